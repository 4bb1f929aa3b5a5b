"""Connections, the client side, over a connected socket. test_engines.py tests them with every engine."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Iterator

import pytest
import trio
import trio.testing

import trio_udp
from trio_udp import Connection, connect

from ..conftest import Bystander, echo

pytestmark = pytest.mark.usefixtures("engine")


@pytest.fixture
def far_end() -> Iterator[socket.socket]:
    """A plain socket to be connected to."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(5)
        yield sock


@pytest.fixture
async def connection(far_end: socket.socket) -> AsyncIterator[Connection]:
    async with await connect(*far_end.getsockname()) as connection:
        yield connection


async def test_a_conversation_with_a_server(nursery: trio.Nursery) -> None:
    """A connection has the same methods and properties as a client."""

    async def serve(task_status: trio.TaskStatus[trio_udp.Server]) -> None:
        await trio_udp.serve(echo, 0, task_status=task_status)

    server: trio_udp.Server = await nursery.start(serve)
    for host in ("localhost", "127.0.0.1", "::1"):
        with trio.fail_after(5):
            async with await connect(host, server.endpoints[0].local_address[1]) as connection:
                await connection.send(b"one")
                connection.send_nowait(bytearray(b""))
                await connection.send_many([b"two", memoryview(b"three")])
                received = [await connection.receive() for _ in range(4)]
                assert received == [b"one", b"", b"two", b"three"]
                assert connection.local_address in [client.peer_address for client in server.clients]
                assert connection.socket.getpeername() == connection.peer_address


async def test_statistics_add_up(connection: Connection, far_end: socket.socket) -> None:
    """Datagrams that were read ahead and not received count as waiting, and as dropped_at_end once closed."""
    for i in range(5):
        far_end.sendto(b"%d" % i, connection.local_address)
    await connection.send(b"xyz")
    assert [await connection.receive() for _ in range(2)] == [b"0", b"1"]
    expected = trio_udp.ConnectionStatistics(
        received=5,
        bytes_received=5,
        truncated=0,
        sent=1,
        bytes_sent=3,
        receive_errors=0,
        send_errors=0,
        errors={},
        receive_buffer=connection.statistics().receive_buffer,
        receive_buffer_requested=4_194_304,
        delivered=2,
        waiting=3,
        dropped_at_end=0,
    )
    assert connection.statistics() == expected
    await connection.aclose()
    assert connection.statistics().dropped_at_end == 3
    assert connection.statistics().waiting == 0


async def test_receive_nowait(connection: Connection, far_end: socket.socket) -> None:
    """receive_nowait returns what has arrived or raises WouldBlock."""
    with pytest.raises(trio.WouldBlock):
        connection.receive_nowait()
    for payload in (b"a", b"b"):
        far_end.sendto(payload, connection.local_address)
    assert [connection.receive_nowait(), await connection.receive()] == [b"a", b"b"]


async def test_async_iteration(connection: Connection, far_end: socket.socket) -> None:
    """A connection can be iterated, as a client can."""
    for i in range(200):
        far_end.sendto(b"%d" % i, connection.local_address)
    seen = []
    async for payload in connection:
        seen.append(payload)
        if len(seen) == 200:
            break
    assert seen == [b"%d" % i for i in range(200)]


def refuse_next(connection: Connection, far_end: socket.socket) -> socket.socket:
    """Let the connection's next send be refused, and bind the peer's port again; return the new peer."""
    address = far_end.getsockname()
    far_end.close()
    connection.send_nowait(b"refused")
    again = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    again.settimeout(5)
    again.bind(address)
    return again


