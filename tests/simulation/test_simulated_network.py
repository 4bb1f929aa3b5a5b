"""The simulated network: its conditions, buffers, addresses, groups and errors, and repeatable runs."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings, strategies as st
from trio.testing import MockClock

import trio_udp
from trio_udp import Client, Connection, Datagram, Endpoint, serve_endpoints
from trio_udp._endpoints import Received
from trio_udp.testing import DatagramEvent, Partition, SimulatedNetwork, deterministic_scheduling
from trio_udp.testing._conditions import Conditions
from trio_udp.testing._engine import SimulatedEngine
from trio_udp.testing._packets import SimulatedRoute
from trio_udp.testing._sockets import SimulatedSocket, SocketTable
from trio_udp.testing._wire import Wire

from ..conftest import ALICE, BOB, CAROL, SERVER, check_adds_up, echo

ROOT = Path(__file__).parents[2]

BAD_CONDITIONS: Any = {"loss": 0.3, "duplicate": 0.2, "reorder": 0.2, "latency": (0.01, 0.2), "bandwidth": 10_000}


async def drain(connection: Connection) -> None:
    async for _ in connection:
        pass


def run(main: Callable[[], Awaitable[object]], seed: int = 0) -> None:
    with deterministic_scheduling(seed):
        trio.run(main, clock=MockClock(autojump_threshold=0))


def fates(network: SimulatedNetwork) -> list[tuple[float, str]]:
    return [(event.time, event.fate) for event in network.events]


async def arrivals(network: SimulatedNetwork, payloads: list[bytes], seconds: float = 1_000) -> list[bytes]:
    """Send all payloads at once from Alice to Bob; return those that have arrived after some seconds."""
    async with await network.connect(*BOB, local_address=ALICE) as alice:
        async with await network.connect(*ALICE, local_address=BOB) as bob:
            await alice.send_many(payloads)
            received = []
            with trio.move_on_after(seconds):
                while True:
                    received.append(await bob.receive())
    return received


# The same seed gives the same run.


def a_bad_day(seed: int) -> str:
    """Ten clients send now and then, under bad conditions, to a server with a short idle timeout."""
    network = SimulatedNetwork(seed=seed, **BAD_CONDITIONS)

    async def talk(connection: Connection) -> None:
        async with connection, trio.open_nursery() as nursery:
            nursery.start_soon(drain, connection)
            for i in range(20):
                await connection.send(b"%d" % i)
                await trio.sleep(0.05)
            nursery.cancel_scope.cancel()

    async def main() -> None:
        endpoint = network.endpoint(*SERVER)
        async with trio.open_nursery() as nursery:
            server = await nursery.start(partial(serve_endpoints, echo, [endpoint], idle_timeout=0.3))
            async with trio.open_nursery() as clients:
                for _ in range(10):
                    clients.start_soon(talk, await network.connect(*SERVER))
            server.stop()
        check_adds_up(server)

    run(main, seed)
    return network.timeline()


def test_the_same_seed_gives_the_same_run() -> None:
    """The same seed gives the same timeline, byte for byte, regardless of earlier runs; another seed gives another."""
    first = a_bad_day(1)
    other = a_bad_day(2)
    assert a_bad_day(1) == first
    assert first != other
    for fate in ("sent", "lost", "held back", "duplicated", "arrived"):
        assert f" {fate} " in first


def test_another_process_gives_the_same_run() -> None:
    """A run does not depend on the order of hashes, which differs from process to process."""
    code = "from tests.simulation.test_simulated_network import a_bad_day; print(a_bad_day(1))"
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    ]
    assert runs == [a_bad_day(1) + "\n"] * 2


async def test_the_order_of_tasks_is_given_back() -> None:
    """After deterministic_scheduling, Trio's random task order goes on as if nothing had happened."""
    scheduler = trio._core._run
    before = scheduler._r.getstate(), scheduler._ALLOW_DETERMINISTIC_SCHEDULING
    with deterministic_scheduling(5):
        assert scheduler._r.getstate() != before[0]
    assert (scheduler._r.getstate(), scheduler._ALLOW_DETERMINISTIC_SCHEDULING) == before


@pytest.mark.no_cover  # heavy
def test_a_day_of_keep_alives() -> None:
    """A client that sends every ten seconds stays the same client for a day."""
    network = SimulatedNetwork(latency=(0.05, 0.2))

    async def keep_alive() -> None:
        endpoint = network.endpoint(*SERVER)
        async with trio.open_nursery() as nursery:
            server = await nursery.start(partial(serve_endpoints, echo, [endpoint], idle_timeout=15))
            async with await network.connect(*SERVER) as connection:
                for _ in range(24 * 360):
                    await connection.send(b"still here")
                    with trio.fail_after(0.5):
                        assert await connection.receive() == b"still here"
                    await trio.sleep_until((trio.current_time() // 10 + 1) * 10)
            assert server.statistics().clients_started == 1
            assert trio.current_time() == 24 * 3_600
            server.stop()

    run(keep_alive)


async def test_the_timeline_is_readable(autojump_clock: MockClock) -> None:
    """Each event is one line: time, number, fate, source, destination, length and first bytes of the datagram."""
    network = SimulatedNetwork(latency=(0.25, 0.25))
    async with await network.connect("192.0.2.53", 53, local_address=ALICE) as connection:
        await connection.send(b"hello")
        with pytest.raises(ConnectionRefusedError):
            await connection.receive()
    network.inject(bytes(20), ("2001:db8::7", 7), ("2001:db8::9", 9))
    assert network.timeline().splitlines() == [
        "    0.000000  #1    sent            192.0.2.1:1000 > 192.0.2.53:53  5 bytes b'hello'",
        "    0.250000  #1    port closed     192.0.2.1:1000 > 192.0.2.53:53  5 bytes b'hello'",
        "    0.250000  #1    refusal sent    192.0.2.53:53 > 192.0.2.1:1000  5 bytes b'hello'",
        "    0.500000  #1    refusal arrived 192.0.2.53:53 > 192.0.2.1:1000  5 bytes b'hello'",
        "    0.500000  #2    sent            [2001:db8::7]:7 > [2001:db8::9]:9  20 bytes " + repr(bytes(16)) + "...",
    ]
    first = DatagramEvent(0.0, 1, "sent", ALICE, SERVER, b"hello")
    assert network.events[0] == first
    network.events.clear()
    assert network.timeline() == ""


# Network conditions.


async def test_by_default_the_network_is_perfect(autojump_clock: MockClock) -> None:
    """By default all datagrams arrive at once and in order."""
    wanted = [b"%d" % i for i in range(100)]
    network = SimulatedNetwork()
    assert await arrivals(network, wanted) == wanted
    assert {event.time for event in network.events} == {0.0}


async def test_loss(autojump_clock: MockClock) -> None:
    """Datagrams are lost with the given probability; the others arrive in order."""
    sent = [b"%d" % i for i in range(250)]
    assert await arrivals(SimulatedNetwork(loss=1), sent) == []
    network = SimulatedNetwork(loss=0.4)
    received = await arrivals(network, sent)
    assert 120 < len(received) < 180
    assert received == sorted(received, key=int)
    assert Counter(fate for _, fate in fates(network)) == {
        "lost": 250 - len(received),
        "sent": len(received),
        "arrived": len(received),
    }


async def test_duplicates(autojump_clock: MockClock) -> None:
    """Both copies of a duplicated datagram arrive, and have the same number."""
    network = SimulatedNetwork(duplicate=1, latency=(0.1, 0.2))
    assert await arrivals(network, [b"x"]) == [b"x", b"x"]
    assert [fate for _, fate in fates(network)] == ["sent", "duplicated", "arrived", "arrived"]
    assert [event.number for event in network.events] == [1, 1, 1, 1]


async def test_reordering(autojump_clock: MockClock) -> None:
    """Later datagrams overtake those that are held back, and nothing is lost."""
    sent = [b"%d" % i for i in range(100)]
    received = await arrivals(SimulatedNetwork(reorder=0.3), sent)
    assert received != sent
    assert sorted(received, key=int) == sent


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0), low=st.floats(0, 1), more=st.floats(0, 10), gaps=st.lists(st.floats(0, 1), max_size=50))
def test_latency_alone_keeps_the_order(seed: int, low: float, more: float, gaps: list[float]) -> None:
    """With any latency, datagrams between the same two addresses arrive in order, and none before the least latency."""
    network = SimulatedNetwork(seed=seed, latency=(low, low + more))

    async def main() -> None:
        for gap in gaps:
            network.inject(b"x", ALICE, BOB)
            await trio.sleep(gap)
        await trio.sleep(20)

    run(main)
    sent = [event for event in network.events if event.fate == "sent"]
    arrived = [event for event in network.events if event.fate == "port closed"]
    assert [event.number for event in arrived] == [event.number for event in sent] == list(range(1, len(gaps) + 1))
    assert all(after.time >= before.time + low for before, after in zip(sent, arrived, strict=True))


