"""The whole server over real sockets: addresses, sizes, binding, and behaviour of the kernel."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import tempfile
import types
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import attrs
import pytest
import trio
import trio.testing

import trio_udp
from trio_udp import Client, Endpoint, Server, serve, serve_endpoints
from trio_udp._endpoints import numeric_address
from trio_udp._endpoints.engines.pktinfo import IP_PKTINFO

from ..conftest import StartServer, check_adds_up, echo, port_of, steps_in

pytestmark = pytest.mark.usefixtures("engine")

needs_pktinfo = pytest.mark.skipif(IP_PKTINFO is None, reason="platform has no IP_PKTINFO")


async def tell_addresses(client: Client) -> None:
    async for _ in client:
        await client.send(f"{client.peer_address} to {client.local_address}".encode())


@contextmanager
def peer(server: Server, host: str = "127.0.0.1", source: str | None = None) -> Iterator[socket.socket]:
    """A plain connected socket, which only receives answers from the address that it sends to."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        if source is not None:
            sock.bind((source, 0))
        sock.connect((host, port_of(server)))
        sock.settimeout(5)
        yield sock


async def ask(sock: socket.socket, payload: bytes) -> bytes:
    sock.send(payload)
    return await trio.to_thread.run_sync(sock.recv, 65_536)


async def test_echo(start_on_loopback: StartServer) -> None:
    """Datagrams of any length come back whole: empty, short, and the longest that UDP can carry."""
    server = await start_on_loopback()
    with peer(server) as sock:
        for payload in (b"hello", b"", bytes(range(256)) * 200, bytes(65_507)):
            assert await ask(sock, payload) == payload
    check_adds_up(server)
    (endpoint,) = server.endpoints
    statistics = endpoint.statistics()
    assert statistics == trio_udp.EndpointStatistics(
        received=4,
        bytes_received=5 + 51_200 + 65_507,
        truncated=0,
        sent=4,
        bytes_sent=5 + 51_200 + 65_507,
        receive_errors=0,
        send_errors=0,
        errors={},
        receive_buffer=statistics.receive_buffer,
        receive_buffer_requested=statistics.receive_buffer_requested,
    )


async def test_server_statistics(start_on_loopback: StartServer) -> None:
    """The server's counters say what happened to each datagram."""
    server = await start_on_loopback()
    with peer(server) as sock:
        await ask(sock, b"hello")
    nothing: Any = dict.fromkeys([field.name for field in attrs.fields(trio_udp.ServerStatistics)], 0)
    one: Any = {"received": 1, "bytes_received": 5, "delivered": 1, "sent": 1, "bytes_sent": 5}
    expected = trio_udp.ServerStatistics(**{**nothing, **one, "clients": 1, "clients_started": 1, "errors": {}})
    assert server.statistics() == expected


async def test_all_interfaces(start_on_loopback: StartServer) -> None:
    """host=None serves IPv4 and IPv6, on the same port, from one endpoint each."""
    server = await start_on_loopback(tell_addresses, host=None)
    addresses = [endpoint.local_address for endpoint in server.endpoints]
    assert addresses == [("0.0.0.0", port_of(server)), ("::", port_of(server), 0, 0)]
    for host in ("127.0.0.1", "::1"):
        with peer(server, host) as sock:
            answer = f"{sock.getsockname()} to {sock.getpeername()}"
            assert (await ask(sock, b"x")).decode() == answer


@needs_pktinfo
@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "127.4.5.6"])
async def test_replies_leave_from_the_address_that_was_written_to(start_on_loopback: StartServer, host: str) -> None:
    """A server bound to all addresses replies from the address the client sent to, so a connected client gets it."""
    server = await start_on_loopback(tell_addresses, host=None)
    with peer(server, host) as sock:
        assert (await ask(sock, b"x")).decode() == f"{sock.getsockname()} to {(host, port_of(server))}"


