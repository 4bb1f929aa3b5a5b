"""The simulated network: its weather, its buffers, its errors, and that all of it can be had again."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings, strategies as st
from trio.testing import MockClock

import trio_udp
from trio_udp import Client, Connection, Endpoint, serve_endpoints
from trio_udp.testing import DatagramEvent, SimulatedNetwork, deterministic_scheduling

from .conftest import ALICE, BOB, CAROL, SERVER, check_adds_up

ROOT = Path(__file__).parent.parent

STORM: Any = {"loss": 0.3, "duplicate": 0.2, "reorder": 0.2, "latency": (0.01, 0.2), "bandwidth": 10_000}


async def echo(client: Client) -> None:
    async for payload in client:
        await client.send(payload)


async def drain(connection: Connection) -> None:
    async for _ in connection:
        pass


def run(main: Callable[[], Awaitable[object]], seed: int = 0) -> None:
    with deterministic_scheduling(seed):
        trio.run(main, clock=MockClock(autojump_threshold=0))


def fates(network: SimulatedNetwork) -> list[tuple[float, str]]:
    return [(event.time, event.fate) for event in network.events]


async def arrivals(network: SimulatedNetwork, payloads: list[bytes], seconds: float = 1_000) -> list[bytes]:
    """Send all at once from Alice to Bob, and return what has arrived after so much time."""
    async with await network.connect(*BOB, local_address=ALICE) as alice:
        async with await network.connect(*ALICE, local_address=BOB) as bob:
            await alice.send_many(payloads)
            received = []
            with trio.move_on_after(seconds):
                while True:
                    received.append(await bob.receive())
    return received


# It can be had again.


def stormy_day(seed: int) -> str:
    """Ten clients that send now and then to a server with short patience, through a storm."""
    network = SimulatedNetwork(seed=seed, **STORM)

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
    """Byte for byte, whatever ran before; another seed gives another."""
    first = stormy_day(1)
    other = stormy_day(2)
    assert stormy_day(1) == first
    assert first != other
    for fate in ("sent", "lost", "held back", "duplicated", "arrived"):
        assert f" {fate} " in first


def test_another_process_gives_the_same_run() -> None:
    """Nothing depends on the order of hashes, which differs from process to process."""
    code = "from tests.test_simulated_network import stormy_day; print(stormy_day(1))"
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    ]
    assert runs == [stormy_day(1) + "\n"] * 2


async def test_the_order_of_tasks_is_given_back() -> None:
    """After deterministic_scheduling Trio throws its own dice again."""
    scheduler = trio._core._run
    before = scheduler._r.getstate(), scheduler._ALLOW_DETERMINISTIC_SCHEDULING
    with deterministic_scheduling(5):
        assert scheduler._r.getstate() != before[0]
    assert (scheduler._r.getstate(), scheduler._ALLOW_DETERMINISTIC_SCHEDULING) == before


def test_a_day_of_keep_alives() -> None:
    """A client that says a word every ten seconds of a day is one client all the while."""
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
    """One line for each event: when, which datagram, what became of it, from where to where, and its first bytes."""
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


# The weather.


async def test_by_default_all_is_well(autojump_clock: MockClock) -> None:
    """Everything arrives at once and in order."""
    wanted = [b"%d" % i for i in range(100)]
    network = SimulatedNetwork()
    assert await arrivals(network, wanted) == wanted
    assert {event.time for event in network.events} == {0.0}


async def test_loss(autojump_clock: MockClock) -> None:
    """Every datagram, none, or some are lost; the others arrive in order."""
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
    """Both copies arrive, and are told from other datagrams by their number."""
    network = SimulatedNetwork(duplicate=1, latency=(0.1, 0.2))
    assert await arrivals(network, [b"x"]) == [b"x", b"x"]
    assert [fate for _, fate in fates(network)] == ["sent", "duplicated", "arrived", "arrived"]
    assert [event.number for event in network.events] == [1, 1, 1, 1]


async def test_reordering(autojump_clock: MockClock) -> None:
    """Those held back are overtaken, and nothing is lost."""
    sent = [b"%d" % i for i in range(100)]
    received = await arrivals(SimulatedNetwork(reorder=0.3), sent)
    assert received != sent
    assert sorted(received, key=int) == sent


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0), low=st.floats(0, 1), more=st.floats(0, 10), gaps=st.lists(st.floats(0, 1), max_size=50))
def test_latency_alone_keeps_the_order(seed: int, low: float, more: float, gaps: list[float]) -> None:
    """However much it varies, datagrams between the same two addresses arrive in order, and none too early."""
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
    """So it is lost more often than a short one; how much, the mtu decides."""

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
    """Each sender's datagrams leave one after the other, as fast as its line allows."""
    network = SimulatedNetwork(bandwidth=100, latency=(1, 1))
    async with await network.connect(*CAROL, local_address=ALICE) as alice:
        async with await network.connect(*CAROL, local_address=BOB) as bob:
            await alice.send_many([bytes(100), bytes(50)])
            await bob.send(bytes(300))
            await trio.sleep(10)
    arrived = [(event.source, event.time) for event in network.events if event.fate == "port closed"]
    assert arrived == [(ALICE, 2.0), (ALICE, 2.5), (BOB, 4.0)]