async def test_a_long_datagram_is_lost_with_any_of_its_fragments(autojump_clock: MockClock) -> None:
    """A datagram that needs several fragments is lost if any is lost; the mtu decides how many it needs."""

    def arrived(length: int, mtu: int) -> int:
        network = SimulatedNetwork(loss=0.3, mtu=mtu)
        for _ in range(1_000):
            network.inject(bytes(length), ALICE, BOB)
        return sum(event.fate == "port closed" for event in network.events)

    assert arrived(1_472, mtu=1_500) == arrived(0, mtu=1_500) == arrived(14_000, mtu=65_535)
    assert 650 < arrived(1_472, mtu=1_500) < 750
    assert 440 < arrived(1_473, mtu=1_500) < 540  # 0.7 ** 2
    assert arrived(14_000, mtu=1_500) < 60  # 0.7 ** 10


async def test_bandwidth(autojump_clock: MockClock) -> None:
    """Each sender's datagrams leave one after the other, at its bandwidth."""
    network = SimulatedNetwork(bandwidth=100, latency=(1, 1))
    async with await network.connect(*CAROL, local_address=ALICE) as alice:
        async with await network.connect(*CAROL, local_address=BOB) as bob:
            await alice.send_many([bytes(100), bytes(50)])
            await bob.send(bytes(300))
            await trio.sleep(10)
    arrived = [(event.source, event.time) for event in network.events if event.fate == "port closed"]
    assert arrived == [(ALICE, 2.0), (ALICE, 2.5), (BOB, 4.0)]


async def test_conditions_may_change(autojump_clock: MockClock) -> None:
    """A changed condition applies to datagrams that are sent from then on."""
    network = SimulatedNetwork(loss=1)
    network.inject(b"1", ALICE, BOB)
    network.loss = 0
    network.latency = (2, 2)
    network.inject(b"2", ALICE, BOB)
    await trio.sleep(5)
    assert fates(network) == [(0, "lost"), (0, "sent"), (2, "port closed")]
    with pytest.raises(AttributeError):
        network.seed = 5
    with pytest.raises(ValueError, match="loss"):
        network.loss = 2


# Partitions.


async def test_a_partition_cuts_both_ways(autojump_clock: MockClock) -> None:
    """Nothing crosses a partition until it is healed, not even datagrams in transit; other traffic passes."""
    network = SimulatedNetwork(latency=(1, 1))
    network.inject(b"under way", ALICE, BOB)
    with network.partition([ALICE], [BOB]) as partition:
        network.inject(b"there", ALICE, BOB)
        network.inject(b"back", BOB, ALICE)
        network.inject(b"elsewhere", ALICE, CAROL)
        await trio.sleep(2)
    network.inject(b"healed", ALICE, BOB)
    await trio.sleep(2)
    partition.heal()
    assert [(event.time, event.fate, event.payload) for event in network.events] == [
        (0, "sent", b"under way"),
        (0, "cut off", b"there"),
        (0, "cut off", b"back"),
        (0, "sent", b"elsewhere"),
        (1, "cut off", b"under way"),
        (1, "port closed", b"elsewhere"),
        (2, "sent", b"healed"),
        (3, "port closed", b"healed"),
    ]


async def test_a_partition_from_all_others(autojump_clock: MockClock) -> None:
    """A partition of some addresses cuts off all others; the addresses inside still reach each other."""
    network = SimulatedNetwork()
    network.partition([ALICE, BOB])
    for source, destination in ((ALICE, BOB), (ALICE, CAROL), (CAROL, BOB), (SERVER, CAROL)):
        network.inject(b"x", source, destination)
    assert [fate for _, fate in fates(network)] == ["sent", "port closed", "cut off", "cut off", "sent", "port closed"]


async def test_a_partition_with_an_error(autojump_clock: MockClock) -> None:
    """Sending across a partition with an error raises that error on a connection, and counts it."""
    network = SimulatedNetwork()
    async with await network.connect(*SERVER, local_address=ALICE) as connection:
        with network.partition([ALICE], error=errno.ENETUNREACH):
            with pytest.raises(OSError, match="unreachable"):
                await connection.send(b"x")
        assert connection.statistics().errors == {"ENETUNREACH": 1}
        assert network.events == []


# Buffers and errors.


