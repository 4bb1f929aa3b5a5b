"""accept: the user's function that is called for every stranger, and may answer immediately."""

from __future__ import annotations

import gc
import socket
import sys
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from trio_udp import Client, Datagram, Limits, RateLimit, Server, open_endpoints, serve_endpoints
from trio_udp.testing import SimulatedNetwork

from ..conftest import (
    ALICE,
    BOB,
    CAROL,
    PLENTY,
    SERVER,
    InMemory,
    StartInMemory,
    check_adds_up,
    echo,
    in_memory,
    narrow,
)

NEIGHBOUR = ("192.0.2.1", 1001)  # another port of ALICE's host


async def test_accept_gets_a_datagram(start_in_memory: StartInMemory) -> None:
    """accept is called with a Datagram that has payload, addresses, endpoint and server."""
    seen: list[Datagram] = []

    def accept(datagram: Datagram) -> bool:
        seen.append(datagram)
        return True

    run = await start_in_memory(echo, accept=accept)
    run.put(b"hello")
    await run.settle()
    (datagram,) = seen
    assert (datagram.payload, datagram.peer_address, datagram.ancillary) == (b"hello", ALICE, ())
    assert datagram.local_address == datagram.destination == SERVER
    assert datagram.interface is None
    assert (datagram.endpoint, datagram.server) == (run.endpoint, run.server)
    assert run.sent == [(ALICE, b"hello")]


async def test_only_strangers_are_asked_about(start_in_memory: StartInMemory) -> None:
    """accept is asked about the first datagram of a client, not about later ones, and again after the client ended."""
    asked: list[bytes] = []

    def accept(datagram: Datagram) -> bool:
        asked.append(datagram.payload)
        return True

    async def handler(client: Client) -> None:
        async for payload in client:
            if payload == b"bye":
                client.close()

    run = await start_in_memory(handler, accept=accept)
    for payload in (b"1", b"2", b"bye", b"3"):
        run.put(payload)
        await run.settle()
    assert asked == [b"1", b"3"]


async def test_false_refuses(start_in_memory: StartInMemory) -> None:
    """A stranger for whom accept returns False becomes no client, is not answered, and is counted."""
    run = await start_in_memory(echo, accept=lambda datagram: datagram.payload == b"please")
    run.put(b"hello", ALICE)
    run.put(b"please", BOB)
    run.put(b"hello again", ALICE)
    await run.settle()
    assert run.sent == [(BOB, b"please")]
    s = run.server.statistics()
    assert (s.refused_by_accept, s.clients_started, s.answered_by_accept) == (2, 1, 0)
    check_adds_up(run.server)


async def test_bytes_are_sent_back(start_in_memory: StartInMemory) -> None:
    """Bytes that accept returns are sent back at once, even b"", and no client begins."""

    def accept(datagram: Datagram) -> bool | bytes:
        if datagram.payload.startswith(b"cookie"):
            return True
        return b"" if datagram.payload == b"empty" else b"cookie " + datagram.payload

    run = await start_in_memory(echo, accept=accept)
    run.put(b"alice", ALICE)
    run.put(b"empty", BOB)
    await run.settle()
    assert run.sent == [(ALICE, b"cookie alice"), (BOB, b"")]
    assert run.server.statistics().clients_started == 0
    run.put(b"cookie alice", ALICE)
    await run.settle()
    assert run.sent_to(ALICE) == [b"cookie alice", b"cookie alice"]
    s = run.server.statistics()
    assert (s.answered_by_accept, s.refused_by_accept, s.delivered, s.clients) == (2, 0, 1, 1)
    check_adds_up(run.server)


