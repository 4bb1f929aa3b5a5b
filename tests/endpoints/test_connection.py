"""Connections, the client side, over connected sockets. test_engines.py tests them with every engine."""

from __future__ import annotations

import errno
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial

import pytest
import trio
import trio.testing

import trio_udp
from trio_udp import Client, Connection, Endpoint, Server, connect, serve, serve_endpoints

from ..conftest import Bystander, echo, plain_socket
from ..namespaces import inside, link_local_machines, machines, needs_namespaces, run

pytestmark = pytest.mark.usefixtures("engine")


@pytest.fixture
def far_end() -> Iterator[socket.socket]:
    """A plain socket for a connection to connect to."""
    with plain_socket("127.0.0.1") as sock:
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


# Sockets that the caller opened


@pytest.mark.parametrize("of_trio", [False, True])
async def test_from_socket(far_end: socket.socket, of_trio: bool) -> None:
    """A connected socket of the standard library or of Trio becomes a connection, which owns it."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect(far_end.getsockname())
    local_address = sock.getsockname()
    async with Connection.from_socket(trio.socket.from_stdlib_socket(sock) if of_trio else sock) as connection:
        assert connection.peer_address == far_end.getsockname()
        assert connection.local_address == local_address
        await connection.send(b"x")
        assert far_end.recvfrom(100) == (b"x", local_address)
        far_end.sendto(b"y", local_address)
        assert await connection.receive() == b"y"
        assert connection.statistics().received == connection.statistics().sent == 1
    assert sock.fileno() == -1 or connection.socket.fileno() == -1


@pytest.mark.skipif(sys.platform == "win32", reason="Unix-domain sockets")
async def test_from_a_socket_pair() -> None:
    """Two connected Unix-domain datagram sockets can exchange datagrams, though they have no addresses."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with theirs:
        async with Connection.from_socket(ours) as connection:
            await connection.send(b"x")
            assert theirs.recv(100) == b"x"
            theirs.send(b"y")
            assert await connection.receive() == b"y"


async def test_sockets_that_cannot_be_connections(far_end: socket.socket) -> None:
    """from_socket refuses an unconnected socket, a stream and an object that is not a socket, and leaves them open."""
    with pytest.raises(ValueError, match="not a connected socket"):
        Connection.from_socket(far_end)
    assert far_end.fileno() != -1
    with pytest.raises(TypeError):
        Connection.from_socket(far_end.fileno())  # type: ignore[arg-type]
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with left, right, pytest.raises(ValueError, match="datagram"):
        Connection.from_socket(left)