@needs_pktinfo
async def test_one_stranger_at_two_of_our_addresses_is_two_clients(start_on_loopback: StartServer) -> None:
    """A peer that sends to another of our addresses is another client."""
    server = await start_on_loopback(tell_addresses, host="0.0.0.0")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(5)
        for host in ("127.0.0.2", "127.0.0.3"):
            sock.sendto(b"x", (host, port_of(server)))
            _, source = await trio.to_thread.run_sync(sock.recvfrom, 100)
            assert source == (host, port_of(server))
    assert sorted(client.local_address[0] for client in server.clients) == ["127.0.0.2", "127.0.0.3"]
    assert len({client.peer_address for client in server.clients}) == 1


@needs_pktinfo
async def test_ipv4_clients_of_a_dual_stack_socket(nursery: trio.Nursery) -> None:
    """A dual-stack socket from the caller works, with IPv4 clients mapped into IPv6."""
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", 0))
    endpoint = Endpoint.from_socket(sock)
    server = await nursery.start(partial(serve_endpoints, tell_addresses, [endpoint]))
    with peer(server, "127.0.0.2") as client:
        answer = await ask(client, b"x")
        own, port = client.getsockname()[1], port_of(server)
        assert answer.decode() == f"('::ffff:127.0.0.1', {own}, 0, 0) to ('::ffff:127.0.0.2', {port}, 0, 0)"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(5)
        await server.send_to(b"unasked", ("::ffff:127.0.0.1", sock.getsockname()[1], 0, 0))
        assert sock.recvfrom(100) == (b"unasked", ("127.0.0.1", port))


@needs_pktinfo
async def test_the_longest_payload_depends_on_the_peer(nursery: trio.Nursery) -> None:
    """Over IPv6 a datagram carries 65,527 bytes, over IPv4 65,507, also from a dual-stack socket."""
    limits = {"127.0.0.1": 65_507, "::1": 65_527}
    codes = []

    async def handler(client: Client) -> None:
        await client.receive()
        longest = limits["::1" if client.peer_address[0] == "::1" else "127.0.0.1"]
        await client.send(bytes(longest))
        with pytest.raises(OSError, match="too long") as info:
            await client.send(bytes(longest + 1))
        codes.append(info.value.errno)

    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", 0))
    server = await nursery.start(partial(serve_endpoints, handler, [Endpoint.from_socket(sock)]))
    for host, longest in limits.items():
        with peer(server, host) as client:
            assert len(await ask(client, b"x")) == longest
    assert codes == [errno.EMSGSIZE] * 2


@needs_pktinfo
@pytest.mark.skipif(sys.platform != "linux", reason="option numbers of Linux")
async def test_other_control_messages_do_not_mislead(start_on_loopback: StartServer) -> None:
    """With options that add other control messages, replies still leave from the address the client sent to."""
    server = await start_on_loopback(tell_addresses, host="0.0.0.0")
    sock = server.endpoints[0].socket
    for level, option in ((socket.SOL_SOCKET, 75), (socket.SOL_SOCKET, 29), (socket.IPPROTO_IP, 12)):
        sock.setsockopt(level, option, 1)  # SO_RCVMARK, SO_TIMESTAMP, IP_RECVTTL
        for host in ("127.0.0.1", "127.0.0.2"):
            with peer(server, host) as client:
                assert (await ask(client, b"x")).decode() == f"{client.getsockname()} to {(host, port_of(server))}"