async def test_a_receive_buffer_is_as_large_as_linuxs(autojump_clock: MockClock) -> None:
    """A receive buffer holds 277 small datagrams by default; later ones are dropped and counted until there is room."""
    network = SimulatedNetwork()
    endpoint = network.endpoint(*SERVER)
    for _ in range(300):
        network.inject(b"x", ALICE, SERVER)
    statistics = endpoint.statistics()
    assert (statistics.kernel_queued, statistics.kernel_dropped) == (277 * 769, 23)
    assert (statistics.receive_buffer, statistics.receive_buffer_requested) == (212_992, 0)
    assert Counter(fate for _, fate in fates(network)) == {"sent": 300, "arrived": 277, "buffer full": 23}
    async with trio.open_nursery() as nursery:
        server = await nursery.start(partial(serve_endpoints, echo, [endpoint]))
        await trio.sleep(1)
        assert endpoint.statistics().kernel_queued == 0
        assert server.statistics().received == 277
        assert server.statistics().kernel_dropped == 23
        server.stop()
    assert network.endpoint(*BOB, receive_buffer=5_000).statistics().receive_buffer_requested == 5_000


async def test_a_refusal_takes_one_round_trip(autojump_clock: MockClock) -> None:
    """A refusal travels back to the connected sender under the same network conditions as datagrams."""
    network = SimulatedNetwork(latency=(0.5, 0.5))
    async with await network.connect(*SERVER) as connection:
        await connection.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            await connection.receive()
        assert trio.current_time() == 1.0
        await connection.send(b"x")
        await trio.sleep(0.6)
        with network.partition([SERVER]):
            await trio.sleep(1)
        with pytest.raises(trio.WouldBlock):
            connection.receive_nowait()
    assert fates(network)[-1] == (2.0, "refusal cut off")


async def test_a_refusal_for_an_earlier_connection(autojump_clock: MockClock) -> None:
    """A refusal is not raised by a later connection at the same address that has another peer."""
    network = SimulatedNetwork(latency=(0.5, 0.5))
    async with await network.connect(*SERVER, local_address=ALICE) as connection:
        await connection.send(b"x")
        await trio.sleep(0.6)
    async with await network.connect(*BOB, local_address=ALICE) as connection:
        await trio.sleep(1)
        with pytest.raises(trio.WouldBlock):
            connection.receive_nowait()
    assert fates(network)[-1] == (1.0, "refusal port closed")


async def test_a_read_that_fails(autojump_clock: MockClock) -> None:
    """fail_next_receive makes one read fail, after the datagrams that arrived before."""
    network = SimulatedNetwork()
    async with await network.connect(*SERVER, local_address=ALICE) as connection:
        network.inject(b"1", SERVER, ALICE)
        network.fail_next_receive(ALICE, errno.ENOMEM)
        network.inject(b"2", SERVER, ALICE)
        assert [await connection.receive() for _ in range(2)] == [b"1", b"2"]
        assert connection.statistics().errors == {"ENOMEM": 1}
    with pytest.raises(ValueError, match="no endpoint"):
        network.fail_next_receive(ALICE, errno.ENOMEM)


# Addresses.


async def test_endpoints_at_any_address(autojump_clock: MockClock) -> None:
    """Endpoints take numeric addresses of both families; with port 0 the network chooses, the same in each run."""
    network = SimulatedNetwork()
    assert network.endpoint("192.0.2.53", 0).local_address == ("192.0.2.53", 49_152)
    assert network.endpoint("2001:db8::53", 53).local_address == ("2001:db8::53", 53, 0, 0)
    connection = await network.connect("2001:db8::53", 53)
    assert connection.local_address == ("2001:db8::1", 49_153, 0, 0)
    assert (await network.connect("0.0.0.0", 53)).peer_address == ("127.0.0.1", 53)
    assert repr(network.endpoint("192.0.2.53", 53)) == "<trio_udp.Endpoint ('192.0.2.53', 53)>"


@pytest.mark.no_cover  # heavy
async def test_free_ports_run_out(autojump_clock: MockClock) -> None:
    """When all ports to choose from are taken, opening fails; closing an endpoint frees its port."""
    network = SimulatedNetwork()
    endpoints = [network.endpoint("192.0.2.1", 0) for _ in range(65_536 - 49_152)]
    with pytest.raises(OSError, match="in use"):
        network.endpoint("192.0.2.1", 0)
    assert network.endpoint("192.0.2.2", 0).local_address[0] == "192.0.2.2"
    endpoints[100].close()
    assert network.endpoint("192.0.2.1", 0).local_address == endpoints[100].local_address


async def test_forged_sources(autojump_clock: MockClock) -> None:
    """inject sends from any address, also from port 0, under the same network conditions."""
    seen = []

    async def handler(client: Client) -> None:
        seen.append((client.peer_address, await client.receive()))

    network = SimulatedNetwork()
    async with trio.open_nursery() as nursery:
        server = await nursery.start(partial(serve_endpoints, handler, [network.endpoint(*SERVER)]))
        network.inject(bytearray(b"forged"), ALICE, SERVER)
        network.inject(b"", ("192.0.2.66", 0), SERVER)
        await trio.sleep(1)
        server.stop()
    assert sorted(seen) == [(ALICE, b"forged"), (("192.0.2.66", 0), b"")]


async def test_there_is_no_socket(autojump_clock: MockClock) -> None:
    """The ``socket`` attribute of a simulated endpoint or connection raises an OSError that gives the reason."""
    network = SimulatedNetwork()
    with pytest.raises(io.UnsupportedOperation, match="SimulatedNetwork"):
        _ = network.endpoint(*SERVER).socket
    with pytest.raises(OSError, match="SimulatedNetwork"):
        _ = (await network.connect(*SERVER)).socket


async def test_two_networks_are_two(autojump_clock: MockClock) -> None:
    """The same address on two networks is two endpoints."""
    one, other = SimulatedNetwork(), SimulatedNetwork(latency=(1, 1))
    endpoints = [network.endpoint(*SERVER) for network in (one, other)]
    other.inject(b"x", ALICE, SERVER)
    assert [endpoint.statistics().kernel_queued for endpoint in endpoints] == [0, 0]
    await trio.sleep(1)
    await trio.testing.wait_all_tasks_blocked()
    assert [endpoint.statistics().kernel_queued for endpoint in endpoints] == [0, 769]


async def test_port_0_is_never_the_port_of_a_shared_socket() -> None:
    """Port 0 never gives the port of a shared socket that waits for its next endpoint."""
    network = SimulatedNetwork()
    network.endpoint("192.0.2.1", 49_152, shared=True).close()
    assert network.endpoint("192.0.2.1", 0, shared=True).local_address == ("192.0.2.1", 49_153)


async def test_connect_takes_a_whole_address(autojump_clock: MockClock) -> None:
    """connect takes an IPv6 address with flow information and scope; the peer address has what a kernel reports."""
    network = SimulatedNetwork()
    for host, wanted in (("fe80::53", ("fe80::53", 53, 0, 1)), ("2001:db8::53", ("2001:db8::53", 53, 0, 0))):
        endpoint = network.endpoint(host, 53)
        assert endpoint.local_address == wanted
        async with await network.connect(host, 53, 7, 1) as connection:
            assert connection.peer_address == wanted
            await connection.send(b"x")
            assert endpoint.receive_nowait().destination == wanted
        async with await network.connect(*endpoint.local_address) as connection:
            assert connection.peer_address == wanted