async def test_a_refusal_is_raised_by_the_next_send(connection: Connection, far_end: socket.socket) -> None:
    """A send that meets an earlier datagram's refusal raises it and sends nothing; then the connection works."""
    with refuse_next(connection, far_end) as again, trio.fail_after(5):
        with pytest.raises(ConnectionRefusedError):
            await connection.send(b"not sent")
        again.sendto(b"answer", connection.local_address)
        assert await connection.receive() == b"answer"  # the refusal is raised once
        await connection.send(b"wanted")
        assert again.recv(100) == b"wanted"
    statistics = connection.statistics()
    assert (statistics.sent, statistics.send_errors, statistics.receive_errors) == (2, 0, 1)
    assert statistics.errors == {"ECONNREFUSED": 1}


async def test_a_refusal_is_raised_by_send_nowait(connection: Connection, far_end: socket.socket) -> None:
    """A send_nowait that meets an earlier datagram's refusal raises it and sends nothing."""
    with refuse_next(connection, far_end) as again:
        with pytest.raises(ConnectionRefusedError):
            connection.send_nowait(b"not sent")
        await connection.send(b"wanted")
        assert again.recv(100) == b"wanted"
    assert connection.statistics().sent == 2


async def test_a_refusal_is_raised_by_send_many(connection: Connection, far_end: socket.socket) -> None:
    """A send_many that meets an earlier datagram's refusal raises it and sends none of its datagrams."""
    with refuse_next(connection, far_end) as again:
        with pytest.raises(ConnectionRefusedError):
            await connection.send_many([b"not sent"] * 3)
        await connection.send(b"wanted")
        assert again.recv(100) == b"wanted"
    assert connection.statistics().sent == 2


async def test_a_refusal_comes_before_what_came_after_it(connection: Connection, far_end: socket.socket) -> None:
    """receive raises an earlier refusal first, even if the server is back and has sent a datagram."""
    with refuse_next(connection, far_end) as again, trio.fail_after(5):
        again.sendto(b"answer", connection.local_address)
        with pytest.raises(ConnectionRefusedError):
            await connection.receive()
        assert await connection.receive() == b"answer"


async def test_refusals_one_after_the_other(connection: Connection, far_end: socket.socket) -> None:
    """A task that always receives gets an error for each refused datagram."""
    far_end.close()
    for _ in range(20):
        await connection.send(b"x")
        with trio.fail_after(5), pytest.raises(ConnectionRefusedError):
            await connection.receive()


def test_short_deadlines_do_not_starve(far_end: socket.socket) -> None:
    """A task that retries receive with a deadline that always passes meanwhile still gets all that has arrived."""
    clock = trio.testing.MockClock()
    seen: list[bytes] = []

    async def hurry() -> None:
        while True:
            clock.jump(1)  # whenever a task lets others run, the deadlines of all have passed
            await trio.lowlevel.checkpoint()

    async def main() -> None:
        async with await connect(*far_end.getsockname()) as connection, trio.open_nursery() as nursery:
            nursery.start_soon(hurry)
            for i in range(200):
                far_end.sendto(b"%d" % i, connection.local_address)
            for _ in range(220):
                with trio.move_on_after(0.5):
                    seen.append(await connection.receive())
            nursery.cancel_scope.cancel()

    trio.run(main, clock=clock)
    assert seen == [b"%d" % i for i in range(200)]


async def test_a_refusal_met_by_a_send_wakes_nobody_else(connection: Connection, far_end: socket.socket) -> None:
    """A refusal that a send has raised is not raised again by a receive that waits: that returns the next datagram."""
    received: list[bytes] = []

    async def receive() -> None:
        with trio.fail_after(5):
            received.append(await connection.receive())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        with refuse_next(connection, far_end) as again:
            with pytest.raises(ConnectionRefusedError):
                connection.send_nowait(b"not sent")
            again.sendto(b"answer", connection.local_address)
            await trio.testing.wait_all_tasks_blocked()
    assert received == [b"answer"]