@needs_pktinfo
async def test_datagrams_that_arrived_before_the_server(nursery: trio.Nursery) -> None:
    """Datagrams that already wait in an inherited socket belong to the same client as those that follow."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("0.0.0.0", 0))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as early:
        early.connect(("127.0.0.2", sock.getsockname()[1]))
        early.settimeout(5)
        early.send(b"1")
        early.send(b"2")
        server = await nursery.start(partial(serve_endpoints, echo, [Endpoint.from_socket(sock)]))
        early.send(b"3")
        assert [await trio.to_thread.run_sync(early.recv, 100) for _ in range(3)] == [b"1", b"2", b"3"]
    assert [client.local_address for client in server.clients] == [("127.0.0.2", port_of(server))]


@pytest.mark.skipif(sys.platform != "linux", reason="IP_RECVERR is Linux's")
async def test_an_unread_error_queue_causes_no_busy_loop(start_on_loopback: StartServer) -> None:
    """A server does not spin if the user has set IP_RECVERR on its socket."""
    server = await start_on_loopback()
    server.endpoints[0].socket.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR
    with peer(server) as gone:
        gone.send(b"x")
    await trio.testing.wait_all_tasks_blocked()
    assert await steps_in(0.3) < 300
    with peer(server) as sock:
        assert await ask(sock, b"still there?") == b"still there?"


async def test_truncated_datagrams_are_never_delivered(start_on_loopback: StartServer) -> None:
    """A datagram longer than max_datagram_size is counted and dropped whole; one of that length is delivered."""
    for host in ("127.0.0.1", "0.0.0.0"):
        server = await start_on_loopback(host=host, max_datagram_size=100)
        with peer(server) as sock:
            sock.send(bytes(101))
            sock.send(bytes(5_000))
            assert await ask(sock, bytes(100)) == bytes(100)
        statistics = server.statistics()
        assert (statistics.received, statistics.truncated, statistics.delivered) == (3, 2, 1)
        assert statistics.clients_started == 1
        check_adds_up(server)


async def test_many_at_once_arrive_in_order(start_on_loopback: StartServer) -> None:
    """A burst from many clients, longer than a batch, comes back complete and in order."""
    server = await start_on_loopback(receive_buffer=4_000_000)
    wanted = [b"%d" % number for number in range(20)]
    with trio.fail_after(10), ExitStack() as sockets:
        opened = [sockets.enter_context(peer(server)) for _ in range(10)]
        for payload in wanted:
            for sock in opened:
                sock.send(payload)
        for sock in opened:
            assert [await trio.to_thread.run_sync(sock.recv, 100) for _ in wanted] == wanted
    check_adds_up(server)


async def test_a_client_that_is_gone_affects_no_other(start_on_loopback: StartServer) -> None:
    """Replies to a closed port end neither the server nor another conversation."""
    server = await start_on_loopback()
    with peer(server) as stays:
        for _ in range(20):
            with peer(server) as leaves:
                leaves.send(b"x")
        assert await ask(stays, b"still there?") == b"still there?"


def send_forged(server: Server, source: tuple[str, int], payload: bytes) -> None:
    """Send a UDP datagram with any source address and port; only root may."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as raw:
        raw.bind((source[0], 0))
        header = struct.pack("!HHHH", source[1], port_of(server), 8 + len(payload), 0)
        raw.sendto(header + payload, ("127.0.0.1", 0))


async def test_source_port_zero_is_survived(start_on_loopback: StartServer) -> None:
    """A datagram from port 0 is delivered; its reply is counted as a send error, and other clients are not affected."""
    server = await start_on_loopback()
    try:
        send_forged(server, ("127.0.0.1", 0), b"x")
    except PermissionError:
        pytest.skip("only root may send from port 0")
    with peer(server) as sock:
        assert await ask(sock, b"y") == b"y"
    statistics = server.statistics()
    assert (statistics.delivered, statistics.sent, statistics.send_errors) == (2, 1, 1)
    assert statistics.errors == {"EDESTADDRREQ": 1}
    check_adds_up(server)


async def test_port_in_use(start_on_loopback: StartServer) -> None:
    """A second server on the same port fails with the kernel's error, and leaves nothing open."""
    server = await start_on_loopback()
    with pytest.raises(OSError, match="in use") as info:
        await serve(echo, port_of(server), host="127.0.0.1")
    assert info.value.errno == errno.EADDRINUSE


