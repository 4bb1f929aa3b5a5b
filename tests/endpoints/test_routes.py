"""Routes: destinations, interfaces and other control messages, over both engines."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from typing import Any, TypeAlias

import attrs
import pytest
import trio

if sys.platform != "linux":
    pytest.skip("needs Linux", allow_module_level=True)

from trio_udp._endpoints._address import Address, host_bytes, network_of
from trio_udp._endpoints.engines import engine_for, network_getter
from trio_udp._endpoints.engines._engine import BATCH, Engine, Received
from trio_udp._endpoints.engines.pktinfo import UDP_GRO, UDP_SEGMENT

from ..namespaces import Machine, inside, machines, needs_namespaces

pytestmark = pytest.mark.usefixtures("engine")


GROUP, BROADCAST = "239.1.2.3", "127.255.255.255"
LOOPBACK = socket.if_nametoindex("lo")

# From asm-generic/socket.h and linux/in.h.
SO_TIMESTAMPNS, IP_RECVTTL, IP_TTL = 35, 12, 2
# By family: the level, the option, and the type of the message that it brings.
TIME_TO_LIVE = {
    socket.AF_INET: (socket.IPPROTO_IP, IP_RECVTTL, IP_TTL),
    socket.AF_INET6: (socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, socket.IPV6_HOPLIMIT),
}

Make: TypeAlias = Callable[..., Engine]


@pytest.fixture
async def closing() -> AsyncIterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
async def make(closing: ExitStack) -> Make:
    """Bind a socket, set its options, and make its engine."""

    def make(
        host: str = "127.0.0.1",
        *,
        connect: Address | None = None,
        options: Any = (),
        dual: bool = False,
        **keywords: Any,
    ) -> Engine:
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual)
        closing.callback(sock.close)
        sock.bind((host, 0))
        if connect is not None:
            sock.connect(connect)
        for level, option, value in options:
            sock.setsockopt(level, option, value)
        return engine_on(sock, closing, **keywords)

    return make


def engine_on(sock: socket.socket, closing: ExitStack, max_datagram_size: int = 65_535, shared: bool = False) -> Engine:
    engine = engine_for(trio.socket.from_stdlib_socket(sock), max_datagram_size, shared=shared)
    closing.callback(engine.close)
    return engine


@pytest.fixture
async def peer(closing: ExitStack) -> socket.socket:
    """A socket on loopback that may send to groups and broadcast addresses."""
    sock = closing.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sock.bind(("127.0.0.1", 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
    sock.settimeout(5)
    return sock


def join(engine: Engine, group: str = GROUP) -> None:
    membership = socket.inet_aton(group) + socket.inet_aton("127.0.0.1")
    engine.socket.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)


async def receive(engine: Engine, count: int = 1) -> list[Received]:
    received: list[Received] = []
    with trio.fail_after(5):
        while len(received) < count:
            batch: list[Received] = []
            if engine.receive(batch) and not batch:
                await engine.wait_readable()
            received += batch
    return received


async def route_of(engine: Engine) -> Any:
    ((_, route, _),) = await receive(engine)
    return route


def send_some(engine: Engine, outgoing: list[Any]) -> int:
    payloads, routes = zip(*outgoing, strict=True)
    return engine.send(payloads, [len(payload) for payload in payloads], routes)


def send_all(engine: Engine, outgoing: list[Any]) -> list[int]:
    """Send datagrams; return how many each call has taken."""
    taken: list[int] = []
    while sum(taken) < len(outgoing):
        taken.append(send_some(engine, outgoing[sum(taken) :]))
    return taken


@attrs.frozen
class Ends:
    """The addresses of a route."""

    peer: Any
    local: Any
    destination: Any
    interface: int | None


def ends(engine: Engine, route: Any) -> Ends:
    return Ends(
        engine.peer_address(route), engine.local_address(route), engine.destination(route), engine.interface(route)
    )


# Destinations


@pytest.mark.parametrize(("host", "destination"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.3")])
async def test_a_unicast_destination_is_the_local_address(
    make: Make, peer: socket.socket, host: str, destination: str
) -> None:
    """A datagram to one of our own addresses has that address as its destination, and no interface."""
    engine = make(host)
    own = (destination, engine.bound_address[1])
    peer.sendto(b"x", own)
    assert ends(engine, await route_of(engine)) == Ends(peer.getsockname(), own, own, None)


@pytest.mark.parametrize("destination", [GROUP, BROADCAST])
async def test_groups_and_broadcast_addresses_are_destinations(
    make: Make, peer: socket.socket, destination: str
) -> None:
    """A datagram to a group or a broadcast address has it as its destination; replies leave from our own address."""
    engine = make("0.0.0.0")
    join(engine)
    port = engine.bound_address[1]
    peer.sendto(b"x", (destination, port))
    route = await route_of(engine)
    assert ends(engine, route) == Ends(peer.getsockname(), ("127.0.0.1", port), (destination, port), LOOPBACK)
    send_all(engine, [(b"reply", route)])
    assert peer.recvfrom(100) == (b"reply", ("127.0.0.1", port))


@pytest.mark.parametrize("destination", [GROUP, BROADCAST])
async def test_a_socket_bound_to_a_group(make: Make, peer: socket.socket, destination: str) -> None:
    """A socket bound to a group or a broadcast address knows the interface, and replies from our own address."""
    engine = make(destination)
    if destination == GROUP:
        join(engine)
    port = engine.bound_address[1]
    peer.sendto(b"x", engine.bound_address)
    route = await route_of(engine)
    assert ends(engine, route) == Ends(peer.getsockname(), ("127.0.0.1", port), (destination, port), LOOPBACK)
    send_all(engine, [(b"reply", route)])
    assert peer.recvfrom(100) == (b"reply", ("127.0.0.1", port))


@pytest.mark.parametrize("destination", [GROUP, BROADCAST, "127.0.0.4"])
async def test_ipv4_destinations_of_a_dual_stack_socket(make: Make, peer: socket.socket, destination: str) -> None:
    """A dual-stack socket has mapped destinations, and replies from our own address."""
    engine = make("::", dual=True)
    join(engine)
    port = engine.bound_address[1]
    own = destination if destination == "127.0.0.4" else "127.0.0.1"
    peer.sendto(b"x", (destination, port))
    route = await route_of(engine)
    assert ends(engine, route) == Ends(
        ("::ffff:127.0.0.1", peer.getsockname()[1], 0, 0),
        (f"::ffff:{own}", port, 0, 0),
        (f"::ffff:{destination}", port, 0, 0),
        None if own == destination else LOOPBACK,
    )
    send_all(engine, [(b"reply", route)])
    assert peer.recvfrom(100) == (b"reply", (own, port))


async def test_each_destination_is_a_route_of_its_own(make: Make, peer: socket.socket) -> None:
    """Datagrams of one peer have equal routes if and only if they were sent to the same address."""
    engine = make("0.0.0.0")
    join(engine)
    routes = set()
    for _ in range(2):
        for host in ("127.0.0.1", "127.0.0.2", GROUP, BROADCAST):
            peer.sendto(b"x", (host, engine.bound_address[1]))
            routes.add(await route_of(engine))
    assert len(routes) == 4


# Routes to addresses that have not sent anything


@pytest.mark.parametrize(
    ("host", "dual", "peer_host", "own"),
    [
        ("127.0.0.1", False, "127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", False, "127.0.0.1", "127.0.0.5"),
        ("::1", False, "::1", "::1"),
        ("::", False, "::1", "::1"),
        ("::", True, "::1", "::1"),
        ("::", True, "::ffff:127.0.0.1", "::ffff:127.0.0.5"),
    ],
)
async def test_a_route_equals_that_of_the_answer(
    make: Make, closing: ExitStack, host: str, dual: bool, peer_host: str, own: str
) -> None:
    """The route to an address from one of ours equals the route of its answer."""
    engine = make(host, dual=dual)
    family = socket.AF_INET6 if peer_host == "::1" else socket.AF_INET
    other = closing.enter_context(socket.socket(family, socket.SOCK_DGRAM))
    other.bind((peer_host.removeprefix("::ffff:"), 0))
    other.settimeout(5)
    scope = (0, 0) if ":" in host else ()
    address: Any = (peer_host, other.getsockname()[1], *scope)
    local: Any = (own, engine.bound_address[1], *scope)
    route = engine.route(address, local)
    send_all(engine, [(b"question", route)])
    _, seen = other.recvfrom(100)
    assert seen[:2] == (own.removeprefix("::ffff:"), engine.bound_address[1])
    other.sendto(b"answer", seen)
    assert await route_of(engine) == route
    assert ends(engine, route) == Ends(address, local, local, None)


async def test_the_source_that_the_kernel_chooses(make: Make, peer: socket.socket) -> None:
    """source_for returns the address from which a datagram leaves, and with it the route of the answer."""
    for host in ("127.0.0.2", "0.0.0.0"):
        engine = make(host)
        own = engine.source_for(peer.getsockname())
        assert own == ("127.0.0.2" if host == "127.0.0.2" else "127.0.0.1", engine.bound_address[1])
        send_all(engine, [(b"question", engine.route(peer.getsockname()))])
        assert peer.recvfrom(100) == (b"question", own)
        peer.sendto(b"answer", own)
        assert await route_of(engine) == engine.route(peer.getsockname(), own)


async def test_other_local_addresses_are_refused(make: Make, peer: socket.socket) -> None:
    """A socket bound to one address sends only from it; no socket sends from another port or from a group."""
    for host, other in (("127.0.0.1", "127.0.0.2"), ("0.0.0.0", GROUP)):
        engine = make(host)
        port = engine.bound_address[1]
        engine.route(peer.getsockname(), (host, port))
        for wrong in ((other, port), ("127.0.0.1", port + 1 if port < 65_535 else 1)):
            with pytest.raises(ValueError, match="cannot send from"):
                engine.route(peer.getsockname(), wrong)


async def test_unix_domain_sockets(closing: ExitStack) -> None:
    """A Unix-domain datagram has paths as addresses, no interface, and a source that is not doubtful."""
    folder = closing.enter_context(tempfile.TemporaryDirectory())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIO_UDP_ENGINE", "")
        own, other = (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2))
        own.bind(os.path.join(folder, "own"))
        engine: Any = engine_on(own, closing)
    other.bind(os.path.join(folder, "other"))
    with other:
        other.sendto(b"x", own.getsockname())
        route = await route_of(engine)
        assert ends(engine, route) == Ends(other.getsockname(), own.getsockname(), own.getsockname(), None)
        assert route == engine.route(other.getsockname(), own.getsockname())
        assert not engine.doubtful_source(route)
        with pytest.raises(ValueError, match="cannot send from"):
            engine.route(other.getsockname(), os.path.join(folder, "other"))


async def test_files_passed_over_unix_domain_sockets_are_closed(closing: ExitStack) -> None:
    """A stranger that passes open files with its datagrams does not use up our file descriptors."""
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    with pytest.MonkeyPatch.context() as patch, other:
        patch.setenv("TRIO_UDP_ENGINE", "")
        engine = engine_on(own, closing)
        before = os.listdir("/proc/self/fd")
        socket.send_fds(other, [b"x"], [0, 1, 2])
        ((payload, _, ancillary),) = await receive(engine)
        assert (payload, len(ancillary)) == (b"x", 1)  # the credentials
        assert os.listdir("/proc/self/fd") == before


# Ancillary data


@pytest.mark.parametrize(
    ("host", "connected"),
    [("127.0.0.1", False), ("0.0.0.0", False), ("127.0.0.1", True), ("::1", False), ("::", False)],
)
async def test_ancillary_data_that_was_asked_for(make: Make, closing: ExitStack, host: str, connected: bool) -> None:
    """Options that are set before the engine is made add their control messages, and change nothing else."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sender = closing.enter_context(socket.socket(family, socket.SOCK_DGRAM))
    near = "::1" if ":" in host else "127.0.0.1"
    sender.bind((near, 0))
    level, option, kind = TIME_TO_LIVE[family]
    options = [(level, option, 1), (socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)]
    engine = make(host, connect=sender.getsockname() if connected else None, options=options)
    for payload in (b"1", b"2"):
        sender.sendto(payload, (near, engine.bound_address[1]))
    received = await receive(engine, 2)
    assert [payload for payload, _, _ in received] == [b"1", b"2"]
    for _, route, ancillary in received:
        assert [message[:2] for message in ancillary] == [(socket.SOL_SOCKET, SO_TIMESTAMPNS), (level, kind)]
        assert ends(engine, route).destination[:2] == (near, engine.bound_address[1])
        assert engine.peer_address(route) == sender.getsockname()
    assert engine.read_ahead == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_ancillary_data_is_empty_by_default(make: Make, peer: socket.socket, host: str) -> None:
    """Without such options a datagram has no ancillary data, even if the engine itself reads control messages."""
    engine = make(host)
    peer.sendto(b"x", ("127.0.0.1", engine.bound_address[1]))
    ((_, _, ancillary),) = await receive(engine)
    assert ancillary == ()