async def test_a_connection_has_a_receive_buffer_too(autojump_clock: MockClock) -> None:
    """The receive_buffer of connect is granted and reported."""
    statistics = (await SimulatedNetwork().connect(*SERVER, receive_buffer=5_000)).statistics()
    assert (statistics.receive_buffer, statistics.receive_buffer_requested) == (5_000, 5_000)


async def test_a_machine_with_several_addresses(autojump_clock: MockClock) -> None:
    """An endpoint bound to all addresses has its own_hosts, replies from each, and sends from the first by default."""
    network = SimulatedNetwork()
    first = network.endpoint("0.0.0.0", 53, own_hosts=["192.0.2.1", "10.0.0.1"])
    second = network.endpoint("0.0.0.0", 53, own_hosts=["192.0.2.2"])
    others = network.endpoint("0.0.0.0", 53)
    for host in ("192.0.2.1", "10.0.0.1", "192.0.2.2", "192.0.2.9"):
        network.inject(host.encode(), ALICE, (host, 53))
    for endpoint, hosts in ((first, ["192.0.2.1", "10.0.0.1"]), (second, ["192.0.2.2"]), (others, ["192.0.2.9"])):
        for host in hosts:
            datagram = endpoint.receive_nowait()
            assert (datagram.payload, datagram.local_address) == (host.encode(), (host, 53))
            assert (datagram.destination, datagram.interface) == ((host, 53), None)
            datagram.reply_nowait(b"reply")
    replies = [event for event in network.events if (event.fate, event.payload) == ("sent", b"reply")]
    assert [reply.source[0] for reply in replies] == ["192.0.2.1", "10.0.0.1", "192.0.2.2", "192.0.2.9"]
    network.events.clear()
    first.send_to_nowait(b"default", BOB)
    first.send_to_nowait(b"chosen", BOB, local_address=("10.0.0.1", 53))
    others.send_to_nowait(b"default", BOB)
    assert [event.source for event in network.events if event.fate == "sent"] == [
        *(("192.0.2.1", 53), ("10.0.0.1", 53), ("127.0.0.1", 53))
    ]
    with pytest.raises(OSError, match="Invalid argument"):
        first.send_to_nowait(b"x", BOB, local_address=("192.0.2.2", 53))
    with pytest.raises(OSError, match="in use"):
        network.endpoint("0.0.0.0", 53, own_hosts=["192.0.2.3", "10.0.0.1"])
    second.close()
    network.endpoint("0.0.0.0", 53, own_hosts=["192.0.2.2"])


async def test_a_source_without_an_address(autojump_clock: MockClock) -> None:
    """A datagram may come from the unspecified address, as a DHCP client's does."""
    network = SimulatedNetwork()
    endpoint = network.endpoint("0.0.0.0", 67)
    network.inject(b"discover", ("0.0.0.0", 68), ("255.255.255.255", 67))
    datagram = endpoint.receive_nowait()
    assert (datagram.peer_address, datagram.destination) == (("0.0.0.0", 68), ("255.255.255.255", 67))
    assert datagram.interface == 1


async def test_link_local_addresses(autojump_clock: MockClock) -> None:
    """Link-local addresses belong to interface 1, with and without a scope; another interface has no route."""
    network = SimulatedNetwork()
    endpoint = network.endpoint("::", 53, own_hosts=["2001:db8::53", "fe80::53"])
    for source in (("fe80::1", 1_000), ("fe80::1", 1_000, 5, 1)):
        network.inject(b"x", source, ("fe80::53", 53))
        datagram = endpoint.receive_nowait()
        assert datagram.peer_address == ("fe80::1", 1_000, 0, 1)
        assert datagram.local_address == datagram.destination == ("fe80::53", 53, 0, 1)
        assert datagram.interface == 1
    endpoint.send_to_nowait(b"near", ("fe80::1", 1_000, 0, 1))
    endpoint.send_to_nowait(b"far", ("2001:db8::1", 1_000))
    sources = [event.source for event in network.events if event.fate == "sent"]
    assert sources[-2:] == [("fe80::53", 53, 0, 1), ("2001:db8::53", 53, 0, 0)]
    with pytest.raises(OSError, match="unreachable"):
        endpoint.send_to_nowait(b"x", ("fe80::1", 1_000, 0, 2))
    with pytest.raises(OSError, match="No such device"):
        network.endpoint("fe80::1%2", 53)


# Groups and broadcast.

GROUP = ("224.0.0.251", 5353)
EVERYONE = ("255.255.255.255", 5353)


def waiting_in(endpoint: Endpoint) -> list[Datagram]:
    """Return all datagrams that have arrived at an endpoint."""
    datagrams = []
    with suppress(trio.WouldBlock):
        while True:
            datagrams.append(endpoint.receive_nowait())
    return datagrams


def member(network: SimulatedNetwork, own_host: str, bound: str = "0.0.0.0", **options: Any) -> Endpoint:
    """Open an endpoint on a machine of its own, and let it join the group."""
    endpoint = network.endpoint(bound, 5353, own_hosts=[own_host], **options)
    network.join(endpoint, GROUP[0])
    return endpoint


async def test_a_group(autojump_clock: MockClock) -> None:
    """A datagram to a group reaches every member, the sender included; replies leave from each member's own address."""
    network = SimulatedNetwork(latency=(0.5, 0.5))
    one, two = member(network, "192.0.2.1"), member(network, "192.0.2.2", bound=GROUP[0])
    one.send_to_nowait(b"who?", GROUP)
    await trio.sleep(1)
    for endpoint, local in ((one, ("192.0.2.1", 5353)), (two, ("192.0.2.2", 5353))):
        (datagram,) = waiting_in(endpoint)
        assert (datagram.payload, datagram.peer_address) == (b"who?", ("192.0.2.1", 5353))
        assert (datagram.destination, datagram.interface, datagram.local_address) == (GROUP, 1, local)
    datagram.reply_nowait(b"I")
    await trio.sleep(1)
    (reply,) = waiting_in(one)
    assert (reply.peer_address, reply.destination, reply.interface) == (("192.0.2.2", 5353), ("192.0.2.1", 5353), None)
    assert network.timeline().splitlines()[:4] == [
        "    0.000000  #1    sent            192.0.2.1:5353 > 224.0.0.251:5353 at 192.0.2.1:5353  4 bytes b'who?'",
        "    0.000000  #1    sent            192.0.2.1:5353 > 224.0.0.251:5353 at 192.0.2.2:5353  4 bytes b'who?'",
        "    0.500000  #1    arrived         192.0.2.1:5353 > 224.0.0.251:5353 at 192.0.2.1:5353  4 bytes b'who?'",
        "    0.500000  #1    arrived         192.0.2.1:5353 > 224.0.0.251:5353 at 192.0.2.2:5353  4 bytes b'who?'",
    ]