async def test_the_weather_may_change(autojump_clock: MockClock) -> None:
    """What is sent from then on meets the new one."""
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
    """Nothing crosses it, not even what was under way, until it has healed; what need not cross it passes."""
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
    """Without others, it is everybody else that is cut off; those inside still reach each other."""
    network = SimulatedNetwork()
    network.partition([ALICE, BOB])
    for source, destination in ((ALICE, BOB), (ALICE, CAROL), (CAROL, BOB), (SERVER, CAROL)):
        network.inject(b"x", source, destination)
    assert [fate for _, fate in fates(network)] == ["sent", "port closed", "cut off", "cut off", "sent", "port closed"]


async def test_a_partition_that_the_sender_is_told_of(autojump_clock: MockClock) -> None:
    """With an error, sending across fails with it, which counts as any error of the network's does."""
    network = SimulatedNetwork()
    async with await network.connect(*SERVER, local_address=ALICE) as connection:
        with network.partition([ALICE], error=errno.ENETUNREACH):
            await connection.send(b"x")
        assert connection.statistics().errors == {"ENETUNREACH": 1}
        assert network.events == []


# Buffers and errors.


async def test_a_receive_buffer_is_as_large_as_linuxs(autojump_clock: MockClock) -> None:
    """277 small datagrams by default; what comes later is dropped and counted, until there is room again."""
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
    """The connected sender is told; it travels through the weather as everything else does."""
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
    """Who has the address by the time that it arrives is not told, unless connected to the same peer."""
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
    """fail_next_receive fails one read, after what has arrived before."""
    network = SimulatedNetwork()
    async with await network.connect(*SERVER, local_address=ALICE) as connection:
        network.inject(b"1", SERVER, ALICE)
        network.fail_next_receive(ALICE, errno.ENOMEM)
        network.inject(b"2", SERVER, ALICE)
        assert [await connection.receive() for _ in range(2)] == [b"1", b"2"]
        assert connection.statistics().errors == {"ENOMEM": 1}
    with pytest.raises(ValueError, match="nobody"):
        network.fail_next_receive(ALICE, errno.ENOMEM)


# Addresses.


async def test_endpoints_at_any_address(autojump_clock: MockClock) -> None:
    """Numeric ones of both families; port 0 lets the network choose, always the same."""
    network = SimulatedNetwork()
    assert network.endpoint("192.0.2.53", 0).local_address == ("192.0.2.53", 49_152)
    assert network.endpoint("2001:db8::53", 53).local_address == ("2001:db8::53", 53, 0, 0)
    connection = await network.connect("2001:db8::53", 53)
    assert connection.local_address == ("2001:db8::1", 49_153, 0, 0)
    assert (await network.connect("0.0.0.0", 53)).peer_address == ("127.0.0.1", 53)
    assert repr(network.endpoint("192.0.2.53", 53)) == "<trio_udp.Endpoint ('192.0.2.53', 53)>"


async def test_there_are_as_many_free_ports_as_there_are(autojump_clock: MockClock) -> None:
    """When all that the network may choose from are taken, it says so; a closed one is free again."""
    network = SimulatedNetwork()
    endpoints = [network.endpoint("192.0.2.1", 0) for _ in range(65_536 - 49_152)]
    with pytest.raises(OSError, match="in use"):
        network.endpoint("192.0.2.1", 0)
    assert network.endpoint("192.0.2.2", 0).local_address[0] == "192.0.2.2"
    endpoints[100].close()
    assert network.endpoint("192.0.2.1", 0).local_address == endpoints[100].local_address


async def test_forged_sources(autojump_clock: MockClock) -> None:
    """inject sends from addresses at which nobody is, through the same weather."""
    seen = []

    async def handler(client: Client) -> None:
        seen.append((client.peer_address, await client.receive()))

    network = SimulatedNetwork()
    async with trio.open_nursery() as nursery:
        server = await nursery.start(partial(serve_endpoints, handler, [network.endpoint(*SERVER)]))
        network.inject(bytearray(b"forged"), ALICE, SERVER)
        network.inject(b"", ("255.255.255.255", 0), SERVER)
        await trio.sleep(1)
        server.stop()
    assert sorted(seen) == [(ALICE, b"forged"), (("255.255.255.255", 0), b"")]