async def test_a_failed_bind_closes_opened_sockets() -> None:
    """If the port of one family is taken, the socket of the other family does not stay bound."""
    # A port of both families, so that no other program has the one that is closed.
    both = {endpoint.local_address[0]: endpoint for endpoint in await trio_udp.open_endpoints(0)}
    await both["0.0.0.0"].aclose()
    async with both["::"] as taken:
        port = taken.local_address[1]
        with pytest.raises(OSError, match="in use"):
            await trio_udp.open_endpoints(port, host=None)
        (free,) = await trio_udp.open_endpoints(port, host="127.0.0.1")
        await free.aclose()


async def test_reuse_port(start_on_loopback: StartServer, nursery: trio.Nursery) -> None:
    """Two servers share a port with reuse_port, and together they answer every client."""
    first = await start_on_loopback(reuse_port=True)
    endpoints = await trio_udp.open_endpoints(port_of(first), host="127.0.0.1", reuse_port=True)
    second = await nursery.start(partial(serve_endpoints, echo, endpoints))
    for i in range(30):
        with peer(first) as sock:
            assert await ask(sock, b"%d" % i) == b"%d" % i
    assert first.statistics().received + second.statistics().received == 30


async def test_buffers(start_on_loopback: StartServer) -> None:
    """receive_buffer and send_buffer set the socket's options."""
    server = await start_on_loopback(receive_buffer=20_000, send_buffer=30_000)
    sock = server.endpoints[0].socket
    # Linux doubles the requested size; see socket(7).
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) in (20_000, 40_000)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) in (30_000, 60_000)


async def test_names_are_resolved() -> None:
    """A host name is bound at each of its addresses, at one port."""
    endpoints = await trio_udp.open_endpoints(0, host="localhost")
    found = await trio.socket.getaddrinfo("localhost", 0, type=socket.SOCK_DGRAM)
    assert {endpoint.local_address[0] for endpoint in endpoints} == {address[0] for *_, address in found}
    assert len({endpoint.local_address[1] for endpoint in endpoints}) == 1
    for endpoint in endpoints:
        await endpoint.aclose()
        await endpoint.aclose()
        assert repr(endpoint) == f"<trio_udp.Endpoint {endpoint.local_address} closed>"


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (TypeError, {"port": "9999"}),
        (TypeError, {"port": None}),
        (ValueError, {"port": 65_536}),
        (ValueError, {"port": -1}),
        (TypeError, {"max_datagram_size": 1.5}),
        (ValueError, {"max_datagram_size": 0}),
        (ValueError, {"max_datagram_size": 65_536}),
        (TypeError, {"receive_buffer": "1M"}),
        (ValueError, {"send_buffer": 0}),
        (OSError, {"host": "no such host.invalid"}),
        (OSError, {"host": "192.0.2.1"}),
    ],
)
async def test_wrong_arguments(error: type[Exception], arguments: dict[str, Any]) -> None:
    """A mistake in the arguments of open_endpoints raises at the call."""
    with pytest.raises(error):
        await trio_udp.open_endpoints(**{"port": 0, **arguments})


