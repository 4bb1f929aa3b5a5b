"""The table of clients: places, eviction, limits for each host, and log lines."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

import trio_udp
from trio_udp import Client, Limits, RateLimit
from trio_udp._endpoints import Address
from trio_udp.testing import SimulatedNetwork

from ..conftest import (
    ALICE,
    BOB,
    CAROL,
    PLENTY,
    InMemory,
    RunningInMemory,
    StartInMemory,
    check_adds_up,
    echo,
)


def peers(run: RunningInMemory) -> list[Address]:
    return [client.peer_address for client in run.server.clients]


async def log_in(client: Client) -> None:
    """A handler that validates a client that logs in."""
    async for payload in client:
        if payload == b"token":
            client.validate()
        await client.send(payload)


def evicting(max_clients: int, **options: Any) -> Limits:
    return Limits(max_clients=max_clients, when_full="evict_idle", **options)


# Eviction


async def test_a_validated_client_is_not_evicted(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A validated client is not evicted, even if it has waited the longest."""
    run = await start_in_memory(log_in, limits=evicting(2), idle_timeout=1_000)
    run.put(b"token", ALICE)
    await trio.sleep(1)
    for source in (BOB, CAROL, BOB):
        run.put(b"x", source)
        await trio.sleep(1)
    assert peers(run) == [ALICE, BOB]
    assert run.server.statistics().clients_evicted == 2


