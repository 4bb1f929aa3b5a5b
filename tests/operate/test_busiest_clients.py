"""The busiest clients of a worker."""

from __future__ import annotations

import sys
from contextlib import ExitStack

import pytest
import trio

from tests.conftest import StartInMemory, echo, plain_socket
from tests.operate.conftest import TIMEOUT, Workers, port_of
from trio_udp import Address
from trio_udp.operate._busiest import SAMPLE, BusiestClients


async def test_busiest_first(start_in_memory: StartInMemory, autojump_clock: trio.testing.MockClock) -> None:
    """Clients are listed by their datagrams a second since the last check; silent clients are not listed."""
    running = await start_in_memory(echo)
    peers = [("192.0.2.1", port) for port in range(1, 6)]
    for peer in peers:
        running.put(b"hello", peer)
    await running.settle()
    busiest = BusiestClients(running.server, 3)
    assert await busiest.look() == []
    for number, peer in enumerate(peers):
        for _ in range(number):
            running.put(b"", peer)
    await trio.sleep(2)
    assert await busiest.look() == [(peers[4], 2), (peers[3], 1.5), (peers[2], 1)]
    await trio.sleep(1)
    assert await busiest.look() == []


async def test_among_more_clients_than_are_looked_at(
    start_in_memory: StartInMemory, autojump_clock: trio.testing.MockClock
) -> None:
    """A busy client among many is found after some time, and stays in the list."""
    running = await start_in_memory(echo)
    busy = ("192.0.2.2", 1)
    for port in range(1, 2 * SAMPLE):
        running.put(b"", ("192.0.2.1", port))
    running.put(b"", busy)
    await running.settle()
    busiest = BusiestClients(running.server, 3)

    async def look() -> list[tuple[Address, float]]:
        await trio.sleep(1)
        running.put(b"", busy)
        await running.settle()
        return await busiest.look()

    while not (found := await look()):
        pass
    assert [found] + [await look() for _ in range(10)] == [[(busy, 1)]] * 11


@pytest.mark.skipif(sys.platform == "win32", reason="workers need a POSIX system")
async def test_of_all_workers(workers: Workers) -> None:
    """With ``busiest_clients``, the supervisor knows the busiest clients of all workers."""
    supervisor = await workers.start(busiest_clients=2)
    with trio.fail_after(TIMEOUT), ExitStack() as cleanup:
        port = port_of(supervisor)
        socks = [cleanup.enter_context(plain_socket("127.0.0.1")) for _ in range(8)]
        while not (busiest := supervisor.busiest_clients):
            for number, sock in enumerate(socks):
                for _ in range(number):
                    sock.sendto(b"hello", ("127.0.0.1", port))
            await trio.sleep(0.05)
        peers = {sock.getsockname() for sock in socks}
    assert {address for address, _ in busiest} <= peers
    rates = [rate for _, rate in busiest]
    assert rates == sorted(rates, reverse=True)
    await workers.stop(supervisor)
    assert supervisor.busiest_clients == ()
