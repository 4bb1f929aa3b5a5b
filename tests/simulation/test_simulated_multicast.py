"""Groups on the simulated network, with the same methods as on a real one."""

from __future__ import annotations

import errno
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from trio_udp import Client, Endpoint, serve_endpoints
from trio_udp.testing import SimulatedNetwork

from ..conftest import ALICE, BOB, check_adds_up, echo

GROUP, GROUP_IPV6 = "239.1.2.3", "ff02::1234"
OWN, ELSEWHERE = "192.0.2.53", "192.0.2.54"
PORT = 5000


def heard(endpoint: Endpoint) -> list[bytes]:
    """Return the payloads that have arrived."""
    payloads = []
    while True:
        try:
            payloads.append(endpoint.receive_nowait().payload)
        except trio.WouldBlock:
            return payloads


@pytest.mark.parametrize("interface", [None, "eth0", 1, OWN])
async def test_joining_and_leaving(interface: int | str | None) -> None:
    """An endpoint receives from a group from join_group to leave_group, on the network's only interface."""
    network = SimulatedNetwork()
    endpoint = network.endpoint("0.0.0.0", PORT, own_hosts=[OWN])
    for change, expected in ((None, []), (endpoint.join_group, [b"x"]), (endpoint.leave_group, [])):
        if change is not None:
            change(GROUP, interface=interface)
        network.inject(b"x", ALICE, (GROUP, PORT))
        assert heard(endpoint) == expected


async def test_ipv6() -> None:
    """An IPv6 endpoint joins IPv6 groups, but no IPv4 groups, because no simulated endpoint is dual-stack."""
    network = SimulatedNetwork()
    endpoint = network.endpoint("::", PORT)
    endpoint.join_group(f"{GROUP_IPV6}%eth0")
    network.inject(b"x", ("fe80::1", 1000), (GROUP_IPV6, PORT))
    assert heard(endpoint) == [b"x"]
    with pytest.raises(ValueError, match="address family of 239"):
        endpoint.join_group(GROUP)


async def test_single_sources() -> None:
    """An endpoint that joins for single sources receives only from these."""
    network = SimulatedNetwork()
    endpoint = network.endpoint("0.0.0.0", PORT)

    def what_is_heard() -> list[bytes]:
        network.inject(b"Alice", ALICE, (GROUP, PORT))
        network.inject(b"Bob", BOB, (GROUP, PORT))
        return heard(endpoint)

    endpoint.join_group(GROUP, source=BOB[0])
    assert what_is_heard() == [b"Bob"]
    endpoint.join_group(GROUP, source=ALICE[0])
    assert what_is_heard() == [b"Alice", b"Bob"]
    endpoint.leave_group(GROUP, source=BOB[0])
    assert what_is_heard() == [b"Alice"]
    endpoint.leave_group(GROUP, source=ALICE[0])
    assert what_is_heard() == []
    endpoint.join_group(GROUP)
    assert what_is_heard() == [b"Alice", b"Bob"]
    endpoint.join_group(GROUP, source=BOB[0])  # as on Linux, this ends receiving from all sources
    assert what_is_heard() == [b"Bob"]
    endpoint.leave_group(GROUP)
    assert what_is_heard() == []


async def test_both_ways_to_join_are_one() -> None:
    """The endpoint can leave a group that SimulatedNetwork.join has joined, and vice versa."""
    network = SimulatedNetwork()
    endpoint = network.endpoint("0.0.0.0", PORT)
    network.join(endpoint, GROUP)
    endpoint.leave_group(GROUP)
    endpoint.join_group(GROUP)
    network.leave(endpoint, GROUP)
    network.inject(b"x", ALICE, (GROUP, PORT))
    assert heard(endpoint) == []


async def test_behind_a_proxy(nursery: trio.Nursery) -> None:
    """An endpoint with proxies can join groups, and its server refuses its own datagrams."""
    network = SimulatedNetwork()
    endpoint = network.endpoint("0.0.0.0", PORT, own_hosts=[OWN], proxies=["10.0.0.0/8"])
    endpoint.join_group(GROUP, interface="eth0")
    server = await nursery.start(serve_endpoints, echo, [endpoint])
    await server.send_to(b"hello", (GROUP, PORT))
    network.inject(b"x", ALICE, (GROUP, PORT))
    await trio.testing.wait_all_tasks_blocked()
    s = server.statistics()
    assert (s.received, s.refused_source, s.delivered, s.sent) == (2, 1, 1, 2)
    check_adds_up(server)


