"""Idle timeouts: when silence begins, and when it ends a client."""

from __future__ import annotations

import math
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from trio_udp import Client

from ..conftest import ALICE, BOB, StartInMemory, check_adds_up, echo


async def test_a_handler_that_polls_notices_a_dead_peer(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """Cancelled and repeated waits are one silence: a handler that sends pings in between ends in time."""
    log: list[Any] = []

    async def handler(client: Client) -> None:
        while True:
            with trio.move_on_after(1) as scope:
                try:
                    log.append(await client.receive())
                except trio.EndOfChannel:
                    log.append((client.ended, trio.current_time()))
                    return
            if scope.cancelled_caught:
                await client.send(b"ping")

    run = await start_in_memory(handler, idle_timeout=8)
    run.put(b"hello")
    await trio.sleep(4.5)
    run.put(b"pong")
    await trio.sleep(30)
    assert log[:2] == [b"hello", b"pong"]
    [(why, when)] = log[2:]
    assert why == "idle"
    assert 12.5 <= when <= 14.5  # at most a quarter late
    assert run.server.statistics().clients_expired == 1
    check_adds_up(run.server)


async def test_polling_with_short_waits(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A handler that works longer than it waits notices a dead peer too, and loses no datagram of a live one."""
    log: list[Any] = []

    async def handler(client: Client) -> None:
        while client.ended is None:
            with trio.move_on_after(0.01):
                while True:
                    try:
                        log.append(await client.receive())
                    except trio.EndOfChannel:
                        break
            await trio.sleep(1)
        log.append((client.ended, trio.current_time()))

    run = await start_in_memory(handler, idle_timeout=4)
    for number in range(10):
        run.put(b"%d" % number)
        await trio.sleep(3)
    await trio.sleep(20)
    assert log[:10] == [b"%d" % number for number in range(10)]
    [(why, when)] = log[10:]
    assert why == "idle"
    assert 31 <= when <= 34
    check_adds_up(run.server)


async def test_a_receive_without_waiting_notices_silence(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """receive_nowait raises EndOfChannel once the silence that a wait began has lasted for the idle timeout."""
    log: list[object] = []

    async def handler(client: Client) -> None:
        await client.receive()
        with trio.move_on_after(0.5):
            await client.receive()
        while True:
            try:
                client.receive_nowait()
            except trio.WouldBlock:
                await trio.sleep(1)
            except trio.EndOfChannel:
                log.append((client.ended, trio.current_time()))
                return

    run = await start_in_memory(handler, idle_timeout=4)
    run.put(b"x")
    await trio.sleep(20)
    assert log == [("idle", 4.5)]


async def test_a_busy_handler_is_never_ended(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A handler at work for many idle timeouts goes on; silence begins when it waits next."""
    log: list[object] = []

    async def handler(client: Client) -> None:
        await client.receive()
        await trio.sleep(100)
        log.append((client.ended, trio.current_time()))
        await client.send(b"done")
        with pytest.raises(trio.EndOfChannel):
            await client.receive()
        log.append(client.ended)
        assert 108 <= trio.current_time() <= 110

    run = await start_in_memory(handler, idle_timeout=8)
    run.put(b"x")
    await trio.sleep(200)
    assert log == [(None, 100.0), "idle"]
    assert run.sent == [(ALICE, b"done")]
    assert run.server.statistics().handler_errors == 0


async def test_a_datagram_that_waited_during_long_work_is_received(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """A datagram that waited during long work is received, even if the idle timeout is over."""
    seen: list[bytes] = []

    async def handler(client: Client) -> None:
        async for payload in client:
            seen.append(payload)
            await trio.sleep(50)

    run = await start_in_memory(handler, idle_timeout=8)
    for number in range(3):
        run.put(b"%d" % number)
    await trio.sleep(200)
    assert seen == [b"0", b"1", b"2"]
    assert run.server.statistics().clients_started == 1


async def test_close_from_another_task_is_a_normal_end(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """A handler whose client another task closes ends without an error, in receive, async for and send."""
    errors: list[object] = []
    log: list[object] = []

    async def handler(client: Client) -> None:
        try:
            if client.peer_address == ALICE:
                async for _ in client:
                    pass
            else:
                await client.receive()
                await trio.sleep(3)
                await client.send(b"x")
        finally:
            log.append((client.peer_address, trio.current_time()))

    run = await start_in_memory(handler, on_error=lambda client, error: errors.append(error))
    run.put(b"x", ALICE)
    run.put(b"x", BOB)
    await trio.sleep(2)
    for client in run.server.clients:
        client.close()
    await trio.sleep(5)
    assert log == [(ALICE, 2.0), (BOB, 3.0)]
    assert errors == []
    assert run.server.statistics().handler_errors == 0
    assert len(run.server.clients) == 0


@pytest.mark.parametrize(("seconds", "earliest", "latest"), [(2, 2, 2.5), (80, 80, 100), (1e-300, 0, 1e-3)])
async def test_idle_timeout_can_be_set(
    start_in_memory: StartInMemory, autojump_clock: MockClock, seconds: float, earliest: float, latest: float
) -> None:
    """A handler may set a shorter or longer timeout for its client; others keep the server's."""
    log: dict[Any, float] = {}

    async def handler(client: Client) -> None:
        if client.peer_address == ALICE:
            client.idle_timeout = seconds
            assert client.idle_timeout == seconds
        async for _ in client:
            pass
        log[client.peer_address] = trio.current_time()

    run = await start_in_memory(handler, idle_timeout=8)
    run.put(b"x", ALICE)
    run.put(b"x", BOB)
    await trio.sleep(200)
    assert earliest <= log[ALICE] <= latest
    assert 8 <= log[BOB] <= 10


async def test_idle_timeout_set_during_a_wait(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A timeout that another task sets applies to the silence that has already begun."""
    ends: list[float] = []

    async def handler(client: Client) -> None:
        async for _ in client:
            pass
        ends.append(trio.current_time())

    run = await start_in_memory(handler, idle_timeout=math.inf)
    run.put(b"x")
    await trio.sleep(100)
    [client] = run.server.clients
    client.idle_timeout = 101
    await trio.sleep(200)
    [end] = ends
    assert 101 <= end <= 101 * 1.25
    run.put(b"x")
    await trio.sleep(50)
    [client] = run.server.clients
    client.idle_timeout = 10  # already over
    await run.settle()
    assert len(run.server.clients) == 0


async def test_a_subscriber_may_be_silent_for_ever(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """With ``idle_timeout = math.inf``, a client that never sends again does not end."""

    async def handler(client: Client) -> None:
        client.idle_timeout = math.inf
        await echo(client)

    run = await start_in_memory(handler, idle_timeout=1)
    run.put(b"subscribe")
    await trio.sleep(80_000)
    await run.server.send_to_all(b"news")
    assert run.sent == [(ALICE, b"subscribe"), (ALICE, b"news")]


@pytest.mark.parametrize(
    ("error", "value"), [(ValueError, 0), (ValueError, -1), (ValueError, math.nan), (TypeError, "5")]
)
async def test_wrong_idle_timeouts(start_in_memory: StartInMemory, error: type[Exception], value: Any) -> None:
    """An invalid idle timeout raises where it is set, and changes nothing."""
    run = await start_in_memory(echo, idle_timeout=8)
    run.put(b"x")
    await run.settle()
    [client] = run.server.clients
    with pytest.raises(error, match="idle_timeout"):
        client.idle_timeout = value
    assert client.idle_timeout == 8
