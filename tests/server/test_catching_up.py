"""Stopping: datagrams that have reached the machine, and those that arrive later."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from functools import partial

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from trio_udp import Client, Datagram, Endpoint, Server, datagram_handler, serve, serve_endpoints
from trio_udp.testing import SimulatedNetwork

from ..conftest import ALICE, BOB, CAROL, SERVER, Bystander, InMemory, check_adds_up, echo, in_memory, narrow


def senders(stack: ExitStack, count: int) -> list[socket.socket]:
    return [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(count)]


@pytest.mark.parametrize(("peers", "each"), [(1, 200), (200, 1), (20, 100)])
async def test_datagrams_in_the_kernel_are_handled(engine: str, peers: int, each: int) -> None:
    """Datagrams that are in the kernel when stop() is called are handled, and strangers among them become clients."""
    stored: list[bytes] = []

    async def store(client: Client) -> None:
        stored.extend([payload async for payload in client])

    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(partial(serve, store, 0, host="127.0.0.1"))
        await trio.testing.wait_all_tasks_blocked()
        with ExitStack() as stack:
            socks = senders(stack, peers)
            for number in range(each):
                for sock in socks:
                    sock.sendto(b"%d" % number, server.endpoints[0].local_address)
            server.stop()
    statistics = server.statistics()
    assert len(stored) == peers * each == statistics.received
    assert (statistics.clients_started, statistics.refused_stopping) == (peers, 0)
    check_adds_up(server)


async def test_a_datagram_handler_catches_up(engine: str) -> None:
    """A datagram_handler sees all that is in the kernel when stop() is called, and its answers leave."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        async with trio.open_nursery() as nursery:
            shout = datagram_handler(lambda datagram: datagram.payload.upper())
            server: Server = await nursery.start(partial(serve, shout, 0, host="127.0.0.1"))
            for number in range(200):
                sock.sendto(b"a%d" % number, server.endpoints[0].local_address)
            server.stop()
        assert [sock.recv(100) for _ in range(200)] == [b"A%d" % number for number in range(200)]
    assert (server.statistics().delivered, server.statistics().refused_stopping) == (200, 0)


async def test_a_stop_before_the_server_has_run() -> None:
    """A stop right after the start handles datagrams that waited on the endpoints, and still calls accept."""
    run = in_memory()
    for port in range(1, 201):
        run.put(b"x", ("192.0.2.7", port))

    def accept(datagram: Datagram) -> bool:
        return datagram.peer_address[1] % 2 == 0

    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(partial(serve_endpoints, echo, [run.endpoint], accept=accept))
        server.stop()
    assert len(run.sent) == 100
    assert server.statistics().refused_by_accept == 100
    check_adds_up(server)


@pytest.mark.parametrize("shared", [False, True])
async def test_datagrams_that_receive_had_read_ahead_are_handled(shared: bool) -> None:
    """A server that stops at once handles all datagrams that receive() had read ahead."""
    network = SimulatedNetwork()
    endpoint = network.endpoint(*SERVER, shared=shared)
    for number in range(10):
        network.inject(b"%d" % number, ALICE, SERVER)
    assert (await endpoint.receive()).payload == b"0"
    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(serve_endpoints, echo, [endpoint])
        server.stop()
    assert (server.statistics().delivered, server.statistics().refused_stopping) == (9, 0)
    check_adds_up(server)


@pytest.mark.parametrize("kind", ["client", "datagram"])
async def test_catching_up_ends_while_more_keeps_arriving(autojump_clock: MockClock, kind: str) -> None:
    """A stop ends soon even if each datagram that is read brings another one."""
    run = in_memory()

    def one_more(datagram: Datagram) -> bytes:
        run.put(b"x", ALICE)
        return b""

    async def handler(client: Client) -> None:
        async for _ in client:
            run.put(b"x", ALICE)

    run.put(b"x", ALICE)
    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            server: Server = await nursery.start(
                serve_endpoints, handler if kind == "client" else datagram_handler(one_more), [run.endpoint]
            )
            server.stop()
    assert run.endpoint.closed
    assert server.statistics().received < 200
    check_adds_up(server)


