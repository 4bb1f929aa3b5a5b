"""A worker's busiest clients, found by sampling each second: nothing is done for each datagram."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable

import trio

from .. import Address, Client, Server

# Clients to sample each second; that takes 2 ms of CPU time.
SAMPLE = 500

# Clients to count between two checkpoints, so that datagrams are read meanwhile.
AT_ONCE = 50


class BusiestClients:
    """The clients of a server that send the most.

    Of more than 500 clients it samples 500 at random each second, and those that were the busiest so far. So one of
    10,000 is found within 20 seconds on average, and then stays found.
    """

    def __init__(self, server: Server, most: int) -> None:
        self._server = server
        self._most = most
        self._counts: dict[Client, int] = {}
        self._counted_at = trio.current_time()

    async def look(self) -> list[tuple[Address, float]]:
        """Return peer addresses with their datagrams a second since the last look, the busiest first."""
        seconds = max(trio.current_time() - self._counted_at, 0.001)
        counts = await _count(self._counts)
        grown = [(count - self._counts[client], client) for client, count in counts.items()]
        busiest = heapq.nlargest(self._most, [item for item in grown if item[0]], key=lambda item: item[0])
        clients = list(self._server.clients)
        if len(clients) > SAMPLE:
            clients = random.sample(clients, SAMPLE) + [client for _, client in busiest if client.ended is None]
        self._counted_at = trio.current_time()
        self._counts = await _count(clients)
        return [(client.peer_address, round(growth / seconds, 1)) for growth, client in busiest]


async def _count(clients: Iterable[Client]) -> dict[Client, int]:
    counts = {}
    for number, client in enumerate(clients):
        if number % AT_ONCE == 0:
            await trio.lowlevel.checkpoint()
        counts[client] = client.statistics().received
    return counts
