"""Fixtures for pytest: a network in memory, and a server on it. See docs/testing.md.

pytest loads this file wherever trio_udp is installed, so it imports nothing of the package until a test uses a fixture.
Only ``udp_server`` needs pytest-trio, which runs it.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

if TYPE_CHECKING:
    import trio

    from . import Connection, Handler, Server
    from .testing import SimulatedNetwork

StartServer: TypeAlias = "Callable[..., Awaitable[Connection]]"

# The attribute of a test item that holds its network. Any version of pytest may load this file, and older ones lack
# ``Item.stash``.
NETWORK = "_trio_udp_network"

# The number of the timeline's last lines that a failing test shows.
LINES_SHOWN = 50

# Seconds that handlers have to end when the test is over. Under autojump_clock they pass at once.
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
        delattr(item, NETWORK)  # pytest keeps its items until the end, and a network keeps every event


@pytest.fixture
def simulated_network(request: pytest.FixtureRequest) -> Iterator[SimulatedNetwork]:
    """A :class:`trio_udp.testing.SimulatedNetwork`. Its seed, from ``--network-seed``, also decides the task order.

    Change network conditions by assignment: ``simulated_network.loss = 0.4``. If the test fails, its report shows the
    seed and the timeline.
    """
    from .testing import SimulatedNetwork, deterministic_scheduling

    network = SimulatedNetwork(seed=request.config.getoption("--network-seed"))
    setattr(request.node, NETWORK, network)
    with deterministic_scheduling(network.seed):
        yield network


@pytest.fixture
async def udp_server(simulated_network: SimulatedNetwork, nursery: trio.Nursery) -> AsyncIterator[StartServer]:
    """Return a function that serves a handler on ``simulated_network`` and returns a connection to it.

    ``connection = await udp_server(handler, idle_timeout=5)``; keywords are those of :func:`trio_udp.serve_endpoints`.
    An error in the handler fails the test, unless ``on_error`` is given. At the end of the test the fixture closes the
    connections and stops the servers. Every handler must then end by itself within 5 seconds, and every datagram must
    be accounted for.
    """
    import trio

    from . import raise_error, serve_endpoints

    opened: list[tuple[Connection, Server, trio.Event]] = []

    async def start(handler: Handler, **options: Any) -> Connection:
        endpoint = simulated_network.endpoint("192.0.2.53", 0)
        options = {"on_error": raise_error, "drain_timeout": math.inf, **options}
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
        assert (s.accounted_for, s.waiting) == (s.received, 0), f"datagrams that are not accounted for: {s}"