async def test_an_ipv6_group(autojump_clock: MockClock) -> None:
    """An IPv6 group reaches every member, as an IPv4 group does; a link-local group has the interface as its scope."""
    network = SimulatedNetwork()
    for group, scope in (("ff02::fb", 1), ("ff05::fb", 0)):
        endpoint = network.endpoint("::", 5353)
        network.join(endpoint, group)
        network.inject(b"x", ("fe80::1", 1_000), (group, 5353))
        (datagram,) = waiting_in(endpoint)
        assert (datagram.destination, datagram.interface) == ((group, 5353, 0, scope), 1)
        endpoint.close()


async def test_a_server_in_a_group(autojump_clock: MockClock) -> None:
    """One peer that writes to a server's own address, to a group and to everyone is three clients of the server."""
    network = SimulatedNetwork()
    endpoint = member(network, "192.0.2.53")
    destinations = [("192.0.2.53", 5353), GROUP, EVERYONE]
    async with trio.open_nursery() as nursery:
        server = await nursery.start(partial(serve_endpoints, echo, [endpoint]))
        for destination in destinations * 2:
            network.inject(b"x", ALICE, destination)
        await trio.sleep(1)
        clients = {(client.destination, client.interface, client.local_address) for client in server.clients}
        assert clients == {
            (destination, interface, ("192.0.2.53", 5353))
            for destination, interface in zip(destinations, [None, 1, 1], strict=True)
        }
        assert server.statistics().clients == 3
        server.stop()


async def test_a_group_reaches_only_members(autojump_clock: MockClock) -> None:
    """A datagram to a group misses other ports, other groups, endpoints bound to one address and those that left."""
    network = SimulatedNetwork()
    wildcard = network.endpoint("0.0.0.0", 5353)
    other_port, one_address = network.endpoint("0.0.0.0", 5354), network.endpoint("192.0.2.1", 5353)
    gone, left = member(network, "192.0.2.2"), member(network, "192.0.2.3")
    network.join(wildcard, "224.0.0.1")
    for endpoint in (other_port, one_address):
        network.join(endpoint, GROUP[0])
    gone.close()
    network.leave(left, GROUP[0])
    network.inject(b"x", ALICE, GROUP)
    assert [waiting_in(endpoint) for endpoint in (wildcard, other_port, one_address, left)] == [[], [], [], []]
    assert fates(network) == [(0.0, "no receiver")]
    network.join(left, GROUP[0])
    network.inject(b"x", ALICE, GROUP)
    assert len(waiting_in(left)) == 1


async def test_a_group_that_is_left_under_way(autojump_clock: MockClock) -> None:
    """A datagram to a group arrives only if its receiver is a member when it arrives."""
    network = SimulatedNetwork(latency=(1, 1))
    endpoint = member(network, "192.0.2.1")
    network.inject(b"x", ALICE, GROUP)
    network.leave(endpoint, GROUP[0])
    await trio.sleep(2)
    assert fates(network) == [(0.0, "sent"), (1.0, "no receiver")]


async def test_copies_to_a_group_travel_separately(autojump_clock: MockClock) -> None:
    """Each machine's copy of a datagram to a group can be lost, or cut off, independently."""
    network = SimulatedNetwork(loss=0.5)
    members = [member(network, f"192.0.2.{number}") for number in range(1, 101)]
    network.inject(b"x", ALICE, GROUP)
    assert 35 < sum(len(waiting_in(endpoint)) for endpoint in members) < 65
    network.loss = 0
    with network.partition([("192.0.2.7", 5353)]):
        network.inject(b"x", ALICE, GROUP)
    assert [number for number, endpoint in enumerate(members, 1) if not waiting_in(endpoint)] == [7]


async def test_two_members_on_one_machine(autojump_clock: MockClock) -> None:
    """Two endpoints on one machine both receive the machine's copy."""
    network = SimulatedNetwork()
    members = [member(network, "192.0.2.1"), member(network, "192.0.2.1", bound=GROUP[0])]
    network.inject(b"x", ALICE, GROUP)
    assert [len(waiting_in(endpoint)) for endpoint in members] == [1, 1]
    assert [fate for _, fate in fates(network)] == ["sent", "arrived", "arrived"]


async def test_broadcast(autojump_clock: MockClock) -> None:
    """A broadcast reaches all endpoints bound to all addresses at its port, the sender's own included."""
    network = SimulatedNetwork()
    sender = network.endpoint("0.0.0.0", 5353, own_hosts=["192.0.2.1"], allow_broadcast=True)
    others = [network.endpoint("0.0.0.0", 5353, own_hosts=["192.0.2.2"]), network.endpoint("0.0.0.0", 5353)]
    deaf = [network.endpoint("192.0.2.3", 5353), network.endpoint("0.0.0.0", 5354)]
    sender.send_to_nowait(b"x", EVERYONE)
    for endpoint, host in zip([sender, *others], ["192.0.2.1", "192.0.2.2", "127.0.0.1"], strict=True):
        (datagram,) = waiting_in(endpoint)
        assert (datagram.peer_address, datagram.local_address) == (("192.0.2.1", 5353), (host, 5353))
        assert (datagram.destination, datagram.interface) == (EVERYONE, 1)
    assert [waiting_in(endpoint) for endpoint in deaf] == [[], []]


async def test_broadcast_has_to_be_allowed(autojump_clock: MockClock) -> None:
    """Sending to the broadcast address fails with EACCES without allow_broadcast, and for a connection always."""
    network = SimulatedNetwork()
    with pytest.raises(PermissionError):
        network.endpoint("0.0.0.0", 5353).send_to_nowait(b"x", EVERYONE)
    with pytest.raises(PermissionError):
        await network.connect(*EVERYONE)
    assert network.events == []


async def test_a_datagram_to_a_group_is_never_refused(autojump_clock: MockClock) -> None:
    """A connection to a group gets no refusal if the group has no members, because there is no ICMP for it."""
    network = SimulatedNetwork()
    async with await network.connect(*GROUP) as connection:
        await connection.send(b"x")
        with pytest.raises(trio.WouldBlock):
            connection.receive_nowait()
    assert fates(network) == [(0.0, "no receiver")]


# Shared sockets.


