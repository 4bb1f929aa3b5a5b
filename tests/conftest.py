from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from trio_udp import Client, Endpoint, Server, serve_endpoints
from trio_udp._endpoints import Address
from trio_udp.testing import SimulatedNetwork

pytest_plugins = ["pytester", "trio_udp._pytest_plugin"]

SERVER = ("192.0.2.53", 53)
ALICE = ("192.0.2.1", 1000)
BOB = ("192.0.2.2", 2000)
CAROL = ("192.0.2.3", 3000)

# Enough for whatever a test lets arrive at once: its subject is what we do with it, not what a kernel would drop.
PLENTY = 2**40


@attrs.define
class InMemory:
    """An endpoint at ``SERVER`` on a simulated network, and what a test does to it."""

    network: SimulatedNetwork
    endpoint: Endpoint

    def put(self, payload: bytes, source: Address = ALICE) -> None:
        """Let a datagram arrive."""
        self.network.inject(payload, source, SERVER)

    @property
    def sent(self) -> list[tuple[Address, bytes]]:
        """What has been sent from the endpoint, and to whom."""
        events = self.network.events
        return [
            (event.destination, event.payload) for event in events if (event.fate, event.source) == ("sent", SERVER)
        ]

    def sent_to(self, address: Address) -> list[bytes]:
        return [payload for destination, payload in self.sent if destination == address]

    async def settle(self) -> None:
        """Let everything happen that happens without time passing."""
        await trio.testing.wait_all_tasks_blocked()


@attrs.define
class RunningInMemory(InMemory):
    """A server on such an endpoint."""

    server: Server


def in_memory(*, send_buffer: int | None = None, bandwidth: float | None = None) -> InMemory:
    network = SimulatedNetwork(bandwidth=bandwidth)
    return InMemory(network, network.endpoint(*SERVER, receive_buffer=PLENTY, send_buffer=send_buffer))


def narrow() -> InMemory:
    """One that sends a byte per second, and whose send buffer is full while a datagram has not yet left."""
    return in_memory(send_buffer=1, bandwidth=1)


StartInMemory = Callable[..., Awaitable[RunningInMemory]]


@pytest.fixture
def start_in_memory(nursery: trio.Nursery) -> StartInMemory:
    """Start a server in memory; keywords are those of ``serve_endpoints``.

    Tests in which time passes also ask for ``autojump_clock``.
    """

    async def start(
        handler: Callable[[Client], Awaitable[object]], on: InMemory | None = None, **options: Any
    ) -> RunningInMemory:
        on = on or in_memory()
        server = await nursery.start(partial(serve_endpoints, handler, [on.endpoint], **options))
        return RunningInMemory(on.network, on.endpoint, server)

    return start


@pytest.fixture(params=["linux", "portable"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test once with each engine: the one chosen for UDP sockets on Linux, and the one for all platforms."""
    if request.param == "linux" and sys.platform != "linux":
        pytest.skip("needs Linux")
    monkeypatch.setenv("TRIO_UDP_ENGINE", "" if request.param == "linux" else "portable")
    return str(request.param)


class Bystander:
    """Another task, which counts how often the one under test lets it run."""

    def __init__(self) -> None:
        self.turns = 0

    async def run(self) -> None:
        while True:
            self.turns += 1
            await trio.lowlevel.checkpoint()


def check_adds_up(server: Server) -> None:
    """Every datagram that was received is accounted for, exactly once."""
    s = server.statistics()
    dropped = s.dropped_inbox_full + s.dropped_at_end + s.truncated
    refused = s.refused_by_rate + s.refused_by_accept + s.refused_full + s.refused_stopping
    assert s.received == s.delivered + s.waiting + dropped + refused
