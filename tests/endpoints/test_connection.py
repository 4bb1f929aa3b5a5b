"""Connections over sockets of the caller's own, scoped peers, and the kernel's errors."""

from __future__ import annotations

import errno
import shutil
import socket
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import trio
import trio.testing

from trio_udp import Client, Connection, Endpoint, Server, connect, serve, serve_endpoints

from ..conftest import echo
from ..namespaces import can_make_namespaces, inside, machines, run

pytestmark = pytest.mark.usefixtures("engine")

needs_namespaces = pytest.mark.skipif(not can_make_namespaces(), reason="needs root and network namespaces")


@pytest.fixture
def far_end() -> Iterator[socket.socket]:
    """A plain socket to be connected to."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(5)
        yield sock


# Sockets that the caller opened.


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
    """Two Unix-domain datagram sockets that are connected to each other converse, though they have no addresses."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with theirs:
        async with Connection.from_socket(ours) as connection:
            await connection.send(b"x")
            assert theirs.recv(100) == b"x"
            theirs.send(b"y")
            assert await connection.receive() == b"y"


async def test_sockets_that_are_no_connection(far_end: socket.socket) -> None:
    """from_socket refuses an unconnected socket, a stream and an object that is no socket, and leaves them open."""
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


# Peers with a scope.


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_connecting_to_an_address_as_a_socket_gives_it(nursery: trio.Nursery, host: str) -> None:
    """connect(*address) works for the addresses of both families that sockets give."""
    server: Server = await nursery.start(partial(serve, echo, 0, host=host))
    async with await connect(*server.endpoints[0].local_address) as connection:
        assert connection.peer_address == server.endpoints[0].local_address
        await connection.send(b"x")
        with trio.fail_after(5):
            assert await connection.receive() == b"x"


@needs_namespaces
async def test_connecting_back_to_a_link_local_peer(nursery: trio.Nursery) -> None:
    """connect(*client.peer_address) reaches a peer that is link-local: its scope is part of the address."""
    peers: list[object] = []

    async def handler(client: Client) -> None:
        peers.append(client.peer_address)
        await echo(client)

    with machines("ours", "theirs") as [ours, theirs]:
        ours.ip(f"link add wire type veth peer name wire netns {theirs.name}")
        for machine, host in ((ours, "fe80::1"), (theirs, "fe80::2")):
            machine.ip("link set wire addrgenmode none")
            machine.ip("link set wire up")
            machine.ip(f"addr add {host}/64 dev wire nodad")
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


# receive_many, of both kinds of channel.


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
        seen: list[bytes] = []
        while len(seen) < 130:
            some = await connection.receive_many()
            assert 1 <= len(some) <= 64
            seen += some
        assert seen == [b"%d" % number for number in range(130)]
        assert connection.statistics().delivered == 131
    with pytest.raises(trio.ClosedResourceError):
        await connection.receive_many()


async def test_receive_many_of_a_client(nursery: trio.Nursery) -> None:
    """receive_many of a client returns what waits in its inbox, at most 64, and ends as receive does."""
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


# Refusals and errors.


@pytest.mark.parametrize("how", ["send", "send_nowait", "send_many", "receive", "receive_many", "receive_nowait"])
async def test_a_refusal_is_raised_once(far_end: socket.socket, how: str) -> None:
    """The next call of any kind raises a refusal, once; a send that raises it is not sent; the connection goes on."""
    address = far_end.getsockname()
    far_end.close()
    async with await connect(*address) as connection:
        await connection.send(b"refused")
        with pytest.raises(ConnectionRefusedError), trio.fail_after(5):
            await call(connection, how)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
            again.bind(address)
            again.settimeout(5)
            await connection.send(b"x")
            assert again.recv(100) == b"x"
            again.sendto(b"y", connection.local_address)
            with trio.fail_after(5):
                assert await connection.receive() == b"y"
        statistics = connection.statistics()
        assert (statistics.sent, statistics.send_errors, statistics.receive_errors) == (2, 0, 1)
        assert statistics.errors == {"ECONNREFUSED": 1}


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


# Buffers and options.


async def test_a_connection_asks_for_4_mib(far_end: socket.socket) -> None:
    """A connection asks for as large a receive buffer as a server, unless told otherwise."""
    async with await connect(*far_end.getsockname()) as connection:
        assert connection.statistics().receive_buffer_requested == 4_194_304
    async with await connect(*far_end.getsockname(), receive_buffer=65_536) as connection:
        statistics = connection.statistics()
        assert statistics.receive_buffer_requested == 65_536
        if sys.platform == "linux":
            assert statistics.receive_buffer == 65_536


async def test_from_socket_leaves_the_buffer_alone(far_end: socket.socket) -> None:
    """The receive buffer of a socket of the caller's own stays as it is."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100_000)
    before = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    sock.connect(far_end.getsockname())
    async with Connection.from_socket(sock) as connection:
        assert connection.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == before
        assert connection.statistics().receive_buffer_requested == 0


async def test_configure(far_end: socket.socket) -> None:
    """configure sees the socket before it is connected, may set any option, and its error closes the socket."""
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