async def test_the_socket_is_read_once_more(autojump_clock: MockClock) -> None:
    """A datagram that arrives at the moment when the last handler ends counts as refused."""
    run = in_memory()

    async def handler(client: Client) -> None:
        await client.receive()
        client.server.stop()
        await trio.sleep(1)
        for number in range(100):
            run.put(b"%d" % number, BOB)

    run.put(b"x")
    server = await _run_to_the_end(run, handler)
    assert (server.statistics().received, server.statistics().refused_stopping) == (101, 100)
    check_adds_up(server)


async def test_datagrams_while_cancelled_handlers_clean_up_are_counted(autojump_clock: MockClock) -> None:
    """The count of refused datagrams is exact up to the moment at which the socket is closed."""
    run = in_memory()

    async def handler(client: Client) -> None:
        await client.receive()
        client.server.stop()
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(1)
                run.put(b"late", BOB)
                await trio.sleep(1)

    run.put(b"x")
    server = await _run_to_the_end(run, handler)
    assert trio.current_time() == 7
    assert (server.statistics().refused_stopping, server.statistics().handlers_cancelled) == (1, 1)
    check_adds_up(server)


async def _run_to_the_end(run: InMemory, handler: Callable[[Client], Awaitable[object]]) -> Server:
    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(serve_endpoints, handler, [run.endpoint])
    return server


async def test_a_datagram_handler_is_not_called_during_a_drain(autojump_clock: MockClock) -> None:
    """During a drain a datagram_handler is not called any more: what arrives is refused_stopping."""
    run = narrow()
    seen: list[bytes] = []
    collect = datagram_handler(lambda datagram: seen.append(datagram.payload))
    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(serve_endpoints, collect, [run.endpoint])
        await server.send_to(b"1", ALICE)
        nursery.start_soon(server.send_to, b"2", ALICE)  # the drain waits for this one
        await trio.testing.wait_all_tasks_blocked()
        run.put(b"before")
        server.stop()
        await trio.sleep(0.5)
        assert not run.endpoint.closed
        run.put(b"late")
    assert seen == [b"before"]
    assert server.statistics().refused_stopping == 1
    check_adds_up(server)


# Shared sockets.


