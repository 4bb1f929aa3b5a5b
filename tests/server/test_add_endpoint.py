"""Endpoints that join a running server: ``Server.add_endpoint``."""

from __future__ import annotations

import logging
import socket
from functools import partial

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from trio_udp import Client, Endpoint, Server, open_endpoints, serve, serve_endpoints
from trio_udp.testing import SimulatedNetwork

from ..conftest import ALICE, BOB, SERVER, check_adds_up, echo

SECOND = ("192.0.2.54", 54)


async def test_it_is_served_like_the_first(engine: str, nursery: trio.Nursery) -> None:
    """The server answers on an added endpoint, from that endpoint's address, and counts its datagrams."""
    server: Server = await nursery.start(partial(serve, echo, 0, host="127.0.0.1"))
    [endpoint] = await open_endpoints(0, host="127.0.0.2")
    server.add_endpoint(endpoint)
    assert server.endpoints[1] is endpoint
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(endpoint.local_address)
        sock.settimeout(5)
        sock.send(b"x")
        assert await trio.to_thread.run_sync(sock.recv, 100) == b"x"
        await server.send_to(b"y", sock.getsockname(), local_address=endpoint.local_address)
        assert sock.recv(100) == b"y"
    [client] = server.clients
    assert client.endpoint is endpoint
    assert (server.statistics().received, server.statistics().sent) == (1, 2)
    check_adds_up(server)


async def test_the_server_owns_it(engine: str) -> None:
    """An added endpoint is closed when the server stops, is cancelled or crashes."""

    def on_error(source: object, error: Exception) -> None:
        raise error

    async def fail(client: Client) -> None:
        raise ValueError

    for end in ("stop", "cancel", "crash"):
        [endpoint] = await open_endpoints(0, host="127.0.0.2")
        try:
            async with trio.open_nursery() as nursery:
                server: Server = await nursery.start(partial(serve, fail, 0, host="127.0.0.1", on_error=on_error))
                server.add_endpoint(endpoint)
                if end == "stop":
                    server.stop()
                elif end == "cancel":
                    nursery.cancel_scope.cancel()
                else:
                    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                        sock.sendto(b"x", endpoint.local_address)
        except BaseException as error:
            assert end == "crash", error  # noqa: PT017
        was_closed = endpoint.closed
        endpoint.close()
        assert was_closed, end


async def test_a_drain_handles_datagrams_on_an_added_endpoint(autojump_clock: MockClock) -> None:
    """A stop handles datagrams that had arrived on an endpoint that was added right before."""
    network = SimulatedNetwork()
    first, second = network.endpoint(*SERVER), network.endpoint(*SECOND)
    for i in range(100):
        network.inject(b"%d" % i, ALICE, SECOND)
    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(serve_endpoints, echo, [first])
        server.add_endpoint(second)
        server.stop()
    assert second.statistics().sent == 100
    assert (server.statistics().delivered, server.statistics().refused_stopping) == (100, 0)
    assert (first.closed, second.closed) == (True, True)
    check_adds_up(server)


async def test_datagrams_that_were_read_ahead_go_to_clients(autojump_clock: MockClock) -> None:
    """Datagrams that the endpoint had read ahead go to clients; those that receive() returned are not counted."""
    network = SimulatedNetwork()
    first, second = network.endpoint(*SERVER), network.endpoint(*SECOND)
    for i in range(10):
        network.inject(b"%d" % i, ALICE, SECOND)
    assert (await second.receive()).payload == b"0"
    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(serve_endpoints, echo, [first])
        server.add_endpoint(second)
        await trio.testing.wait_all_tasks_blocked()
        assert [event.payload for event in network.events if event.source == SECOND and event.fate == "sent"] == [
            b"%d" % i for i in range(1, 10)
        ]
        assert server.statistics().received == 9
        check_adds_up(server)
        server.stop()


async def test_its_port_is_one_of_the_servers(autojump_clock: MockClock) -> None:
    """A datagram with the added endpoint's address as its source is refused on the first endpoint, and vice versa."""
    network = SimulatedNetwork()
    host = SERVER[0]
    first, second = network.endpoint(*SERVER), network.endpoint(host, 54)
    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(serve_endpoints, echo, [first])
        server.add_endpoint(second)
        network.inject(b"x", (host, 54), SERVER)
        network.inject(b"x", SERVER, (host, 54))
        network.inject(b"x", BOB, SERVER)
        await trio.testing.wait_all_tasks_blocked()
        assert server.statistics().refused_source == 2
        assert [client.peer_address for client in server.clients] == [BOB]
        server.stop()


