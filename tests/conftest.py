from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from trio_udp import Client, Server, serve_endpoints

from .memory import MemoryEngine, memory_endpoint


@attrs.define
class InMemory:
    """A server on an endpoint in memory, for tests in virtual time."""

    server: Server
    engine: MemoryEngine

    async def settle(self) -> None:
        """Let everything happen that happens without time passing."""
        await trio.testing.wait_all_tasks_blocked()


StartInMemory = Callable[..., Awaitable[InMemory]]


@pytest.fixture
def start_in_memory(nursery: trio.Nursery) -> StartInMemory:
    """Start a server in memory; keywords are those of ``serve_endpoints``.

    Tests in which time passes also ask for ``autojump_clock``.
    """

    async def start(handler: Callable[[Client], Awaitable[object]], **options: Any) -> InMemory:
        endpoint, engine = memory_endpoint()
        server = await nursery.start(partial(serve_endpoints, handler, [endpoint], **options))
        return InMemory(server, engine)

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
    refused = s.refused_by_accept + s.refused_full + s.refused_stopping
    assert s.received == s.delivered + s.waiting + dropped + refused