async def test_there_is_no_socket(autojump_clock: MockClock) -> None:
    """Who asks an endpoint or a connection for its socket is told why there is none."""
    network = SimulatedNetwork()
    with pytest.raises(io.UnsupportedOperation, match="SimulatedNetwork"):
        _ = network.endpoint(*SERVER).socket
    with pytest.raises(OSError, match="SimulatedNetwork"):
        _ = (await network.connect(*SERVER)).socket


async def test_two_networks_are_two(autojump_clock: MockClock) -> None:
    """The same addresses on another network are other endpoints."""
    one, other = SimulatedNetwork(), SimulatedNetwork(latency=(1, 1))
    endpoints = [network.endpoint(*SERVER) for network in (one, other)]
    other.inject(b"x", ALICE, SERVER)
    assert [endpoint.statistics().kernel_queued for endpoint in endpoints] == [0, 0]
    await trio.sleep(1)
    await trio.testing.wait_all_tasks_blocked()
    assert [endpoint.statistics().kernel_queued for endpoint in endpoints] == [0, 769]


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
def test_weather_that_makes_no_sense(error: type[Exception], name: str, value: Any) -> None:
    """Raises when the network is made, naming the argument."""
    with pytest.raises(error, match=name):
        SimulatedNetwork(**{name: value})


async def test_wrong_arguments() -> None:
    """Addresses that are none, ports and sizes out of range, and payloads that no datagram can carry."""
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
    for options in ({"receive_buffer": 0}, {"send_buffer": "1M"}, {"receive_buffer": 1.5}, {"max_datagram_size": 0}):
        with pytest.raises((TypeError, ValueError), match=next(iter(options))):
            anything.endpoint(*SERVER, **options)
    with pytest.raises(ValueError, match="families"):
        await network.connect("192.0.2.1", 53, local_address=("2001:db8::1", 53))
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
    """A network can be made anywhere, but time is Trio's."""
    network = SimulatedNetwork()
    network.endpoint(*SERVER).close()
    with pytest.raises(RuntimeError):
        network.inject(b"x", ALICE, SERVER)


# What ends in the middle.


async def test_a_cancelled_connect_takes_no_address() -> None:
    """As with a real one, nothing stays open."""
    network = SimulatedNetwork()
    with trio.CancelScope() as scope:
        scope.cancel()
        await network.connect(*SERVER, local_address=ALICE)
    assert scope.cancelled_caught
    network.endpoint(*ALICE)


async def test_a_shielded_goodbye_arrives(autojump_clock: MockClock) -> None:
    """Time goes on for the network while everything else is cancelled."""
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


async def test_what_is_due_arrives_before_the_network_changes(mock_clock: MockClock) -> None:
    """A partition, or an endpoint that opens or closes, changes nothing for what should have arrived before."""
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
        change(endpoint)
        assert [fate for _, fate in fates(network)] == ["sent", "sent", "arrived", "port closed"]
        network._partitions.clear()
        for opened in list(network._engines.values()):
            opened.close()


def test_a_network_may_outlive_its_run() -> None:
    """What was under way when Trio ended arrives when the network is next used, on whatever clock."""
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
    """Ctrl-C ends a run with datagrams under way as it ends any other."""
    network = SimulatedNetwork(latency=(1, 1))

    async def main() -> None:
        network.inject(b"x", ALICE, SERVER)
        await trio.sleep(0.5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(main)


# All of it together.

weathers = st.fixed_dictionaries(
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
    weathers=st.lists(weathers, min_size=1, max_size=4),
    steps=st.lists(st.sampled_from(["send", "send many", "inject", "cut", "heal", "wait", "weather"]), max_size=60),
)
def test_whatever_the_weather_everything_is_accounted_for(
    seed: int, weathers: list[dict[str, Any]], steps: list[str]
) -> None:
    """Each copy of each datagram ends in one way, and both ends have counted those that have reached them."""
    network = SimulatedNetwork(seed=seed, **weathers[0])

    async def main() -> None:
        endpoint = network.endpoint(*SERVER, receive_buffer=20_000)
        partition = network.partition([], [])
        changes = iter(weathers[1:])
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
            await trio.sleep(1_000)  # even for what waits in the send buffer
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
    """Servers in production do not pay for it."""
    code = "import sys, trio_udp; assert 'trio_udp.testing' not in sys.modules"
    await trio.run_process([sys.executable, "-c", code])


def test_what_is_public() -> None:
    """It lives at its public place and has documentation."""
    names = trio_udp.testing.__all__
    assert names == ["DatagramEvent", "Partition", "SimulatedNetwork", "deterministic_scheduling"]
    for name in names:
        assert getattr(trio_udp.testing, name).__module__ == "trio_udp.testing"