class KernelWithout:
    """Opens sockets like a kernel that lacks something in IPv6."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, socket_error: int = 0, bind_error: int = 0) -> None:
        class Socket(socket.socket):
            def __init__(self, family: int, type: int) -> None:
                if family == socket.AF_INET6 and socket_error:
                    raise OSError(socket_error, "no such family")
                super().__init__(family, type)

        self.bind_failures = sys.maxsize  # after this many, binding succeeds

        def open_socket(family: int, type: int) -> socket.socket:
            if family == socket.AF_INET6 and bind_error and self.bind_failures:
                self.bind_failures -= 1
                return Unbindable(family, type)
            with Socket(family, type) as checked:
                return socket.socket(fileno=checked.detach())

        class Unbindable(socket.socket):
            def bind(self, address: Any) -> None:
                raise OSError(bind_error, "cannot be bound")

        kernel = types.SimpleNamespace(**vars(socket))
        kernel.socket = open_socket
        monkeypatch.setattr(trio_udp._endpoints._open, "socket", kernel)


@pytest.mark.parametrize(
    ("host", "error"),
    [
        (None, {"socket_error": errno.EAFNOSUPPORT}),
        ("localhost", {"socket_error": errno.EAFNOSUPPORT}),
        ("localhost", {"bind_error": errno.EADDRNOTAVAIL}),
    ],
)
async def test_a_machine_without_ipv6(monkeypatch: pytest.MonkeyPatch, host: str | None, error: dict[str, int]) -> None:
    """A family that the machine lacks is skipped, unless it is the only one asked for."""
    KernelWithout(monkeypatch, **error)
    (endpoint,) = await trio_udp.open_endpoints(0, host=host)
    assert endpoint.local_address[0] in ("0.0.0.0", "127.0.0.1")
    await endpoint.aclose()
    with pytest.raises(OSError, match=r"family|bound") as info:
        await trio_udp.open_endpoints(0, host="::1")
    assert info.value.errno in error.values()


async def test_a_port_that_is_free_in_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Port 0 tries another port if the first is taken in the other family, but not for ever."""
    kernel = KernelWithout(monkeypatch, bind_error=errno.EADDRINUSE)
    with pytest.raises(OSError, match="bound") as info:
        await trio_udp.open_endpoints(0)
    assert info.value.errno == errno.EADDRINUSE
    kernel.bind_failures = 3
    first, second = await trio_udp.open_endpoints(0)
    assert first.local_address[1] == second.local_address[1]
    for endpoint in (first, second):
        await endpoint.aclose()


@pytest.mark.parametrize("blocking", [True, False])
async def test_a_socket_that_someone_else_bound(nursery: trio.Nursery, blocking: bool) -> None:
    """from_socket takes over a bound socket, in blocking mode or not, and the server closes it."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.setblocking(blocking)
    endpoint = Endpoint.from_socket(sock)
    assert endpoint.local_address == sock.getsockname()
    server = await nursery.start(partial(serve_endpoints, echo, [endpoint]))
    with peer(server) as client:
        assert await ask(client, b"x") == b"x"
    server.stop()
    await trio.testing.wait_all_tasks_blocked()
    assert sock.fileno() == -1


async def test_a_trio_socket(nursery: trio.Nursery) -> None:
    """from_socket takes a Trio socket, and endpoint.socket returns it."""
    sock = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)
    await sock.bind(("127.0.0.1", 0))
    endpoint = Endpoint.from_socket(sock)
    assert endpoint.socket is sock
    server = await nursery.start(partial(serve_endpoints, echo, [endpoint]))
    with peer(server) as client:
        assert await ask(client, b"x") == b"x"


async def test_a_connected_socket(nursery: trio.Nursery) -> None:
    """A connected socket can be served; it has one client."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far_end:
        far_end.bind(("127.0.0.1", 0))
        far_end.settimeout(5)
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect(far_end.getsockname())
        far_end.connect(sock.getsockname())
        server = await nursery.start(partial(serve_endpoints, tell_addresses, [Endpoint.from_socket(sock)]))
        own, its = far_end.getsockname(), far_end.getpeername()
        assert (await ask(far_end, b"x")).decode() == f"{own} to {its}"
        assert repr(server) == f"<trio_udp.Server on {its} with 1 clients>"
    # The closed port counts as an error, and the server goes on.
    (client,) = server.clients
    for _ in range(3):
        await client.send(b"refused")
        await trio.testing.wait_all_tasks_blocked()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far_end:
        far_end.bind(own)
        far_end.connect(its)
        far_end.settimeout(5)
        assert (await ask(far_end, b"x")).decode() == f"{own} to {its}"
    assert set(server.statistics().errors) == {"ECONNREFUSED"}


