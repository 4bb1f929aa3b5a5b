"""Many addresses at once, over a real socket: order, bounds, and service for known clients."""

from __future__ import annotations

import gc
import socket
import sys
import tracemalloc
from collections.abc import Iterator
from functools import partial

import pytest
import trio
import trio.testing

from trio_udp import Client, Limits, Server, serve
from trio_udp._endpoints.engines.pktinfo import IP_PKTINFO

from ..conftest import check_adds_up, echo

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs all of 127.0.0.0/8 to send from"),
    pytest.mark.usefixtures("engine"),
    pytest.mark.no_cover,  # heavy
]


class Forger:
    """A socket that sends from any number of addresses."""

    def __init__(self, server: Server) -> None:
        self.destination = server.endpoints[0].local_address
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("0.0.0.0", 0))

    def send(self, number: int, payload: bytes) -> None:
        # struct in_pktinfo: the middle is the address to send from; 127.1.0.0 and up, by number.
        source = bytes(4) + (0x7F010000 + number).to_bytes(4, "big") + bytes(4)
        assert IP_PKTINFO is not None
        self.socket.sendmsg([payload], [(socket.IPPROTO_IP, IP_PKTINFO, source)], 0, self.destination)


@pytest.fixture
def forgers() -> Iterator[list[Forger]]:
    forgers: list[Forger] = []
    yield forgers
    for forger in forgers:
        forger.socket.close()


async def all_read(server: Server, count: int) -> None:
    """Let the server run until it waits for more datagrams; by then it has read ``count``."""
    with trio.fail_after(30):
        # Not 0: the kernel may take a moment to deliver datagrams on the loopback interface.
        await trio.testing.wait_all_tasks_blocked(0.001)
    assert server.statistics().received == count


async def test_ten_thousand_clients_each_in_order(nursery: trio.Nursery, forgers: list[Forger]) -> None:
    """With 10,000 clients whose datagrams are mixed, each handler gets all its own, in order."""
    taken: dict[object, list[bytes]] = {}

    async def handler(client: Client) -> None:
        mine = taken.setdefault(client.peer_address, [])
        async for payload in client:
            mine.append(payload)

    server: Server = await nursery.start(partial(serve, handler, 0, host="127.0.0.1"))
    forger = Forger(server)
    forgers.append(forger)
    sent = 0
    for number in range(5):
        for client in range(10_000):
            forger.send(client, b"%d" % number)
            sent += 1
            if sent % 100 == 0:
                await all_read(server, sent)
    await trio.testing.wait_all_tasks_blocked()
    assert len(taken) == 10_000
    wanted = [b"%d" % number for number in range(5)]
    assert all(payloads == wanted for payloads in taken.values())
    check_adds_up(server)


async def test_memory_stays_below_the_worst_case(nursery: trio.Nursery, forgers: list[Forger]) -> None:
    """A server whose limits are all reached takes no more memory than worst_case_memory says, and more than half."""

    async def stuck(client: Client) -> None:
        await trio.sleep_forever()

    limits = Limits(max_clients=500, inbox_datagrams=20, total_bytes=500 * 20 * 100 + 100)
    server: Server = await nursery.start(partial(serve, stuck, 0, host="127.0.0.1", limits=limits))
    forger = Forger(server)
    forgers.append(forger)
    sent = 0
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(25):
            for client in range(600):
                forger.send(client, b"%0100d" % number)
                sent += 1
                if sent % 100 == 0:
                    await all_read(server, sent)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    s = server.statistics()
    assert (s.clients, s.waiting, s.refused_full, s.dropped_inbox_full) == (500, 10_000, 2_500, 2_500)
    assert limits.worst_case_memory() / 2 < grown < limits.worst_case_memory()


@pytest.mark.parametrize("when_full", ["refuse", "evict_idle"])
async def test_a_flood_of_forged_addresses(nursery: trio.Nursery, forgers: list[Forger], when_full: str) -> None:
    """Memory stays flat, and an existing client is served, under datagrams from 100,000 addresses.

    The same holds under evict_idle, because that client is never the one that has waited the longest.
    """

    limits = Limits(max_clients=1_000, when_full=when_full)  # type: ignore[arg-type]
    server: Server = await nursery.start(partial(serve, echo, 0, host="127.0.0.1", limits=limits))
    forger = Forger(server)
    forgers.append(forger)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as known:
        known.connect(forger.destination)
        known.settimeout(5)
        asked = answered = 0

        async def flood(first: int, last: int) -> None:
            nonlocal asked, answered
            for number in range(first, last):
                forger.send(number, b"flood")
                if number % 100 == 99:
                    known.send(b"%d" % asked)
                    asked += 1
                    await all_read(server, number + 1 + asked)
                    await trio.testing.wait_all_tasks_blocked()
                    answered += known.recv(100) == b"%d" % answered

        known.send(b"%d" % asked)
        asked += 1
        await all_read(server, asked)
        await trio.testing.wait_all_tasks_blocked()
        assert known.recv(100) == b"0"
        answered += 1
        await flood(0, 20_000)
        gc.collect()
        before = sys.getallocatedblocks()
        await flood(20_000, 100_000)
        gc.collect()
        grown = sys.getallocatedblocks() - before
    assert answered == asked == 1_001
    assert grown < 2_000  # objects; a single client is more than ten
    statistics = server.statistics()
    assert statistics.clients == 1_000
    assert statistics.refused_full == (100_000 - 999 if when_full == "refuse" else 0)
    check_adds_up(server)