# Sending


async def test_sending_to_many_peers(make: Make, peer: socket.socket) -> None:
    """Datagrams to many peers, equal or not, arrive once and in order, and the counts add up."""
    engine = make()
    route = engine.route(peer.getsockname())
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_000_000)
    others = [engine.route(("127.0.0.1", 9 + i)) for i in range(40)]
    payloads = [b"%d" % i for i in range(150)] + [b"", b"", b"x" * 9_000, b"y" * 9_000, b"z"]
    outgoing = [(payload, route) for payload in payloads]
    for i, other in enumerate(others):
        outgoing.insert(4 * i, (b"other", other))
    taken = send_all(engine, outgoing)
    assert sum(taken) == len(outgoing)
    assert [peer.recv(65_535) for _ in payloads] == payloads


async def test_routes_that_are_equal_are_merged(make: Make, peer: socket.socket, engine: str) -> None:
    """Replies to equal routes leave as one message, although each received datagram has its own route object."""
    if engine != "linux":
        pytest.skip("the portable engine merges nothing")
    server = make()
    peer.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    for _ in range(8):
        peer.sendto(b"x", server.bound_address)
    received = await receive(server, 8)
    send_all(server, [(b"12", route) for _, route, _ in received] + [(b"3", received[0][1])])
    assert peer.recv(100) == b"12" * 8 + b"3"


