"""Sources that a server refuses or cannot answer: its own addresses, groups, broadcast, and no address."""

from __future__ import annotations

import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from trio.testing import MockClock

import trio_udp
from trio_udp import Client, Datagram, Endpoint, Limits, Server, open_endpoints, serve_endpoints
from trio_udp._endpoints import Address
from trio_udp.testing import SimulatedNetwork

from ..conftest import ALICE, SERVER, StartInMemory, check_adds_up, echo
from ..namespaces import inside, machines, needs_namespaces

OWN, OTHER_OWN, ELSEWHERE = "192.0.2.53", "192.0.2.54", "192.0.2.99"
OWN_IPV6 = "2001:db8::53"
GROUP, BROADCAST = "224.0.0.251", "255.255.255.255"


@trio_udp.datagram_handler
def repeat(datagram: Datagram) -> bytes:
    return datagram.payload


@attrs.define
class Machine:
    """A server on a machine with two IPv4 addresses and an IPv6 address, on ports 5000, 6000 and 7000."""

    network: SimulatedNetwork
    endpoints: list[Endpoint]
    server: Server

    async def refuses(self, source: Address, destination: Address) -> bool:
        """Let a datagram arrive; return whether its source was refused. Otherwise it must have been delivered."""
        before = self.server.statistics()
        self.network.inject(b"x", source, destination)
        await trio.testing.wait_all_tasks_blocked()
        after = self.server.statistics()
        refused = after.refused_source - before.refused_source
        assert (after.received - before.received, refused + after.delivered - before.delivered) == (1, 1)
        check_adds_up(self.server)
        return bool(refused)


StartMachine = Callable[..., Awaitable[Machine]]


@pytest.fixture(params=["clients", "datagram_handler"])
async def start(request: pytest.FixtureRequest, nursery: trio.Nursery) -> StartMachine:
    """Start the server. The rules about sources are the same for both kinds of handlers."""

    async def start(*, allow_broadcast: bool = False) -> Machine:
        network = SimulatedNetwork()
        endpoints = [
            network.endpoint("0.0.0.0", 5000, own_hosts=(OWN, OTHER_OWN), allow_broadcast=allow_broadcast),
            network.endpoint(OWN, 6000),
            network.endpoint("::", 7000, own_hosts=(OWN_IPV6,)),
        ]
        network.join(endpoints[0], GROUP)
        network.join(endpoints[2], "ff02::fb")
        handler: Any = echo if request.param == "clients" else repeat
        server: Server = await nursery.start(serve_endpoints, handler, endpoints)
        return Machine(network, endpoints, server)

    return start


async def test_our_own_address_with_a_port_of_ours(start: StartMachine) -> None:
    """A datagram to our own address is refused if it comes from an address of this machine and any port of the server.

    The server would otherwise answer itself for ever.
    """
    machine = await start()
    for host in (OWN, OTHER_OWN):
        for port in (5000, 6000, 7000):
            assert await machine.refuses((host, port), (OWN, 5000))
            assert await machine.refuses((host, port), (OTHER_OWN, 5000))
    assert await machine.refuses((OWN_IPV6, 7000, 0, 0), (OWN_IPV6, 7000, 0, 0))
    assert await machine.refuses((OWN_IPV6, 5000, 0, 0), (OWN_IPV6, 7000, 0, 0))


async def test_only_both_together_are_refused(start: StartMachine) -> None:
    """A source with only an address of ours, or only a port of ours, is delivered."""
    machine = await start()
    assert not await machine.refuses((OWN, 5001), (OWN, 5000))
    for port in (5000, 6000, 7000):
        assert not await machine.refuses((ELSEWHERE, port), (OWN, 5000))
    assert not await machine.refuses(("2001:db8::99", 7000, 0, 0), (OWN_IPV6, 7000, 0, 0))


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        ((OWN, 5000), (GROUP, 5000)),
        ((OWN, 6000), (GROUP, 5000)),
        ((OWN, 5000), (BROADCAST, 5000)),
        ((OWN_IPV6, 7000, 0, 0), ("ff02::fb", 7000, 0, 1)),
    ],
)
async def test_a_program_of_this_machine_may_write_to_a_group(
    start: StartMachine, source: Address, destination: Address
) -> None:
    """Another program on this machine may use our port and send to a group, as mDNS programs do.

    If the datagram was forged there is still no loop: the answer goes to our own address, and is refused there.
    """
    machine = await start()
    machine.network.inject(b"x", source, destination)
    await trio.testing.wait_all_tasks_blocked()
    s = machine.server.statistics()
    assert (s.received, s.delivered, s.refused_source, s.sent) == (2, 1, 1, 1)
    check_adds_up(machine.server)