async def test_a_shared_socket_outlives_its_endpoint(autojump_clock: MockClock) -> None:
    """Datagrams wait in a shared socket's buffer, unread ones included, until the next endpoint there reads them."""
    network = SimulatedNetwork()
    first = network.endpoint(*SERVER, shared=True)
    network.inject(b"1", ALICE, SERVER)
    assert first.receive_nowait().payload == b"1"
    network.inject(b"2", ALICE, SERVER)
    await first.aclose()
    assert first.closed
    network.inject(b"3", ALICE, SERVER)
    second = network.endpoint(*SERVER, shared=True)
    network.inject(b"4", ALICE, SERVER)
    assert [datagram.payload for datagram in waiting_in(second)] == [b"2", b"3", b"4"]
    assert [endpoint.statistics().received for endpoint in (first, second)] == [1, 3]


async def test_a_server_that_is_restarted(autojump_clock: MockClock) -> None:
    """Datagrams that arrive between two servers on a shared socket are all handled, by one of the two."""
    network = SimulatedNetwork(latency=(0.05, 0.05))
    servers = []

    async def send() -> None:
        for number in range(100):
            await connection.send(b"%d" % number)
            await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        connection = await network.connect(*SERVER)
        nursery.start_soon(send)
        for _ in range(2):
            endpoint = network.endpoint(*SERVER, shared=True)
            servers.append(await nursery.start(partial(serve_endpoints, echo, [endpoint])))
            await trio.sleep(0.3)
            servers[-1].stop()
            await trio.sleep(0.1)
        endpoint = network.endpoint(*SERVER, shared=True)
        servers.append(await nursery.start(partial(serve_endpoints, echo, [endpoint])))
        await trio.sleep(1)
        assert [await connection.receive() for _ in range(100)] == [b"%d" % number for number in range(100)]
        servers[-1].stop()
    handled = [server.statistics().delivered for server in servers]
    assert (sum(handled), min(handled) > 0) == (100, True)
    assert [server.statistics().refused_stopping for server in servers] == [0, 0, 0]


async def test_a_shared_socket_drops_when_its_buffer_is_full(autojump_clock: MockClock) -> None:
    """The buffer of a shared socket overflows while no endpoint is open; a closed endpoint's statistics stay."""
    network = SimulatedNetwork()
    first = network.endpoint(*SERVER, shared=True, receive_buffer=1_000)
    first.close()
    for _ in range(5):
        network.inject(b"x", ALICE, SERVER)
    second = network.endpoint(*SERVER, shared=True)
    assert first.statistics().kernel_dropped == 0
    assert (second.statistics().kernel_dropped, second.statistics().kernel_queued) == (3, 2 * 769)


async def test_a_shared_socket_stays_in_its_groups(autojump_clock: MockClock) -> None:
    """Datagrams to a group wait in the buffer of a shared socket, too."""
    network = SimulatedNetwork()
    member(network, "192.0.2.1", shared=True).close()
    network.inject(b"x", ALICE, GROUP)
    second = network.endpoint("0.0.0.0", 5353, own_hosts=["192.0.2.1"], shared=True)
    assert [datagram.destination for datagram in waiting_in(second)] == [GROUP]


async def test_an_endpoint_that_waits_is_woken_by_the_next_one(autojump_clock: MockClock) -> None:
    """Closing one endpoint of a shared socket ends its own receive, and not that of the endpoint that takes over."""
    network = SimulatedNetwork()
    first, second = (network.endpoint(*SERVER, shared=True) for _ in range(2))
    received = []

    async def receive() -> None:
        received.append((await second.receive()).payload)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        first.close()
        await trio.testing.wait_all_tasks_blocked()
        assert received == []
        network.inject(b"x", ALICE, SERVER)
    assert received == [b"x"]


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (False, False)])
async def test_an_address_is_shared_by_agreement(before: bool, after: bool) -> None:
    """Only shared endpoints can have one address; a shared socket keeps its address for ever."""
    network = SimulatedNetwork()
    endpoint = network.endpoint(*SERVER, shared=before)
    with pytest.raises(OSError, match="in use"):
        network.endpoint(*SERVER, shared=after)
    endpoint.close()
    if before:
        with pytest.raises(OSError, match="in use"):
            network.endpoint(*SERVER, shared=after)
    else:
        network.endpoint(*SERVER, shared=after)


# The engine.


def make_engine(host: str = SERVER[0], groups: Iterable[str] = (), **options: Any) -> tuple[SimulatedEngine, Wire]:
    """Make an engine at port 53 of a network of its own."""
    table, socket = SocketTable(), SimulatedSocket((host, 53), **options)
    wire = Wire(Conditions(), table)
    assert table.add(socket) is socket
    for group in groups:
        table.join(socket, group)
    return SimulatedEngine(socket, table, wire), wire


async def test_routes_are_equal_if_they_are_one_client(autojump_clock: MockClock) -> None:
    """Routes differ by peer, local address and, except for unicast, destination; route() equals those of arrivals."""
    engine, wire = make_engine("0.0.0.0", ["224.0.0.1"], own_hosts=("192.0.2.53", "10.0.0.1"))
    destinations = [("192.0.2.53", 53), ("10.0.0.1", 53), ("224.0.0.1", 53), ("255.255.255.255", 53)]
    for peer in (ALICE, BOB):
        for destination in destinations * 2:
            wire.send(b"x", peer, destination, 0.0, 0.0)
    batch: list[Received] = []
    assert engine.receive(batch)
    routes = [route for _, route, _ in batch]
    assert routes[:4] == routes[4:8]
    assert routes[8:12] == routes[12:]
    assert len(set(routes)) == 8
    assert engine.route(ALICE) == engine.route(ALICE, engine.source_for(ALICE)) == routes[0]
    assert engine.route(BOB, ("10.0.0.1", 53)) == routes[9]
    assert [engine.destination(route) for route in routes[:4]] == destinations
    assert [engine.interface(route) for route in routes[:4]] == [None, None, 1, 1]
    assert [engine.local_address(route)[0] for route in routes[:4]] == ["192.0.2.53", "10.0.0.1", *["192.0.2.53"] * 2]
    assert {ancillary for _, _, ancillary in batch} == {()}


async def test_send_stops_at_the_first_failure(autojump_clock: MockClock) -> None:
    """send returns how many datagrams it took before one failed, and raises only if the first one fails."""
    engine, _ = make_engine()
    good, bad = engine.route(ALICE), engine.route(("192.0.2.1", 0))
    assert engine.send([b"x"] * 4, [1] * 4, [good, good, bad, good]) == 2
    with pytest.raises(OSError, match="Invalid argument"):
        engine.send([b"x"] * 2, [1] * 2, [bad, good])
    assert engine.send([b"x"], [1], [good]) == 1


async def test_send_does_not_lose_a_refusal(autojump_clock: MockClock) -> None:
    """A refusal that arrives between two datagrams of one send is raised by the next call, and once."""
    engine, _ = make_engine(peer=ALICE)
    route = engine.route(ALICE)
    assert engine.send([b"x"] * 2, [1] * 2, [route] * 2) == 1
    with pytest.raises(ConnectionRefusedError):
        engine.send([b"x"], [1], [route])
    assert engine.send([b"x"], [1], [route]) == 1