async def test_nothing_is_taken_where_the_first_fails(make: Make, peer: socket.socket) -> None:
    """An error is about the first datagram; datagrams before a failing one are taken."""
    engine = make()
    good, bad = engine.route(peer.getsockname()), engine.route(("127.0.0.1", 0))
    assert send_some(engine, [(b"1", good), (b"2", bad), (b"3", good)]) == 1
    with pytest.raises(OSError, match="Invalid") as info:
        send_some(engine, [(b"2", bad), (b"3", good)])
    assert info.value.errno == errno.EINVAL
    assert send_some(engine, [(b"3", good)]) == 1
    assert [peer.recv(10) for _ in range(2)] == [b"1", b"3"]


# Sockets that other processes hold too


def send_coalesced(sock: socket.socket, address: Any, parts: list[bytes]) -> None:
    control = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", len(parts[0])))]
    sock.sendmsg([b"".join(parts)], control, 0, address)


PARTS = [b"%03d" % i for i in range(10)]


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize(("host", "connected"), [("127.0.0.1", False), ("0.0.0.0", False), ("127.0.0.1", True)])
async def test_a_shared_socket_keeps_its_options(
    make: Make, peer: socket.socket, host: str, connected: bool, before: int
) -> None:
    """On a shared socket UDP_GRO stays unchanged, during and after the engine; datagrams arrive singly either way."""
    options = [(socket.IPPROTO_UDP, UDP_GRO, before)]
    engine = make(host, connect=peer.getsockname() if connected else None, options=options, shared=True)
    with engine.socket.dup() as other:
        send_coalesced(peer, ("127.0.0.1", engine.bound_address[1]), PARTS)
        received = await receive(engine, 10)
        assert [payload for payload, _, _ in received] == PARTS
        assert {engine.peer_address(route) for _, route, _ in received} == {peer.getsockname()}
        assert engine.counts.received == 10
        assert other.getsockopt(socket.IPPROTO_UDP, UDP_GRO) == before
        engine.close()
        assert other.getsockopt(socket.IPPROTO_UDP, UDP_GRO) == before