async def test_groups_and_the_broadcast_address_are_refused_sources(start: StartMachine) -> None:
    """A datagram whose source is a group or 255.255.255.255 is refused, whatever its destination."""
    machine = await start()
    for source in ((GROUP, 9), ("239.255.255.250", 1900), (BROADCAST, 9)):
        for destination in ((OWN, 5000), (GROUP, 5000)):
            assert await machine.refuses(source, destination)
    assert await machine.refuses(("ff02::1", 9, 0, 1), (OWN_IPV6, 7000, 0, 0))
    assert await machine.refuses((GROUP, 0), (OWN, 5000))


async def test_a_server_refuses_its_own_datagrams_to_a_group(start: StartMachine) -> None:
    """A server in a group refuses its own datagrams to the group, and is not its own client."""
    machine = await start()
    await machine.server.send_to(b"hello", (GROUP, 5000), local_address=(OWN, 5000))
    await trio.testing.wait_all_tasks_blocked()
    s = machine.server.statistics()
    assert (s.received, s.delivered, s.refused_source, s.sent) == (1, 0, 1, 1)
    check_adds_up(machine.server)


async def test_an_echo_beside_a_program_with_our_address(start: StartMachine) -> None:
    """A server refuses its own datagrams to a group, and receives those of another program with the same address."""
    machine = await start()
    for _ in range(2):
        machine.network.inject(b"theirs", (OWN, 5000), (GROUP, 5000))
        await trio.testing.wait_all_tasks_blocked()
        await machine.server.send_to(b"ours", (GROUP, 5000), local_address=(OWN, 5000))
        await trio.testing.wait_all_tasks_blocked()
    s = machine.server.statistics()
    # Its answers to the other program arrive at the server itself, which has the port here.
    assert (s.received, s.delivered, s.refused_source) == (6, 2, 4)
    check_adds_up(machine.server)


async def test_an_echo_is_refused_once(start: StartMachine, autojump_clock: MockClock) -> None:
    """A second datagram with the same payload from our address is delivered, also after the echo was forgotten."""
    machine = await start()
    await machine.server.send_to(b"same", (GROUP, 5000), local_address=(OWN, 5000))
    await trio.testing.wait_all_tasks_blocked()
    assert machine.server.statistics().refused_source == 1
    assert not await refuses_from_here(machine, b"same")
    await machine.server.send_to(b"same", ("239.9.9.9", 5000), local_address=(OWN, 5000))  # it has no receiver
    await trio.sleep(6)
    assert not await refuses_from_here(machine, b"same")


async def refuses_from_here(machine: Machine, payload: bytes) -> bool:
    """Let another program with the server's address send to the group; return whether the server refused it."""
    delivered = machine.server.statistics().delivered
    machine.network.inject(payload, (OWN, 5000), (GROUP, 5000))
    await trio.testing.wait_all_tasks_blocked()
    check_adds_up(machine.server)
    return machine.server.statistics().delivered == delivered


async def test_two_endpoints_of_one_server_do_not_answer_each_other(start: StartMachine) -> None:
    """A datagram from one endpoint of a server to another is refused."""
    machine = await start()
    await machine.server.send_to(b"hello", (OWN, 5000), local_address=(OWN, 6000))
    await trio.testing.wait_all_tasks_blocked()
    s = machine.server.statistics()
    assert (s.received, s.refused_source, s.sent) == (1, 1, 1)


async def test_an_endpoint_that_is_added_later(start: StartMachine) -> None:
    """The port of an added endpoint is a port of the server from then on, on all endpoints."""
    machine = await start()
    assert not await machine.refuses((OTHER_OWN, 8000), (OWN, 5000))
    machine.server.add_endpoint(machine.network.endpoint(OWN, 8000))
    assert await machine.refuses((OWN, 8000), (OWN, 5000))
    assert await machine.refuses((OWN, 5000), (OWN, 8000))


async def test_an_endpoint_that_is_closed(start: StartMachine) -> None:
    """The port of a closed endpoint is no longer a port of the server: another program may have it."""
    machine = await start()
    assert await machine.refuses((OWN, 6000), (OWN, 5000))
    await machine.endpoints[1].aclose()
    await trio.testing.wait_all_tasks_blocked()
    assert not await machine.refuses((OWN, 6000), (OWN, 5000))