@pytest.mark.parametrize(("amplification", "most"), [(None, 30), (1.5, 15), (5, 50)])
async def test_an_answer_is_not_much_longer_than_the_question(
    start_in_memory: StartInMemory, amplification: float | None, most: int
) -> None:
    """An answer of accept has at most 3 times the bytes of the datagram, or ``amplification`` times if that is set.

    A longer answer is withheld, and the datagram still counts as answered_by_accept.
    """
    sizes = iter([most, most + 1, 1, 0])
    run = await start_in_memory(
        echo, accept=lambda datagram: bytes(next(sizes)), limits=Limits(amplification=amplification)
    )
    for size in (10, 10, 0, 0):
        run.put(bytes(size))
    await run.settle()
    assert [len(payload) for payload in run.sent_to(ALICE)] == [most, 0]
    s = run.server.statistics()
    assert (s.answered_by_accept, s.sends_withheld, s.sent) == (4, 2, 2)
    check_adds_up(run.server)


@pytest.mark.parametrize("wrong", [None, 0, 1, "yes", bytearray(b"x"), [], object()])
async def test_anything_else_is_a_mistake(
    start_in_memory: StartInMemory, caplog: pytest.LogCaptureFixture, wrong: Any
) -> None:
    """An answer of accept other than True, False or bytes refuses the stranger, and is logged as an error."""
    answers = iter([wrong, True])
    run = await start_in_memory(echo, accept=lambda datagram: next(answers))
    run.put(b"1", ALICE)
    run.put(b"2", BOB)
    await run.settle()
    assert run.sent == [(BOB, b"2")]
    assert run.server.statistics().refused_by_accept == 1
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.getMessage() == f"accept failed on a datagram from {ALICE}"
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == f"accept must return True, False or bytes, not {wrong!r}"
    check_adds_up(run.server)


async def test_a_coroutine_is_a_mistake(start_in_memory: StartInMemory, caplog: pytest.LogCaptureFixture) -> None:
    """An accept that returns a coroutine refuses the stranger, without a warning that it was never awaited."""

    async def ask(datagram: Datagram) -> bool:
        return True

    run = await start_in_memory(echo, accept=lambda datagram: ask(datagram))
    run.put(b"x")
    await run.settle()
    gc.collect()
    assert run.server.statistics().refused_by_accept == 1
    assert [record.levelname for record in caplog.records if record.levelname != "INFO"] == ["ERROR"]


async def test_an_error_in_accept(start_in_memory: StartInMemory, caplog: pytest.LogCaptureFixture) -> None:
    """If accept raises, the stranger is refused and the error logged; accept is called for the next stranger."""

    def accept(datagram: Datagram) -> bool:
        return bool(1 / int(datagram.payload))

    errors: list[object] = []
    run = await start_in_memory(echo, accept=accept, on_error=lambda client, error: errors.append(error))
    run.put(b"0", ALICE)
    run.put(b"1", BOB)
    await run.settle()
    assert run.sent == [(BOB, b"1")]
    s = run.server.statistics()
    assert (s.refused_by_accept, s.handler_errors, errors) == (1, 0, [])
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ZeroDivisionError)
    check_adds_up(run.server)


async def test_an_answer_that_is_too_long(start_in_memory: StartInMemory, caplog: pytest.LogCaptureFixture) -> None:
    """An answer of accept that is too long for a datagram refuses the stranger, and is logged as an error."""
    run = await start_in_memory(echo, accept=lambda datagram: bytes(65_508))
    run.put(bytes(30_000))
    await run.settle()
    s = run.server.statistics()
    assert (s.refused_by_accept, s.answered_by_accept, s.sent, s.send_errors) == (1, 0, 0, 0)
    assert [record.levelname for record in caplog.records if record.levelname != "INFO"] == ["ERROR"]


async def test_reply_nowait_inside_accept(start_in_memory: StartInMemory, caplog: pytest.LogCaptureFixture) -> None:
    """reply_nowait raises RuntimeError inside accept, which returns bytes instead; afterwards it works."""
    kept: list[Datagram] = []
    errors: list[str] = []

    def accept(datagram: Datagram) -> bool:
        kept.append(datagram)
        for each in kept:
            with pytest.raises(RuntimeError) as caught:
                each.reply_nowait(b"no")
            errors.append(str(caught.value))
        return False

    run = await start_in_memory(echo, accept=accept)
    run.put(b"1", ALICE)
    run.put(b"2", BOB)
    await run.settle()
    assert errors == ["accept must return its reply as bytes, not send it"] * 3
    assert run.sent == []
    kept[0].reply_nowait(b"yes")
    await kept[1].reply(b"you too")
    assert run.sent == [(ALICE, b"yes"), (BOB, b"you too")]