async def test_sockets_that_cannot_be_served() -> None:
    """from_socket says what is wrong with an unbound socket, a stream socket, or an object that is not a socket."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, pytest.raises(ValueError, match="not bound"):
        Endpoint.from_socket(sock)
    with socket.socket() as sock, pytest.raises(ValueError, match="datagram"):
        Endpoint.from_socket(sock)
    with pytest.raises(TypeError, match="socket"):
        Endpoint.from_socket(5)  # type: ignore[arg-type]


async def test_closing_the_socket_under_a_running_server() -> None:
    """When its socket is closed under it, the server ends with ClosedResourceError and does not spin."""
    (endpoint,) = await trio_udp.open_endpoints(0, host="127.0.0.1")

    async def handler(client: Client) -> None:
        await client.receive()
        endpoint.socket.close()
        await trio.sleep_forever()

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(10):
            sock.sendto(b"x", endpoint.local_address)
    await expect_closed(partial(serve_endpoints, handler, [endpoint]))


async def expect_closed(serving: Callable[[], Awaitable[None]]) -> None:
    with trio.fail_after(5), pytest.raises(trio.ClosedResourceError):
        await serving()


async def test_a_receive_that_waits_when_the_endpoint_is_closed(start_on_loopback: StartServer) -> None:
    """Closing an endpoint on which nothing arrives wakes its loop."""
    (endpoint,) = await trio_udp.open_endpoints(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_closed, partial(serve_endpoints, echo, [endpoint]))
        await trio.testing.wait_all_tasks_blocked()
        await endpoint.aclose()


async def test_cancelling_leaves_nothing_open() -> None:
    """Cancelling serve frees its port."""
    async with trio.open_nursery() as nursery:
        server = await nursery.start(partial(serve, echo, 0))
        nursery.cancel_scope.cancel()
    for endpoint in await trio_udp.open_endpoints(port_of(server)):
        await endpoint.aclose()


async def test_closing_the_file_descriptor_itself() -> None:
    """If its file descriptor is closed by number, the server ends, and does not touch a new file with that number."""
    (endpoint,) = await trio_udp.open_endpoints(0, host="127.0.0.1")
    number = endpoint.socket.fileno()

    async def handler(client: Client) -> None:
        await client.receive()
        os.dup2(other.fileno(), number)  # the number belongs to another file now
        await client.send(b"x")
        await trio.sleep_forever()

    with (
        tempfile.TemporaryFile() as other,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        sock.sendto(b"1", endpoint.local_address)
        sock.sendto(b"2", endpoint.local_address)
        await expect_closed(partial(serve_endpoints, handler, [endpoint]))
        os.close(number)  # still open, because it is not ours
        assert endpoint.closed


async def test_send_to_passes_over_closed_endpoints(nursery: trio.Nursery) -> None:
    """If one of two endpoints of a family is closed, the other one sends."""
    first, second = [(await trio_udp.open_endpoints(0, host="127.0.0.1"))[0] for _ in range(2)]
    server: Server = await nursery.start(partial(serve_endpoints, echo, [first, second]))
    await first.aclose()
    await trio.testing.wait_all_tasks_blocked()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(5)
        await server.send_to(b"news", sock.getsockname())
        assert await trio.to_thread.run_sync(sock.recvfrom, 100) == (b"news", second.local_address)


async def test_send_to_needs_a_socket_for_it(nursery: trio.Nursery) -> None:
    """Of a Unix-domain, a connected and a bound endpoint, send_to chooses the one that can send to the address."""
    unix = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
    ):
        unix.bind(os.path.join(folder, "server"))
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(5)
        other.bind(("127.0.0.1", 0))
        connected = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        connected.connect(other.getsockname())
        endpoints = [Endpoint.from_socket(unix), Endpoint.from_socket(connected)]
        endpoints += await trio_udp.open_endpoints(0, host="127.0.0.1")
        server: Server = await nursery.start(partial(serve_endpoints, echo, endpoints))
        await server.send_to(b"news", sock.getsockname())
        assert await trio.to_thread.run_sync(sock.recvfrom, 100) == (b"news", endpoints[2].local_address)


async def test_numeric_addresses() -> None:
    """The scope of a link-local address can be given by name or by number."""
    index = socket.if_nametoindex("lo")
    for address in (("fe80::1%lo", 9), ("fe80::1", 9, 0, index), ("fe80::1%lo", 9, 0, 0)):
        assert numeric_address(address) == ("fe80::1", 9, 0, index)