async def test_more_than_a_batch_of_coalesced_datagrams(make: Make, peer: socket.socket) -> None:
    """Each batch has at most 64 datagrams; the others are read ahead, reported as such, and follow."""
    engine = make(options=[(socket.IPPROTO_UDP, UDP_GRO, 1)], shared=True)
    parts = [b"%02d" % i for i in range(50)]
    for _ in range(3):
        send_coalesced(peer, engine.bound_address, parts)
    with trio.fail_after(5):
        await engine.wait_readable()
    batches: list[list[Received]] = []
    while not batches or len(batches[-1]) == BATCH:
        batches.append([])
        engine.receive(batches[-1])
    assert [len(batch) for batch in batches] == [64, 64, 22]
    assert [payload for batch in batches for payload, _, _ in batch] == 3 * parts
    assert engine.read_ahead == 0


async def test_truncation_counts_single_datagrams(make: Make, peer: socket.socket) -> None:
    """max_datagram_size applies to each datagram, even if datagrams arrive coalesced."""
    engine = make(options=[(socket.IPPROTO_UDP, UDP_GRO, 1)], shared=True, max_datagram_size=3)
    send_coalesced(peer, engine.bound_address, [b"1234"] * 5)
    send_coalesced(peer, engine.bound_address, [b"123"] * 5)
    assert [payload for payload, _, _ in await receive(engine, 5)] == [b"123"] * 5
    assert (engine.counts.received, engine.counts.truncated) == (10, 5)


