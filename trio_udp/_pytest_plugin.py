"""Fixtures for pytest: a network in memory, and a server on it. See docs/testing.md.

pytest loads this wherever trio_udp is installed. ``udp_server`` needs pytest-trio, which runs it.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

if TYPE_CHECKING:
    import trio

    from . import Client, Connection, Server
    from .testing import SimulatedNetwork

StartServer: TypeAlias = "Callable[..., Awaitable[Connection]]"

# Marks a test that has a network. (Nothing here may need a new pytest: whatever there is loads it.)
NETWORK = "_trio_udp_network"

# Lines of the timeline that a failing test shows, the last ones.
LINES_SHOWN = 50

# Seconds that handlers have to end when the test is over; no time at all under autojump_clock.
PATIENCE = 5


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--network-seed", type=int, default=0, help="seed of the fixture simulated_network (default: 0)")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    report = (yield).get_result()
    network: SimulatedNetwork | None = getattr(item, NETWORK, None)
    if network is not None and report.failed:
        lines = network.timeline().splitlines()
        shown = [f"{network!r}: repeat it with --network-seed={network.seed}"]
        if len(lines) > LINES_SHOWN:
            shown.append(f"... {len(lines) - LINES_SHOWN} earlier events")
        report.sections.append(("simulated network", "\n".join(shown + lines[-LINES_SHOWN:])))
    if network is not None and call.when == "teardown":
        delattr(item, NETWORK)  # pytest keeps its items until the end, and a network remembers all that has happened


@pytest.fixture
def simulated_network(request: pytest.FixtureRequest) -> Iterator[SimulatedNetwork]:
    """A :class:`trio_udp.testing.SimulatedNetwork` whose seed, from ``--network-seed``, decides the order of tasks too.

    Set its weather by assignment: ``simulated_network.loss = 0.4``. If the test fails, its report has the seed and the
    timeline.
    """
    from .testing import SimulatedNetwork, deterministic_scheduling

    network = SimulatedNetwork(seed=request.config.getoption("--network-seed"))
    setattr(request.node, NETWORK, network)
    with deterministic_scheduling(network.seed):
        yield network


@pytest.fixture
async def udp_server(simulated_network: SimulatedNetwork, nursery: trio.Nursery) -> AsyncIterator[StartServer]:
    """A function that serves a handler on ``simulated_network`` and returns a connection to it.

    ``connection = await udp_server(handler, idle_timeout=5)``; keywords are those of :func:`trio_udp.serve_endpoints`.
    An error in the handler fails the test, unless there is an ``on_error``. At the end of the test the connections are
    closed and the servers stopped; then every handler must end, and every datagram must be accounted for.
    """
    import trio

    from . import serve_endpoints

    opened: list[tuple[Connection, Server, trio.Event]] = []

    async def start(handler: Callable[[Client], Awaitable[object]], **options: Any) -> Connection:
        endpoint = simulated_network.endpoint("192.0.2.53", 0)
        options = {"on_error": _fail, "drain_timeout": math.inf, **options}
        ended = trio.Event()

        async def serve(task_status: trio.TaskStatus[Server]) -> None:
            await serve_endpoints(handler, [endpoint], task_status=task_status, **options)
            ended.set()

        server: Server = await nursery.start(serve)
        connection = await simulated_network.connect(*endpoint.local_address[:2])
        opened.append((connection, server, ended))
        return connection

    yield start

    for connection, server, _ in opened:
        connection.close()
        server.stop()
    for _, server, ended in opened:
        with trio.move_on_after(PATIENCE):
            await ended.wait()
        left = list(server.clients)
        assert not left, f"handlers that did not end within {PATIENCE} seconds after the server was stopped: {left}"
        s = server.statistics()
        dropped = s.dropped_inbox_full + s.dropped_at_end + s.truncated
        refused = s.refused_by_rate + s.refused_by_accept + s.refused_full + s.refused_stopping
        assert s.received == s.delivered + dropped + refused, f"datagrams that are not accounted for: {s}"


def _fail(client: Client, error: Exception) -> None:
    raise error