@pytest.mark.parametrize("source", [("192.0.2.7", 0), ("0.0.0.0", 68), (OWN, 0), ("0.0.0.0", 5000), ("0.0.0.0", 0)])
@pytest.mark.parametrize("destination", [(OWN, 5000), (BROADCAST, 5000)])
async def test_port_zero_and_the_unspecified_address(
    start: StartMachine, source: Address, destination: Address
) -> None:
    """A datagram from port 0 or the unspecified address is delivered; a reply to it is a send error."""
    machine = await start()
    assert not await machine.refuses(source, destination)
    s = machine.server.statistics()
    assert (s.sent, s.send_errors, s.errors) == (0, 1, {"EDESTADDRREQ": 1})


async def test_the_unspecified_address_of_ipv6(start: StartMachine) -> None:
    """A datagram from the unspecified IPv6 address is delivered; a reply to it is a send error."""
    machine = await start()
    assert not await machine.refuses(("::", 546, 0, 0), (OWN_IPV6, 7000, 0, 0))
    s = machine.server.statistics()
    assert (s.sent, s.send_errors, s.errors) == (0, 1, {"EDESTADDRREQ": 1})


async def test_a_million_hosts_with_our_port_are_forgotten(start: StartMachine, autojump_clock: MockClock) -> None:
    """The cache of hosts with a port of ours stays bounded, and its answers stay right."""
    machine = await start()
    for number in range(3_000):
        machine.network.inject(b"x", (f"198.51.{number // 250}.{number % 250}", 5000), (OWN, 5000))
        if number % 100 == 99:
            machine.network.inject(b"loop", (OWN, 5000), (OWN, 5000))
            await trio.testing.wait_all_tasks_blocked()
    s = machine.server.statistics()
    assert (s.delivered, s.refused_source) == (3_000, 30)


# Unanswerable clients


async def test_a_client_that_cannot_be_answered(start_in_memory: StartInMemory) -> None:
    """Every kind of send to a client with port 0, validated or not, counts as its send error."""

    async def handler(client: Client) -> None:
        await client.receive()
        await client.send(b"1")
        client.validate()
        client.send_nowait(b"2")
        await client.send_many([b"3", b"4"])
        await client.server.send_to_all(b"5")
        assert client.statistics().errors == {"EDESTADDRREQ": 5}
        assert client.statistics().send_errors == 5
        await client.receive()

    run = await start_in_memory(handler, on_error=trio_udp.raise_error)
    run.put(b"x", ("192.0.2.1", 0))
    await run.settle()
    assert run.sent == []
    s = run.server.statistics()
    assert (s.clients, s.sent, s.send_errors, s.errors) == (1, 0, 5, {"EDESTADDRREQ": 5})


async def test_a_dhcp_client_is_answered_by_broadcast(nursery: trio.Nursery) -> None:
    """A datagram from the unspecified address is delivered, and send_to the broadcast address can answer it."""
    network = SimulatedNetwork()
    dhcp = network.endpoint("0.0.0.0", 67, own_hosts=[OWN], allow_broadcast=True)
    asking = network.endpoint("0.0.0.0", 68, own_hosts=[ELSEWHERE], allow_broadcast=True)

    async def offer(client: Client) -> None:
        async for payload in client:
            assert client.destination == (BROADCAST, 67)
            await client.server.send_to(payload + b": offer", (BROADCAST, 68))

    server: Server = await nursery.start(serve_endpoints, offer, [dhcp])
    network.inject(b"discover", ("0.0.0.0", 68), (BROADCAST, 67))
    datagram = await asking.receive()
    assert (datagram.payload, datagram.peer_address) == (b"discover: offer", (OWN, 67))
    assert server.statistics().send_errors == 0