async def test_closing_one_of_two_engines_on_a_socket(closing: ExitStack, make: Make, peer: socket.socket) -> None:
    """Closing one engine of a socket leaves single datagrams to the other, both queued and later ones."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        leaving, staying = (engine_on(sock.dup(), closing) for _ in range(2))
        send_coalesced(peer, sock.getsockname(), PARTS)
        leaving.close()
        send_coalesced(peer, sock.getsockname(), PARTS)
        assert [payload for payload, _, _ in await receive(staying, 20)] == 2 * PARTS
        staying.close()
        assert sock.getsockopt(socket.IPPROTO_UDP, UDP_GRO) == 0
        sock.settimeout(5)
        send_coalesced(peer, sock.getsockname(), PARTS)
        assert [sock.recv(100) for _ in PARTS] == PARTS


# Python 3.15 warns of a fork beside other threads. An earlier test may have left one: Trio keeps an idle worker.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
async def test_a_fork_leaves_the_option_to_the_other_process(closing: ExitStack, peer: socket.socket) -> None:
    """Closing an engine in a forked process does not harm the engine of its parent on the same socket."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        engine = engine_on(sock.dup(), closing)
        send_coalesced(peer, sock.getsockname(), PARTS)
        child = os.fork()
        if not child:
            try:
                engine.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)  # noqa: ASYNC222  # it ends at once
        assert [payload for payload, _, _ in await receive(engine, 10)] == PARTS


# Sources


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
async def test_doubtful_sources(make: Make, host: str) -> None:
    """Watched ports, groups, 255.255.255.255 and unspecified addresses are doubtful; other addresses are not."""
    engine = make(host)
    engine.watch_ports(frozenset({7, 4_660}))
    hosts: dict[str, bool] = {"192.0.2.1": False, "223.0.0.1": False, "0.0.0.0": True, "0.1.2.3": True, GROUP: True}
    hosts["255.255.255.255"] = True
    if ":" in host:
        hosts = {f"::ffff:{ipv4}": doubtful for ipv4, doubtful in hosts.items()}
        hosts |= {"2001:db8::1": False, "fe80::1": False, "::1": False, "::": True, "ff02::1": True}
    harmless, ends = ("2001:db8::2", (0, 0)) if ":" in host else ("192.0.2.2", ())
    for source, doubtful in hosts.items():
        for port in (7, 4_660, 8, 13_330):  # 13,330 is 4,660 in the other byte order
            route = engine.route((source, port, *ends))
            is_doubtful = doubtful or port in (7, 4_660)
            assert engine.doubtful_source(route) == is_doubtful, (source, port)
            for others in (0, 1, 20):
                fine = [engine.route((harmless, 1_000 + other, *ends)) for other in range(others)]
                assert engine.doubtful_sources([*fine, route, *fine]) == is_doubtful, (source, port)


@pytest.mark.parametrize(("ipv4_bits", "ipv6_bits"), [(24, 56), (32, 128), (20, 60), (8, 3)])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
async def test_networks_of_routes(make: Make, host: str, ipv4_bits: int, ipv6_bits: int) -> None:
    """A rate limit sees the first bits of a peer's address; those of an IPv4 address in every form of a route."""
    engine = make(host)
    network = network_getter(engine, ipv4_bits, ipv6_bits)
    hosts = ["192.0.2.77", "223.255.129.1"]
    for source in [*(f"::ffff:{ipv4}" for ipv4 in hosts), "2001:db8:77:1234::1"] if ":" in host else hosts:
        address: Any = (source, 9, 0, 0) if ":" in host else (source, 9)
        assert network(engine.route(address)) == network_of(host_bytes(address), ipv4_bits, ipv6_bits)


