"""The code in docs/layers.md runs, and its tables are right."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

import trio_udp
from trio_udp.testing import SimulatedNetwork

from ..conftest import ALICE, StartInMemory, port_of

GUIDE = (Path(__file__).parents[2] / "docs" / "layers.md").read_text()
SECTIONS = {
    section.splitlines()[0].strip("# "): "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    for section in re.split(r"\n(?=##+ )", GUIDE)
}

StartServer = Callable[..., Awaitable[trio_udp.Connection]]


def run(*titles: str) -> dict[str, Any]:
    """Run the code of sections, one after the other, and return its names."""
    for library in re.findall(
        r"^(?:import|from) (msgspec|cattrs|easynetwork)", "".join(map(SECTIONS.__getitem__, titles)), re.M
    ):
        pytest.importorskip(library)
    names: dict[str, Any] = {"__name__": "guide"}
    for title in titles:
        assert SECTIONS[title]
        exec(compile(SECTIONS[title], f"docs/layers.md: {title}", "exec", dont_inherit=True), names)
    return names


def test_all_code_is_run_here() -> None:
    """Every section with code is run by a test below."""
    tested = set(re.findall(r"run\((.*?)\)", Path(__file__).read_text()))
    titles = {title for titles in tested for title in re.findall(r'"(.*?)"', titles)} | set(FORMATS)
    assert {title for title, code in SECTIONS.items() if code} == titles


async def test_look_up(simulated_network: SimulatedNetwork, udp_server: StartServer, autojump_clock: MockClock) -> None:
    """The first program gets the answer to its own request, with loss and duplicates."""
    look_up = run("Repeating a request until it is answered")["look_up"]

    @trio_udp.request_handler
    async def shout(payload: bytes, client: trio_udp.Client) -> bytes:
        request_id, _, name = payload.partition(b" ")
        return b"%b %b" % (request_id, name.upper())

    connection = await udp_server(shout, idle_timeout=300)
    simulated_network.loss = simulated_network.duplicate = 0.2
    assert [await look_up(connection, name) for name in (b"a", b"b", b"c")] == [b"A", b"B", b"C"]


def test_table_of_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedules in the table are those of the protocols, and take the time that the protocols allow."""
    rows = re.findall(r"^\| (\w+) \| `(.*?)`.*? \| .*? \| [\d.]+ % \|$", GUIDE, re.MULTILINE)
    names = {"backoff": partial(trio_udp.backoff, jitter=0), "random": __import__("random")}
    waits = {protocol: list(eval(source, names)) for protocol, source in rows}
    assert {protocol: len(seconds) for protocol, seconds in waits.items()} == {
        "DNS": 2,
        "RADIUS": 4,
        "CoAP": 5,
        "SNMP": 6,
        "STUN": 7,
    }
    assert sum(waits["RADIUS"]) == 30
    assert sum(waits["STUN"]) == 39.5
    assert 62 <= sum(waits["CoAP"]) <= 93


# Format: pairs of payload and answer; None for a payload that does not decode.
FORMATS: dict[str, list[tuple[bytes, bytes | None]]] = {
    "msgspec": [
        (b'{"x":1,"y":2}', b'{"moves":[{"x":1,"y":2}]}'),
        (b'{"x":1}', None),
        (b'{"x":1,"y":"2"}', None),
        (b'{"x":3,"y":4}', b'{"moves":[{"x":1,"y":2},{"x":3,"y":4}]}'),
    ],
    "cattrs": [
        (b'{"x": 1, "y": 2}', b'{"x": 2, "y": 1}'),
        (b'{"x": 1, "y": 2, "z": 3}', None),
        (b'{"x": 1, "y": "two"}', None),
        (b"[]", None),
        (b"\xff", None),
    ],
    "json": [
        (b'{"add": 5}', b'{"total": 5}'),
        (b"5", None),
        (b"{}", None),
        (b'{"add": "5"}', None),
        (b"[" * 9_000, None),
        (b'{"add": 1}', b'{"total": 6}'),
    ],
    "If you come from easynetwork": [
        (b'{"a": 1}', b'{"a":1}'),
        (b"{", None),
    ],
    "struct": [
        (b"\0\7\0\0\0\0\0\0\0\0", b"\0\7\x3f\x80\0\0\0\0\0\0"),
        (b"\0\7\0\0\0\0\0\0\0", None),
        (b"", None),
    ],
}


@pytest.mark.parametrize("title", FORMATS)
async def test_formats(start_in_memory: StartInMemory, title: str, caplog: pytest.LogCaptureFixture) -> None:
    """The handler for each format answers payloads that decode, and skips others."""
    on = await start_in_memory(run(title)["handler"])
    for payload, _ in FORMATS[title]:
        on.put(payload)
    await on.settle()
    assert on.sent_to(ALICE) == [answer for _, answer in FORMATS[title] if answer is not None]
    assert on.server.statistics().handler_errors == 0
    assert len(caplog.messages) == 1


async def test_client(start_on_loopback: Callable[..., Awaitable[trio_udp.Server]]) -> None:
    """The other end of msgspec's server gets its board."""
    names = run("msgspec")
    with trio.fail_after(10):
        server = await start_on_loopback(names["handler"])
        board = await names["make_moves"]("127.0.0.1", port_of(server))
    assert board == names["Board"]([names["Move"](1, 2)])


async def test_payloads_that_do_not_decode(start_in_memory: StartInMemory) -> None:
    """``on_decode_error`` answers a payload that does not decode."""
    on = await start_in_memory(run("json", "Payloads that do not decode")["handler"])
    on.put(b"junk")
    on.put(b'{"add": 5}')
    await on.settle()
    assert on.sent_to(ALICE) == [b'{"error": "no such request"}', b'{"total": 5}']


@pytest.mark.parametrize("who", ["news", "client", "nobody"])
async def test_keeping_alive(start_in_memory: StartInMemory, autojump_clock: MockClock, who: str) -> None:
    """News and datagrams of the client both keep the conversation alive, and it ends without either."""
    subscription = run("Keeping a conversation alive from both sides")["subscription"]

    async def news() -> AsyncIterator[bytes]:
        while who == "news":
            await trio.sleep(9)
            yield b"new"
        await trio.sleep_forever()

    on = await start_in_memory(partial(subscription, news(), 10), idle_timeout=3)
    on.put(b"hello")
    for _ in range(20):
        await trio.sleep(9)
        if who == "client":
            on.put(b"still here")
    assert len(on.server.clients) == (0 if who == "nobody" else 1)
    on.server.stop()
    await trio.sleep(1)
    assert on.server.statistics().handlers_cancelled == 0