async def test_a_connection_of_a_peer_that_has_spoken_first(far_end: socket.socket) -> None:
    """A connection receives datagrams that arrived before it was made from its socket."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect(far_end.getsockname())
    far_end.sendto(b"early", sock.getsockname())
    async with Connection.from_socket(sock) as connection:
        assert await connection.receive() == b"early"


# Addresses


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_connecting_to_an_address_as_a_socket_gives_it(nursery: trio.Nursery, host: str) -> None:
    """connect(*address) works for the addresses of both families, in the form that sockets return."""
    server: Server = await nursery.start(partial(serve, echo, 0, host=host))
    async with await connect(*server.endpoints[0].local_address) as connection:
        assert connection.peer_address == server.endpoints[0].local_address
        await connection.send(b"x")
        with trio.fail_after(5):
            assert await connection.receive() == b"x"


@needs_namespaces
async def test_connecting_back_to_a_link_local_peer(nursery: trio.Nursery) -> None:
    """connect(*client.peer_address) reaches a link-local peer, because the address includes its scope."""
    peers: list[object] = []

    async def handler(client: Client) -> None:
        peers.append(client.peer_address)
        await echo(client)

    with link_local_machines() as (ours, theirs):
        endpoint = Endpoint.from_socket(ours.socket("::", family=socket.AF_INET6))
        server: Server = await nursery.start(serve_endpoints, handler, [endpoint])
        with theirs.socket("fe80::2%wire", family=socket.AF_INET6) as sock:
            address = ("fe80::1", endpoint.local_address[1], 0, theirs.index("wire"))
            sock.sendto(b"x", address)
            with trio.fail_after(5):
                while not peers:
                    await trio.lowlevel.checkpoint()
            assert peers == [("fe80::2", sock.getsockname()[1], 0, ours.index("wire"))]
            with inside(ours.name):
                back = await connect(*peers[0])  # type: ignore[misc]
            async with back:
                assert back.peer_address == peers[0]
                await back.send(b"back")
                sock.settimeout(5)
                seen = {await trio.to_thread.run_sync(sock.recv, 100) for _ in range(2)}
                assert seen == {b"x", b"back"}  # x is the echo
        server.stop()


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


# Receiving, and fairness to other tasks


async def test_receive_nowait(connection: Connection, far_end: socket.socket) -> None:
    """receive_nowait returns what has arrived or raises WouldBlock."""
    with pytest.raises(trio.WouldBlock):
        connection.receive_nowait()
    for payload in (b"a", b"b"):
        far_end.sendto(payload, connection.local_address)
    assert [connection.receive_nowait(), await connection.receive()] == [b"a", b"b"]


async def test_receive_many_of_a_connection(far_end: socket.socket) -> None:
    """receive_many waits for one datagram, and then returns all that have arrived: at most 64, in order."""
    async with await connect(*far_end.getsockname()) as connection:
        async with trio.open_nursery() as nursery:
            many: list[list[bytes]] = []

            async def receive() -> None:
                many.append(await connection.receive_many())

            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            far_end.sendto(b"", connection.local_address)
        assert many == [[b""]]
        for number in range(130):
            far_end.sendto(b"%d" % number, connection.local_address)
        seen = [await connection.receive_many() for _ in range(3)]
        assert [len(some) for some in seen] == [64, 64, 2]
        assert [payload for some in seen for payload in some] == [b"%d" % number for number in range(130)]
        assert connection.statistics().delivered == 131
    with pytest.raises(trio.ClosedResourceError):
        await connection.receive_many()


async def test_receive_many_of_a_client(nursery: trio.Nursery) -> None:
    """receive_many of a client returns the datagrams in its inbox, at most 64, and ends as receive does."""
    seen: list[list[bytes]] = []
    over = trio.Event()

    async def handler(client: Client) -> None:
        await go.wait()
        try:
            while True:
                seen.append(await client.receive_many())
        except trio.EndOfChannel:
            over.set()

    go = trio.Event()
    server: Server = await nursery.start(partial(serve, handler, 0, host="127.0.0.1"))
    async with await connect(*server.endpoints[0].local_address) as connection:
        await connection.send_many([b"%d" % number for number in range(100)])
        with trio.fail_after(5):
            while server.statistics().received < 100:
                await trio.lowlevel.checkpoint()
            go.set()
            while server.statistics().waiting:
                await trio.lowlevel.checkpoint()
            server.stop()
            await over.wait()
    assert [len(some) for some in seen] == [64, 36]
    assert [payload for some in seen for payload in some] == [b"%d" % number for number in range(100)]
    assert server.statistics().delivered == 100


def test_short_deadlines_do_not_starve(far_end: socket.socket) -> None:
    """A task that retries receive with a deadline that always passes still gets all datagrams that have arrived."""
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


# Refusals


def refuse_next(connection: Connection, far_end: socket.socket) -> socket.socket:
    """Make the connection's next send meet a refusal, and bind the peer's port again; return the new peer."""
    address = far_end.getsockname()
    far_end.close()
    connection.send_nowait(b"refused")
    again = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    again.settimeout(5)
    again.bind(address)
    return again


async def call(connection: Connection, how: str) -> None:
    match how:
        case "send":
            await connection.send(b"1")
        case "send_nowait":
            connection.send_nowait(b"1")
        case "send_many":
            await connection.send_many([b"1", b"2", b"3"])
        case "receive":
            await connection.receive()
        case "receive_many":
            await connection.receive_many()
        case "receive_nowait":
            connection.receive_nowait()


@pytest.mark.parametrize("how", ["send", "send_nowait", "send_many", "receive", "receive_many", "receive_nowait"])
async def test_a_refusal_is_raised_once(connection: Connection, far_end: socket.socket, how: str) -> None:
    """The next call of any kind raises a refusal, once. A send that raises it sends nothing; the connection goes on."""
    with refuse_next(connection, far_end) as again, trio.fail_after(5):
        with pytest.raises(ConnectionRefusedError):
            await call(connection, how)
        await connection.send(b"x")
        assert again.recv(100) == b"x"
        again.sendto(b"y", connection.local_address)
        assert await connection.receive() == b"y"
    statistics = connection.statistics()
    assert (statistics.sent, statistics.send_errors, statistics.receive_errors) == (2, 0, 1)
    assert statistics.errors == {"ECONNREFUSED": 1}


async def test_an_earlier_refusal_comes_before_a_later_datagram(connection: Connection, far_end: socket.socket) -> None:
    """receive raises an earlier refusal first, even if the server is back and has sent a datagram."""
    with refuse_next(connection, far_end) as again, trio.fail_after(5):
        again.sendto(b"answer", connection.local_address)
        with pytest.raises(ConnectionRefusedError):
            await connection.receive()
        assert await connection.receive() == b"answer"


async def test_refusals_one_after_the_other(connection: Connection, far_end: socket.socket) -> None:
    """A task that always receives gets one error for each refused datagram."""
    far_end.close()
    for _ in range(20):
        await connection.send(b"x")
        with trio.fail_after(5), pytest.raises(ConnectionRefusedError):
            await connection.receive()


async def test_a_refusal_that_a_send_raised_is_not_raised_again(connection: Connection, far_end: socket.socket) -> None:
    """A refusal that a send has raised is not raised by a waiting receive, which returns the next datagram."""
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
    """A waiting receive raises a refusal that no send has met."""
    far_end.close()

    async def expect_refusal() -> None:
        with trio.fail_after(5), pytest.raises(ConnectionRefusedError):
            await connection.receive()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_refusal)
        await trio.testing.wait_all_tasks_blocked()
        await connection.send(b"1")
    assert connection.statistics().errors == {"ECONNREFUSED": 1}


# Other errors


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


@needs_namespaces
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("how", ["send", "send_nowait", "send_many"])
async def test_an_error_that_repeats_is_raised(family: socket.AddressFamily, how: str) -> None:
    """A missing route to the peer is raised by each call, and counted once for each."""
    with machines("alone") as [alone]:
        alone.ip("link add wire type veth peer name other")
        alone.ip("link set wire up")
        alone.ip("link set other up")
        mine, peer, size = ("192.0.2.1", "192.0.2.9", "24")
        if family == socket.AF_INET6:
            mine, peer, size = ("2001:db8::1", "2001:db8::9", "64 nodad")
        length, *flags = size.split()
        alone.ip(f"addr add {mine}/{length} dev wire {' '.join(flags)}")
        with inside(alone.name):
            connection = await connect(peer, 9)
        async with connection:
            await connection.send(b"x")
            alone.ip("link set wire down")
            for _ in range(2):
                with pytest.raises(OSError, match="unreachable"):
                    await call(connection, how)
            statistics = connection.statistics()
            assert (statistics.sent, statistics.send_errors, statistics.receive_errors) == (1, 2, 0)
            assert statistics.errors == {"ENETUNREACH": 2}


@needs_namespaces
@pytest.mark.skipif(shutil.which("nft") is None, reason="needs nft")
@pytest.mark.parametrize("how", ["send", "send_nowait", "send_many"])
async def test_an_error_that_goes_away_is_counted(how: str) -> None:
    """An error that is gone at the second try is counted, not raised, and the datagrams of the call are sent."""
    with machines("alone") as [alone]:
        with inside(alone.name):
            rule = "udp dport 9 reject with icmp type admin-prohibited"
            chain = "add table inet t; add chain inet t in { type filter hook input priority 0; }"
            run("nft", f"{chain}; add rule inet t in {rule}")
            connection = await connect("127.0.0.1", 9)
        async with connection:
            await connection.send(b"rejected")
            with inside(alone.name):
                run("nft", "flush", "ruleset")
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
                    peer.bind(("127.0.0.1", 9))
                    peer.settimeout(5)
                    await call(connection, how)
                    sent = 3 if how == "send_many" else 1
                    assert [peer.recv(100) for _ in range(sent)] == [b"1", b"2", b"3"][:sent]
            statistics = connection.statistics()
            assert (statistics.sent, statistics.send_errors, statistics.receive_errors) == (1 + sent, 0, 1)
            assert statistics.errors == {"EHOSTUNREACH": 1}


async def test_a_datagram_that_is_too_long_is_not_sent(far_end: socket.socket) -> None:
    """A payload over 65,507 bytes raises EMSGSIZE before anything of its call is sent."""
    async with await connect(*far_end.getsockname()) as connection:
        with pytest.raises(OSError, match=r".+") as info:
            await connection.send_many([b"x", bytes(65_508)])
        assert info.value.errno == errno.EMSGSIZE
        assert connection.statistics().sent == 0


# Buffers and options


async def test_a_connection_asks_for_4_mib(far_end: socket.socket) -> None:
    """A connection requests as large a receive buffer as a server does, unless told otherwise."""
    async with await connect(*far_end.getsockname()) as connection:
        assert connection.statistics().receive_buffer_requested == 4_194_304
    async with await connect(*far_end.getsockname(), receive_buffer=65_536) as connection:
        statistics = connection.statistics()
        assert statistics.receive_buffer_requested == 65_536
        if sys.platform == "linux":
            assert statistics.receive_buffer == 65_536


async def test_from_socket_leaves_the_buffer_alone(far_end: socket.socket) -> None:
    """from_socket does not change the receive buffer of the caller's socket."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100_000)
    before = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    sock.connect(far_end.getsockname())
    async with Connection.from_socket(sock) as connection:
        assert connection.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == before
        assert connection.statistics().receive_buffer_requested == 0


async def test_configure(far_end: socket.socket) -> None:
    """configure gets the socket before it is connected, and may set any option; its error closes the socket."""
    seen: list[socket.socket] = []

    def configure(sock: socket.socket) -> None:
        seen.append(sock)
        with pytest.raises(OSError, match=r".+"):
            sock.getpeername()
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 7)

    async with await connect(*far_end.getsockname(), configure=configure) as connection:
        assert connection.socket.getsockopt(socket.IPPROTO_IP, socket.IP_TTL) == 7
    assert len(seen) == 1

    def fail(sock: socket.socket) -> None:
        seen.append(sock)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await connect(*far_end.getsockname(), configure=fail)
    assert seen[1].fileno() == -1