async def test_networks_of_the_routes_of_a_connected_socket(make: Make, peer: socket.socket) -> None:
    """A connected socket has one peer, and so one network."""
    engine = make(connect=peer.getsockname())
    assert network_getter(engine, 24, 56)(engine.route(peer.getsockname())) == b"\x7f\0\0"


async def test_hosts_of_this_machine(make: Make) -> None:
    """All loopback addresses are ours; groups, unspecified and foreign addresses are not."""
    ipv4, ipv6 = make("127.0.0.1"), make("::1", dual=True)
    ours = ["127.0.0.1", "127.9.9.9"]
    foreign = ["192.0.2.77", "0.0.0.0", GROUP, "255.255.255.255"]
    assert [host for host in ours + foreign if ipv4.is_own_host((host, 7))] == ours
    hosts = ["::1", "::ffff:127.0.0.1", "2001:db8::77", "::", "ff02::1", "::ffff:192.0.2.77"]
    assert [host for host in hosts if ipv6.is_own_host((host, 7, 0, 0))] == hosts[:2]


async def test_broadcast_addresses(make: Make) -> None:
    """The kernel's demand for SO_BROADCAST reveals a broadcast address; the engine knows whether the option is set."""
    engine, ipv6 = make(), make("::1", dual=True)
    hosts = [BROADCAST, "255.255.255.255", "127.0.0.1", GROUP, "192.0.2.77"]
    assert [host for host in hosts if engine.is_broadcast((host, 7))] == hosts[:2]
    assert ipv6.is_broadcast((f"::ffff:{BROADCAST}", 7, 0, 0))
    assert not ipv6.is_broadcast(("::1", 7, 0, 0))
    assert not engine.allows_broadcast()
    assert make(options=[(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)]).allows_broadcast()


# Two machines with two wires between them


@pytest.fixture
def wired() -> Iterator[tuple[Machine, Machine]]:
    """Machines with interfaces ``one`` and ``two``, which have the same link-local addresses and groups."""
    with machines("ours", "theirs") as (ours, theirs):
        for wire, network in (("one", 1), ("two", 2)):
            ours.wire_to(theirs, wire)
            for machine, number in ((ours, 1), (theirs, 2)):
                machine.ip(f"address add 192.0.{network}.{number}/24 brd + dev {wire}")
                machine.ip(f"address add 169.254.{network}.{number}/24 scope link dev {wire}")
                machine.ip(f"address add 2001:db8:{network}::{number}/64 nodad dev {wire}")
                machine.set(f"ipv6/conf/{wire}/accept_dad", 0)
                machine.ip(f"link set {wire} up")
                machine.ip(f"address add fe80::{number}/64 nodad dev {wire}")
        yield ours, theirs


def take_over(machine: Machine, closing: ExitStack, host: str, groups: Any = ()) -> Engine:
    """Make an engine on a machine, in groups (address, interface)."""
    sock = machine.socket(host, family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    closing.callback(sock.close)
    for group, interface in groups:
        index = struct.pack("=I", machine.index(interface))
        if ":" in group:
            sock.setsockopt(
                socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, socket.inet_pton(socket.AF_INET6, group) + index
            )
        else:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + bytes(4) + index)
    with inside(machine.name):  # where engines ask the kernel about addresses
        return engine_on(sock, closing)


@needs_namespaces
@pytest.mark.parametrize("wire", ["one", "two"])
@pytest.mark.parametrize("kind", ["group", "broadcast", "link-local", "unicast", "255.255.255.255"])
async def test_ipv4_interfaces(wired: tuple[Machine, Machine], closing: ExitStack, wire: str, kind: str) -> None:
    """Replies leave on the interface that the datagram arrived on, from our address on that network."""
    ours, theirs = wired
    number = {"one": 1, "two": 2}[wire]
    engine = take_over(ours, closing, "0.0.0.0", [(GROUP, "one"), (GROUP, "two")])
    port = engine.bound_address[1]
    near = f"169.254.{number}.2" if kind == "link-local" else f"192.0.{number}.2"
    peer = closing.enter_context(theirs.socket(near))
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, wire.encode())
    own = f"169.254.{number}.1" if kind == "link-local" else f"192.0.{number}.1"
    destination = {"group": GROUP, "broadcast": f"192.0.{number}.255", "255.255.255.255": kind}.get(kind, own)
    peer.sendto(b"x", (destination, port))
    route = await route_of(engine)
    index = None if kind == "unicast" else ours.index(wire)
    assert ends(engine, route) == Ends(peer.getsockname(), (own, port), (destination, port), index)
    send_all(engine, [(b"reply", route)])
    with trio.fail_after(5):
        await trio.lowlevel.wait_readable(peer)
    assert peer.recvfrom(100) == (b"reply", (own, port))
    if destination == own:
        assert engine.route(peer.getsockname(), (own, port)) == route


