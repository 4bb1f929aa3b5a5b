"""Groups and broadcast over real sockets: joining, leaving, sending, and replies on the right interface of two."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

if sys.platform != "linux":
    pytest.skip("needs Linux", allow_module_level=True)

import trio_udp
from trio_udp import Client, Datagram, Endpoint, Server, open_endpoints, serve_endpoints
from trio_udp._endpoints import engines

from ..conftest import check_adds_up, echo
from ..namespaces import Machine, inside, machines, needs_namespaces

pytestmark = pytest.mark.usefixtures("engine")

GROUP, OTHER_GROUP, GROUP_IPV6, SITE_GROUP_IPV6 = "239.1.2.3", "239.1.2.4", "ff02::1234", "ff05::1234"
SSM, SSM_IPV6 = "232.1.2.3", "ff35::1234"
WIRES = ["one", "two"]
NUMBERS = {"one": 1, "two": 2}


@pytest.fixture
async def closing() -> AsyncIterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@attrs.frozen
class Network:
    """Two machines with wires ``one`` and ``two`` between them. On each wire, ours has address 1, theirs 2 and 3."""

    ours: Machine
    theirs: Machine
    closing: ExitStack

    def endpoint(
        self, host: str = "0.0.0.0", port: int = 0, *, dual: bool = False, broadcast: bool = False
    ) -> Endpoint:
        """Open an endpoint on our machine. Enter that machine for all later look-ups of addresses."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with inside(self.ours.name):
            sock = socket.socket(family, socket.SOCK_DGRAM)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, broadcast)
            sock.bind((host, port))
            endpoint = Endpoint.from_socket(sock)
        self.closing.callback(endpoint.close)
        return endpoint

    def peer(self, wire: str, host: str | None = None, *, ipv6: bool = False, port: int = 0) -> Peer:
        """Open a socket on their machine, at its address on a wire. It sends to groups on this wire."""
        number = NUMBERS[wire]
        host = host or (f"2001:db8:{number}::2" if ipv6 else f"192.0.{number}.2")
        sock = self.closing.enter_context(
            self.theirs.socket(host, port, socket.AF_INET6 if ":" in host else socket.AF_INET)
        )
        index = self.theirs.index(wire)
        if ":" in host:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        else:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, struct.pack("@8xI", index))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, wire.encode())
        return Peer(sock, wire, index)


@attrs.frozen
class Peer:
    """A socket on their machine."""

    socket: socket.socket
    wire: str
    index: int

    def send(self, payload: bytes, host: str, port: int) -> None:
        scope = (0, self.index if host.startswith(("ff02", "fe80")) else 0) if ":" in host else ()
        self.socket.sendto(payload, (host, port, *scope))

    async def receive(self) -> tuple[bytes, Any]:
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(self.socket)
        payload, address = self.socket.recvfrom(65_535)
        return payload, address

    def join(self, group: str) -> None:
        if ":" in group:
            membership = socket.inet_pton(socket.AF_INET6, group) + struct.pack("@I", self.index)
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, membership)
        else:
            membership = socket.inet_aton(group) + struct.pack("@4xI", self.index)
            self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)


def wire_up(ours: Machine, theirs: Machine, *, same_network: bool = False) -> None:
    """Connect two machines by two wires. With ``same_network`` both wires have only 169.254/16 over IPv4."""
    for wire, number in NUMBERS.items():
        ours.wire_to(theirs, wire)
        for machine, hosts in ((ours, [1]), (theirs, [2, 3])):
            for setting in ("all", wire):
                machine.set(f"ipv4/conf/{setting}/rp_filter", 0)
            machine.set(f"ipv6/conf/{wire}/accept_dad", 0)
            machine.ip(f"link set {wire} addrgenmode none")
            for host in hosts:
                if same_network:
                    machine.ip(f"address add 169.254.{number}.{host}/16 scope link dev {wire}")
                else:
                    machine.ip(f"address add 192.0.{number}.{host}/24 brd + dev {wire}")
                machine.ip(f"address add 2001:db8:{number}::{host}/64 nodad dev {wire}")
            machine.ip(f"link set {wire} up")
            machine.ip(f"address add fe80::{hosts[0]}/64 nodad dev {wire}")
    for machine in (ours, theirs):
        machine.wait_until_up(*WIRES)


@pytest.fixture(scope="module")
def wired() -> Iterator[list[Machine]]:
    with machines("ours", "theirs") as (ours, theirs):
        wire_up(ours, theirs)
        yield [ours, theirs]


