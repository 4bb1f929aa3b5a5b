"""A full send buffer: senders wait in turn, nothing is lost, reordered or sent twice, and nothing spins."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings, strategies as st
from trio.testing import MockClock

from trio_udp import Client, Endpoint, Limits, Server, serve_endpoints
from trio_udp._endpoints import reader_of

from ..conftest import ALICE, BOB, StartInMemory, check_adds_up, echo, in_memory, narrow, steps_in

pytestmark = pytest.mark.usefixtures("engine")


async def test_send_waits_and_send_nowait_does_not(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """When the send buffer is full, send waits for room, and send_nowait raises WouldBlock and sends nothing."""
    log: list[str] = []

    async def handler(client: Client) -> None:
        await client.receive()
        await client.send(b"1")
        with pytest.raises(trio.WouldBlock):
            client.send_nowait(b"lost")
        log.append("waiting")
        await client.send(b"2")
        log.append("sent")

    run = await start_in_memory(handler, on=narrow())
    run.put(b"x")
    await run.settle()
    assert log == ["waiting"]
    await trio.sleep(1)
    await run.settle()
    assert log == ["waiting", "sent"]
    assert run.sent_to(ALICE) == [b"1", b"2"]
    assert run.server.statistics().sent == 2


async def test_first_come_first_served(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """Senders that wait for room send in the order of their calls; no sender overtakes a waiting one."""

    async def handler(client: Client) -> None:
        name = await client.receive()
        await client.send(name)
        with pytest.raises(trio.WouldBlock):
            client.send_nowait(b"overtaken")

    run = await start_in_memory(handler, on=narrow())
    names = [b"%d" % i for i in range(10)]
    for i, name in enumerate(names):
        run.put(name, ("192.0.2.1", i + 1))
        await run.settle()
    with pytest.raises(trio.WouldBlock):
        next(iter(run.server.clients)).send_nowait(b"overtaken")
    for count in range(1, 11):
        assert [payload for _, payload in run.sent] == names[:count]
        await trio.sleep(1)
        await run.settle()


async def test_send_to_waits_too(
    start_in_memory: StartInMemory, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """A send_to that finds the send buffer full waits for room, as replies do."""

    async def handler(client: Client) -> None:
        await client.receive()

    run = await start_in_memory(handler, on=narrow())
    await run.server.send_to(b"1", BOB)
    nursery.start_soon(run.server.send_to, b"news", BOB)
    await run.settle()
    assert run.sent == [(BOB, b"1")]
    await trio.sleep(1)
    await run.settle()
    assert run.sent == [(BOB, b"1"), (BOB, b"news")]


async def test_a_cancelled_sender_lets_the_next_one_go(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """A waiting send that is cancelled sends nothing, and the next sender gets its turn."""
    scopes = [trio.CancelScope() for _ in range(4)]

    async def handler(client: Client) -> None:
        number = int(await client.receive())
        with scopes[number]:
            await client.send(b"%d" % number)

    run = await start_in_memory(handler, on=narrow())
    for i in range(4):
        run.put(b"%d" % i, ("192.0.2.1", i + 1))
        await run.settle()
    scopes[2].cancel()
    await run.settle()
    scopes[1].cancel()
    await trio.sleep(5)
    assert [payload for _, payload in run.sent] == [b"0", b"3"]


async def test_replies_to_a_batch_wait_for_room_in_order(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """Replies collected during a batch that meet a full buffer leave later, complete and in order."""

    # Ten small datagrams: each takes 768 bytes besides its payload.
    run = await start_in_memory(echo, on=in_memory(send_buffer=10 * 768, bandwidth=100))
    wanted = [b"%d" % i for i in range(200)]
    for payload in wanted:
        run.put(payload, ALICE)
        run.put(payload, BOB)
    await run.settle()
    assert len(run.sent) == 10
    await trio.sleep(20)
    assert run.sent_to(ALICE) == wanted
    assert run.sent_to(BOB) == wanted
    assert run.server.statistics().sent == 400
    check_adds_up(run.server)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.sampled_from(["datagram", "yield", "wait"]), max_size=100),
    room=st.integers(1, 10),
)
def test_replies_to_a_batch_do_not_overtake_those_that_wait(steps: list[str], room: int) -> None:
    """Datagrams of two tasks of a client leave in the order of the calls, even if two batches meet a full buffer."""
    called: list[bytes] = []

    async def send(client: Client, payload: bytes) -> None:
        called.append(payload)
        await client.send(payload)

    async def handler(client: Client) -> None:
        async with trio.open_nursery() as nursery:
            async for payload in client:
                nursery.start_soon(send, client, b"task " + payload)
                await send(client, b"main " + payload)

    async def main() -> None:
        run = in_memory(send_buffer=room * 768, bandwidth=10)
        async with trio.open_nursery() as nursery:
            server = await nursery.start(partial(serve_endpoints, handler, [run.endpoint], idle_timeout=math.inf))
            for i, step in enumerate(steps):
                if step == "datagram":
                    run.put(b"%d" % i)
                elif step == "yield":
                    await trio.lowlevel.checkpoint()
                else:
                    await trio.sleep(1)
            await trio.sleep(1_000)
            assert [payload for _, payload in run.sent] == called
            assert len(called) == 2 * steps.count("datagram")
            server.stop()

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_replies_before_one_that_was_given_up_leave(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """If a reply finds outbox and send buffer full and is cancelled, those before it leave once there is room."""

    async def handler(client: Client) -> None:
        async for _ in client:
            for i in range(300):
                with contextlib.suppress(trio.WouldBlock):
                    client.send_nowait(b"%d" % i)

    for _ in range(20):  # in some orders of the tasks, the receive loop does it anyway
        run = await start_in_memory(
            handler, on=in_memory(send_buffer=1), limits=Limits(max_clients=1, when_full="evict_idle")
        )
        run.put(b"x", BOB)
        await run.settle()
        run.network.bandwidth = 1
        await run.server.send_to(b"1", BOB)  # fills the buffer for a second
        run.put(b"x", ALICE)  # evicts Bob, so that the loop lets tasks run once more than usual
        run.put(b"x", ALICE)
        await run.settle()
        run.network.bandwidth = None
        await trio.sleep(2)
        assert run.sent_to(ALICE) == [b"%d" % i for i in range(256)]


async def test_closing_wakes_senders_that_wait() -> None:
    """Closing the endpoint ends the wait of every sender with ClosedResourceError."""
    outcome: list[str] = []

    async def handler(client: Client) -> None:
        await client.receive()
        with pytest.raises(trio.ClosedResourceError):
            await client.send_many([b"1", b"2", b"3"])
        outcome.append("closed")

    run = narrow()
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as handler_nursery:

            async def serve() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await serve_endpoints(handler, [run.endpoint], handler_nursery=handler_nursery)

            nursery.start_soon(serve)
            for i in range(3):
                run.put(b"x", ("192.0.2.1", i + 1))
                await trio.testing.wait_all_tasks_blocked()
            await run.endpoint.aclose()
            await trio.testing.wait_all_tasks_blocked()
    assert outcome == ["closed"] * 3


async def test_closing_a_client_wakes_its_senders(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A send that waits for room ends with ClosedResourceError when its client is closed, and sends nothing."""
    outcome: list[str] = []

    async def send(client: Client) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await client.send(b"x")
        outcome.append("closed")

    async def handler(client: Client) -> None:
        client.send_nowait(b"1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, client)
            nursery.start_soon(send, client)
            await trio.testing.wait_all_tasks_blocked()
            client.close()

    run = await start_in_memory(handler, on=narrow())
    run.put(b"x")
    await run.settle()
    await run.settle()
    assert outcome == ["closed", "closed"]
    await trio.sleep(5)
    assert run.sent_to(ALICE) == [b"1"]


async def test_replies_that_cannot_leave_before_closing_are_counted(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """Replies that find no room until drain_timeout is over count as send errors."""

    async def handler(client: Client) -> None:
        async for payload in client:
            client.send_nowait(payload)

    run = await start_in_memory(handler, on=narrow(), drain_timeout=5)
    for _ in range(4):
        run.put(bytes(10))
    await run.settle()
    run.server.stop()
    await trio.sleep(10)
    statistics = run.server.statistics()
    assert (statistics.sent, statistics.send_errors, statistics.errors) == (1, 3, {"EAGAIN": 3})


# A Unix-domain datagram socket has real backpressure on one machine, if its peer does not read.


@pytest.fixture
def far_end() -> Iterator[socket.socket]:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(os.path.join(folder, "peer"))
        sock.settimeout(5)
        yield sock


@pytest.fixture
async def unix_server(far_end: socket.socket, nursery: trio.Nursery) -> AsyncIterator[Server]:
    """A server that answers one datagram with a thousand."""

    async def handler(client: Client) -> None:
        async for payload in client:
            for i in range(1_000):
                await client.send(payload + b"%d" % i)

    path = os.path.join(os.path.dirname(far_end.getsockname()), "server")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(path)
    server: Server = await nursery.start(partial(serve_endpoints, handler, [Endpoint.from_socket(sock)]))
    far_end.connect(path)
    yield server
    os.unlink(path)


async def test_a_real_full_buffer(far_end: socket.socket, unix_server: Server) -> None:
    """Every datagram to a slow peer arrives once and in order, and no task spins meanwhile."""
    far_end.send(b"a")
    await trio.testing.wait_all_tasks_blocked()
    assert 0 < unix_server.statistics().sent < 1_000
    assert await steps_in(0.3) < 300
    received = [await trio.to_thread.run_sync(far_end.recv, 100) for _ in range(1_000)]
    assert received == [b"a%d" % i for i in range(1_000)]
    assert unix_server.statistics().sent == 1_000


async def test_a_full_buffer_of_an_unconnected_peer(far_end: socket.socket, nursery: trio.Nursery) -> None:
    """A full buffer of an unconnected peer makes no task spin, though the kernel does not report when it has room."""

    async def handler(client: Client) -> None:
        async for payload in client:
            for i in range(100):
                await client.send(payload + b"%d" % i)

    with tempfile.TemporaryDirectory() as folder:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sock.bind(os.path.join(folder, "server"))
        server: Server = await nursery.start(partial(serve_endpoints, handler, [Endpoint.from_socket(sock)]))
        far_end.sendto(b"a", os.path.join(folder, "server"))
        assert await steps_in(0.3) < 300
        assert 0 < server.statistics().sent < 100
        received = [await trio.to_thread.run_sync(far_end.recv, 100) for _ in range(100)]
    assert received == [b"a%d" % i for i in range(100)]


async def test_a_sender_without_an_address(nursery: trio.Nursery) -> None:
    """A reply to an unbound Unix-domain socket is counted as a send error; other clients are not affected."""

    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unbound:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sock.bind(os.path.join(folder, "server"))
        server: Server = await nursery.start(partial(serve_endpoints, echo, [Endpoint.from_socket(sock)]))
        for _ in range(3):
            unbound.sendto(b"x", os.path.join(folder, "server"))
            await trio.testing.wait_all_tasks_blocked()
        assert server.statistics().errors == {"EDESTADDRREQ": 3}
        assert server.statistics().handler_errors == 0


async def test_the_drain_waits_for_a_full_buffer(far_end: socket.socket, unix_server: Server) -> None:
    """Replies that wait for room when the server stops leave as soon as there is room."""
    far_end.send(b"a")
    await trio.testing.wait_all_tasks_blocked()
    unix_server.stop()
    received: list[Any] = [await trio.to_thread.run_sync(far_end.recv, 100) for _ in range(1_000)]
    assert received == [b"a%d" % i for i in range(1_000)]


@pytest.mark.parametrize("passes", range(5))
async def test_datagrams_that_left_while_a_task_waited_for_room(passes: int) -> None:
    """A task that waits for room may find that the queue has left meanwhile, as when a server stops in a flood."""
    for _ in range(20):  # Trio runs the two tasks in random order
        run = in_memory()
        outbox = reader_of(run.endpoint).outbox
        outbox.hold()
        outbox.send([(b"bye", outbox.engine.route(ALICE), outbox.own)])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outbox.empty)
            for _ in range(passes):
                await trio.lowlevel.checkpoint()
            outbox.release()
        assert run.sent_to(ALICE) == [b"bye"]


async def test_a_log_handler_that_raises_makes_nothing_leave_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a log handler raises while queued datagrams are sent, those that have left are not sent again."""

    def fail(_: logging.LogRecord) -> None:
        raise RuntimeError("the disk is full")

    run = in_memory()
    run.network.partition([BOB], error=errno.ENOBUFS)
    outbox = reader_of(run.endpoint).outbox
    outbox.hold()
    for payload, peer in ((b"1", ALICE), (b"2", BOB), (b"3", ALICE)):
        outbox.send([(payload, outbox.engine.route(peer), outbox.own)])
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", fail)
    logger = logging.getLogger("trio_udp")
    logger.addHandler(handler)
    try:
        with pytest.raises(RuntimeError):
            outbox.release()
    finally:
        logger.removeHandler(handler)
    outbox.release()
    assert run.sent_to(ALICE) == [b"1", b"3"]
    assert (outbox.own.sent, outbox.own.send_errors) == (2, 1)