@needs_namespaces
@pytest.mark.parametrize("wire", ["one", "two"])
@pytest.mark.parametrize("destination", ["ff02::1234", "ff05::1234", "fe80::1", "2001:db8::"])
@pytest.mark.parametrize("bound", ["::", "destination"])
async def test_ipv6_interfaces(
    wired: tuple[Machine, Machine], closing: ExitStack, wire: str, destination: str, bound: str
) -> None:
    """The same link-local address or group on two interfaces is two routes, each with its own interface for replies."""
    ours, theirs = wired
    number = {"one": 1, "two": 2}[wire]
    if destination == "2001:db8::":
        destination = f"2001:db8:{number}::1"
    groups = [(destination, "one"), (destination, "two")] if destination[0:2] == "ff" else []
    scoped = destination[:4] in ("fe80", "ff02")
    index = ours.index(wire)
    engine = take_over(
        ours, closing, bound if bound == "::" else f"{destination}%{wire}" if scoped else destination, groups
    )
    port = engine.bound_address[1]
    near = f"2001:db8:{number}::2" if destination[:4] in ("2001", "ff05") else f"fe80::2%{wire}"
    peer = closing.enter_context(theirs.socket(near, family=socket.AF_INET6))
    peer.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, theirs.index(wire))
    peer.sendto(b"x", (destination, port, 0, theirs.index(wire)))
    route = await route_of(engine)
    source = (near.partition("%")[0], peer.getsockname()[1], 0, index if "%" in near else 0)
    to = (destination, port, 0, index if scoped else 0)
    group = destination[:2] == "ff"
    local = engine.bound_address if group else to
    assert ends(engine, route) == Ends(source, local, to, None if destination[0] == "2" else index)
    send_all(engine, [(b"reply", route)])
    with trio.fail_after(5):
        await trio.lowlevel.wait_readable(peer)
    payload, seen = peer.recvfrom(100)
    assert (payload, seen[1]) == (b"reply", port)
    if not group:
        assert seen[0] == destination
        assert engine.route(source, to) == route


@needs_namespaces
async def test_one_group_on_two_interfaces(wired: tuple[Machine, Machine], closing: ExitStack) -> None:
    """A peer address that sends to a group on two links has a route for each."""
    ours, theirs = wired
    engine = take_over(ours, closing, "::", [("ff02::1234", "one"), ("ff02::1234", "two"), ("ff02::5", "one")])
    peer = closing.enter_context(theirs.socket("::", family=socket.AF_INET6))
    routes = set()
    for group, wire in (("ff02::1234", "one"), ("ff02::1234", "two"), ("ff02::5", "one"), ("ff02::1234", "one")):
        peer.sendto(b"x", (group, engine.bound_address[1], 0, theirs.index(wire)))
        route = await route_of(engine)
        routes.add(route)
        assert (engine.destination(route)[0], engine.interface(route)) == (group, ours.index(wire))
    assert len(routes) == 3


@needs_namespaces
async def test_a_link_local_ipv4_bind(wired: tuple[Machine, Machine], closing: ExitStack) -> None:
    """A socket bound to an address in 169.254/16 knows the interface of that address."""
    ours, theirs = wired
    engine = take_over(ours, closing, "169.254.2.1")
    peer = closing.enter_context(theirs.socket("169.254.2.2"))
    peer.sendto(b"x", engine.bound_address)
    route = await route_of(engine)
    own = engine.bound_address
    assert ends(engine, route) == Ends(peer.getsockname(), own, own, ours.index("two"))
    assert engine.route(peer.getsockname()) == engine.route(peer.getsockname(), own) == route