@pytest.mark.parametrize(
    ("bound", "own_hosts", "own", "foreign"),
    [
        ("192.0.2.53", [], ["192.0.2.53"], ["192.0.2.1", "127.0.0.1"]),
        ("192.0.2.53", ["192.0.2.53", "10.0.0.1"], ["192.0.2.53", "10.0.0.1"], ["192.0.2.1"]),
        ("0.0.0.0", ["192.0.2.53", "10.0.0.1"], ["192.0.2.53", "10.0.0.1"], ["192.0.2.1", "127.0.0.1"]),
        ("0.0.0.0", [], ["192.0.2.1", "127.0.0.1", "0.0.0.0"], []),
        ("224.0.0.1", ["10.0.0.1"], ["10.0.0.1"], ["192.0.2.1"]),
    ],
)
async def test_own_hosts(bound: str, own_hosts: list[str], own: list[str], foreign: list[str]) -> None:
    """An endpoint's own hosts are its bound address, its own_hosts, and all addresses that no other endpoint has."""
    engine, _ = make_engine(bound, own_hosts=tuple(own_hosts))
    assert [host for host in own + foreign if engine.is_own_host((host, 999))] == own


async def test_doubtful_sources() -> None:
    """Watched ports, groups, the broadcast and the unspecified address are doubtful sources."""
    engine, _ = make_engine()
    engine.watch_ports(frozenset({53}))
    doubtful = [("192.0.2.1", 53), ("224.0.0.1", 1), ("255.255.255.255", 1)]
    assert [peer for peer in [*doubtful, ALICE, BOB] if engine.doubtful_source(engine.route(peer))] == doubtful
    unspecified = SimulatedRoute(("0.0.0.0", 68), SERVER, SERVER, None)
    assert engine.doubtful_source(unspecified)


async def test_no_route_to_an_address() -> None:
    """source_for raises the error of a partition that tells the sender."""
    engine, wire = make_engine()
    assert engine.source_for(ALICE) == SERVER
    wire.cut(frozenset({ALICE}), None, errno.ENETUNREACH)
    with pytest.raises(OSError, match="unreachable"):
        engine.source_for(ALICE)


# The caller's mistakes.


@pytest.mark.parametrize(
    ("error", "name", "value"),
    [
        (TypeError, "seed", 1.5),
        (TypeError, "seed", None),
        (TypeError, "loss", "0.4"),
        (TypeError, "loss", True),
        (ValueError, "loss", 40),
        (ValueError, "duplicate", -0.1),
        (ValueError, "reorder", float("nan")),
        (TypeError, "latency", 0.1),
        (TypeError, "latency", (0.1,)),
        (TypeError, "latency", ("0", "1")),
        (ValueError, "latency", (0.2, 0.1)),
        (ValueError, "latency", (-1, 1)),
        (ValueError, "latency", (0, float("inf"))),
        (TypeError, "mtu", 1500.0),
        (ValueError, "mtu", 20),
        (TypeError, "bandwidth", "1M"),
        (ValueError, "bandwidth", 0),
    ],
)
def test_conditions_that_are_not_valid(error: type[Exception], name: str, value: Any) -> None:
    """A condition that is not valid raises when the network is made, and the message names it."""
    with pytest.raises(error, match=name):
        SimulatedNetwork(**{name: value})


async def test_wrong_arguments() -> None:
    """Values that are not addresses, ports and sizes out of range, and payloads that are too long raise at the call."""
    network = SimulatedNetwork()
    anything: Any = network
    for wrong in (
        ("localhost", 53),
        ("192.0.2.1", -1),
        ("192.0.2.1", 65_536),
        ("192.0.2.1", "53"),
        (None, 53),
        ("", 53),
    ):
        with pytest.raises((TypeError, ValueError), match="address"):
            anything.endpoint(*wrong)
        with pytest.raises((TypeError, ValueError), match="address"):
            await anything.connect(*wrong)
        with pytest.raises((TypeError, ValueError), match="address"):
            anything.inject(b"x", wrong, SERVER)
        with pytest.raises((TypeError, ValueError), match="address"):
            anything.inject(b"x", SERVER, wrong)
        with pytest.raises((TypeError, ValueError), match="address"):
            anything.partition([wrong])
    for hosts in (["localhost"], ["0.0.0.0"], ["224.0.0.1"], ["2001:db8::1"], "192.0.2.1", [1]):
        with pytest.raises((TypeError, ValueError), match="address"):
            anything.endpoint("0.0.0.0", 53, own_hosts=hosts)
    endpoint = network.endpoint("0.0.0.0", 53)
    elsewhere = SimulatedNetwork().endpoint("0.0.0.0", 53)
    for change in (network.join, network.leave):
        for group in ("192.0.2.1", "255.255.255.255", "ff02::1", "group"):
            with pytest.raises(ValueError, match="address"):
                change(endpoint, group)
        with pytest.raises(ValueError, match="not an open endpoint"):
            change(elsewhere, "224.0.0.1")
    with pytest.raises(OSError, match="not in group"):
        network.leave(endpoint, "224.0.0.1")
    network.join(endpoint, "224.0.0.1")
    with pytest.raises(OSError, match="already in group"):
        network.join(endpoint, "224.0.0.1")
    endpoint.close()
    with pytest.raises(ValueError, match="not an open endpoint"):
        network.join(endpoint, "224.0.0.1")
    for options in ({"receive_buffer": 0}, {"send_buffer": "1M"}, {"receive_buffer": 1.5}, {"max_datagram_size": 0}):
        with pytest.raises((TypeError, ValueError), match=next(iter(options))):
            anything.endpoint(*SERVER, **options)
    with pytest.raises(ValueError, match="families"):
        await network.connect("192.0.2.1", 53, local_address=("2001:db8::1", 53))
    with pytest.raises(TypeError, match="receive_buffer"):
        await anything.connect(*SERVER, receive_buffer="1M")
    with pytest.raises(ValueError, match="families"):
        network.inject(b"x", ("2001:db8::1", 53), SERVER)
    with pytest.raises(ValueError, match="port 0"):
        network.inject(b"x", ALICE, ("192.0.2.1", 0))
    with pytest.raises(TypeError):
        anything.inject("text", ALICE, BOB)
    with pytest.raises(OSError, match="too long"):
        network.inject(bytes(65_508), ALICE, BOB)
    with pytest.raises(ValueError, match="many addresses"):
        network.partition([ALICE], [("0.0.0.0", 53)])
    with pytest.raises(TypeError, match="seed"), deterministic_scheduling(anything):
        pass
    with pytest.raises(TypeError, match="error"):
        anything.partition([ALICE], error="EPERM")
    with pytest.raises(TypeError, match="error"):
        anything.fail_next_receive(ALICE, OSError(5))
    assert network.events == []


