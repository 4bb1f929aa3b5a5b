"""Stopping: the drain, signals, cancellation, and conversations in progress."""

from __future__ import annotations

import math
import os
import signal
import sys
from functools import partial

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from trio_udp import Client, Datagram, Server, serve_endpoints
from trio_udp.testing import SimulatedNetwork

from ..conftest import ALICE, BOB, CAROL, SERVER, StartInMemory, check_adds_up, echo, in_memory, narrow

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


async def test_stop_handles_datagrams_that_have_arrived(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """stop() lets handlers empty their inboxes in order and send last replies, and refuses later datagrams."""
    ends = []

    async def handler(client: Client) -> None:
        async for payload in client:
            await trio.sleep(0.1)
            await client.send(payload)
        ends.append(client.ended)
        await client.send(b"goodbye")

    run = await start_in_memory(handler)
    for i in range(10):
        run.put(b"%d" % i, ALICE)
    run.put(b"x", BOB)
    await run.settle()
    run.server.stop()
    run.server.stop()
    run.put(b"late", ALICE)
    run.put(b"late", CAROL)
    await trio.sleep(10)
    assert run.sent_to(ALICE) == [b"%d" % i for i in range(10)] + [b"goodbye"]
    assert run.sent_to(BOB) == [b"x", b"goodbye"]
    assert run.sent_to(CAROL) == []
    assert ends == ["stopping", "stopping"]
    assert run.endpoint.closed
    assert run.server.statistics().refused_stopping == 2
    assert run.server.statistics().clients == 0
    check_adds_up(run.server)


async def test_serve_returns_as_soon_as_the_last_handler_has(autojump_clock: MockClock) -> None:
    """The drain takes as long as the handlers need, not all of drain_timeout."""
    run = in_memory()

    async def handler(client: Client) -> None:
        await client.receive()
        client.server.stop()
        await trio.sleep(3)

    run.put(b"x")
    await serve_endpoints(handler, [run.endpoint], drain_timeout=math.inf)
    assert trio.current_time() == 3


async def test_handlers_are_cancelled_after_drain_timeout(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """Handlers that run after drain_timeout are cancelled and counted; their waiting datagrams count as dropped."""
    cancelled = []

    async def handler(client: Client) -> None:
        try:
            await client.receive()
            await trio.sleep_forever()
        finally:
            cancelled.append(trio.current_time())
            client.send_nowait(b"last word")

    run = await start_in_memory(handler, drain_timeout=7)
    run.put(b"1")
    run.put(b"2")
    await run.settle()
    run.server.stop()
    await trio.sleep(10)
    assert cancelled == [7.0]
    assert run.sent_to(ALICE) == [b"last word"]
    assert (run.server.statistics().dropped_at_end, run.server.statistics().handlers_cancelled) == (1, 1)
    check_adds_up(run.server)


async def test_a_handler_can_learn_of_the_stop(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """server.stopping and wait_stopping tell a handler in a transaction that the server drains."""
    log: list[tuple[bool, float]] = []

    async def handler(client: Client) -> None:
        with client.transaction():
            log.append((client.server.stopping, trio.current_time()))
            await client.server.wait_stopping()
            log.append((client.server.stopping, trio.current_time()))

    run = await start_in_memory(handler)
    run.put(b"x")
    await trio.sleep(2)
    run.server.stop()
    await run.settle()
    assert log == [(False, 0.0), (True, 2.0)]
    assert run.endpoint.closed
    assert run.server.stopping


async def test_stop_without_clients_ends_at_once(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A server without clients stops without waiting."""
    run = await start_in_memory(echo, drain_timeout=math.inf)
    run.server.stop()
    await run.settle()
    assert run.endpoint.closed
    assert run.server.statistics().received == 0


async def test_a_transaction_goes_on_during_the_drain(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """A client in a transaction receives datagrams during a drain until the transaction ends; the rest is refused."""
    seen: list[object] = []

    async def handler(client: Client) -> None:
        await client.receive()
        with client.transaction():
            seen.append(await client.receive())
            seen.append(await client.receive())
        with pytest.raises(trio.EndOfChannel):
            await client.receive()
        seen.append(client.ended)
        await trio.sleep(1)

    run = await start_in_memory(handler)
    run.put(b"begin")
    await run.settle()
    run.server.stop()
    for payload in (b"name", b"password"):
        await trio.sleep(1)
        run.put(payload)
    await run.settle()
    run.put(b"late")
    await trio.sleep(2)
    assert seen == [b"name", b"password", "stopping"]
    assert run.endpoint.closed
    assert run.server.statistics().refused_stopping == 1
    assert run.server.statistics().handler_errors == 0
    check_adds_up(run.server)


async def test_a_transaction_can_begin_during_the_drain(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """A handler that enters a transaction during a drain receives datagrams again."""
    seen = []

    async def handler(client: Client) -> None:
        await client.receive()
        await trio.sleep(1)
        with client.transaction():
            seen.append(await client.receive())

    run = await start_in_memory(handler)
    run.put(b"begin")
    await run.settle()
    run.server.stop()
    await trio.sleep(2)
    run.put(b"more")
    await trio.sleep(1)
    assert seen == [b"more"]
    assert run.endpoint.closed


async def test_a_transaction_ends_with_drain_timeout(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A transaction that never ends delays the stop by at most drain_timeout."""

    async def handler(client: Client) -> None:
        with client.transaction():
            async for _ in client:
                pass

    run = await start_in_memory(handler, drain_timeout=5)
    run.put(b"x")
    await run.settle()
    run.server.stop()
    await trio.sleep(4)
    assert not run.endpoint.closed
    await trio.sleep(2)
    assert run.endpoint.closed


async def test_leaving_a_transaction_ends_another_tasks_wait(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """A receive that waits in a transaction during a drain ends when another task leaves the transaction."""
    ends = []

    async def receive(client: Client) -> None:
        async for _ in client:
            pass
        ends.append((client.ended, trio.current_time()))

    async def handler(client: Client) -> None:
        await client.receive()
        async with trio.open_nursery() as nursery:
            with client.transaction():
                nursery.start_soon(receive, client)
                await trio.sleep(2)

    run = await start_in_memory(handler)
    run.put(b"x")
    await run.settle()
    run.server.stop()
    await trio.sleep(3)
    assert ends == [("stopping", 2.0)]


async def test_a_handler_is_called_again_during_a_drain(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """A handler that takes one datagram per call is called again during a drain for each one that had arrived."""
    seen = []

    async def handler(client: Client) -> None:
        seen.append(await client.receive())
        await trio.sleep(0.1)

    run = await start_in_memory(handler)
    for i in range(5):
        run.put(b"%d" % i)
    await run.settle()
    run.server.stop()
    await trio.sleep(1)
    assert seen == [b"0", b"1", b"2", b"3", b"4"]
    check_adds_up(run.server)


@pytest.mark.parametrize("drain_timeout", [0, 0.5])
async def test_stop_from_accept(
    start_in_memory: StartInMemory, autojump_clock: MockClock, drain_timeout: float
) -> None:
    """stop() may be called in the middle of a batch: the rest of it is handled, strangers included."""

    def accept(datagram: Datagram) -> bool:
        if datagram.payload == b"stop":
            assert datagram.server is not None
            datagram.server.stop()
        return True

    run = await start_in_memory(echo, accept=accept, drain_timeout=drain_timeout)
    for payload, address in ((b"1", ALICE), (b"stop", BOB), (b"2", ALICE), (b"x", CAROL)):
        run.put(payload, address)
    await trio.sleep(1)
    assert run.endpoint.closed
    statistics = run.server.statistics()
    assert (statistics.received, statistics.clients_started, statistics.refused_stopping) == (4, 3, 0)
    if drain_timeout:
        assert sorted(run.sent) == [(ALICE, b"1"), (ALICE, b"2"), (BOB, b"stop"), (CAROL, b"x")]
    check_adds_up(run.server)


async def test_cancelling_serve_ends_everything_at_once(autojump_clock: MockClock) -> None:
    """Cancelling serve cancels its handlers and closes its endpoints; waiting datagrams count as dropped."""
    run = in_memory()
    ended = []

    async def handler(client: Client) -> None:
        try:
            await client.receive()
            await trio.sleep_forever()
        finally:
            ended.append(client.peer_address)

    for address in (ALICE, ALICE, BOB):
        run.put(b"x", address)
    async with trio.open_nursery() as nursery:
        server = await nursery.start(partial(serve_endpoints, handler, [run.endpoint]))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert sorted(ended) == [ALICE, BOB]
    assert run.endpoint.closed
    assert server.statistics().dropped_at_end == 1
    check_adds_up(server)


async def test_closing_the_only_endpoint_ends_the_server(autojump_clock: MockClock) -> None:
    """serve_endpoints raises a bare ClosedResourceError, not a group, when its last endpoint is closed."""
    run = in_memory()
    seen = []

    async def handler(client: Client) -> None:
        await client.receive()
        await run.endpoint.aclose()
        await trio.sleep_forever()

    run.put(b"x")
    try:
        await serve_endpoints(handler, [run.endpoint])
    except trio.ClosedResourceError as error:
        seen.append(str(error))
    assert seen == ["every endpoint of this server has been closed"]


async def test_closing_one_of_two_endpoints_ends_its_clients(autojump_clock: MockClock) -> None:
    """Clients of a closed endpoint end without an error of their handlers; those of the other endpoint go on."""
    network = SimulatedNetwork()
    first, second = network.endpoint(*SERVER), network.endpoint("192.0.2.54", 53)
    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(partial(serve_endpoints, echo, [first, second]))
        network.inject(b"1", ALICE, first.local_address)
        network.inject(b"2", ALICE, second.local_address)
        await trio.testing.wait_all_tasks_blocked()
        assert len(server.clients) == 2
        await first.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert [client.local_address for client in server.clients] == [("192.0.2.54", 53)]
        network.inject(b"3", ALICE, second.local_address)
        await trio.testing.wait_all_tasks_blocked()
        assert second.statistics().sent == 2
        assert server.statistics().handler_errors == 0
        server.stop()
    check_adds_up(server)


async def test_closing_the_endpoint_during_the_drain_is_not_an_error(autojump_clock: MockClock) -> None:
    """A draining server returns normally if its endpoint is closed meanwhile."""
    run = in_memory()

    async def handler(client: Client) -> None:
        await client.receive()
        client.server.stop()
        await run.endpoint.aclose()
        await trio.sleep(1)

    run.put(b"x")
    await serve_endpoints(handler, [run.endpoint])
    assert trio.current_time() == 1


async def test_handlers_in_a_nursery_of_the_callers(autojump_clock: MockClock) -> None:
    """Handlers in handler_nursery outlive the server, and find their client closed."""
    run = in_memory()
    log = []

    async def handler(client: Client) -> None:
        assert await client.receive() == b"x"
        with pytest.raises(trio.ClosedResourceError):
            await client.receive()
        with pytest.raises(trio.ClosedResourceError):
            await client.send(b"x")
        with pytest.raises(trio.ClosedResourceError):
            await client.server.send_to(b"x", ALICE)
        await trio.sleep(5)
        log.append("handler")

    async with trio.open_nursery() as handler_nursery:
        async with trio.open_nursery() as nursery:
            server: Server = await nursery.start(
                partial(serve_endpoints, handler, [run.endpoint], handler_nursery=handler_nursery)
            )
            run.put(b"x")
            run.put(b"y", BOB)
            run.put(b"y", BOB)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        log.append("server")
        handler_nursery.cancel_scope.deadline = trio.current_time() + 10
    assert log == ["server", "handler"]
    check_adds_up(server)


async def test_drain_with_handlers_in_a_nursery_of_the_callers(autojump_clock: MockClock) -> None:
    """A drain waits for handlers in handler_nursery too, but does not cancel them after drain_timeout."""
    run = in_memory()
    log = []

    async def handler(client: Client) -> None:
        await client.receive()
        await trio.sleep(20)
        log.append(("handler", trio.current_time()))

    async with trio.open_nursery() as handler_nursery:
        async with trio.open_nursery() as nursery:
            server: Server = await nursery.start(
                partial(serve_endpoints, handler, [run.endpoint], handler_nursery=handler_nursery)
            )
            run.put(b"x")
            await trio.testing.wait_all_tasks_blocked()
            server.stop()
        log.append(("server", trio.current_time()))
    assert log == [("server", 5.0), ("handler", 20.0)]
    assert server.statistics().handlers_cancelled == 0


async def test_signals_stop_the_server(autojump_clock: MockClock) -> None:
    """The first signal of stop_signals drains the server."""
    run = in_memory()
    ends = []

    async def handler(client: Client) -> None:
        async for _ in client:
            os.kill(os.getpid(), signal.SIGUSR1)
        ends.append(client.ended)

    run.put(b"x")
    await serve_endpoints(handler, [run.endpoint], stop_signals={signal.SIGUSR1})
    assert ends == ["stopping"]


async def test_the_second_signal_stops_at_once(autojump_clock: MockClock) -> None:
    """The second signal of stop_signals cancels running handlers, and serve still returns normally."""
    run = in_memory()

    async def handler(client: Client) -> None:
        await client.receive()
        os.kill(os.getpid(), signal.SIGUSR1)
        await trio.sleep(1)
        os.kill(os.getpid(), signal.SIGUSR1)
        await trio.sleep_forever()

    run.put(b"x")
    await serve_endpoints(handler, [run.endpoint], stop_signals=[signal.SIGUSR1], drain_timeout=100)
    assert trio.current_time() == 1


@pytest.mark.parametrize("drain_timeout", [0, 5])
async def test_a_handler_with_a_nursery_is_cut_off(
    start_in_memory: StartInMemory, autojump_clock: MockClock, drain_timeout: float
) -> None:
    """serve returns normally even if a handler's tasks are cancelled, and raise meanwhile."""
    errors: list[str] = []

    async def read(client: Client) -> None:
        while True:
            await client.receive()

    async def fail_late() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("late")

    async def handler(client: Client) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, client)
            nursery.start_soon(trio.sleep_forever)
            if client.peer_address == BOB:
                nursery.start_soon(fail_late)

    def on_error(source: Client | Datagram, error: Exception) -> None:
        errors.extend(f"{source.peer_address[0]}: {inner}" for inner in leaves(error))

    for _ in range(20):
        errors.clear()
        run = in_memory()
        async with trio.open_nursery() as nursery:
            server: Server = await nursery.start(
                partial(serve_endpoints, handler, [run.endpoint], on_error=on_error, drain_timeout=drain_timeout)
            )
            run.put(b"x", ALICE)
            run.put(b"x", BOB)
            await trio.testing.wait_all_tasks_blocked()
            server.stop()
        assert [error for error in errors if error] == ["192.0.2.2: late"]
        assert server.statistics().handler_errors == 1
        check_adds_up(server)


def leaves(error: BaseException) -> list[BaseException]:
    """Return the exceptions in a group, at any depth, except EndOfChannel."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [] if isinstance(error, trio.EndOfChannel) else [error]


async def test_last_words_wait_for_room(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """Replies that wait for room in the send buffer when the last handler ends leave before serve returns."""

    async def handler(client: Client) -> None:
        async for payload in client:
            client.send_nowait(payload)

    run = await start_in_memory(handler, on=narrow())
    for i in range(3):
        run.put(b"%d" % i)
    await run.settle()
    run.server.stop()
    await trio.sleep(1.5)
    assert run.server.statistics().clients == 0
    assert not run.endpoint.closed
    await trio.sleep(1)
    assert run.endpoint.closed
    assert run.sent_to(ALICE) == [b"0", b"1", b"2"]