@pytest.fixture
def network(wired: list[Machine], closing: ExitStack) -> Network:
    """A network that the test does not change."""
    ours, theirs = wired
    return Network(ours, theirs, closing)


@pytest.fixture
def own_network(closing: ExitStack) -> Network:
    """A network that the test may change."""
    ours, theirs = closing.enter_context(machines("our-own", "their-own"))
    wire_up(ours, theirs)
    return Network(ours, theirs, closing)


@pytest.fixture(scope="module")
def wired_alike() -> Iterator[list[Machine]]:
    with machines("ours-alike", "theirs-alike") as (ours, theirs):
        wire_up(ours, theirs, same_network=True)
        yield [ours, theirs]


async def heard(endpoint: Endpoint, peers: list[Peer], group: str) -> list[tuple[str, str]]:
    """Let each peer send to a group; return the hosts and wires from which the endpoint received that.

    Each peer then sends to the endpoint itself, which arrives after its datagram to the group.
    """
    port = endpoint.local_address[1]
    for peer in peers:
        own = f"2001:db8:{NUMBERS[peer.wire]}::1" if ":" in group else f"192.0.{NUMBERS[peer.wire]}.1"
        peer.send(peer.wire.encode(), group, port)
        peer.send(b"end", own, port)
    datagrams: list[Datagram] = []
    ends = 0
    with trio.fail_after(5):
        while ends < len(peers):
            datagram = await endpoint.receive()
            if datagram.payload == b"end":
                ends += 1
            else:
                datagrams.append(datagram)
    assert all(datagram.destination[0].removeprefix("::ffff:") == group for datagram in datagrams)
    return [(datagram.peer_address[0].removeprefix("::ffff:"), datagram.payload.decode()) for datagram in datagrams]


# Joining and leaving


@needs_namespaces
@pytest.mark.parametrize("group", [GROUP, GROUP_IPV6, SITE_GROUP_IPV6])
@pytest.mark.parametrize("named_by", ["name", "index", "address"])
async def test_a_group_is_joined_on_an_interface(network: Network, group: str, named_by: str) -> None:
    """An endpoint receives from a group on the interfaces on which it has joined, however they are named."""
    ipv6 = ":" in group
    endpoint = network.endpoint("::" if ipv6 else "0.0.0.0")
    peers = [network.peer(wire, ipv6=ipv6) for wire in WIRES]
    hosts = [(peer.socket.getsockname()[0], peer.wire) for peer in peers]

    def interface(wire: str) -> int | str:
        own = f"2001:db8:{NUMBERS[wire]}::1" if ipv6 else f"192.0.{NUMBERS[wire]}.1"
        ways: dict[str, int | str] = {"name": wire, "index": network.ours.index(wire), "address": own}
        return ways[named_by]

    with inside(network.ours.name):
        assert await heard(endpoint, peers, group) == []
        endpoint.join_group(group, interface=interface("two"))
        assert await heard(endpoint, peers, group) == hosts[1:]
        endpoint.join_group(group, interface=interface("one"))
        assert await heard(endpoint, peers, group) == hosts
        endpoint.leave_group(group, interface=interface("two"))
        assert await heard(endpoint, peers, group) == hosts[:1]
        endpoint.leave_group(group, interface=interface("one"))
        assert await heard(endpoint, peers, group) == []


@needs_namespaces
@pytest.mark.parametrize("group", [SSM, SSM_IPV6])
async def test_a_group_of_single_sources(network: Network, group: str) -> None:
    """An endpoint that joins for single sources receives from these, until it leaves for one of them or for all."""
    ipv6 = ":" in group
    endpoint = network.endpoint("::" if ipv6 else "0.0.0.0")
    hosts = ["2001:db8:1::2", "2001:db8:1::3"] if ipv6 else ["192.0.1.2", "192.0.1.3"]
    peers = [network.peer("one", host) for host in hosts]
    endpoint.join_group(group, interface="one", source=hosts[1])
    assert await heard(endpoint, peers, group) == [(hosts[1], "one")]
    endpoint.join_group(group, interface="one", source=hosts[0])
    assert await heard(endpoint, peers, group) == [(host, "one") for host in hosts]
    endpoint.leave_group(group, interface="one", source=hosts[1])
    assert await heard(endpoint, peers, group) == [(hosts[0], "one")]
    endpoint.leave_group(group, interface="one")
    assert await heard(endpoint, peers, group) == []


