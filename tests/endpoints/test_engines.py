"""Behaviour of every engine: the same tests run in memory and over loopback, so that none can drift.

The tests use only endpoints, servers and connections. They use the real clock, and wait for short times only.
"""

from __future__ import annotations

import errno
import math
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import attrs
import pytest
import trio
import trio.testing

import trio_udp
from trio_udp import Client, Connection, Endpoint, Server, serve_endpoints
from trio_udp._endpoints import Address
from trio_udp.testing import SimulatedNetwork

from ..conftest import check_adds_up, echo

HOST = "127.0.0.1"


@attrs.frozen
class World:
    """The environment of a test: how to open an endpoint, and how to connect to it."""

    endpoint: Callable[..., Awaitable[Endpoint]]
    connect: Callable[..., Awaitable[Connection]]
    narrow: Callable[[], Awaitable[tuple[Connection, Connection]]] | None  # two ends, and a line that is quickly full


async def open_endpoint(port: int = 0, host: str = HOST, **options: Any) -> Endpoint:
    (endpoint,) = await trio_udp.open_endpoints(port, host=host, **options)
    return endpoint


async def open_narrow() -> tuple[Connection, Connection]:
    near, far = map(Connection.from_socket, socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
    return near, far


def simulated_world() -> World:
    network = SimulatedNetwork()

    async def open_endpoint(port: int = 0, host: str = HOST, **options: Any) -> Endpoint:
        return network.endpoint(host, port, **options)

    async def open_narrow() -> tuple[Connection, Connection]:
        network = SimulatedNetwork(bandwidth=8_000)
        near, far = (HOST, 1), (HOST, 2)
        # Room for all of them, or a process that is stalled for a moment would lose datagrams.
        return await network.connect(*far, local_address=near), await network.connect(
            *near, local_address=far, receive_buffer=2**30
        )

    return World(open_endpoint, network.connect, open_narrow)


# An endpoint with proxies has an engine around the engine. These have addresses from which nothing can send.
open_behind_proxies = partial(open_endpoint, proxies=["240.0.0.0/4"])


@pytest.fixture(params=["simulated", "portable", "linux", "behind proxies"])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> World:
    if request.param == "simulated":
        return simulated_world()
    if request.param == "linux" and sys.platform != "linux":
        pytest.skip("not Linux")
    if request.param == "behind proxies":
        return World(open_behind_proxies, trio_udp.connect, None)
    monkeypatch.setenv("TRIO_UDP_ENGINE", request.param)
    # UDP has no backpressure on one machine. Unix-domain datagrams do, and have the portable engine only.
    return World(open_endpoint, trio_udp.connect, open_narrow if request.param == "portable" else None)


StartServer = Callable[..., Awaitable[Server]]


@pytest.fixture
def start(world: World, nursery: trio.Nursery) -> StartServer:
    """Start a server on a new endpoint. The keywords are those of the endpoint."""

    async def start(handler: Callable[[Client], Awaitable[object]] = echo, **options: Any) -> Server:
        endpoint = await world.endpoint(**options)
        server: Server = await nursery.start(partial(serve_endpoints, handler, [endpoint], idle_timeout=math.inf))
        return server

    return start


def address_of(server: Server) -> Address:
    return server.endpoints[0].local_address


@pytest.fixture
async def connection(world: World, start: StartServer) -> AsyncIterator[Connection]:
    """A connection to an echo server."""
    server = await start(receive_buffer=1_000_000)
    async with await world.connect(*address_of(server)) as connection:
        yield connection


@pytest.fixture
async def refused(world: World) -> AsyncIterator[Connection]:
    """A connection to a closed port."""
    endpoint = await world.endpoint()
    await endpoint.aclose()
    async with await world.connect(*endpoint.local_address) as connection:
        yield connection


async def take(connection: Connection, count: int) -> list[bytes]:
    with trio.fail_after(5):
        return [await connection.receive() for _ in range(count)]


async def expect_refusal(connection: Connection) -> None:
    with trio.fail_after(5), pytest.raises(ConnectionRefusedError):
        await connection.receive()


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def test_payloads_come_back_whole(connection: Connection) -> None:
    """A payload of any length comes back whole, from 0 bytes to the longest that UDP can carry."""
    for payload in (b"hello", b"", bytes(range(256)) * 200, bytes(65_507)):
        await connection.send(payload)
        assert await take(connection, 1) == [payload]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_both_families(world: World, start: StartServer, host: str) -> None:
    """Over IPv4 and IPv6, addresses have the form that a socket of their family returns."""
    server = await start(host=host)
    own = address_of(server)
    async with await world.connect(*own[:2]) as connection:
        await connection.send(b"x")
        assert await take(connection, 1) == [b"x"]
        assert connection.peer_address == own
        assert own == ((host, own[1]) if host == "127.0.0.1" else (host, own[1], 0, 0))
        assert [client.peer_address for client in server.clients] == [connection.local_address]


async def test_a_burst_keeps_its_order(connection: Connection) -> None:
    """A burst of more datagrams than a batch is received and answered in order."""
    wanted = [b"%d" % i for i in range(200)]
    await connection.send_many(wanted)
    assert await take(connection, 200) == wanted


async def test_many_clients_at_once(world: World, start: StartServer) -> None:
    """Mixed datagrams of many clients each reach their own client's handler, in order."""
    server = await start(receive_buffer=1_000_000)
    connections = [await world.connect(*address_of(server)) for _ in range(20)]
    wanted = [b"%d" % i for i in range(10)]
    for payload in wanted:
        for connection in connections:
            connection.send_nowait(payload)
    for connection in connections:
        assert await take(connection, 10) == wanted
        await connection.aclose()
    assert server.statistics().clients_started == 20
    check_adds_up(server)


async def test_a_payload_that_is_too_long_raises(connection: Connection) -> None:
    """Sending 65,508 bytes raises EMSGSIZE, and the connection goes on."""
    with pytest.raises(OSError, match="too long") as info:
        await connection.send(bytes(65_508))
    assert info.value.errno == errno.EMSGSIZE
    await connection.send(b"x")
    assert await take(connection, 1) == [b"x"]


async def test_truncated_datagrams_are_counted_and_dropped(world: World, start: StartServer) -> None:
    """A datagram as long as max_datagram_size is delivered; a longer one is not, and does not start a client."""
    server = await start(max_datagram_size=100)
    async with await world.connect(*address_of(server)) as connection:
        await connection.send_many([bytes(101), bytes(5_000)])
        await settle()
        assert server.statistics().clients_started == 0
        await connection.send_many([bytes(100), bytes(101), b"x"])
        assert await take(connection, 2) == [bytes(100), b"x"]
    statistics = server.statistics()
    assert (statistics.received, statistics.truncated, statistics.delivered) == (5, 3, 2)
    check_adds_up(server)


async def test_a_connection_receives_from_its_peer_only(
    world: World, start: StartServer, connection: Connection
) -> None:
    """A connection does not receive a datagram that a stranger sends to its address."""
    stranger = await start()
    await stranger.send_to(b"forged", connection.local_address)
    await connection.send(b"genuine")
    assert await take(connection, 1) == [b"genuine"]
    with pytest.raises(trio.WouldBlock):
        connection.receive_nowait()


async def test_send_to_reaches_an_address_that_has_never_sent(start: StartServer) -> None:
    """send_to reaches an address that has never sent anything, which sees the server's own address."""
    seen = []

    async def handler(client: Client) -> None:
        seen.append((client.peer_address, await client.receive()))

    server, other = await start(), await start(handler)
    await server.send_to(b"news", address_of(other))
    await settle()
    assert seen == [(address_of(server), b"news")]
    assert (server.statistics().sent, server.statistics().bytes_sent) == (1, 4)


async def test_sending_to_port_zero_raises(world: World, start: StartServer) -> None:
    """Sending to port 0 raises the kernel's EINVAL, and is counted once; connecting to it is a ValueError."""
    server = await start()
    with pytest.raises(OSError, match="Invalid") as info:
        await server.send_to(b"x", (HOST, 0))
    assert info.value.errno == errno.EINVAL
    assert server.statistics().errors == {"EINVAL": 1}
    assert (server.statistics().sent, server.statistics().send_errors) == (0, 1)
    with pytest.raises(ValueError, match="port"):
        await world.connect(HOST, 0)


async def test_answers_leave_from_the_address_written_to(world: World, start: StartServer) -> None:
    """A peer that sends to two addresses of one endpoint is two clients, each answered from its address."""

    async def tell(client: Client) -> None:
        async for _ in client:
            await client.send(client.local_address[0].encode())

    seen = []

    async def listen(client: Client) -> None:
        seen.append((client.peer_address, await client.receive()))

    server, stranger = await start(tell, host="0.0.0.0"), await start(listen)
    port = address_of(server)[1]
    assert address_of(server) == ("0.0.0.0", port)
    for host in ("127.0.0.2", "127.0.0.3"):
        await stranger.send_to(b"x", (host, port))
        await settle()
    assert seen == [(("127.0.0.2", port), b"127.0.0.2"), (("127.0.0.3", port), b"127.0.0.3")]
    assert {client.peer_address for client in server.clients} == {address_of(stranger)}
    assert server.statistics().clients_started == 2


async def test_datagrams_wait_in_an_endpoint_until_a_server_runs(world: World, nursery: trio.Nursery) -> None:
    """Datagrams wait in an endpoint until a server runs on it."""
    endpoint = await world.endpoint()
    async with await world.connect(*endpoint.local_address) as connection:
        await connection.send_many([b"1", b"2"])
        await nursery.start(partial(serve_endpoints, echo, [endpoint]))
        await connection.send(b"3")
        assert await take(connection, 3) == [b"1", b"2", b"3"]


TELLS_NOT = () if sys.platform == "linux" else (0,)


async def test_a_full_receive_buffer(world: World, nursery: trio.Nursery) -> None:
    """A full receive buffer drops and counts new datagrams; those already in it stay, in order."""
    endpoint = await world.endpoint(receive_buffer=10_000)
    seen: list[bytes] = []

    async def collect(client: Client) -> None:
        while True:
            seen.append(await client.receive())

    async with await world.connect(*endpoint.local_address) as connection:
        sent = [b"%0100d" % i for i in range(1_000)]
        for payload in sent:
            await connection.send(payload)
        server: Server = await nursery.start(partial(serve_endpoints, collect, [endpoint]))
        await settle()
        assert 0 < len(seen) < 1_000
        assert seen[0] == sent[0]
        assert seen == sorted(seen)
        assert server.statistics().received == len(seen)
        assert server.statistics().kernel_dropped in (1_000 - len(seen), *TELLS_NOT)
        assert connection.statistics().sent == 1_000
        await connection.send(b"there is room again")
        await settle()
        assert seen[-1] == b"there is room again"


async def test_a_full_send_buffer(world: World) -> None:
    """With a full send buffer send_nowait raises and send waits; everything arrives once and in order."""
    if world.narrow is None:
        pytest.skip("no UDP socket of one machine is ever full; see test_linux_engine.py")
    near, far = await world.narrow()
    count = 0
    while True:
        try:
            near.send_nowait(b"%d" % count)
        except trio.WouldBlock:
            break
        count += 1
    assert count > 0
    rest = [b"%d" % i for i in range(count, count + 1_000)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.send_many, rest)
        assert await take(far, count + 1_000) == [b"%d" % i for i in range(count + 1_000)]
    assert near.statistics().sent == count + 1_000
    assert near.statistics().send_errors == 0
    near.close()
    far.close()


async def test_a_refusal_is_raised_once(world: World, refused: Connection, nursery: trio.Nursery) -> None:
    """receive raises a refusal once; when a server listens there, the same connection reaches it."""
    await refused.send(b"anybody?")
    await expect_refusal(refused)
    with pytest.raises(trio.WouldBlock):
        refused.receive_nowait()
    endpoint = await world.endpoint(refused.peer_address[1])
    await nursery.start(partial(serve_endpoints, echo, [endpoint]))
    await refused.send(b"and now?")
    assert await take(refused, 1) == [b"and now?"]
    assert refused.statistics().errors == {"ECONNREFUSED": 1}


async def test_a_refusal_is_raised_by_the_next_send(world: World, refused: Connection, nursery: trio.Nursery) -> None:
    """A send that meets an earlier datagram's refusal raises it and sends nothing; the next send works."""
    await refused.send(b"refused")
    endpoint = await world.endpoint(refused.peer_address[1])
    await nursery.start(partial(serve_endpoints, echo, [endpoint]))
    with pytest.raises(ConnectionRefusedError):
        await refused.send(b"not sent")
    await refused.send(b"wanted")
    assert await take(refused, 1) == [b"wanted"]
    assert (refused.statistics().sent, refused.statistics().send_errors) == (2, 0)
    assert refused.statistics().errors == {"ECONNREFUSED": 1}


async def test_a_refusal_wakes_the_receiver(refused: Connection) -> None:
    """A receive that already waits raises each refusal."""
    for _ in range(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_refusal, refused)
            await settle()
            await refused.send(b"x")


async def test_a_server_is_not_told_of_refusals(world: World, start: StartServer) -> None:
    """A server does not notice that a client's port is closed; it counts no error and serves others."""
    server = await start()
    for _ in range(5):
        async with await world.connect(*address_of(server)) as leaves:
            await leaves.send(b"x")
    async with await world.connect(*address_of(server)) as stays:
        await stays.send(b"still there?")
        assert await take(stays, 1) == [b"still there?"]
    assert (server.statistics().sent, server.statistics().errors) == (6, {})


async def test_addresses_in_use(world: World, start: StartServer) -> None:
    """An address belongs to one endpoint, and is free when that is closed."""
    endpoint = await world.endpoint()
    with pytest.raises(OSError, match="in use") as info:
        await world.endpoint(endpoint.local_address[1])
    assert info.value.errno == errno.EADDRINUSE
    server = await start()
    with pytest.raises(OSError, match="in use"):
        await world.connect(*address_of(server), local_address=endpoint.local_address)
    await endpoint.aclose()
    async with await world.connect(*address_of(server), local_address=endpoint.local_address) as connection:
        assert connection.local_address == endpoint.local_address
        await connection.send(b"x")
        assert await take(connection, 1) == [b"x"]


async def test_closing_an_endpoint_under_a_waiting_server(world: World, nursery: trio.Nursery) -> None:
    """A server whose endpoint is closed ends with ClosedResourceError; its handlers find their client closed."""
    endpoint = await world.endpoint()
    ends = []

    async def handler(client: Client) -> None:
        await client.receive()
        try:
            await client.receive()
        finally:
            ends.append(client.statistics().received)

    async def serve() -> None:
        with trio.fail_after(5), pytest.raises(trio.ClosedResourceError):
            await serve_endpoints(handler, [endpoint])
        ends.append(-1)

    nursery.start_soon(serve)
    async with await world.connect(*endpoint.local_address) as connection:
        await connection.send(b"x")
        await settle()
        await endpoint.aclose()
        await settle()
    assert ends == [1, -1]
    assert endpoint.closed
    assert endpoint.statistics().received == 1
    assert repr(endpoint) == f"<trio_udp.Endpoint {endpoint.local_address} closed>"


async def test_closing_with_datagrams_waiting(world: World) -> None:
    """A server ends, and does not spin, when its endpoint is closed while datagrams wait in it."""
    endpoint = await world.endpoint()

    async def handler(client: Client) -> None:
        await client.receive()
        endpoint.close()
        await trio.sleep_forever()

    async with await world.connect(*endpoint.local_address) as connection:
        await connection.send_many([b"x"] * 100)
        with trio.fail_after(5), pytest.raises(trio.ClosedResourceError):
            await serve_endpoints(handler, [endpoint])


async def test_closing_a_connection_under_a_waiting_receiver(connection: Connection) -> None:
    """A receive that waits gets ClosedResourceError when the connection is closed, as does every later call."""
    ends = []

    async def receive() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await connection.receive()
        ends.append("closed")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await settle()
        await connection.aclose()
    connection.close()
    assert ends == ["closed"]
    assert "closed" in repr(connection)
    for operation in (connection.receive, partial(connection.send, b"x"), partial(connection.send_many, [b"x"])):
        with pytest.raises(trio.ClosedResourceError):
            await operation()
    for nowait in (connection.receive_nowait, partial(connection.send_nowait, b"x")):
        with pytest.raises(trio.ClosedResourceError):
            nowait()


async def test_cancelling_receive_loses_nothing(connection: Connection) -> None:
    """A datagram that has arrived when receive is cancelled stays for the next receive."""
    await connection.send(b"x")
    await settle()
    with trio.CancelScope() as scope:
        scope.cancel()
        await connection.receive()
    assert scope.cancelled_caught
    assert await take(connection, 1) == [b"x"]


async def test_two_tasks_cannot_receive_at_once(connection: Connection) -> None:
    """The second of two tasks that receive from a connection gets BusyResourceError, and the first its datagram."""
    seen = []

    async def receive() -> None:
        seen.append(await connection.receive())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await settle()
        with pytest.raises(trio.BusyResourceError):
            await connection.receive()
        with pytest.raises(trio.WouldBlock):
            connection.receive_nowait()
        await connection.send(b"x")
    assert seen == [b"x"]


async def test_counters(world: World, start: StartServer) -> None:
    """Both ends count the same datagrams, each of them once."""
    server = await start()
    async with await world.connect(*address_of(server)) as connection:
        await connection.send_many([b"123", b"", b"45"])
        assert await take(connection, 2) == [b"123", b""]
        await settle()
        near = connection.statistics()
    far = connection.statistics()
    statistics = server.statistics()
    assert (statistics.received, statistics.bytes_received, statistics.sent, statistics.bytes_sent) == (3, 5, 3, 5)
    assert (near.sent, near.bytes_sent, near.delivered) == (3, 5, 2)
    assert near.received == near.delivered + near.waiting
    assert far.received == far.delivered + far.dropped_at_end
    assert (statistics.errors, near.errors) == ({}, {})
    check_adds_up(server)