async def test_an_answer_at_a_full_send_buffer_is_dropped(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """An answer of accept that finds the send buffer full is dropped and counted under EAGAIN; nothing waits for it."""
    run = await start_in_memory(echo, on=narrow(), accept=lambda datagram: datagram.payload)
    for source in (ALICE, BOB, CAROL):
        run.put(b"x", source)
        await run.settle()
    await trio.sleep(10)
    assert run.sent == [(ALICE, b"x")]
    s = run.server.statistics()
    assert (s.answered_by_accept, s.send_errors, s.errors) == (3, 2, {"EAGAIN": 2})


async def test_accept_cannot_answer_an_unanswerable_source(start_in_memory: StartInMemory) -> None:
    """accept is called for datagrams from port 0 and the unspecified address; its answer is a send error."""
    run = await start_in_memory(echo, accept=lambda datagram: b"x")
    run.put(b"x", ("192.0.2.1", 0))
    run.put(b"x", ("0.0.0.0", 68))
    await run.settle()
    assert run.sent == []
    s = run.server.statistics()
    assert (s.answered_by_accept, s.send_errors, s.errors) == (2, 2, {"EDESTADDRREQ": 2})
    check_adds_up(run.server)


async def test_statistics_add_up_inside_accept(start_in_memory: StartInMemory) -> None:
    """statistics() adds up inside accept: the datagram and those behind it in the batch are not yet received."""
    seen: list[int] = []
    answers: list[bool | bytes] = [True, False, b"x"]

    def accept(datagram: Datagram) -> bool | bytes:
        assert datagram.server is not None
        check_adds_up(datagram.server)
        seen.append(datagram.server.statistics().received)
        return answers[len(seen) - 1]

    run = await start_in_memory(echo, accept=accept)
    for source in (ALICE, BOB, CAROL):
        run.put(b"x", source)
    await run.settle()
    assert seen == [0, 1, 2]
    check_adds_up(run.server)


# The order of the checks


class Asked:
    """An accept that returns True and records its datagrams."""

    def __init__(self) -> None:
        self.about: list[bytes] = []

    def __call__(self, datagram: Datagram) -> bool:
        self.about.append(datagram.payload)
        return True


async def test_the_source_is_the_first_question(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A datagram whose source is the server itself is refused before it costs a token of the rate limit."""
    asked = Asked()
    run = await start_in_memory(echo, accept=asked, limits=Limits(rate_limit=RateLimit(1, 2)))
    for _ in range(5):
        run.put(b"loop", SERVER)
    for payload in (b"1", b"2", b"3"):
        run.put(payload, NEIGHBOUR)
    await run.settle()
    s = run.server.statistics()
    assert (s.refused_source, s.refused_by_rate, s.delivered) == (5, 1, 2)
    assert asked.about == [b"1"]


async def test_the_rate_is_asked_before_accept(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A stranger beyond the rate limit is refused before accept sees its datagram."""
    asked = Asked()
    run = await start_in_memory(echo, accept=asked, limits=Limits(rate_limit=RateLimit(1, 2)))
    for number in range(5):
        run.put(b"%d" % number, ("192.0.2.1", 1 + number))
    await run.settle()
    assert asked.about == [b"0", b"1"]
    assert run.server.statistics().refused_by_rate == 3


async def test_accept_is_asked_before_memory_host_and_room(start_in_memory: StartInMemory) -> None:
    """accept is called, and may answer, even if there is no room for the stranger."""
    answers: list[bool | bytes] = [True, True, False, b"full", True]
    left = iter(answers)
    limits = Limits(max_clients=1, clients_per_host=1, inbox_bytes=10)
    run = await start_in_memory(echo, accept=lambda datagram: next(left), limits=limits)
    run.put(b"x", ALICE)
    for source, payload in ((BOB, bytes(11)), (BOB, b"x"), (BOB, b"xx"), (BOB, b"x")):
        run.put(payload, source)
    await run.settle()
    assert sorted(run.sent) == [(ALICE, b"x"), (BOB, b"full")]
    s = run.server.statistics()
    assert (s.dropped_inbox_full, s.refused_by_accept, s.answered_by_accept, s.refused_full) == (1, 1, 1, 1)
    check_adds_up(run.server)


async def test_memory_is_asked_before_the_host(start_in_memory: StartInMemory) -> None:
    """A stranger's datagram that fits into no inbox is dropped_inbox_full, even at its host's clients_per_host."""
    run = await start_in_memory(echo, limits=Limits(clients_per_host=1, inbox_bytes=10))
    run.put(b"x", ALICE)
    run.put(bytes(11), NEIGHBOUR)
    run.put(bytes(10), NEIGHBOUR)
    await run.settle()
    s = run.server.statistics()
    assert (s.dropped_inbox_full, s.refused_full, s.clients) == (1, 1, 1)


async def test_the_host_is_asked_before_room_is_made(start_in_memory: StartInMemory) -> None:
    """A stranger whose host has clients_per_host clients evicts no client."""
    limits = Limits(max_clients=2, clients_per_host=1, when_full="evict_idle")
    run = await start_in_memory(echo, limits=limits)
    run.put(b"x", ALICE)
    run.put(b"x", BOB)
    await run.settle()
    run.put(b"x", NEIGHBOUR)
    await run.settle()
    s = run.server.statistics()
    assert (s.refused_full, s.clients_evicted) == (1, 0)
    assert [client.peer_address for client in run.server.clients] == [ALICE, BOB]


# Stopping


async def test_during_a_drain_only_bytes_count(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """accept is still called during a drain: its bytes are sent, and any other answer counts as refused_stopping."""
    answers: dict[bytes, Any] = {b"yes": True, b"no": False, b"bytes": b"refused", b"wrong": None}

    def accept(datagram: Datagram) -> Any:
        if datagram.payload == b"error":
            raise ValueError
        return answers[datagram.payload]

    async def handler(client: Client) -> None:
        await client.receive()
        await trio.sleep(3)

    run = await start_in_memory(handler, accept=accept)
    run.put(b"yes", ALICE)
    await run.settle()
    run.server.stop()
    for payload in (b"yes", b"no", b"bytes", b"wrong", b"error"):
        run.put(payload, BOB)
    await run.settle()
    assert run.sent == [(BOB, b"refused")]
    s = run.server.statistics()
    assert (s.refused_stopping, s.answered_by_accept, s.refused_by_accept, s.clients_started) == (4, 1, 0, 1)
    check_adds_up(run.server)
    await trio.sleep(5)
    assert run.endpoint.closed


async def test_strangers_that_had_arrived_before_the_stop(start_in_memory: StartInMemory) -> None:
    """accept is called for a stranger whose datagram had arrived before the stop, and the stranger becomes a client."""
    run = await start_in_memory(echo, accept=lambda datagram: datagram.payload != b"no" or b"bytes")
    run.put(b"yes", ALICE)
    run.put(b"no", BOB)
    run.server.stop()
    await run.settle()
    assert sorted(run.sent) == [(ALICE, b"yes"), (BOB, b"bytes")]
    s = run.server.statistics()
    assert (s.refused_stopping, s.answered_by_accept, s.clients_started) == (0, 1, 1)


async def test_accept_may_stop_the_server(start_in_memory: StartInMemory) -> None:
    """When accept itself stops the server, its datagram and those behind it in the batch are still handled."""

    def accept(datagram: Datagram) -> bool:
        assert datagram.server is not None
        datagram.server.stop()
        return True

    run = await start_in_memory(echo, accept=accept)
    for source in (ALICE, BOB, CAROL):
        run.put(b"x", source)
    await run.settle()
    assert sorted(run.sent) == [(ALICE, b"x"), (BOB, b"x"), (CAROL, b"x")]
    assert run.endpoint.closed
    check_adds_up(run.server)


# Many strangers


async def test_twenty_thousand_strangers_are_answered_and_nothing_is_kept(start_in_memory: StartInMemory) -> None:
    """20,000 strangers with QUIC Initials all get their Retry from accept, and no client, task or memory is left."""
    initial = b"\xc3\x00\x00\x00\x01" + bytes(1_195)
    run = await start_in_memory(
        echo,
        accept=lambda datagram: b"\xf0\x00\x00\x00\x01" + datagram.payload[5:25],
        limits=Limits(max_clients=1),
    )
    sent = 0

    async def flood(first: int, last: int) -> None:
        nonlocal sent
        for number in range(first, last):
            run.put(initial, (f"198.{number >> 15}.{number >> 7 & 255}.{number & 127}", 443))
            if number % 100 == 99:
                await run.settle()
                sent += len(run.sent)
                run.network.events.clear()
        gc.collect()

    await flood(0, 5_000)
    before, tasks = sys.getallocatedblocks(), trio.lowlevel.current_statistics().tasks_living
    await flood(5_000, 20_000)
    assert sys.getallocatedblocks() - before < 1_000
    assert trio.lowlevel.current_statistics().tasks_living == tasks
    assert sent == 20_000
    s = run.server.statistics()
    assert (s.received, s.answered_by_accept, s.sent, s.bytes_sent) == (20_000, 20_000, 20_000, 20_000 * 25)
    assert (s.clients_started, s.refused_full, len(run.server.clients)) == (0, 0, 0)
    check_adds_up(run.server)


# Source addresses of answers


async def test_an_answer_leaves_from_the_address_that_was_written_to(start_in_memory: StartInMemory) -> None:
    """On an endpoint bound to all addresses, the answer leaves from the address that the stranger sent to."""
    network = SimulatedNetwork()
    hosts = ("192.0.2.53", "192.0.2.54")
    on = InMemory(network, network.endpoint("0.0.0.0", 53, own_hosts=hosts, receive_buffer=PLENTY))
    await start_in_memory(echo, on=on, accept=lambda datagram: datagram.destination[0].encode())
    for host in hosts:
        network.inject(b"hello", ALICE, (host, 53))
    await on.settle()
    assert [(event.source, event.payload) for event in network.events if event.destination == ALICE][::2] == [
        ((host, 53), host.encode()) for host in hosts
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="needs all of 127.0.0.0/8")
@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("wildcard", [True, False])
async def test_answers_over_a_real_socket(nursery: trio.Nursery, wildcard: bool) -> None:
    """Answers of accept leave from the address the stranger sent to, on sockets bound to all addresses or to one."""
    (endpoint,) = await open_endpoints(0, host="0.0.0.0" if wildcard else "127.0.0.2")
    server: Server = await nursery.start(
        lambda task_status: serve_endpoints(
            echo, [endpoint], accept=lambda datagram: datagram.payload * 3, task_status=task_status
        )
    )
    hosts = ["127.0.0.2", "127.0.0.3", "127.0.0.1"] if wildcard else ["127.0.0.2"] * 3
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(5)
        for host in hosts:
            address = (host, endpoint.local_address[1])
            peer.sendto(b"ab", address)
            assert await trio.to_thread.run_sync(peer.recvfrom, 100) == (b"ababab", address)
    s = server.statistics()
    assert (s.answered_by_accept, s.clients_started) == (3, 0)
    check_adds_up(server)


# Mistakes at the call


@pytest.mark.parametrize("wrong", [5, "yes", True])
async def test_accept_must_be_callable(wrong: Any) -> None:
    """serve refuses an accept that is not callable."""
    with pytest.raises(TypeError, match=f"accept must be a plain function, not {wrong!r}"):
        await serve_endpoints(echo, [in_memory().endpoint], accept=wrong)


async def test_accept_must_be_a_plain_function_of_one_argument() -> None:
    """serve refuses an async accept, and one that cannot be called with one argument."""

    async def ask(datagram: Datagram) -> bool:
        return True

    def two(payload: bytes, address: object) -> bool:
        return True

    for wrong in (ask, two):
        with pytest.raises(TypeError, match="accept"):
            await serve_endpoints(echo, [in_memory().endpoint], accept=wrong)  # type: ignore[arg-type]
