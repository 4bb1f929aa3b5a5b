"""The fixtures in a user's project. Tests that have to fail run in a pytest of their own."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from trio_udp import Client
from trio_udp._pytest_plugin import StartServer
from trio_udp.testing import SimulatedNetwork


async def shout(client: Client) -> None:
    async for payload in client:
        await client.send(payload.upper())


async def test_a_server_and_a_connection_to_it(udp_server: StartServer) -> None:
    """udp_server serves a handler and returns a connection."""
    connection = await udp_server(shout)
    await connection.send(b"hello")
    assert await connection.receive() == b"HELLO"


async def test_options_and_network_conditions(
    udp_server: StartServer, simulated_network: SimulatedNetwork, autojump_clock: MockClock
) -> None:
    """udp_server takes the keywords of serve_endpoints, is on simulated_network, and can be called more than once."""
    ends = []

    async def handler(client: Client) -> None:
        async for _ in client:
            pass
        ends.append((client.ended, trio.current_time()))

    simulated_network.latency = (1, 1)
    for _ in range(2):
        connection = await udp_server(handler, idle_timeout=8)
        await connection.send(b"x")
    await trio.sleep(20)
    assert ends == [("idle", 9.0)] * 2


async def test_another_client(udp_server: StartServer, simulated_network: SimulatedNetwork) -> None:
    """The peer address of the first connection is the server's, so a test can connect again."""
    first = await udp_server(shout)
    async with await simulated_network.connect(*first.peer_address[:2]) as second:
        await second.send(b"me too")
        assert await second.receive() == b"ME TOO"


TESTS_OF_A_USER = """
import pytest, trio, trio_udp

async def shout(client):
    async for payload in client:
        await client.send(payload.upper())

async def test_passes(udp_server):
    connection = await udp_server(shout)
    await connection.send(b"hello")
    assert await connection.receive() == b"HELLO"

async def test_fails(simulated_network, autojump_clock):
    simulated_network.latency = (1, 1)
    for number in range(60):
        simulated_network.inject(b"%d" % number, ("192.0.2.1", 1), ("192.0.2.2", 2))
    await trio.sleep(2)
    assert False

async def test_handler_raises(udp_server):
    async def handler(client):
        raise ValueError("from the handler")

    connection = await udp_server(handler)
    await connection.send(b"x")
    await connection.receive()

async def test_handler_raises_and_may(udp_server):
    async def handler(client):
        raise ValueError("from the handler")

    connection = await udp_server(handler, on_error=lambda client, error: None)
    await connection.send(b"x")

async def test_handler_stays(udp_server, autojump_clock):
    async def handler(client):
        await client.receive()
        await trio.sleep_forever()

    connection = await udp_server(handler)
    await connection.send(b"x")
    await trio.sleep(1)

def test_without_trio(simulated_network):
    assert simulated_network.seed == 7
"""


def test_what_fails_and_how(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installing the package installs the plugin; a failing test shows the seed and the last events."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makeini("[pytest]\ntrio_mode = true\nfilterwarnings = error\n")
    pytester.makepyfile(TESTS_OF_A_USER)
    result = pytester.runpytest_subprocess("--network-seed=7", "--tb=short", timeout=60)
    result.assert_outcomes(passed=3, failed=3)
    shown = result.stdout.str()
    assert "latency=(1, 1), mtu=1500, bandwidth=None): repeat it with --network-seed=7" in shown
    assert "... 70 earlier events" in shown
    assert "#10   port closed" not in shown
    assert "#11   port closed" in shown
    assert "ValueError: from the handler" in shown
    assert "handlers that did not end within 5 seconds after the server was stopped" in shown


def test_without_pytest_trio(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pytest-trio the plugin loads, and simulated_network works."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makepyfile("def test_it(simulated_network): pass\ndef test_nothing(): pass")
    result = pytester.runpytest_subprocess("-p", "no:trio", "-p", "no:pytest_trio", timeout=60)
    result.assert_outcomes(passed=2)