async def test_a_refusal_reaches_a_receive_that_waits(connection: Connection, far_end: socket.socket) -> None:
    """A task that waits in receive raises a refusal that no send has met."""
    far_end.close()

    async def expect_refusal() -> None:
        with trio.fail_after(5), pytest.raises(ConnectionRefusedError):
            await connection.receive()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_refusal)
        await trio.testing.wait_all_tasks_blocked()
        await connection.send(b"1")
    assert connection.statistics().errors == {"ECONNREFUSED": 1}


async def test_receive_many(connection: Connection, far_end: socket.socket) -> None:
    """receive_many returns all that has arrived, in order, at least one datagram and at most 64."""
    wanted = [b"%d" % i for i in range(100)]
    for payload in wanted:
        far_end.sendto(payload, connection.local_address)
    seen = [await connection.receive_many() for _ in range(2)]
    assert [len(many) for many in seen] == [64, 36]
    assert [payload for many in seen for payload in many] == wanted
    assert connection.statistics().delivered == 100


async def test_an_error_of_the_kernels_is_raised(
    connection: Connection, far_end: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    """send raises an error of its own datagram, not of an earlier one, and counts it once."""
    connection.socket.shutdown(socket.SHUT_WR)
    with pytest.raises(BrokenPipeError):
        await connection.send(b"x")
    with pytest.raises(BrokenPipeError):
        connection.send_nowait(b"x")
    with pytest.raises(BrokenPipeError):
        await connection.send_many([b"x", b"y"])
    far_end.sendto(b"still here", connection.local_address)
    assert await connection.receive() == b"still here"
    statistics = connection.statistics()
    assert (statistics.sent, statistics.send_errors, statistics.receive_errors) == (0, 3, 0)
    assert statistics.errors == {"EPIPE": 3}
    assert "EPIPE" in caplog.text


async def test_local_address(far_end: socket.socket) -> None:
    """A connection can be bound to one of our addresses."""
    host, port = far_end.getsockname()
    async with await connect(host, port, local_address=("127.0.0.5", 0)) as connection:
        assert connection.local_address[0] == "127.0.0.5"
        await connection.send(b"x")
        assert far_end.recvfrom(100) == (b"x", connection.local_address)


async def test_connecting_fails_with_the_kernels_error() -> None:
    """A wrong port, an unknown name and an address that is not ours raise at the call."""
    with pytest.raises(TypeError, match="port"):
        await connect("127.0.0.1", "9")  # type: ignore[arg-type]
    for port in (0, -1, 65_536, 70_000):
        with pytest.raises(ValueError, match="port"):
            await connect("127.0.0.1", port)
    with pytest.raises(OSError, match=r".+"):
        await connect("no such host.invalid", 9)
    with pytest.raises(OSError, match=r".+") as info:
        await connect("127.0.0.1", 9, local_address=("192.0.2.1", 0))
    assert info.value.errno == errno.EADDRNOTAVAIL
    with pytest.raises(TypeError):
        await connect("127.0.0.1", 9, local_address=5)  # type: ignore[arg-type]


async def test_polling_and_sending_lets_others_run(connection: Connection, far_end: socket.socket) -> None:
    """A task that sends and receives without waiting yields at least once in 64 sends."""
    bystander = Bystander()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(bystander.run)
        await trio.lowlevel.checkpoint()
        before = bystander.turns
        for _ in range(640):
            far_end.sendto(b"x", connection.local_address)
            connection.receive_nowait()
            await connection.send(b"x")
        assert bystander.turns - before >= 9
        nursery.cancel_scope.cancel()


async def test_other_tasks_run_while_much_arrives(connection: Connection, far_end: socket.socket) -> None:
    """A task that always finds a datagram lets others run at least once in a batch of 64.

    Trio runs the tasks of each pass in random order, so the other task runs at least once in 128 datagrams.
    """
    bystander = Bystander()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(bystander.run)
        for _ in range(10):
            for _ in range(130):
                far_end.sendto(b"x", connection.local_address)
            before = bystander.turns
            for _ in range(130):
                await connection.receive()
            assert bystander.turns > before
        nursery.cancel_scope.cancel()