async def test_closing_the_first_is_not_the_end(autojump_clock: MockClock) -> None:
    """A server runs as long as one endpoint is open, even if only an added one is."""
    network = SimulatedNetwork()
    first, second = network.endpoint(*SERVER), network.endpoint(*SECOND)
    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(serve_endpoints, echo, [first])
        server.add_endpoint(second)
        first.close()
        await trio.testing.wait_all_tasks_blocked()
        network.inject(b"x", ALICE, SECOND)
        await trio.testing.wait_all_tasks_blocked()
        assert second.statistics().sent == 1
        server.stop()


async def test_it_is_logged(caplog: pytest.LogCaptureFixture, autojump_clock: MockClock) -> None:
    """The log names the address of an added endpoint."""
    caplog.set_level(logging.INFO, "trio_udp")
    network = SimulatedNetwork()
    first, second = network.endpoint(*SERVER), network.endpoint(*SECOND)
    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(serve_endpoints, echo, [first])
        caplog.clear()
        server.add_endpoint(second)
        assert "192.0.2.54" in caplog.text
        server.stop()


async def test_mistakes(engine: str, nursery: trio.Nursery) -> None:
    """add_endpoint raises for an object that cannot be added, and leaves it as it was."""
    server: Server = await nursery.start(partial(serve, echo, 0, host="127.0.0.1"))
    other: Server = await nursery.start(partial(serve, echo, 0, host="127.0.0.1"))
    with pytest.raises(TypeError):
        server.add_endpoint(server)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="twice"):
        server.add_endpoint(server.endpoints[0])
    with pytest.raises(trio.BusyResourceError):
        server.add_endpoint(other.endpoints[0])
    assert not other.endpoints[0].closed

    [lone] = await open_endpoints(0, host="127.0.0.1")
    async with lone:
        nursery.start_soon(_receive_until_closed, lone)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            server.add_endpoint(lone)
        assert not lone.closed
    with pytest.raises(trio.ClosedResourceError):
        server.add_endpoint(lone)
    assert len(server.endpoints) == 1

    [late] = await open_endpoints(0, host="127.0.0.1")
    async with late:
        server.stop()
        with pytest.raises(trio.ClosedResourceError):
            server.add_endpoint(late)
        assert not late.closed
        late.send_to_nowait(b"x", late.local_address)
        assert (await late.receive()).payload == b"x"


async def _receive_until_closed(endpoint: Endpoint) -> None:
    with pytest.raises(trio.ClosedResourceError):
        await endpoint.receive()


async def test_receiving_is_over(engine: str, nursery: trio.Nursery) -> None:
    """receive() raises for an added endpoint, and no other server can take it."""
    server: Server = await nursery.start(partial(serve, echo, 0, host="127.0.0.1"))
    [endpoint] = await open_endpoints(0, host="127.0.0.2")
    server.add_endpoint(endpoint)
    with pytest.raises(trio.BusyResourceError):
        await endpoint.receive()
    with pytest.raises(trio.BusyResourceError):
        await serve_endpoints(echo, [endpoint])
    assert not endpoint.closed


async def test_the_port_of_a_closed_endpoint_is_others(autojump_clock: MockClock) -> None:
    """After an endpoint is closed, another program on the machine may use its port, as a client and as a peer."""
    network = SimulatedNetwork()
    host = SERVER[0]
    first, second = network.endpoint(*SERVER), network.endpoint(host, 54)
    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(serve_endpoints, echo, [first, second])
        second.close()
        await trio.testing.wait_all_tasks_blocked()
        async with network.endpoint(host, 54) as other:
            await other.send_to(b"x", SERVER)
            await trio.testing.wait_all_tasks_blocked()
            assert server.statistics().refused_source == 0
            assert (await other.receive()).payload == b"x"
        async with network.endpoint(host, 54) as other:
            for client in server.clients:
                client.close()
            async with server.connect((host, 54)) as client:
                await client.send(b"y")
                assert (await other.receive()).payload == b"y"
        server.stop()
