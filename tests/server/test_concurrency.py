"""request_handler(concurrency=): several requests of one client at a time."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

import trio_udp
from trio_udp import Client, Limits, serve_endpoints

from ..conftest import ALICE, BOB, CAROL, StartInMemory, check_adds_up, in_memory

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


def sleeper(concurrency: int, **options: Any) -> Callable[[Client], Awaitable[None]]:
    """Make a handler whose request is a number of seconds, and whose reply leaves after that time."""

    @trio_udp.request_handler(concurrency=concurrency, **options)
    async def reply(payload: bytes, client: Client) -> bytes:
        await trio.sleep(float(payload))
        return payload

    return reply


async def test_replies_leave_as_they_are_ready(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """Requests of one client run side by side, and each reply leaves when it is ready."""
    run = await start_in_memory(sleeper(3))
    for payload in (b"3", b"1", b"2"):
        run.put(payload)
    await trio.sleep(10)
    assert [(event.time, event.payload) for event in run.network.events if event.destination == ALICE][::2] == [
        (1, b"1"),
        (2, b"2"),
        (3, b"3"),
    ]
    assert run.server.statistics().clients_started == 1
    check_adds_up(run.server)


async def test_at_most_concurrency_requests_run(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """At most ``concurrency`` requests of one client run at a time; others wait in its inbox, in arrival order."""
    running: dict[Any, int] = {}
    most: dict[Any, int] = {}
    begun: list[bytes] = []

    @trio_udp.request_handler(concurrency=3)
    async def reply(payload: bytes, client: Client) -> None:
        peer = client.peer_address
        if peer == ALICE:
            begun.append(payload)
        running[peer] = running.get(peer, 0) + 1
        most[peer] = max(most.get(peer, 0), running[peer])
        await trio.sleep(1)
        running[peer] -= 1

    run = await start_in_memory(reply)
    for number in range(10):
        run.put(b"%d" % number, ALICE)
        run.put(b"%d" % number, BOB)
    await run.settle()
    (alice, _) = run.server.clients
    assert alice.statistics().waiting == 7
    await trio.sleep(10)
    assert most == {ALICE: 3, BOB: 3}
    assert sorted(begun) == [b"%d" % number for number in range(10)]
    assert [sorted(begun[i : i + 3]) for i in range(0, 9, 3)] == [
        [b"0", b"1", b"2"],
        [b"3", b"4", b"5"],
        [b"6", b"7", b"8"],
    ]


async def test_a_running_request_is_not_idle(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A client with a running request is not idle; its silence begins when the request has ended."""
    run = await start_in_memory(sleeper(3), idle_timeout=8)
    run.put(b"100")
    await trio.sleep(99)
    assert len(run.server.clients) == 1
    await trio.sleep(8)  # 7 seconds after the reply
    assert run.sent_to(ALICE) == [b"100"]
    assert len(run.server.clients) == 1
    await trio.sleep(4)  # noticed at most 2 seconds late
    assert len(run.server.clients) == 0
    s = run.server.statistics()
    assert (s.clients_expired, s.handler_errors) == (1, 0)


