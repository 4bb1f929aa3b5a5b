"""The relay: dig through it to the DNS example, and its keep-alive in virtual time."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock

import trio_udp
from trio_udp.testing import SimulatedNetwork

from ..conftest import check_adds_up, echo
from ..project.conftest import EXAMPLES, Serve, Start, ask, waiting, without_signals
from .conftest import load

relay = load("relay")

UPSTREAM = ("192.0.2.80", 80)

StartRelay = Callable[..., Awaitable[trio_udp.Server]]


@pytest.fixture
def start_relay(simulated_network: SimulatedNetwork, nursery: trio.Nursery) -> StartRelay:
    """Start a relay to ``UPSTREAM``, with a silence of 10 seconds, on the simulated network."""

    async def start(**options: Any) -> trio_udp.Server:
        endpoint = simulated_network.endpoint("192.0.2.53", 53)
        handler = partial(relay.relay, partial(simulated_network.connect, *UPSTREAM), 10)
        server: trio_udp.Server = await nursery.start(
            partial(trio_udp.serve_endpoints, handler, [endpoint], on_error=trio_udp.raise_error, **options)
        )
        return server

    return start


async def connect(network: SimulatedNetwork) -> trio_udp.Connection:
    return await network.connect("192.0.2.53", 53)


@without_signals
@pytest.mark.skipif(shutil.which("dig") is None, reason="needs dig")
def test_dig(start: Start) -> None:
    """Concurrent queries through the relay to the DNS example each get the answer to their own question."""
    dns = start("dns_server", "--port", "0", str(EXAMPLES / "example.zone"), port=None)
    example = start("relay", "--host", "127.0.0.1", "--to", "127.0.0.1", str(dns.port))
    names = ["www.example.com", "ns1.example.com"]
    answers = {}
    for server in (dns, example):
        command = ["dig", "-r", "+short", "+tries=1", "@127.0.0.1", "-p", str(server.port)]
        digs = {
            (name, number): subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True)
            for name in names
            for number in range(10)
        }
        answers[server.port] = {
            question: sorted(dig.communicate(timeout=20)[0].split()) for question, dig in digs.items()
        }
        assert all(dig.returncode == 0 for dig in digs.values())
    assert answers[dns.port] == answers[example.port]
    assert answers[dns.port]["ns1.example.com", 0] == ["192.0.2.1"]


@without_signals
def test_clients_are_kept_apart(start: Start, serve: Serve) -> None:
    """Each client has its own conversation with the server, and no other client gets its answers."""
    adder = serve("errors:handler")  # keeps a total for each client
    example = start("relay", "--host", "127.0.0.1", "--to", "127.0.0.1", str(adder.port))
    one, two = example.peer(), example.peer()
    for total in (6, 12, 18):
        assert json.loads(ask(one, b'{"add": 6}')) == {"total": total}
    assert json.loads(ask(two, b'{"add": 1}')) == {"total": 1}
    assert waiting(one) == []


async def test_silence_ends_a_client(
    simulated_network: SimulatedNetwork, autojump_clock: MockClock, start_relay: StartRelay
) -> None:
    """A client and its connection end after ``silence`` seconds without traffic, and may start again."""
    upstream = simulated_network.endpoint(*UPSTREAM)
    server = await start_relay()
    connection = await connect(simulated_network)
    sources = []
    for _ in range(2):
        await connection.send(b"hello")
        question = await upstream.receive()
        sources.append(question.peer_address)
        await question.reply(b"welcome")
        assert await connection.receive() == b"welcome"
        await trio.sleep(9.9)
        assert len(server.clients) == 1
        await trio.sleep(0.2)
        assert len(server.clients) == 0
        await question.reply(b"too late")  # refused: its connection is closed
        await trio.sleep(0.1)
    assert sources[0] != sources[1]
    with pytest.raises(trio.WouldBlock):
        connection.receive_nowait()
    check_adds_up(server)


@pytest.mark.parametrize("speaker", ["client", "server"])
async def test_one_direction_keeps_both_alive(
    simulated_network: SimulatedNetwork, autojump_clock: MockClock, start_relay: StartRelay, speaker: str
) -> None:
    """A client that only receives, and one that only sends, stay alive while there is traffic."""
    upstream = simulated_network.endpoint(*UPSTREAM)
    server = await start_relay(idle_timeout=3)
    connection = await connect(simulated_network)
    await connection.send(b"subscribe")
    subscription = await upstream.receive()
    for number in range(100):
        await trio.sleep(9)
        payload = b"%d" % number
        if speaker == "server":
            await subscription.reply(payload)
            assert await connection.receive() == payload
        else:
            await connection.send(payload)
            datagram = await upstream.receive()
            assert (datagram.payload, datagram.peer_address) == (payload, subscription.peer_address)
    assert len(server.clients) == 1
    assert server.statistics().clients_started == 1
    await trio.sleep(10.1)
    assert len(server.clients) == 0


async def test_server_that_is_not_there(
    simulated_network: SimulatedNetwork, autojump_clock: MockClock, start_relay: StartRelay
) -> None:
    """Refusals end nothing: when the server starts, the client's next datagram reaches it."""
    server = await start_relay()
    connection = await connect(simulated_network)
    for _ in range(5):
        await connection.send_many([b"anyone?"] * 3)
        await trio.sleep(1)
    upstream = simulated_network.endpoint(*UPSTREAM)
    await connection.send(b"now?")
    assert (await upstream.receive()).payload == b"now?"
    assert server.statistics().handler_errors == 0
    assert server.statistics().clients_started == 1


async def test_last_answers(
    simulated_network: SimulatedNetwork, autojump_clock: MockClock, start_relay: StartRelay
) -> None:
    """A relay that stops still forwards the answers to earlier datagrams for one second."""
    simulated_network.latency = (0.1, 0.1)
    upstream = simulated_network.endpoint(*UPSTREAM)
    server = await start_relay()
    connection = await connect(simulated_network)
    await connection.send(b"question")
    question = await upstream.receive()
    server.stop()
    await question.reply(b"answer")
    assert await connection.receive() == b"answer"
    await trio.sleep(1)
    statistics = server.statistics()
    assert (statistics.clients, statistics.handlers_cancelled) == (0, 0)


async def test_bounded(
    simulated_network: SimulatedNetwork, autojump_clock: MockClock, start_relay: StartRelay, nursery: trio.Nursery
) -> None:
    """A relay opens at most one connection for each of ``max_clients``; others are refused until a client ends."""
    upstream = simulated_network.endpoint(*UPSTREAM)
    await nursery.start(trio_udp.serve_endpoints, echo, [upstream])
    server = await start_relay(limits=trio_udp.Limits(max_clients=5))
    connections = [await connect(simulated_network) for _ in range(8)]
    for connection in connections:
        await connection.send(b"hello")
    await trio.sleep(1)
    served = []
    for connection in connections:
        try:
            served.append(connection.receive_nowait())
        except trio.WouldBlock:
            served.append(b"")
    assert served == [b"hello"] * 5 + [b""] * 3
    assert server.statistics().refused_full == 3
    await trio.sleep(10)
    await connections[-1].send(b"again")
    assert await connections[-1].receive() == b"again"
    check_adds_up(server)