async def test_players_under_a_flood(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """Validated players who are silent now and then keep their places while a flood fills all other places."""
    run = await start_in_memory(log_in, limits=evicting(100), idle_timeout=1_000)
    players = [("192.0.2.10", port) for port in range(1, 51)]
    for player in players:
        run.put(b"token", player)
    await run.settle()
    for second in range(20):
        for number in range(100):
            run.put(b"flood", (f"198.51.{second}.{number}", 7))
            if number % 25 == 24:
                await run.settle()
        await trio.sleep(1)
    run.network.events.clear()
    for player in players:
        run.put(b"still here", player)
    await run.settle()
    assert sorted(run.sent) == [(player, b"still here") for player in players]
    s = run.server.statistics()
    assert (s.clients, s.clients_started, s.clients_evicted) == (100, 2_050, 1_950)
    check_adds_up(run.server)


async def test_strangers_are_refused_when_all_are_validated(start_in_memory: StartInMemory) -> None:
    """Strangers are refused if every client is validated, because none can be evicted."""
    run = await start_in_memory(log_in, limits=evicting(2))
    run.put(b"token", ALICE)
    run.put(b"token", BOB)
    await run.settle()
    run.put(b"x", CAROL)
    await run.settle()
    assert peers(run) == [ALICE, BOB]
    s = run.server.statistics()
    assert (s.refused_full, s.clients_evicted) == (1, 0)
    check_adds_up(run.server)


async def test_about_the_longest_wait_is_found_among_many(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """Among a thousand clients, those that keep sending stay, and those that fell silent first are evicted."""
    run = await start_in_memory(echo, limits=evicting(1_000), idle_timeout=10_000)
    clients = [("192.0.2.8", port) for port in range(1, 1_001)]
    active = clients[::2]
    for second in range(5):
        for number, source in enumerate(clients if second == 0 else active):
            run.put(b"x", source)
            if number % 64 == 63:
                await run.settle()
        await trio.sleep(1)
    for number in range(500):
        run.put(b"x", ("198.51.100.1", 1 + number))
        await run.settle()
        if number % 50 == 49:
            for source in active:
                run.put(b"x", source)
            await trio.sleep(1)
    left = set(peers(run))
    # Approximately: it is a second-chance queue.
    assert sum(source in left for source in active) >= 450
    assert sum(source in left for source in clients[1::2]) <= 50


async def test_a_request_handler_makes_room(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A client of a request_handler that waits for its next request makes room, also under "refuse"."""

    @trio_udp.request_handler
    async def reply(payload: bytes, client: Client) -> bytes:
        if payload == b"token":
            client.validate()
        await trio.sleep(1 if payload == b"slow" else 0)
        return payload

    run = await start_in_memory(reply, limits=Limits(max_clients=2))
    for number in range(100):
        run.put(b"x", ("192.0.2.8", 1 + number))
        await run.settle()
    s = run.server.statistics()
    assert (s.clients, s.clients_evicted, s.refused_full, s.delivered) == (2, 98, 0, 100)
    # A busy client does not make room, and neither does a validated one.
    run.put(b"slow", ALICE)
    run.put(b"token", BOB)
    await run.settle()
    run.put(b"x", CAROL)
    await run.settle()
    assert peers(run) == [ALICE, BOB]
    assert run.server.statistics().refused_full == 1
    await trio.sleep(2)
    run.put(b"x", CAROL)
    await run.settle()
    assert peers(run) == [BOB, CAROL]
    check_adds_up(run.server)


async def test_a_plain_handler_makes_no_room(start_in_memory: StartInMemory) -> None:
    """A client of any other handler keeps its place under "refuse": its handler may hold state."""
    run = await start_in_memory(echo, limits=Limits(max_clients=1))
    run.put(b"x", ALICE)
    await run.settle()
    run.put(b"x", BOB)
    await run.settle()
    assert peers(run) == [ALICE]
    assert run.server.statistics().refused_full == 1


async def test_connect_makes_room_as_a_stranger_does(start_in_memory: StartInMemory) -> None:
    """Server.connect evicts a client if the policy is to evict, and its own client is not evicted later."""
    run = await start_in_memory(echo, limits=evicting(1))
    run.put(b"x", ALICE)
    await run.settle()
    run.server.connect(BOB)
    await run.settle()
    assert peers(run) == [BOB]
    with pytest.raises(trio.WouldBlock):
        run.server.connect(CAROL)
    run.put(b"x", ALICE)
    await run.settle()
    assert peers(run) == [BOB]
    assert run.server.statistics().refused_full == 1


# clients_per_host


async def test_clients_of_one_host(start_in_memory: StartInMemory) -> None:
    """A host gets no more clients than clients_per_host; other hosts are not affected, and its clients are served."""
    run = await start_in_memory(echo, limits=Limits(clients_per_host=3))
    for port in range(1, 11):
        run.put(b"%d" % port, ("192.0.2.1", port))
    run.put(b"x", BOB)
    run.put(b"again", ("192.0.2.1", 1))
    await run.settle()
    assert peers(run) == [("192.0.2.1", 1), ("192.0.2.1", 2), ("192.0.2.1", 3), BOB]
    assert run.sent_to(("192.0.2.1", 1)) == [b"1", b"again"]
    s = run.server.statistics()
    assert (s.refused_full, s.clients) == (7, 4)
    check_adds_up(run.server)


async def test_a_host_may_begin_again(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A client that has ended no longer counts for its host; one whose handler lingers does."""

    async def handler(client: Client) -> None:
        async for _ in client:
            pass
        await trio.sleep(100)

    run = await start_in_memory(handler, idle_timeout=8, limits=Limits(clients_per_host=1))
    started = []
    for port, seconds in ((1, 50), (2, 60), (3, 8), (4, 200), (5, 0)):
        run.put(b"x", ("192.0.2.1", port))
        await run.settle()
        started.append(run.server.statistics().clients_started)
        await trio.sleep(seconds)
    assert started == [1, 1, 2, 2, 3]


async def test_a_host_of_ipv6_is_a_64(start_in_memory: StartInMemory) -> None:
    """An IPv6 /64 is one host, because the owner of one of its addresses owns all of them."""
    network = SimulatedNetwork()
    server = ("2001:db8::53", 53, 0, 0)
    on = InMemory(network, network.endpoint("2001:db8::53", 53, receive_buffer=PLENTY))
    run = await start_in_memory(echo, on=on, limits=Limits(clients_per_host=2))
    for host in ("2001:db8:0:1::1", "2001:db8:0:1::2", "2001:db8:0:1:ffff::3", "2001:db8:0:2::1"):
        network.inject(b"x", (host, 7, 0, 0), server)
    await run.settle()
    assert [address[0] for address in peers(run)] == ["2001:db8:0:1::1", "2001:db8:0:1::2", "2001:db8:0:2::1"]
    assert run.server.statistics().refused_full == 1


async def test_connections_of_ours_do_not_count_for_a_host(start_in_memory: StartInMemory) -> None:
    """Clients that Server.connect made are not counted by clients_per_host."""
    run = await start_in_memory(echo, limits=Limits(clients_per_host=1))
    ours = [run.server.connect(("192.0.2.1", port)) for port in (1, 2, 3)]
    run.put(b"x", ("192.0.2.1", 4))
    run.put(b"x", ("192.0.2.1", 5))
    await run.settle()
    assert len(run.server.clients) == 4
    assert run.server.statistics().refused_full == 1
    for client in ours:
        client.close()
    run.put(b"x", ("192.0.2.1", 6))
    await run.settle()
    assert peers(run) == [("192.0.2.1", 4)]


async def test_one_real_host_cannot_hold_the_table(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """One host that validates from thousands of ports holds no more of the table than clients_per_host."""
    run = await start_in_memory(log_in, limits=evicting(100, clients_per_host=10))
    for port in range(1, 5_001):
        run.put(b"token", ("203.0.113.1", port))
        if port % 100 == 0:
            await run.settle()
    for number in range(90):
        run.put(b"token", (f"192.0.2.{number}", 7))
    await run.settle()
    s = run.server.statistics()
    assert (s.clients, s.refused_full, s.clients_evicted) == (100, 4_990, 0)


# Log lines


async def test_a_full_table_is_a_warning_once_a_minute(
    start_in_memory: StartInMemory, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The log warns, at most once a minute, that strangers are refused because the table is full."""
    run = await start_in_memory(echo, idle_timeout=10_000, limits=Limits(max_clients=1))
    run.put(b"x", ALICE)
    when = []
    for _ in range(150):
        caplog.clear()
        run.put(b"x", BOB)
        run.put(b"x", CAROL)
        await run.settle()
        texts = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        if texts:
            when.append(trio.current_time())
            assert texts == ["strangers are refused: the table of clients is full (max_clients=1)"]
        await trio.sleep(1)
    assert when == [0, 60, 120]


async def test_no_warning_while_clients_can_be_evicted(
    start_in_memory: StartInMemory, caplog: pytest.LogCaptureFixture
) -> None:
    """The log does not warn about a full table while clients can be evicted."""
    run = await start_in_memory(echo, limits=evicting(1))
    for source in (ALICE, BOB, CAROL):
        run.put(b"x", source)
        await run.settle()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_log_lines_of_a_server(
    start_in_memory: StartInMemory, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """At INFO the log says which addresses are served, that a stop began, and how it ended."""
    caplog.set_level(logging.INFO, logger="trio_udp")

    async def handler(client: Client) -> None:
        await client.receive()
        await trio.sleep_forever()

    run = await start_in_memory(handler, drain_timeout=3)
    run.put(b"x", ALICE)
    run.put(b"x", BOB)
    await run.settle()
    run.server.stop()
    run.server.stop()
    run.put(b"late", CAROL)
    await trio.sleep(5)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert said == [
        "serving on ('192.0.2.53', 53)",
        "stopping: 2 clients to drain",
        "stopped: 2 clients served, 1 datagrams refused while stopping, 2 handlers cancelled",
    ]
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


# Limits


WRONG: dict[str, list[Any]] = {
    "max_clients": [0, -1, 1.5, "10", None, True, 10**20],
    "when_full": ["", "evict", None, 5, []],
    "clients_per_host": [0, -1, 1.5, "10", True],
    "inbox_datagrams": [0, 1.5, None],
    "inbox_bytes": [0, 1.5, None],
    "total_bytes": [0, 1.5, None],
    "when_inbox_full": ["", "drop", None, []],
    "rate_limit": [5, "5/s", RateLimit],
    "amplification": [0, -1, "3", float("nan"), float("inf"), True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_limits_say_so_in_one_line(name: str, value: Any) -> None:
    """A limit that makes no sense raises TypeError or ValueError, with one line that names the limit and the value."""
    with pytest.raises((TypeError, ValueError)) as caught:
        Limits(**{name: value})
    message = str(caught.value)
    assert message.startswith(name)
    assert repr(value) in message
    assert "\n" not in message
    assert caught.value.args == (message,)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("per_second", 0),
        ("per_second", "5"),
        ("per_second", float("nan")),
        ("burst", 0),
        ("burst", 1.5),
        ("ipv4_prefix", 33),
        ("ipv4_prefix", 0),
        ("ipv6_prefix", 129),
        ("ipv6_prefix", None),
        ("buckets", 1),
        ("buckets", None),
    ],
)
def test_wrong_rate_limits_say_so_in_one_line(name: str, value: Any) -> None:
    """A RateLimit value that makes no sense raises TypeError or ValueError, in one line that names it."""
    with pytest.raises((TypeError, ValueError)) as caught:
        RateLimit(**{"per_second": 1, name: value})
    message = str(caught.value)
    assert message.startswith(name)
    assert repr(value) in message
    assert "\n" not in message
    assert caught.value.args == (message,)


def test_limits_are_values() -> None:
    """Limits are equal by value, hashable, and cannot be changed."""
    assert Limits(max_clients=5) == Limits(max_clients=5) != Limits(max_clients=6)
    assert len({Limits(), Limits(), Limits(clients_per_host=1)}) == 2
    with pytest.raises(AttributeError):
        Limits().max_clients = 5  # type: ignore[misc]


def test_the_worst_case_grows_with_concurrency() -> None:
    """worst_case_memory takes a request_handler's concurrency, and adds the memory of its requests."""
    limits = Limits(max_clients=100)
    assert limits.worst_case_memory() == limits.worst_case_memory(concurrency=1)
    more = limits.worst_case_memory(concurrency=10) - limits.worst_case_memory()
    assert limits.worst_case_memory(concurrency=20) - limits.worst_case_memory() == 2 * more > 0