async def test_an_idle_client_ends(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A client without running requests ends by its idle timeout, as any other client does."""
    run = await start_in_memory(sleeper(3), idle_timeout=8)
    run.put(b"0")
    await trio.sleep(8.01)
    assert run.server.statistics().clients_expired == 1


async def test_a_client_with_requests_is_not_evicted(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A client with a running request keeps its place; without one it makes room, even under "refuse"."""
    run = await start_in_memory(sleeper(2), limits=Limits(max_clients=1))
    run.put(b"10", ALICE)
    await run.settle()
    run.put(b"0", BOB)
    await run.settle()
    assert run.server.statistics().refused_full == 1
    await trio.sleep(11)
    run.put(b"0", CAROL)
    await run.settle()
    assert run.sent == [(ALICE, b"10"), (CAROL, b"0")]
    s = run.server.statistics()
    assert (s.clients_evicted, s.handler_errors) == (1, 0)
    check_adds_up(run.server)


async def test_an_error_cancels_no_sibling(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """An error of one request goes to on_error; the client's other requests are answered."""
    errors: list[tuple[Any, Exception]] = []

    @trio_udp.request_handler(concurrency=2)
    async def reply(payload: bytes, client: Client) -> bytes:
        await trio.sleep(float(payload))
        return payload

    run = await start_in_memory(reply, on_error=lambda client, error: errors.append((client, error)))
    for payload in (b"2", b"one", b"1"):
        run.put(payload)
    await trio.sleep(10)
    assert run.sent_to(ALICE) == [b"1", b"2"]
    (client,) = run.server.clients
    assert [(source, type(error)) for source, error in errors] == [(client, ValueError)]
    s = run.server.statistics()
    assert (s.handler_errors, s.clients_started) == (1, 1)


async def test_an_error_that_crashes_the_server_is_reported_once(autojump_clock: MockClock) -> None:
    """on_error is called once for an error, even if on_error raises; the server then ends with that exception."""
    told: list[Exception] = []
    on = in_memory()
    on.put(b"one")

    def crash(client: Client, error: Exception) -> None:
        told.append(error)
        raise error

    with pytest.raises(BaseExceptionGroup) as caught:
        await serve_endpoints(sleeper(2), [on.endpoint], on_error=crash)
    assert caught.value.split(ValueError)[1] is None
    assert [type(error) for error in told] == [ValueError]


async def test_timeouts_are_per_request(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """Each of the requests that run side by side has its own timeout."""
    run = await start_in_memory(sleeper(4, timeout=2))
    for payload in (b"1", b"3", b"1.5", b"4"):
        run.put(payload)
    await trio.sleep(1)
    run.put(b"1.9")
    await trio.sleep(10)
    assert run.sent_to(ALICE) == [b"1", b"1.5", b"1.9"]
    s = run.server.statistics()
    assert (s.requests_timed_out, s.handler_errors) == (2, 0)


async def test_running_requests_are_answered_during_the_drain(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """When the server stops, running and waiting requests are answered within drain_timeout."""
    run = await start_in_memory(sleeper(2), drain_timeout=5)
    for payload in (b"1", b"2", b"1.5"):
        run.put(payload)
    await run.settle()
    run.server.stop()
    await trio.sleep(2.4)
    assert not run.endpoint.closed
    await trio.sleep(0.2)
    assert run.endpoint.closed
    assert sorted(run.sent_to(ALICE)) == [b"1", b"1.5", b"2"]
    s = run.server.statistics()
    assert (s.handlers_cancelled, s.handler_errors, s.dropped_at_end) == (0, 0, 0)


async def test_requests_that_take_too_long_are_cancelled(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """Requests that still run after drain_timeout are cancelled, and count as one handler; waiting ones are dropped."""
    run = await start_in_memory(sleeper(2), drain_timeout=5)
    for payload in (b"100", b"100", b"100"):
        run.put(payload)
    await run.settle()
    run.server.stop()
    await trio.sleep(6)
    assert run.endpoint.closed
    s = run.server.statistics()
    assert (s.handlers_cancelled, s.handler_errors, s.dropped_at_end, s.sent) == (1, 0, 1, 0)
    check_adds_up(run.server)


async def test_a_request_may_close_the_client(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A request may close its client, without an error; the next datagram begins a new conversation."""

    @trio_udp.request_handler(concurrency=2)
    async def reply(payload: bytes, client: Client) -> bytes | None:
        if payload == b"bye":
            client.close()
            return None
        return payload

    run = await start_in_memory(reply)
    for payload in (b"a", b"bye", b"b"):
        run.put(payload)
        await run.settle()
    assert run.sent_to(ALICE) == [b"a", b"b"]
    s = run.server.statistics()
    assert (s.clients_started, s.handler_errors) == (2, 0)
    check_adds_up(run.server)


async def test_closing_the_client_cancels_no_sibling(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """If one request closes the client, the other running requests finish; their replies are not errors."""
    done: list[bytes] = []

    @trio_udp.request_handler(concurrency=3)
    async def reply(payload: bytes, client: Client) -> bytes | None:
        if payload == b"bye":
            client.close()
            return None
        await trio.sleep(1)
        done.append(payload)
        return payload

    run = await start_in_memory(reply)
    for payload in (b"a", b"b", b"bye"):
        run.put(payload)
    await trio.sleep(5)
    assert sorted(done) == [b"a", b"b"]
    assert run.sent == []
    s = run.server.statistics()
    assert (s.clients, s.handler_errors) == (0, 0)


async def test_empty_replies_and_none(start_in_memory: StartInMemory) -> None:
    """With concurrency too, b"" is an empty reply and None is no reply."""

    @trio_udp.request_handler(concurrency=2)
    async def reply(payload: bytes, client: Client) -> bytes | None:
        return None if payload == b"quiet" else b""

    run = await start_in_memory(reply)
    for payload in (b"a", b"quiet", b"", b"b"):
        run.put(payload)
    await run.settle()
    assert run.sent_to(ALICE) == [b"", b"", b""]


async def test_a_burst_is_answered(start_in_memory: StartInMemory) -> None:
    """A burst of requests that exceeds both ``concurrency`` and a batch is answered without a loss."""

    @trio_udp.request_handler(concurrency=5)
    async def reply(payload: bytes, client: Client) -> bytes:
        await trio.lowlevel.checkpoint()
        return payload

    run = await start_in_memory(reply)
    for number in range(200):
        run.put(b"%d" % number)
    await run.settle()
    assert sorted(run.sent_to(ALICE)) == sorted(b"%d" % number for number in range(200))


@pytest.mark.parametrize("concurrency", [0, -1])
def test_concurrency_is_at_least_one(concurrency: int) -> None:
    """A concurrency of zero or less raises ValueError."""
    with pytest.raises(ValueError, match="concurrency"):
        trio_udp.request_handler(concurrency=concurrency)


@pytest.mark.parametrize("concurrency", [1.5, "2", None, True])
def test_concurrency_is_a_number(concurrency: Any) -> None:
    """A concurrency that is not an int raises TypeError."""
    with pytest.raises(TypeError, match="concurrency"):
        trio_udp.request_handler(concurrency=concurrency)