@needs_namespaces
@pytest.mark.parametrize("group", [GROUP, GROUP_IPV6])
async def test_systems_without_sources(network: Network, group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the options of RFC 3678, an endpoint joins for all sources, and refuses to join for one."""
    monkeypatch.setattr(engines.multicast, "HAS_SOURCES", False)
    ipv6 = ":" in group
    endpoint = network.endpoint("::" if ipv6 else "0.0.0.0")
    peers = [network.peer(wire, ipv6=ipv6) for wire in WIRES]
    endpoint.join_group(group, interface="two")
    assert await heard(endpoint, peers, group) == [(peers[1].socket.getsockname()[0], "two")]
    with pytest.raises(OSError, match="already in group"):
        endpoint.join_group(group, interface="two")
    with pytest.raises(NotImplementedError, match="works on Linux only"):
        endpoint.join_group(group, interface="one", source="2001:db8::5" if ipv6 else "192.0.2.5")
    endpoint.leave_group(group, interface="two")
    assert await heard(endpoint, peers, group) == []


@needs_namespaces
@pytest.mark.parametrize("group", [GROUP, GROUP_IPV6])
async def test_groups_of_other_programs(network: Network, group: str) -> None:
    """An endpoint in a group receives nothing from groups that only other sockets of its machine have joined."""
    ipv6 = ":" in group
    host, mine = ("::", "ff02::99") if ipv6 else ("0.0.0.0", OTHER_GROUP)
    endpoint, other = network.endpoint(host), network.endpoint(host)
    other.join_group(group, interface="one")
    endpoint.join_group(mine, interface="one")
    peers = [network.peer(wire, ipv6=ipv6) for wire in WIRES]
    assert await heard(endpoint, peers, group) == []
    assert await heard(other, peers, group) == [(peers[0].socket.getsockname()[0], "one")]
    endpoint.join_group(group, interface="two")
    both = [(peer.socket.getsockname()[0], peer.wire) for peer in peers]
    # For IPv6 the kernel compares only the group, not the interface.
    assert await heard(endpoint, peers, group) == (both if ipv6 else both[1:])


@needs_namespaces
async def test_the_interface_of_the_route(own_network: Network) -> None:
    """Without an interface, the route to the group decides; without a route, the error says so."""
    network = own_network
    for group, host in ((GROUP, "0.0.0.0"), (SITE_GROUP_IPV6, "::")):
        endpoint = network.endpoint(host)
        peers = [network.peer(wire, ipv6=":" in host) for wire in WIRES]
        network.ours.ip(
            f"route add {group} dev two" if ":" not in host else f"route add {group}/128 dev two table local"
        )
        endpoint.join_group(group)
        assert await heard(endpoint, peers, group) == [(peers[1].socket.getsockname()[0], "two")]
        endpoint.leave_group(group)
        assert await heard(endpoint, peers, group) == []
    with pytest.raises(OSError, match=r"^\[Errno 19\] No such device: no route to group 239.1.2.4: name an interface$"):
        network.endpoint().join_group(OTHER_GROUP)


@needs_namespaces
async def test_an_ipv6_group_with_its_interface(network: Network) -> None:
    """A scope after a group or an address also names the interface."""
    endpoint = network.endpoint("::")
    peers = [network.peer(wire, ipv6=True) for wire in WIRES]
    endpoint.join_group(f"{GROUP_IPV6}%two")
    assert await heard(endpoint, peers, GROUP_IPV6) == [("2001:db8:2::2", "two")]
    endpoint.leave_group(f"{GROUP_IPV6}%{network.ours.index('two')}", interface="two")
    with inside(network.ours.name):
        endpoint.join_group(GROUP_IPV6, interface="fe80::1%one")
        with pytest.raises(ValueError, match="several interfaces have the address fe80::1"):
            endpoint.join_group(GROUP_IPV6, interface="fe80::1")
    assert await heard(endpoint, peers, GROUP_IPV6) == [("2001:db8:1::2", "one")]
    with pytest.raises(ValueError, match="on another interface than 'two'"):
        endpoint.join_group(f"{GROUP_IPV6}%one", interface="two")


@needs_namespaces
async def test_a_dual_stack_endpoint_joins_both_families(network: Network) -> None:
    """An IPv6 endpoint that receives IPv4 too joins IPv4 groups, plain or mapped; one for IPv6 only does not."""
    endpoint = network.endpoint("::", dual=True)
    peers, peers_ipv6 = ([network.peer(wire, ipv6=ipv6) for wire in WIRES] for ipv6 in (False, True))
    endpoint.join_group(f"::ffff:{GROUP}", interface="two")
    with inside(network.ours.name):
        endpoint.join_group(SSM, interface="192.0.1.1", source="192.0.1.2")
    endpoint.join_group(GROUP_IPV6, interface="one")
    assert await heard(endpoint, peers, GROUP) == [("192.0.2.2", "two")]
    assert await heard(endpoint, peers, SSM) == [("192.0.1.2", "one")]
    assert await heard(endpoint, peers_ipv6, GROUP_IPV6) == [("2001:db8:1::2", "one")]
    endpoint.leave_group(GROUP, interface="two")
    assert await heard(endpoint, peers, GROUP) == []
    with pytest.raises(ValueError, match=r"does not receive the address family of 239\.1\.2\.3"):
        network.endpoint("::").join_group(GROUP, interface="two")
    with pytest.raises(ValueError, match="does not receive the address family of ff02::1234"):
        network.endpoint().join_group(GROUP_IPV6, interface="two")


@needs_namespaces
async def test_an_endpoint_bound_to_a_group(network: Network) -> None:
    """An endpoint bound to a group joins it, and receives nothing else."""
    endpoint = network.endpoint(GROUP)
    endpoint.join_group(GROUP, interface="one")
    peer = network.peer("one")
    port = endpoint.local_address[1]
    for payload, host in ((b"unicast", "192.0.1.1"), (b"group", GROUP)):
        peer.send(payload, host, port)
    with trio.fail_after(5):
        datagram = await endpoint.receive()
        await datagram.reply(b"reply")
    assert (datagram.payload, datagram.destination) == (b"group", (GROUP, port))
    assert await peer.receive() == (b"reply", ("192.0.1.1", port))


async def test_an_endpoint_bound_to_one_address(caplog: pytest.LogCaptureFixture) -> None:
    """An endpoint bound to one of our addresses receives nothing from a group, and the log warns of that."""
    (endpoint,) = await open_endpoints(0, host="127.0.0.1")
    async with endpoint:
        endpoint.join_group(GROUP, interface="lo")
    assert caplog.messages == [
        f"an endpoint bound to 127.0.0.1 receives nothing from group {GROUP}: bind it to all addresses"
    ]


# Destinations and replies


@needs_namespaces
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("destination", [GROUP, "192.0.{}.255", "255.255.255.255", "192.0.{}.1", GROUP_IPV6, "fe80::1"])
async def test_a_server_on_two_interfaces(network: Network, nursery: trio.Nursery, wire: str, destination: str) -> None:
    """A client knows its destination; replies leave on the interface of arrival, from our address there."""
    number = NUMBERS[wire]
    destination = destination.format(number)
    ipv6 = ":" in destination
    endpoint = network.endpoint("::" if ipv6 else "0.0.0.0")
    for name in WIRES:
        endpoint.join_group(GROUP_IPV6 if ipv6 else GROUP, interface=name)
    server: Server = await nursery.start(serve_endpoints, echo, [endpoint])
    peer = network.peer(wire, f"fe80::2%{wire}" if ipv6 else None)
    port = endpoint.local_address[1]
    peer.send(b"hello", destination, port)
    payload, source = await peer.receive()
    assert (payload, source[0]) == (b"hello", "fe80::1" if ipv6 else f"192.0.{number}.1")
    (client,) = server.clients
    assert client.destination[:2] == (destination, port)
    assert client.interface == (None if destination.endswith(".1") else network.ours.index(wire))
    check_adds_up(server)


@needs_namespaces
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("destination", [GROUP, "255.255.255.255"])
@pytest.mark.parametrize("dual", [False, True])
async def test_one_network_on_two_interfaces(
    wired_alike: list[Machine], closing: ExitStack, wire: str, destination: str, dual: bool
) -> None:
    """If both interfaces have the same network, replies leave on the right one, from its own address.

    Then ``local_address`` with that address also sends to the group, or the broadcast address, on that interface.
    """
    ours, theirs = wired_alike
    network, number = Network(ours, theirs, closing), NUMBERS[wire]
    endpoint = network.endpoint("::" if dual else "0.0.0.0", dual=dual, broadcast=True)
    for name in WIRES:
        endpoint.join_group(GROUP, interface=name)
    endpoint.multicast_interface = "two" if wire == "one" else "one"
    peer = network.peer(wire, f"169.254.{number}.2")
    listening = network.peer(wire, "0.0.0.0")
    listening.join(GROUP)
    port = endpoint.local_address[1]
    own = f"169.254.{number}.1"
    for _ in range(2):
        peer.send(b"question", destination, port)
        with trio.fail_after(5):
            datagram = await endpoint.receive()
            await datagram.reply(b"reply")
            assert await peer.receive() == (b"reply", (own, port))
            assert datagram.local_address[0].removeprefix("::ffff:") == own
            assert (datagram.destination[0].removeprefix("::ffff:"), datagram.interface) == (
                destination,
                network.ours.index(wire),
            )
            to = (destination, listening.socket.getsockname()[1])
            await endpoint.send_to(b"to all", to, local_address=datagram.local_address)
            assert await listening.receive() == (b"to all", (own, port))


@needs_namespaces
async def test_an_interface_without_an_address(own_network: Network) -> None:
    """A question on an interface without an IPv4 address is answered there, from one of our addresses."""
    network = own_network
    network.ours.ip("address flush dev two")
    network.ours.ip("route add 192.0.2.0/24 dev two")
    endpoint = network.endpoint()
    endpoint.join_group(GROUP, interface="two")
    peer = network.peer("two")
    network.theirs.ip("route add 192.0.1.1 dev two")
    peer.send(b"question", GROUP, endpoint.local_address[1])
    with trio.fail_after(5):
        datagram = await endpoint.receive()
        await datagram.reply(b"reply")
    assert await peer.receive() == (b"reply", ("192.0.1.1", endpoint.local_address[1]))
    assert datagram.local_address == ("192.0.1.1", endpoint.local_address[1])
    assert datagram.interface == network.ours.index("two")


# Sending


@needs_namespaces
@pytest.mark.parametrize("group", [GROUP, GROUP_IPV6, SITE_GROUP_IPV6])
async def test_the_interface_to_send_on(network: Network, group: str) -> None:
    """Datagrams to groups leave on multicast_interface, or on the interface of local_address if that is given."""
    ipv6 = ":" in group
    endpoint = network.endpoint("::" if ipv6 else "0.0.0.0")
    assert endpoint.multicast_interface is None
    listening = [network.peer(wire, "::" if ipv6 else "0.0.0.0") for wire in WIRES]
    for peer in listening:
        peer.join(group)
    with inside(network.ours.name):
        for name, chosen in (
            ("two", listening[1]),
            (network.ours.index("one"), listening[0]),
            ("2001:db8:2::1" if ipv6 else "192.0.2.1", listening[1]),
        ):
            endpoint.multicast_interface = name
            assert endpoint.multicast_interface == network.ours.index(chosen.wire)
            await endpoint.send_to(b"hello", (group, chosen.socket.getsockname()[1]))
            payload, source = await chosen.receive()
            own = "fe80::1" if group == GROUP_IPV6 else f"2001:db8:{NUMBERS[chosen.wire]}::1"
            assert (payload, source[0]) == (b"hello", own if ipv6 else f"192.0.{NUMBERS[chosen.wire]}.1")
        port = endpoint.local_address[1]
        local: Any = ("2001:db8:1::1", port, 0, 0) if ipv6 else ("192.0.1.1", port)
        await endpoint.send_to(b"from one", (group, listening[0].socket.getsockname()[1]), local_address=local)
        payload, source = await listening[0].receive()
        assert (payload, source[0]) == (b"from one", local[0])
    endpoint.multicast_interface = None
    assert endpoint.multicast_interface is None


@needs_namespaces
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("group", [GROUP, GROUP_IPV6])
async def test_hops(network: Network, group: str, dual: bool) -> None:
    """multicast_hops is the time to live of datagrams to groups, 1 by default; with dual stack, of both families."""
    ipv6 = ":" in group
    if ipv6 and dual:
        return
    endpoint = network.endpoint("::" if ipv6 or dual else "0.0.0.0", dual=dual)
    endpoint.multicast_interface = "one"
    listening = network.peer("one", "::" if ipv6 else "0.0.0.0")
    listening.join(group)
    if ipv6:
        listening.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
    else:
        listening.socket.setsockopt(socket.IPPROTO_IP, 12, 1)  # IP_RECVTTL
    for hops in (1, 7, 255):
        if hops > 1:
            endpoint.multicast_hops = hops
        assert endpoint.multicast_hops == hops
        await endpoint.send_to(b"x", (group, listening.socket.getsockname()[1]))
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(listening.socket)
        _, ((_, _, value),), _, _ = listening.socket.recvmsg(10, 100)
        assert int.from_bytes(value, sys.byteorder) == hops


@needs_namespaces
@pytest.mark.parametrize("group", [GROUP, GROUP_IPV6])
async def test_loop(network: Network, group: str) -> None:
    """Members on our own machine, and we ourselves, receive our datagrams unless multicast_loop is off."""
    host = "::" if ":" in group else "0.0.0.0"
    endpoint, other = network.endpoint(host), network.endpoint(host)
    port = endpoint.local_address[1]
    for member in (endpoint, other):
        member.join_group(group, interface="one")
        member.multicast_interface = "one"
        assert member.multicast_loop
    endpoint.multicast_loop = False
    assert not endpoint.multicast_loop
    with trio.fail_after(5):
        await endpoint.send_to(b"not looped", (group, port))
        await other.send_to(b"looped", (group, port))
        assert (await endpoint.receive()).payload == b"looped"
        endpoint.multicast_loop = True
        await endpoint.send_to(b"to itself", (group, port))
        assert (await endpoint.receive()).payload == b"to itself"


# A server that receives its own datagrams


def share(sock: socket.socket) -> None:
    """Share the port with another program, as mDNS programs do."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


@pytest.mark.parametrize("as_function", [False, True])
async def test_a_server_is_not_its_own_client(nursery: trio.Nursery, as_function: bool) -> None:
    """A server refuses its own datagrams to a group, and serves a program with the same address and port."""
    taken: list[bytes] = []

    async def handler(client: Client) -> None:
        while True:
            taken.append(await client.receive())

    function = trio_udp.datagram_handler(lambda datagram: taken.append(datagram.payload))
    (endpoint,) = await open_endpoints(0, host="0.0.0.0", configure=share)
    port = endpoint.local_address[1]
    (other,) = await open_endpoints(port, host="0.0.0.0", configure=share)
    for member in (endpoint, other):
        member.join_group(GROUP, interface="127.0.0.1")
        member.multicast_interface = "lo"
    server: Server = await nursery.start(serve_endpoints, function if as_function else handler, [endpoint])
    async with other:
        with trio.fail_after(5):
            for number in range(3):
                await server.send_to(b"ours", (GROUP, port))
                await endpoint.send_to(b"ours too", (GROUP, port), local_address=("127.0.0.1", port))
                assert {(await other.receive()).payload for _ in range(2)} == {b"ours", b"ours too"}
                await other.send_to(b"theirs", (GROUP, port))
                assert (await other.receive()).payload == b"theirs"
                while len(taken) <= number:
                    await trio.testing.wait_all_tasks_blocked(0.001)
    s = server.statistics()
    assert taken == [b"theirs"] * 3
    assert (s.received, s.delivered, s.refused_source, s.sent) == (9, 3, 6, 6)
    assert s.clients_started == (0 if as_function else 1)
    check_adds_up(server)


@needs_namespaces
async def test_a_server_refuses_its_own_broadcast(network: Network, nursery: trio.Nursery) -> None:
    """A server refuses its own broadcasts, limited and directed."""
    endpoint = network.endpoint(broadcast=True)
    server: Server = await nursery.start(serve_endpoints, echo, [endpoint])
    port = endpoint.local_address[1]
    with inside(network.ours.name), trio.fail_after(5):
        for count, host in enumerate(("255.255.255.255", "192.0.1.255", "192.0.2.255"), 1):
            wire = "192.0.2.1" if host == "192.0.2.255" else "192.0.1.1"
            await server.send_to(b"hello", (host, port), local_address=(wire, port))
            while server.statistics().received < count:
                await trio.testing.wait_all_tasks_blocked(0.001)
        await trio.testing.wait_all_tasks_blocked()
    s = server.statistics()
    assert (s.received, s.refused_source, s.clients_started, s.sent) == (3, 3, 0, 3)
    check_adds_up(server)


# Errors


def read(file: str) -> str:
    return Path(file).read_text()


def fails(number: int, message: str) -> Any:
    return pytest.raises(OSError, match=rf"^\[Errno {number}\] {os.strerror(number)}: {message}$")


async def test_errors_of_groups() -> None:
    """Errors say what is wrong: not a group, joined twice, never joined, no such interface."""
    (endpoint,) = await open_endpoints(0, host="0.0.0.0")
    loopback = socket.if_nametoindex("lo")
    async with endpoint:
        for change in (endpoint.join_group, endpoint.leave_group):
            with fails(errno.EINVAL, r"192\.0\.2\.1 is not a group"):
                change("192.0.2.1", interface="lo")
            with fails(errno.ENODEV, "no interface 'nosuch'"):
                change(GROUP, interface="nosuch")
            with fails(errno.ENODEV, "no interface 'a name that is too long'"):
                change(GROUP, interface="a name that is too long")
            with fails(errno.EADDRNOTAVAIL, r"192\.0\.2\.77 is not an address of this machine"):
                change(GROUP, interface="192.0.2.77")
        with fails(errno.ENODEV, "no interface 999999"):
            endpoint.join_group(GROUP, interface=999_999)
        name = rf"group 239\.1\.2\.3 on interface {loopback}"
        with fails(errno.EADDRNOTAVAIL, f"not in {name}"):
            endpoint.leave_group(GROUP, interface="lo")
        endpoint.join_group(GROUP, interface="lo")
        with fails(errno.EADDRINUSE, f"already in {name}"):
            endpoint.join_group(GROUP, interface=loopback)
        endpoint.leave_group(GROUP, interface="lo")
        with fails(errno.EADDRNOTAVAIL, f"not in {name}"):
            endpoint.leave_group(GROUP, interface="lo")
        endpoint.join_group(SSM, interface="lo", source="192.0.2.1")
        name = rf"group 232\.1\.2\.3 for source 192\.0\.2\.{{}} on interface {loopback}"
        with fails(errno.EADDRNOTAVAIL, f"already in {name.format(1)}"):
            endpoint.join_group(SSM, interface="lo", source="192.0.2.1")
        with fails(errno.EADDRNOTAVAIL, f"not in {name.format(2)}"):
            endpoint.leave_group(SSM, interface="lo", source="192.0.2.2")
        with fails(errno.EINVAL, f"not in {name.format(1).replace('232', '239')}"):
            endpoint.leave_group("239.1.2.3", interface="lo", source="192.0.2.1")
        with fails(errno.EADDRNOTAVAIL, "no interface 999999"):
            endpoint.multicast_interface = 999_999


async def test_the_callers_mistakes() -> None:
    """Arguments of the wrong type or kind raise at the call and change nothing; a closed endpoint raises too."""
    (endpoint,) = await open_endpoints(0, host="0.0.0.0")
    anything: Any = endpoint
    for wrong in (None, 5, b"239.1.2.3", ("239.1.2.3", 5)):
        with pytest.raises(TypeError, match="group must be"):
            anything.join_group(wrong)
    for text in ("localhost", "", "239.1.2.3:5", "239.1.2.3\0"):
        with pytest.raises(ValueError, match="group must be a numeric address"):
            endpoint.join_group(text)
    for interface in (b"lo", True, 1.5, ("lo",)):
        with pytest.raises(TypeError, match="interface must be"):
            anything.join_group(GROUP, interface=interface)
    for index in (0, -1, 2**40):
        with pytest.raises(ValueError, match="an interface index must be at least 1"):
            endpoint.join_group(GROUP, interface=index)
    for source in ("0.0.0.0", GROUP, "255.255.255.255", "host"):
        with pytest.raises(ValueError, match="source must be"):
            endpoint.join_group(SSM, interface="lo", source=source)
    with pytest.raises(ValueError, match="address family of ::1"):
        endpoint.join_group(SSM, interface="lo", source="::1")
    for hops in (-1, 256):
        with pytest.raises(ValueError, match="from 0 to 255"):
            endpoint.multicast_hops = hops
    for attribute, value in (("multicast_hops", True), ("multicast_hops", "1"), ("multicast_loop", 1)):
        with pytest.raises(TypeError, match=f"{attribute} must be"):
            setattr(endpoint, attribute, value)
    assert (endpoint.multicast_hops, endpoint.multicast_loop, endpoint.multicast_interface) == (1, True, None)
    await endpoint.aclose()
    uses: list[Callable[[], object]] = [
        partial(endpoint.join_group, GROUP),
        partial(endpoint.leave_group, GROUP),
        partial(getattr, endpoint, "multicast_hops"),
        partial(setattr, endpoint, "multicast_loop", True),
        partial(setattr, endpoint, "multicast_interface", "lo"),
    ]
    for use in uses:
        with pytest.raises(trio.ClosedResourceError):
            use()


@pytest.mark.parametrize("interface", ["lo", "127.0.0.1"])
async def test_the_loopback_interface(interface: str) -> None:
    """On loopback, a datagram to a group leaves from the loopback address."""
    (endpoint,) = await open_endpoints(0, host="0.0.0.0")
    async with endpoint:
        endpoint.join_group(GROUP, interface="lo")
        endpoint.multicast_interface = interface
        assert endpoint.multicast_interface == socket.if_nametoindex("lo")
        await endpoint.send_to(b"x", (GROUP, endpoint.local_address[1]))
        with trio.fail_after(5):
            datagram = await endpoint.receive()
        assert (datagram.peer_address, datagram.local_address) == (("127.0.0.1", endpoint.local_address[1]),) * 2


async def test_unix_domain_sockets_have_no_groups(tmp_path: Any) -> None:
    """A Unix-domain endpoint refuses to join a group."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "socket"))
        async with Endpoint.from_socket(sock) as endpoint:
            with pytest.raises(ValueError, match="no groups"):
                endpoint.join_group(GROUP)


async def test_too_many_groups() -> None:
    """The error at the system's limit names the setting; the endpoint still receives from the earlier groups."""
    (endpoint,) = await open_endpoints(0, host="0.0.0.0")
    most = int(read("/proc/sys/net/ipv4/igmp_max_memberships"))
    if most > 500:
        pytest.skip("this machine allows too many groups")
    async with endpoint:
        endpoint.multicast_interface = "lo"
        for number in range(most):
            endpoint.join_group(f"239.7.{number // 250}.{number % 250 + 1}", interface="lo")
        with pytest.raises(OSError, match=r"No buffer space available: .*igmp_max_memberships") as info:
            endpoint.join_group(GROUP, interface="lo")
        assert info.value.errno == errno.ENOBUFS
        endpoint.leave_group("239.7.0.1", interface="lo")
        endpoint.join_group(GROUP, interface="lo")
        await endpoint.send_to(b"x", (GROUP, endpoint.local_address[1]))
        with trio.fail_after(5):
            assert (await endpoint.receive()).destination[0] == GROUP


@needs_namespaces
@pytest.mark.parametrize("group", [GROUP, GROUP_IPV6])
async def test_an_interface_that_goes_away(own_network: Network, nursery: trio.Nursery, group: str) -> None:
    """If an interface goes away, the server goes on with the other one, and can join again when it comes back."""
    network = own_network
    ipv6 = ":" in group
    endpoint = network.endpoint("::" if ipv6 else "0.0.0.0")
    for wire in WIRES:
        endpoint.join_group(group, interface=wire)
    server: Server = await nursery.start(serve_endpoints, echo, [endpoint])
    port = endpoint.local_address[1]
    old = network.peer("two", "fe80::2%two" if ipv6 else None)
    old.send(b"before", group, port)
    assert (await old.receive())[0] == b"before"
    gone = network.ours.index("two")
    endpoint.multicast_interface = "two"
    network.ours.ip("link delete two")
    (client,) = server.clients
    await client.send(b"nowhere")
    with pytest.raises(OSError, match=r"No such device|unreachable|Invalid argument|Cannot assign"):
        await server.send_to(b"nowhere", (group, port, 0, gone) if ipv6 else (group, port))
    near = network.peer("one", "fe80::2%one" if ipv6 else None)
    near.send(b"still here", group, port)
    assert (await near.receive())[0] == b"still here"
    endpoint.leave_group(group, interface=gone)
    with pytest.raises(OSError, match="no interface"):
        endpoint.join_group(group, interface="two")
    assert server.statistics().handler_errors == 0
    check_adds_up(server)


async def test_closing_while_a_group_is_received(nursery: trio.Nursery) -> None:
    """Closing an endpoint leaves its groups and ends a receive on it; another endpoint can join at once."""
    for _ in range(2):
        (endpoint,) = await open_endpoints(0, host="0.0.0.0")
        endpoint.join_group(GROUP, interface="lo")
        nursery.start_soon(endpoint.aclose)
        with trio.fail_after(5), pytest.raises(trio.ClosedResourceError):
            await endpoint.receive()
        assert "030201EF" not in read("/proc/net/igmp")