async def test_two_servers_may_answer_each_other(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """Two servers on one machine are strangers to each other, so two that answer everything do so for ever."""
    network = SimulatedNetwork(latency=(1, 1))
    one: Server = await nursery.start(serve_endpoints, echo, [network.endpoint(OWN, 5000)])
    other: Server = await nursery.start(serve_endpoints, repeat, [network.endpoint(OWN, 6000)])
    await one.send_to(b"hello", (OWN, 6000))
    await trio.sleep(10.5)
    assert [(s.received, s.refused_source) for s in (one.statistics(), other.statistics())] == [(5, 0), (5, 0)]


async def test_an_own_source_takes_nothing(start_in_memory: StartInMemory) -> None:
    """A refused source takes no place, evicts no client, and does not reach accept."""
    asked: list[Address] = []

    def accept(datagram: Datagram) -> bool:
        asked.append(datagram.peer_address)
        return True

    run = await start_in_memory(echo, accept=accept, limits=Limits(max_clients=1, when_full="evict_idle"))
    run.put(b"x", ALICE)
    await run.settle()
    for source in (SERVER, (GROUP, 53), (BROADCAST, 53)):
        run.put(b"x", source)
    await run.settle()
    assert asked == [ALICE]
    s = run.server.statistics()
    assert (s.refused_source, s.clients_evicted, s.clients) == (3, 0, 1)
    check_adds_up(run.server)


# Over real sockets


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", "::1"])
@pytest.mark.parametrize("handler", [echo, repeat])
async def test_two_real_endpoints_of_one_server(nursery: trio.Nursery, host: str, handler: Any) -> None:
    """A datagram from one real endpoint of a server to another, or to itself, is refused and not answered."""
    endpoints = [*await open_endpoints(0, host=host), *await open_endpoints(0, host=host)]
    server: Server = await nursery.start(serve_endpoints, handler, endpoints)
    loopback = "::1" if host == "::1" else "127.0.0.1"
    addresses: list[Any] = [(loopback, *endpoint.local_address[1:]) for endpoint in endpoints]
    for endpoint in endpoints:
        for address in addresses:
            await endpoint.send_to(b"loop", address)
    with trio.fail_after(5):
        while server.statistics().received < 4:
            await trio.testing.wait_all_tasks_blocked(0.001)
    await trio.testing.wait_all_tasks_blocked(0.01)
    s = server.statistics()
    assert (s.received, s.refused_source, s.sent, s.clients_started) == (4, 4, 4, 0)
    check_adds_up(server)


@pytest.mark.usefixtures("engine")
async def test_an_innocent_program_of_this_machine(nursery: trio.Nursery) -> None:
    """A program on this machine with a port of its own is served."""
    (endpoint,) = await open_endpoints(0, host="0.0.0.0")
    server: Server = await nursery.start(serve_endpoints, echo, [endpoint])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.connect(("127.0.0.1", endpoint.local_address[1]))
        peer.settimeout(5)
        peer.send(b"hello")
        assert await trio.to_thread.run_sync(peer.recv, 100) == b"hello"
    assert server.statistics().refused_source == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs a broadcast address on loopback")
@needs_namespaces
@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("allowed", [True, False])
async def test_a_directed_broadcast_source(nursery: trio.Nursery, allowed: bool) -> None:
    """With SO_BROADCAST, a directed-broadcast source is refused, because one answer would reach a whole network.

    Without it, the kernel itself refuses to send the answer.
    """
    with machines("here", "there") as (here, there):
        here.wire_to(there)
        for machine, host in ((here, "10.77.0.1"), (there, "10.77.0.2")):
            machine.ip(f"address add {host}/24 broadcast 10.77.0.255 dev wire")
            machine.ip("link set wire up")
            machine.set("ipv4/conf/all/rp_filter", 0)
            machine.set("ipv4/conf/wire/rp_filter", 0)
        sock = here.socket("10.77.0.1", 5000)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, allowed)
        server: Server = await nursery.start(serve_endpoints, echo, [Endpoint.from_socket(sock)])
        with trio.move_on_after(5):
            while not server.statistics().received:  # the first may be lost while the wire comes up
                _forge(there, ("10.77.0.255", 9), ("10.77.0.1", 5000))
                with inside(here.name):  # where the server also asks the kernel about the address
                    await trio.testing.wait_all_tasks_blocked(0.05)
        s = server.statistics()
        if not s.received:
            pytest.skip("this kernel drops such a source itself")
        assert (s.refused_source, s.sent) == (s.received if allowed else 0, 0)
        assert s.errors == ({} if allowed else {"EACCES": s.received})


def _forge(machine: Any, source: tuple[str, int], destination: tuple[str, int]) -> None:
    """Send a datagram with any source from a machine, through a raw socket."""
    udp = source[1].to_bytes(2, "big") + destination[1].to_bytes(2, "big") + (9).to_bytes(2, "big") + b"\0\0x"
    ip = b"\x45\0" + (20 + len(udp)).to_bytes(2, "big") + bytes(4) + b"\x40\x11\0\0"
    ip += socket.inet_aton(source[0]) + socket.inet_aton(destination[0])
    with inside(machine.name), socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.sendto(ip + udp, (destination[0], 0))
