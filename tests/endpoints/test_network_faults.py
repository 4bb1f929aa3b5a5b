"""Network errors as Linux itself reports them: packet filters, missing routes, small links, ICMP, no interface.

Two network namespaces, connected by a wire, play the server's machine and the clients' machine. A socket belongs to the
namespace in which it was opened, so the servers here run in this process as usual. Needs root, ip(8) and nft(8).
"""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio

from trio_udp import Client, Connection, Endpoint, Server, serve_endpoints
from trio_udp._endpoints import Address

from ..conftest import check_adds_up, echo
from ..namespaces import Machine, can_make_namespaces, inside, machines, run

if sys.platform != "linux":
    pytest.skip("needs Linux", allow_module_level=True)
if shutil.which("nft") is None:
    pytest.skip("needs nft", allow_module_level=True)
if not can_make_namespaces():
    pytest.skip("needs root and network namespaces", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("engine")

# Addresses for documentation. The clients' machine has several, one for each client; to the last of them the server's
# has no route, unless a test gives it one.
PORT = 53
OURS, OURS_TOO, OURS_IPV6, OURS_TOO_IPV6 = "192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"
ALICE, BOB, BOB_IPV6 = "192.0.2.11", "192.0.2.12", "2001:db8::12"
FAR = "198.51.100.13"

# From linux/in.h. Let no router, and not this machine, cut datagrams into fragments; tell of all errors.
IP_MTU_DISCOVER, IP_PMTUDISC_DO = 10, 2
IP_RECVERR = 11

# From linux/rtnetlink.h: the group that reports changes of interfaces.
RTMGRP_LINK = 1


@attrs.frozen
class FilteringMachine(Machine):
    """A machine with a packet filter."""

    def filter(self, hook: str, rule: str) -> None:
        """Add a rule of nftables for all incoming or outgoing packets."""
        chain = f"add table inet test; add chain inet test {hook} {{ type filter hook {hook} priority 0; }}"
        with inside(self.name):
            run("nft", f"{chain}; add rule inet test {hook} {rule}")

    def open_filters(self) -> None:
        with inside(self.name):
            run("nft", "flush", "ruleset")

    def count(self, counter: str) -> int:
        """Read a counter of the kernel, by its names in /proc/net/snmp: ``Ip FragOKs``."""
        protocol, name = counter.split()
        with inside(self.name):
            lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
        names, values = (line.split() for line in lines if line.startswith(f"{protocol}:"))
        return int(values[names.index(name)])


@attrs.frozen
class Network:
    """Two machines, each with an interface called ``wire``.

    Attributes:
      icmp: A raw socket on the server's machine, which gets a copy of each ICMP message that arrives there.
    """

    ours: FilteringMachine
    theirs: FilteringMachine
    icmp: socket.socket
    _sockets: list[socket.socket] = attrs.field(factory=list)

    def client(self, host: str, server: str = OURS) -> Peer:
        """Open a socket on the clients' machine."""
        sock = self.theirs.socket(host, family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._sockets.append(sock)
        return Peer(sock, (server, PORT))

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()

    async def until_up(self) -> None:
        """Wait until both ends of the wire are up."""
        for machine in (self.ours, self.theirs):
            with inside(machine.name):
                changes = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
            with changes, trio.fail_after(5):
                changes.bind((0, RTMGRP_LINK))
                while "state UP" not in machine.ip("link show wire"):
                    await trio.lowlevel.wait_readable(changes)
                    changes.recv(65_535)

    async def until_icmp(self) -> None:
        """Wait until an ICMP message has arrived at the server's machine."""
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(self.icmp)
        self.icmp.recv(65_535)

    def until_icmp_now(self) -> None:
        """Wait for an ICMP message like until_icmp, but without letting other tasks run."""
        self.icmp.settimeout(5)
        self.icmp.recv(65_535)
        self.icmp.setblocking(False)


@attrs.frozen
class Peer:
    """A client, as seen from the clients' machine."""

    socket: socket.socket
    server: Address

    def send(self, *payloads: bytes) -> None:
        """Send datagrams before the server runs again."""
        for payload in payloads:
            self.socket.sendto(payload, self.server)

    async def receive(self) -> bytes:
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(self.socket)
        return self.socket.recv(65_535)

    async def ask(self, *payloads: bytes) -> list[bytes]:
        """Send datagrams, and return the same number of answers."""
        self.send(*payloads)
        return [await self.receive() for _ in payloads]


@pytest.fixture
async def network() -> AsyncIterator[Network]:
    with machines("ours", "theirs") as made, ExitStack() as closing:
        ours, theirs = (FilteringMachine(machine.name) for machine in made)
        with inside(ours.name):
            icmp = closing.enter_context(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
        icmp.setblocking(False)
        network = Network(ours, theirs, icmp)
        closing.callback(network.close)
        ours.wire_to(theirs)
        # Let the server's machine accept datagrams from addresses to which it has no route.
        for setting in ("all", "wire"):
            ours.set(f"ipv4/conf/{setting}/rp_filter", 0)
        theirs.set("ipv4/icmp_ratelimit", 0)
        addresses = {ours: [OURS, OURS_TOO, OURS_IPV6, OURS_TOO_IPV6], theirs: [ALICE, BOB, BOB_IPV6, FAR]}
        for machine, hosts in addresses.items():
            for host in hosts:
                rest = "/64 nodad" if ":" in host else "/24"
                machine.ip(f"address add {host}{rest} dev wire")
            machine.ip("link set wire up")
        await network.until_up()
        yield network


Start = Callable[..., Awaitable[Server]]


@pytest.fixture
def start(network: Network, nursery: trio.Nursery) -> Start:
    """Start a server on the server's machine."""

    async def start(handler: Callable[[Client], Awaitable[object]] = echo, host: str = OURS) -> Server:
        sock = network.ours.socket(host, PORT, socket.AF_INET6 if ":" in host else socket.AF_INET)
        server: Server = await nursery.start(partial(serve_endpoints, handler, [Endpoint.from_socket(sock)]))
        return server

    return start


def client_at(server: Server, host: str) -> Client:
    (client,) = (client for client in server.clients if client.peer_address[0] == host)
    return client


def check(server: Server, *, received: int, sent: int, errors: dict[str, int]) -> None:
    """Check that the server has counted nothing else and dropped no datagram."""
    s = server.statistics()
    assert (s.received, s.delivered, s.sent, s.errors) == (received, received, sent, errors)
    assert (s.send_errors, s.receive_errors, s.handler_errors) == (sum(errors.values()), 0, 0)
    check_adds_up(server)


def check_client(client: Client, *, sent: int, errors: dict[str, int]) -> None:
    s = client.statistics()
    assert (s.sent, s.send_errors, s.errors) == (sent, sum(errors.values()), errors)


@pytest.mark.parametrize("host", [OURS, "0.0.0.0"])
async def test_a_packet_filter(network: Network, start: Start, host: str) -> None:
    """Replies that a packet filter drops count for their client. Others are answered, and later this client too."""
    server = await start(host=host)
    alice, bob = network.client(ALICE), network.client(BOB)
    network.ours.filter("output", f"ip daddr {ALICE} drop")
    for _ in range(3):
        alice.send(b"1", b"2")
        assert await bob.ask(b"1", b"2") == [b"1", b"2"]
    check(server, received=12, sent=6, errors={"EPERM": 6})
    check_client(client_at(server, ALICE), sent=0, errors={"EPERM": 6})
    check_client(client_at(server, BOB), sent=6, errors={})
    network.ours.open_filters()
    assert await alice.ask(b"3") == [b"3"]
    check(server, received=13, sent=7, errors={"EPERM": 6})


@pytest.mark.parametrize("host", [OURS, "0.0.0.0"])
@pytest.mark.parametrize(
    ("route", "error"),
    [
        ("none", "ENETUNREACH"),
        ("unreachable", "EHOSTUNREACH"),
        ("prohibit", "EACCES"),
        ("blackhole", "EINVAL"),
    ],
)
async def test_no_way_back(network: Network, start: Start, host: str, route: str, error: str) -> None:
    """A client that cannot be answered, real or forged, does not affect other clients."""
    server = await start(host=host)
    if route != "none":
        network.ours.ip(f"route add {route} {FAR}")
    far, bob = network.client(FAR), network.client(BOB)
    for _ in range(3):
        far.send(b"1", b"2")
        assert await bob.ask(b"1", b"2") == [b"1", b"2"]
    check(server, received=12, sent=6, errors={error: 6})
    check_client(client_at(server, FAR), sent=0, errors={error: 6})
    check_client(client_at(server, BOB), sent=6, errors={})
    network.ours.ip(f"route replace {FAR} dev wire")
    assert await far.ask(b"3") == [b"3"]


async def test_a_datagram_too_long_for_the_link(network: Network, start: Start) -> None:
    """A datagram too long for the link is not sent where fragments are forbidden; shorter ones beside it are."""

    async def handler(client: Client) -> None:
        async for _ in client:
            await client.send_many([b"short", bytes(1_000), b"too"])

    server = await start(handler)
    server.endpoints[0].socket.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
    network.ours.ip("link set wire mtu 576")
    alice = network.client(ALICE)
    assert await alice.ask(b"x", b"x") == [b"short", b"too"]
    assert [await alice.receive() for _ in range(2)] == [b"short", b"too"]
    check(server, received=2, sent=4, errors={"EMSGSIZE": 2})
    check_client(client_at(server, ALICE), sent=4, errors={"EMSGSIZE": 2})


async def test_replies_of_one_size_over_a_small_link(network: Network, start: Start) -> None:
    """Replies longer than the link's MTU arrive in fragments, not segments; other clients are answered as before."""
    replies = [b"%04d" % i * 250 for i in range(20)]

    async def handler(client: Client) -> None:
        async for _ in client:
            await client.send_many(replies)

    server = await start(handler)
    network.ours.ip("link set wire mtu 576")
    alice, bob = network.client(ALICE), network.client(BOB)
    for peer in (alice, bob):
        peer.send(b"x")
    for peer in (alice, bob):
        assert [await peer.receive() for _ in replies] == replies
    assert network.ours.count("Ip FragOKs") == 40
    check(server, received=2, sent=40, errors={})


@pytest.mark.parametrize("host", [OURS, "0.0.0.0"])
async def test_a_source_port_of_zero(network: Network, start: Start, host: str) -> None:
    """A datagram from port 0 is delivered; its reply is not sent, but counted for that client alone."""
    server = await start(host=host)
    alice, bob = network.client(ALICE), network.client(BOB)
    network.theirs.filter("output", f"ip saddr {ALICE} udp sport set 0")
    for _ in range(3):
        alice.send(b"1", b"2")
        assert await bob.ask(b"1", b"2") == [b"1", b"2"]
    check(server, received=12, sent=6, errors={"EDESTADDRREQ": 6})
    assert client_at(server, ALICE).peer_address == (ALICE, 0)
    check_client(client_at(server, ALICE), sent=0, errors={"EDESTADDRREQ": 6})
    check_client(client_at(server, BOB), sent=6, errors={})


ICMP = ["port-unreachable", "host-unreachable", "net-unreachable", "admin-prohibited"]


@pytest.mark.parametrize("answer", ICMP)
async def test_icmp_at_a_server(network: Network, start: Start, answer: str) -> None:
    """A server does not notice ICMP errors: it counts nothing, and all other clients are answered."""
    server = await start()
    alice, bob = network.client(ALICE), network.client(BOB)
    network.theirs.filter("input", f"ip daddr {ALICE} udp sport {PORT} reject with icmp type {answer}")
    for _ in range(3):
        alice.send(b"x")
        await network.until_icmp()
        assert await bob.ask(b"1", b"2") == [b"1", b"2"]
    check(server, received=9, sent=9, errors={})


async def test_icmp_at_a_server_that_asks_for_it(network: Network, start: Start) -> None:
    """With IP_RECVERR, a send to the next client may meet an error about another, and still leaves."""
    server = await start()
    server.endpoints[0].socket.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
    alice, bob = network.client(ALICE), network.client(BOB)
    assert await alice.ask(b"x") + await bob.ask(b"x") == [b"x"] * 2
    network.theirs.filter("input", f"ip daddr {ALICE} udp sport {PORT} reject with icmp type port-unreachable")
    for _ in range(5):
        client_at(server, ALICE).send_nowait(b"y")
        network.until_icmp_now()
        client_at(server, BOB).send_nowait(b"z")
        assert await bob.receive() == b"z"
    s = server.statistics()
    assert (s.sent, s.send_errors, s.errors) == (12, 0, {"ECONNREFUSED": 5})
    assert s.receive_errors == 5


async def test_clients_that_are_gone(network: Network, start: Start) -> None:
    """ICMP errors about replies to closed ports disturb neither the server nor its other clients."""
    server = await start()
    bob = network.client(BOB)
    for _ in range(5):
        gone = network.client(ALICE)
        gone.send(b"x")
        gone.socket.close()
        assert await bob.ask(b"y") == [b"y"]
        await network.until_icmp()
    assert await bob.ask(b"z") == [b"z"]
    check(server, received=11, sent=11, errors={})


@pytest.mark.parametrize("answer", ["port-unreachable", "host-unreachable", "admin-prohibited"])
async def test_icmp_at_a_connection(network: Network, answer: str) -> None:
    """A connection raises a refusal once, counts hard ICMP errors, and does not notice soft ones."""
    theirs = network.theirs.socket(BOB, PORT)
    network._sockets.append(theirs)
    network.theirs.filter("input", f"udp dport {PORT} reject with icmp type {answer}")
    sock = network.ours.socket(OURS)
    sock.connect((BOB, PORT))
    async with Connection.from_socket(sock) as connection:
        await connection.send(b"x")
        await network.until_icmp()
        if answer == "port-unreachable":
            with pytest.raises(ConnectionRefusedError):
                connection.receive_nowait()
        for _ in range(2):
            with pytest.raises(trio.WouldBlock):
                connection.receive_nowait()
        s = connection.statistics()
        told = {"port-unreachable": {"ECONNREFUSED": 1}, "admin-prohibited": {"EHOSTUNREACH": 1}}
        assert (s.sent, s.send_errors, s.errors) == (1, 0, told.get(answer, {}))
        network.theirs.open_filters()
        await connection.send(b"y")
        peer = trio.socket.from_stdlib_socket(theirs)
        with trio.fail_after(5):
            payload, address = await peer.recvfrom(100)
            assert payload == b"y"
            await peer.sendto(b"z", address)
            assert await connection.receive() == b"z"


async def test_a_packet_filter_at_a_connection(network: Network) -> None:
    """A connection raises the kernel's error about this datagram, each time; once the filter is gone it sends again."""
    theirs = network.theirs.socket(BOB, PORT)
    network._sockets.append(theirs)
    sock = network.ours.socket(OURS)
    sock.connect((BOB, PORT))
    network.ours.filter("output", f"ip daddr {BOB} drop")
    async with Connection.from_socket(sock) as connection:
        for _ in range(2):
            with pytest.raises(PermissionError):
                await connection.send(b"x")
        with pytest.raises(PermissionError):
            await connection.send_many([b"x", b"y"])
        s = connection.statistics()
        assert (s.sent, s.send_errors, s.receive_errors, s.errors) == (0, 3, 0, {"EPERM": 3})
        network.ours.open_filters()
        await connection.send(b"y")
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(theirs)
        assert theirs.recv(100) == b"y"


async def test_send_to_raises_the_kernels_error(network: Network, start: Start) -> None:
    """Server.send_to raises the kernel's error about its datagram; clients are answered as before."""
    server = await start()
    bob = network.client(BOB)
    with pytest.raises(OSError, match="unreachable"):
        await server.send_to(b"x", (FAR, PORT))
    network.ours.filter("output", f"ip daddr {ALICE} drop")
    with pytest.raises(PermissionError):
        server.send_to_nowait(b"x", (ALICE, PORT))
    assert await bob.ask(b"1") == [b"1"]
    check(server, received=1, sent=1, errors={"ENETUNREACH": 1, "EPERM": 1})


@pytest.mark.parametrize("host", [OURS, "0.0.0.0"])
async def test_an_interface_that_goes_down_and_up(network: Network, start: Start, host: str) -> None:
    """Datagrams to an interface that is down are counted as errors; later the same clients are answered."""
    server = await start(host=host)
    bob = network.client(BOB)
    assert await bob.ask(b"1") == [b"1"]
    for down in range(1, 3):
        network.ours.ip("link set wire down")
        await client_at(server, BOB).send_many([b"x"] * 10)
        network.ours.ip("link set wire up")
        await network.until_up()
        assert await bob.ask(b"2") == [b"2"]
        check(server, received=1 + down, sent=1 + down, errors={"ENETUNREACH": 10 * down})
        check_client(client_at(server, BOB), sent=1 + down, errors={"ENETUNREACH": 10 * down})


@pytest.mark.parametrize(
    ("everywhere", "host", "removed", "peer", "error"),
    [
        ("0.0.0.0", OURS, OURS_TOO, BOB, "ENETUNREACH"),
        ("::", OURS_IPV6, OURS_TOO_IPV6, BOB_IPV6, "EINVAL"),
    ],
)
async def test_a_local_address_that_is_removed(
    network: Network, start: Start, everywhere: str, host: str, removed: str, peer: str, error: str
) -> None:
    """Only clients that sent to a removed address cannot be answered, until the address is back."""
    server = await start(host=everywhere)
    lost, kept = network.client(peer, removed), network.client(peer, host)
    assert await lost.ask(b"1") + await kept.ask(b"1") == [b"1"] * 2
    length = 64 if ":" in host else 24
    network.ours.ip(f"address delete {removed}/{length} dev wire")
    to_lost, to_kept = sorted(server.clients, key=lambda client: client.local_address[0] != removed)
    for _ in range(3):
        await to_lost.send(b"2")
        await to_kept.send(b"3")
        assert await kept.receive() == b"3"
    check(server, received=2, sent=5, errors={error: 3})
    check_client(to_lost, sent=1, errors={error: 3})
    check_client(to_kept, sent=4, errors={})
    network.ours.add_address(f"{removed}/{length}", "wire")
    assert await lost.ask(b"4") == [b"4"]