def test_outside_of_trio() -> None:
    """A network can be made outside of Trio, but sending needs Trio's clock."""
    network = SimulatedNetwork()
    network.endpoint(*SERVER).close()
    with pytest.raises(RuntimeError):
        network.inject(b"x", ALICE, SERVER)


# Interrupted runs.


async def test_a_cancelled_connect_takes_no_address() -> None:
    """A cancelled connect leaves nothing open, as with a real one."""
    network = SimulatedNetwork()
    with trio.CancelScope() as scope:
        scope.cancel()
        await network.connect(*SERVER, local_address=ALICE)
    assert scope.cancelled_caught
    network.endpoint(*ALICE)


async def test_a_shielded_goodbye_arrives(autojump_clock: MockClock) -> None:
    """Datagrams still arrive in a shielded clean-up while everything else is cancelled."""
    network = SimulatedNetwork(latency=(1, 1))
    endpoint = network.endpoint(*SERVER)
    async with await network.connect(*SERVER) as connection, trio.open_nursery() as nursery:
        nursery.start_soon(partial(serve_endpoints, echo, [endpoint]))
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                await trio.sleep_forever()
            finally:
                with trio.move_on_after(5, shield=True):
                    await connection.send(b"goodbye")
                    assert await connection.receive() == b"goodbye"
        nursery.cancel_scope.cancel()
    assert trio.current_time() == 2


async def test_due_datagrams_arrive_before_the_network_changes(mock_clock: MockClock) -> None:
    """Datagrams that are due arrive before a partition begins and before an endpoint opens or closes."""
    network = SimulatedNetwork(latency=(1, 1))
    changes: list[Callable[[Endpoint], object]] = [
        lambda _: network.partition([ALICE]),
        lambda _: network.endpoint(*SERVER),
        lambda endpoint: endpoint.close(),
    ]
    for change in changes:
        endpoint = network.endpoint(*BOB)
        network.events.clear()
        network.inject(b"x", ALICE, BOB)
        network.inject(b"x", ALICE, SERVER)
        mock_clock.jump(5)
        changed = change(endpoint)
        assert [fate for _, fate in fates(network)] == ["sent", "sent", "arrived", "port closed"]
        if isinstance(changed, Partition):
            changed.heal()
        for opened in (endpoint, changed):
            if isinstance(opened, Endpoint):
                opened.close()


def test_a_network_may_outlive_its_run() -> None:
    """Datagrams in transit when a run of Trio ends arrive when the network is next used, on any clock."""
    network = SimulatedNetwork(latency=(1, 1))

    async def send() -> None:
        network.inject(b"x", ALICE, SERVER)

    for _ in range(2):
        run(send)
    run(partial(trio.sleep, 2))
    assert [fate for _, fate in fates(network)] == ["sent", "port closed", "sent"]

    async def wait() -> None:
        network.inject(b"x", ALICE, SERVER)
        await trio.sleep(2)

    run(wait)
    assert [fate for _, fate in fates(network)] == ["sent", "port closed"] * 3
    assert network.events[-1].time == network.events[-2].time + 1


def test_a_program_that_is_interrupted() -> None:
    """Ctrl-C ends a run normally while datagrams are in transit."""
    network = SimulatedNetwork(latency=(1, 1))

    async def main() -> None:
        network.inject(b"x", ALICE, SERVER)
        await trio.sleep(0.5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(main)


# All conditions together.

conditions = st.fixed_dictionaries(
    {
        "loss": st.floats(0, 1),
        "duplicate": st.floats(0, 1),
        "reorder": st.floats(0, 1),
        "latency": st.tuples(st.floats(0, 0.1), st.floats(0.1, 2)),
        "mtu": st.integers(68, 65_535),
        "bandwidth": st.none() | st.floats(1_000, 1_000_000),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0),
    phases=st.lists(conditions, min_size=1, max_size=4),
    steps=st.lists(st.sampled_from(["send", "send many", "inject", "cut", "heal", "wait", "change"]), max_size=60),
)
def test_everything_is_accounted_for(seed: int, phases: list[dict[str, Any]], steps: list[str]) -> None:
    """Each copy of each datagram has exactly one end, and both ends count the copies that reach them."""
    network = SimulatedNetwork(seed=seed, **phases[0])

    async def main() -> None:
        endpoint = network.endpoint(*SERVER, receive_buffer=20_000)
        partition = network.partition([], [])
        changes = iter(phases[1:])
        async with trio.open_nursery() as nursery:
            server = await nursery.start(partial(serve_endpoints, echo, [endpoint]))
            alice = await network.connect(*SERVER, local_address=ALICE)
            nursery.start_soon(drain, alice)
            for step in steps:
                if step == "send":
                    with trio.move_on_after(1):
                        await alice.send(b"hello")
                elif step == "send many":
                    with trio.move_on_after(1):
                        await alice.send_many([bytes(length * 100) for length in range(40)])
                elif step == "inject":
                    network.inject(b"forged", BOB, SERVER)
                elif step == "cut":
                    partition.heal()
                    partition = network.partition([ALICE], [SERVER])
                elif step == "heal":
                    partition.heal()
                elif step == "wait":
                    await trio.sleep(0.5)
                else:
                    for name, value in next(changes, {}).items():
                        setattr(network, name, value)
            await trio.sleep(1_000)  # until the send buffer is empty
            check_adds_up(server)
            nursery.cancel_scope.cancel()
        count = Counter((event.fate, event.destination) for event in network.events)
        for address, at in ((SERVER, endpoint.statistics()), (ALICE, alice.statistics())):
            assert (count["arrived", address], count["buffer full", address]) == (at.received, at.kernel_dropped)
        leaving = {"sent", "held back", "duplicated"}
        for number in {event.number for event in network.events}:
            seen = [event.fate for event in network.events if event.number == number]
            copies = sum(fate in leaving for fate in seen)
            assert len(seen) == 2 * copies if copies else seen in (["lost"], ["cut off"])

    run(main)


async def test_importing_trio_udp_does_not_import_it() -> None:
    """Importing trio_udp does not import trio_udp.testing, so that servers do not pay for it."""
    code = "import sys, trio_udp; assert 'trio_udp.testing' not in sys.modules"
    await trio.run_process([sys.executable, "-c", code])


def test_what_is_public() -> None:
    """Public names have ``trio_udp.testing`` as their module."""
    names = trio_udp.testing.__all__
    assert names == ["DatagramEvent", "Partition", "SimulatedNetwork", "deterministic_scheduling"]
    for name in names:
        assert getattr(trio_udp.testing, name).__module__ == "trio_udp.testing"