async def test_loop_and_hops() -> None:
    """multicast_loop affects members on the sender's machine, multicast_hops those on other machines."""
    network = SimulatedNetwork()
    sender = network.endpoint("0.0.0.0", PORT, own_hosts=[OWN])
    near = network.endpoint("0.0.0.0", PORT + 1, own_hosts=[OWN])
    far = network.endpoint("0.0.0.0", PORT, own_hosts=[ELSEWHERE])
    for member in (sender, near, far):
        member.join_group(GROUP)
    assert (sender.multicast_hops, sender.multicast_loop, sender.multicast_interface) == (1, True, None)

    async def send() -> list[list[bytes]]:
        for port in (PORT, PORT + 1):
            await sender.send_to(b"x", (GROUP, port))
        return [heard(member) for member in (sender, near, far)]

    assert await send() == [[b"x"], [b"x"], [b"x"]]
    sender.multicast_loop = False
    assert await send() == [[], [], [b"x"]]
    sender.multicast_hops = 0
    assert await send() == [[], [], []]
    sender.multicast_loop = True
    assert await send() == [[b"x"], [b"x"], []]
    sender.multicast_interface = "eth0"
    assert (sender.multicast_hops, sender.multicast_loop, sender.multicast_interface) == (0, True, 1)


async def test_a_server_is_not_its_own_client(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """A server on the simulated network refuses its own datagrams to a group, also late ones."""
    network = SimulatedNetwork(latency=(2, 2))
    endpoint = network.endpoint("0.0.0.0", PORT, own_hosts=[OWN])
    endpoint.join_group(GROUP)
    taken = []

    async def handler(client: Client) -> None:
        async for payload in client:
            taken.append((client.peer_address, payload))
            await client.server.send_to(b"to all: " + payload, (GROUP, PORT))

    server = await nursery.start(partial(serve_endpoints, handler, [endpoint]))
    network.inject(b"hello", ALICE, (GROUP, PORT))
    await trio.sleep(10)
    assert taken == [(ALICE, b"hello")]
    s = server.statistics()
    assert (s.received, s.refused_source, s.sent) == (2, 1, 1)
    check_adds_up(server)


async def test_errors() -> None:
    """Errors of groups are those of a real network."""
    endpoint: Any = SimulatedNetwork().endpoint("0.0.0.0", PORT, own_hosts=[OWN])
    expected: list[Any] = [
        (endpoint.join_group, ("192.0.2.1",), {}, errno.EINVAL, "192.0.2.1 is not a group"),
        (endpoint.join_group, (GROUP,), {"interface": "eth1"}, errno.ENODEV, "no interface 'eth1'"),
        (endpoint.join_group, (GROUP,), {"interface": 2}, errno.ENODEV, "no interface 2"),
        (endpoint.join_group, (GROUP,), {"interface": ELSEWHERE}, errno.EADDRNOTAVAIL, "not an address of this"),
        (endpoint.leave_group, (GROUP,), {}, errno.EADDRNOTAVAIL, "not in group 239.1.2.3"),
        (endpoint.leave_group, (GROUP,), {"source": ELSEWHERE}, errno.EADDRNOTAVAIL, "not in group 239.1.2.3 for"),
        (endpoint.join_group, (GROUP,), {}, None, ""),
        (endpoint.join_group, (GROUP,), {}, errno.EADDRINUSE, "already in group 239.1.2.3"),
        (partial(setattr, endpoint), ("multicast_interface", "eth1"), {}, errno.ENODEV, "no interface 'eth1'"),
    ]
    for call, arguments, keywords, number, message in expected:
        if number is None:
            call(*arguments, **keywords)
            continue
        with pytest.raises(OSError, match=message) as info:
            call(*arguments, **keywords)
        assert info.value.errno == number
    with pytest.raises(TypeError, match="group must be"):
        endpoint.join_group(None)
    endpoint.close()
    for call in (endpoint.join_group, endpoint.leave_group):
        with pytest.raises(trio.ClosedResourceError):
            call(GROUP)