@pytest.fixture
def held() -> Iterator[socket.socket]:
    """A socket that a supervisor holds open."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_194_304)
        sock.bind(("127.0.0.1", 0))
        yield sock


async def test_nothing_is_read_from_a_shared_socket_after_stop(engine: str, held: socket.socket) -> None:
    """On a shared socket, unread datagrams wait for the next server when stop() returns; read ones are handled."""
    seen: list[tuple[str, bytes]] = []

    def noting(name: str) -> Callable[[Client], Awaitable[object]]:
        return partial(note, name)

    async def note(name: str, client: Client) -> None:
        async for payload in client:
            seen.append((name, payload))
            await trio.lowlevel.checkpoint()

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(held.getsockname())
        async with trio.open_nursery() as nursery:
            first: Server = await nursery.start(
                serve_endpoints, noting("first"), [Endpoint.from_socket(held.dup(), shared=True)]
            )
            sock.send(b"1")
            with trio.fail_after(5):
                while not first.clients:
                    await trio.lowlevel.checkpoint()
            for number in range(2, 202):
                sock.send(b"%d" % number)
            first.stop()
            sock.send(b"202")
        async with trio.open_nursery() as nursery:
            second: Server = await nursery.start(
                serve_endpoints, noting("second"), [Endpoint.from_socket(held.dup(), shared=True)]
            )
            with trio.fail_after(5):
                while len(seen) < 202:
                    await trio.lowlevel.checkpoint()
            second.stop()
    assert seen == [("first", b"1")] + [("second", b"%d" % number) for number in range(2, 203)]
    assert first.statistics().received == 1
    for server in (first, second):
        assert server.statistics().refused_stopping == 0
        check_adds_up(server)


async def test_a_transaction_on_a_shared_socket_ends(autojump_clock: MockClock) -> None:
    """On a shared socket even a transaction ends once read datagrams are handled; the next server gets the rest."""
    network = SimulatedNetwork()
    endpoint = network.endpoint(*SERVER, shared=True)
    seen: list[object] = []

    async def handler(client: Client) -> None:
        with client.transaction():
            async for payload in client:
                seen.append(payload)
                await trio.sleep(1)
            seen.append(client.ended)

    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(serve_endpoints, handler, [endpoint])
        network.inject(b"1", ALICE, SERVER)
        network.inject(b"2", ALICE, SERVER)
        await trio.testing.wait_all_tasks_blocked()
        server.stop()
        network.inject(b"3", ALICE, SERVER)
    assert seen == [b"1", b"2", "stopping"]
    assert trio.current_time() == 2
    next_one = network.endpoint(*SERVER, shared=True)
    assert (await next_one.receive()).payload == b"3"
    next_one.close()
    check_adds_up(server)


async def test_a_transaction_that_waits_on_a_shared_socket_is_woken(autojump_clock: MockClock) -> None:
    """A receive that waits in a transaction ends at once when a server on a shared socket stops."""
    network = SimulatedNetwork()
    endpoint = network.endpoint(*SERVER, shared=True)
    ends: list[object] = []

    async def handler(client: Client) -> None:
        with client.transaction():
            async for _ in client:
                pass
        ends.append(client.ended)

    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(serve_endpoints, handler, [endpoint])
        network.inject(b"1", ALICE, SERVER)
        await trio.testing.wait_all_tasks_blocked()
        server.stop()
    assert ends == ["stopping"]
    assert trio.current_time() == 0


@pytest.mark.parametrize("kind", ["client", "datagram"])
async def test_twenty_restarts_lose_nothing(engine: str, held: socket.socket, kind: str) -> None:
    """A service that is restarted twenty times on one socket, under load, handles each datagram exactly once."""
    seen: list[bytes] = []
    sent: list[bytes] = []
    over = False

    async def handler(client: Client) -> None:
        with client.transaction():
            async for payload in client:
                seen.append(payload)
                await trio.lowlevel.checkpoint()

    collect = datagram_handler(lambda datagram: seen.append(datagram.payload))

    async def load() -> None:
        with ExitStack() as stack:
            socks = senders(stack, 20)
            while not over:
                for number, sock in enumerate(socks):
                    payload = b"%d/%d" % (number, len(sent))
                    sock.sendto(payload, held.getsockname())
                    sent.append(payload)
                await trio.lowlevel.checkpoint()

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            for _ in range(20):
                before = len(seen)
                async with trio.open_nursery() as serving:
                    server: Server = await serving.start(
                        serve_endpoints,
                        handler if kind == "client" else collect,
                        [Endpoint.from_socket(held.dup(), shared=True)],
                    )
                    while len(seen) < before + 100:
                        await trio.lowlevel.checkpoint()
                    server.stop()
                assert server.statistics().refused_stopping == 0
                check_adds_up(server)
            over = True
        async with trio.open_nursery() as nursery:
            last: Server = await nursery.start(
                serve_endpoints, collect, [Endpoint.from_socket(held.dup(), shared=True)]
            )
            while len(seen) < len(sent):
                await trio.lowlevel.checkpoint()
            last.stop()
    assert sorted(seen) == sorted(sent)
    of_each = [[payload for payload in seen if payload.startswith(b"%d/" % number)] for number in range(20)]
    assert all(mine == sorted(mine, key=lambda payload: int(payload.split(b"/")[1])) for mine in of_each)


# wait_stopping, signals and drain_timeout.


async def test_any_task_may_wait_for_the_stop(autojump_clock: MockClock) -> None:
    """wait_stopping() returns once the server stops, at once afterwards, and also if the server is cancelled."""
    log: list[float] = []

    async def wait(server: Server) -> None:
        await server.wait_stopping()
        assert server.stopping
        log.append(trio.current_time())

    for cancel in (False, True):
        run = in_memory()
        async with trio.open_nursery() as nursery, trio.open_nursery() as serving:
            server: Server = await serving.start(serve_endpoints, echo, [run.endpoint])
            assert not server.stopping
            nursery.start_soon(wait, server)
            await trio.sleep(1)
            if cancel:
                serving.cancel_scope.cancel()
            else:
                server.stop()
        await wait(server)
    assert log == [1, 1, 2, 2]


async def test_sigterm(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """SIGTERM drains; the log says that the stop began, and how it ended."""
    caplog.set_level(logging.INFO, "trio_udp")
    run = in_memory()
    ends: list[str | None] = []

    async def handler(client: Client) -> None:
        async for _ in client:
            os.kill(os.getpid(), signal.SIGTERM)
        ends.append(client.ended)

    run.put(b"x")
    await serve_endpoints(handler, [run.endpoint], stop_signals={signal.SIGTERM})
    assert ends == ["stopping"]
    assert [record.levelname for record in caplog.records] == ["INFO"] * 3
    assert "192.0.2.53" in caplog.messages[0]
    assert "stopping" in caplog.messages[1]
    assert caplog.messages[2].startswith("stopped")


async def test_a_second_signal(autojump_clock: MockClock) -> None:
    """A second signal ends the drain at once. The handlers that it cancels and the last datagrams are counted."""
    run = in_memory()

    async def handler(client: Client) -> None:
        await client.receive()
        os.kill(os.getpid(), signal.SIGTERM)
        await trio.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        await trio.sleep_forever()

    run.put(b"x")
    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(
            partial(serve_endpoints, handler, [run.endpoint], stop_signals={signal.SIGTERM}, drain_timeout=100)
        )
    assert trio.current_time() == 1
    assert server.statistics().handlers_cancelled == 1
    check_adds_up(server)


async def test_handlers_that_are_cancelled_are_counted(autojump_clock: MockClock) -> None:
    """handlers_cancelled counts handlers that run after drain_timeout; their waiting datagrams are dropped_at_end."""
    run = in_memory()

    async def handler(client: Client) -> None:
        await client.receive()
        if client.peer_address != CAROL:
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(partial(serve_endpoints, handler, [run.endpoint], drain_timeout=3))
        for address in (ALICE, ALICE, ALICE, BOB, BOB, CAROL):
            run.put(b"x", address)
        await trio.testing.wait_all_tasks_blocked()
        server.stop()
    statistics = server.statistics()
    assert (statistics.handlers_cancelled, statistics.dropped_at_end, statistics.clients) == (2, 3, 0)
    assert trio.current_time() == 3
    check_adds_up(server)


async def test_handlers_in_the_callers_nursery_are_the_callers(autojump_clock: MockClock) -> None:
    """After drain_timeout the server ends; handlers in the caller's nursery go on, are not counted, and may finish."""
    run = in_memory()
    log: list[object] = []

    async def handler(client: Client) -> None:
        await client.receive()
        await trio.sleep(10)
        log.append(trio.current_time())

    async with trio.open_nursery() as mine:
        async with trio.open_nursery() as nursery:
            server: Server = await nursery.start(
                partial(serve_endpoints, handler, [run.endpoint], handler_nursery=mine, drain_timeout=3)
            )
            run.put(b"1")
            run.put(b"2")
            await trio.testing.wait_all_tasks_blocked()
            server.stop()
        log.append("server has ended")
        assert trio.current_time() == 3
        statistics = server.statistics()
        assert (statistics.handlers_cancelled, statistics.dropped_at_end, statistics.waiting) == (0, 1, 0)
    assert log == ["server has ended", 10.0]
    check_adds_up(server)


async def test_other_tasks_run_while_thousands_are_woken() -> None:
    """A stop wakes 5,000 waiting clients a batch at a time, and other tasks run in between."""
    run = in_memory()
    ended = 0

    async def handler(client: Client) -> None:
        nonlocal ended
        async for _ in client:
            pass
        ended += 1

    bystander = Bystander(lambda: ended)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bystander.run)
        async with trio.open_nursery() as serving:
            server: Server = await serving.start(serve_endpoints, handler, [run.endpoint])
            for port in range(1, 5_001):
                run.put(b"x", ("192.0.2.7", port))
            with trio.fail_after(20):
                while server.statistics().delivered < 5_000:
                    await trio.lowlevel.checkpoint()
            server.stop()
        nursery.cancel_scope.cancel()
    assert ended == 5_000
    assert 0 < bystander.most <= 128  # Trio orders the tasks of a pass at random
