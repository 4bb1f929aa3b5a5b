"""Conversations that the server starts: ``Server.connect``."""

from __future__ import annotations

import socket
from functools import partial

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from trio_udp import Address, Client, Endpoint, Limits, Server, serve_endpoints

from ..conftest import ALICE, BOB, SERVER, StartInMemory, StartServer, check_adds_up, echo, in_memory, plain_socket
from ..namespaces import inside, link_local_machines, machines, needs_namespaces


async def converse(client: Client, sock: socket.socket) -> Address:
    """Let both sides send a datagram; return the address that the peer sees."""
    await client.send(b"hello")
    payload, address = sock.recvfrom(100)
    assert payload == b"hello"
    sock.sendto(b"answer", address)
    with trio.fail_after(5):
        assert await client.receive() == b"answer"
    return address  # type: ignore[no-any-return]


@pytest.mark.parametrize("host", [None, "127.0.0.1", "::1"])
async def test_answers_reach_the_client(start_on_loopback: StartServer, host: str | None) -> None:
    """The peer's answer reaches the Server.connect client, not a handler, on an endpoint bound to any address."""
    server = await start_on_loopback(host=host)
    for other in ["127.0.0.9", "::1"] if host is None else [host]:
        with plain_socket(other) as sock:
            client = server.connect(sock.getsockname())
            assert client.peer_address == sock.getsockname()
            assert client.local_address == await converse(client, sock)
            client.close()
    statistics = server.statistics()
    assert statistics.delivered == statistics.received == statistics.sent
    assert statistics.clients == 0
    check_adds_up(server)


async def test_a_local_address_of_our_choice(start_on_loopback: StartServer) -> None:
    """A Server.connect client on an endpoint bound to all addresses sends from local_address."""
    server = await start_on_loopback(host="0.0.0.0")
    with plain_socket() as sock:
        client = server.connect(sock.getsockname(), local_address=("127.0.0.2", 0))
        assert client.local_address == ("127.0.0.2", server.endpoints[0].local_address[1])
        assert await converse(client, sock) == client.local_address
        client.close()


async def test_ipv6_flow_labels_do_not_tell_clients_apart(start_on_loopback: StartServer) -> None:
    """An address with a flow label is the same peer as the address without it."""
    server = await start_on_loopback(host="::")
    with plain_socket("::1") as sock:
        client = server.connect(("::1", sock.getsockname()[1], 7, 0))
        await converse(client, sock)
        with pytest.raises(trio.BusyResourceError):
            server.connect(sock.getsockname())
        client.close()


@pytest.mark.parametrize("host", ["127.0.0.9", "::ffff:127.0.0.9"])
async def test_a_dual_stack_socket(engine: str, nursery: trio.Nursery, host: str) -> None:
    """On a dual-stack socket, Server.connect takes an IPv4 address in either notation."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as dual:
        dual.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        dual.bind(("::", 0))
        server: Server = await nursery.start(serve_endpoints, echo, [Endpoint.from_socket(dual.dup())])
    with plain_socket() as sock:
        client = server.connect((host, sock.getsockname()[1]))
        await converse(client, sock)
        client.close()


@needs_namespaces
@pytest.mark.parametrize("bound_to", ["::", "fe80::1%wire"])
async def test_a_link_local_peer(engine: str, nursery: trio.Nursery, bound_to: str) -> None:
    """Server.connect reaches a link-local peer over the interface in its scope."""
    with link_local_machines() as (ours, theirs):
        endpoint = Endpoint.from_socket(ours.socket(bound_to, family=socket.AF_INET6))
        server: Server = await nursery.start(serve_endpoints, echo, [endpoint])
        with theirs.socket("fe80::2%wire", family=socket.AF_INET6) as sock:
            sock.settimeout(5)
            address = ("fe80::2", sock.getsockname()[1], 0, ours.index("wire"))
            with inside(ours.name):  # the kernel of this machine chooses the address
                client = server.connect(address)
            assert client.peer_address == address
            await converse(client, sock)
            client.close()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "address",
    [
        ("239.1.2.3", 9),
        ("ff02::1", 9, 0, 1),
        ("255.255.255.255", 9),
        ("127.255.255.255", 9),
        ("127.0.0.1", 0),
        ("::1", 0),
        ("0.0.0.0", 9),
        ("::", 9),
    ],
    ids=str,
)
async def test_addresses_that_are_not_a_single_peer(start_on_loopback: StartServer, address: Address) -> None:
    """Server.connect raises ValueError for a group, a broadcast address, the unspecified address and port 0."""
    server = await start_on_loopback(host=None)
    with pytest.raises(ValueError, match=r".+"):
        server.connect(address)
    assert len(server.clients) == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
async def test_our_own_address(start_on_loopback: StartServer, host: str) -> None:
    """Server.connect refuses the server's own address, in the form of any address of its machine."""
    server = await start_on_loopback(host=None)
    with pytest.raises(ValueError, match="itself"):
        server.connect((host, server.endpoints[0].local_address[1]))


async def test_addresses_that_no_endpoint_can_use(start_on_loopback: StartServer) -> None:
    """Server.connect raises for a name, another family, or a local address that no endpoint is bound to."""
    server = await start_on_loopback()
    for options in ({"address": ("localhost", 9)}, {"address": ("::1", 9)}):
        with pytest.raises(ValueError, match=r".+"):
            server.connect(**options)
    with pytest.raises(ValueError, match=r".+"):
        server.connect(("127.0.0.1", 9), local_address=("127.0.0.2", 0))
    with pytest.raises(TypeError):
        server.connect("127.0.0.1")


async def test_a_local_address_that_is_not_ours(start_on_loopback: StartServer) -> None:
    """Server.connect refuses a local_address that the machine does not have."""
    server = await start_on_loopback(host="0.0.0.0")
    with pytest.raises(OSError, match=r".+"):
        server.connect(("127.0.0.1", 9), local_address=("192.0.2.1", 0))
    assert len(server.clients) == 0


@needs_namespaces
async def test_no_route(engine: str, nursery: trio.Nursery) -> None:
    """Server.connect raises the kernel's error if there is no route to the peer."""
    with machines("alone") as [alone]:
        server: Server = await nursery.start(serve_endpoints, echo, [Endpoint.from_socket(alone.socket("0.0.0.0"))])
        with inside(alone.name), pytest.raises(OSError, match="unreachable"):
            server.connect(("192.0.2.1", 9))
        assert len(server.clients) == 0
        nursery.cancel_scope.cancel()


async def test_an_address_is_one_client(start_in_memory: StartInMemory) -> None:
    """Server.connect raises BusyResourceError for a peer that is already a client, until that client is closed."""
    run = await start_in_memory(echo)
    run.put(b"x", ALICE)
    await run.settle()
    with pytest.raises(trio.BusyResourceError):
        run.server.connect(ALICE)
    client = run.server.connect(BOB)
    with pytest.raises(trio.BusyResourceError):
        run.server.connect(BOB)
    client.close()
    run.server.connect(BOB).close()


async def test_it_counts_as_a_client(start_in_memory: StartInMemory) -> None:
    """A Server.connect client is in clients, and takes a place of max_clients, until its owner closes it."""
    run = await start_in_memory(echo, limits=Limits(max_clients=1))
    client = run.server.connect(ALICE)
    assert list(run.server.clients) == [client]
    assert client in run.server.clients
    assert (run.server.statistics().clients, run.server.statistics().clients_started) == (1, 1)
    with pytest.raises(trio.WouldBlock):
        run.server.connect(BOB)
    run.put(b"x", BOB)
    await run.settle()
    assert run.server.statistics().refused_full == 1
    await client.aclose()
    assert len(run.server.clients) == 0
    run.put(b"y", BOB)
    await run.settle()
    assert run.sent == [(BOB, b"y")]
    check_adds_up(run.server)


async def test_it_is_validated(start_in_memory: StartInMemory) -> None:
    """A Server.connect client has no amplification limit, and no stranger evicts it."""
    run = await start_in_memory(echo, limits=Limits(max_clients=1, when_full="evict_idle", amplification=3))
    client = run.server.connect(ALICE)
    assert client.validated
    await client.send(b"something long")
    assert run.sent == [(ALICE, b"something long")]
    with trio.move_on_after(0):
        await client.receive()
    run.put(b"x", BOB)
    await run.settle()
    assert (run.server.statistics().refused_full, run.server.statistics().clients_evicted) == (1, 0)


async def test_it_evicts_where_strangers_do(start_in_memory: StartInMemory) -> None:
    """At max_clients, Server.connect evicts a client if the policy is to evict, as a stranger does."""
    ends: list[str | None] = []

    async def handler(client: Client) -> None:
        async for _ in client:
            pass
        ends.append(client.ended)

    run = await start_in_memory(handler, limits=Limits(max_clients=1, when_full="evict_idle"))
    run.put(b"x", ALICE)
    await run.settle()
    client = run.server.connect(BOB)
    await run.settle()
    assert ends == ["evicted"]
    assert list(run.server.clients) == [client]
    assert run.server.statistics().clients_evicted == 1


async def test_it_is_not_counted_for_its_host(start_in_memory: StartInMemory) -> None:
    """clients_per_host does not count Server.connect clients."""
    run = await start_in_memory(echo, limits=Limits(clients_per_host=1))
    for port in (1, 2):
        run.server.connect((ALICE[0], port))
    for port in (3, 4):
        run.put(b"x", (ALICE[0], port))
    await run.settle()
    assert run.sent == [((ALICE[0], 3), b"x")]
    assert run.server.statistics().refused_full == 1
    for client in run.server.clients:
        client.close()
    check_adds_up(run.server)


async def test_no_handler_runs(start_in_memory: StartInMemory) -> None:
    """Datagrams of a Server.connect client wait for its owner; after close() the next datagram is a stranger's."""
    handled: list[bytes] = []

    async def handler(client: Client) -> None:
        handled.extend([payload async for payload in client])

    run = await start_in_memory(handler)
    async with run.server.connect(ALICE) as client:
        run.put(b"1")
        run.put(b"2")
        await run.settle()
        assert await client.receive() == b"1"
    assert client.statistics().dropped_at_end == 1
    run.put(b"3")
    await run.settle()
    run.server.stop()
    await run.settle()
    assert handled == [b"3"]
    with pytest.raises(trio.ClosedResourceError):
        await client.send(b"x")
    check_adds_up(run.server)


async def test_a_handler_may_be_run_for_it(start_in_memory: StartInMemory, nursery: trio.Nursery) -> None:
    """``nursery.start_soon(handler, server.connect(address))`` serves a peer that has not sent anything yet."""
    run = await start_in_memory(echo)
    nursery.start_soon(echo, run.server.connect(ALICE))
    await run.settle()
    run.put(b"x")
    await run.settle()
    assert run.sent == [(ALICE, b"x")]
    assert run.server.statistics().clients_started == 1


async def test_silence_ends_its_receive(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A Server.connect client ends by its idle timeout, but stays in clients until its owner closes it."""
    run = await start_in_memory(echo, idle_timeout=8)
    client = run.server.connect(ALICE)
    with pytest.raises(trio.EndOfChannel):
        await client.receive()
    assert 8 <= trio.current_time() <= 10
    assert client.ended == "idle"
    await client.send(b"goodbye")
    assert run.sent == [(ALICE, b"goodbye")]
    assert len(run.server.clients) == 1
    client.close()
    assert len(run.server.clients) == 0


async def test_a_drain_waits_for_its_owner(autojump_clock: MockClock) -> None:
    """A drain ends the channel of a Server.connect client, and waits until its owner closes it."""
    run = in_memory()
    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(serve_endpoints, echo, [run.endpoint])
        client = server.connect(ALICE)
        run.put(b"before")
        await trio.testing.wait_all_tasks_blocked()
        server.stop()
        assert [payload async for payload in client] == [b"before"]
        assert client.ended == "stopping"
        await trio.sleep(2)
        assert not run.endpoint.closed
        await client.send(b"goodbye")
        client.close()
    assert trio.current_time() == 2
    assert run.sent == [(ALICE, b"goodbye")]
    check_adds_up(server)


async def test_drain_timeout_closes_the_client(autojump_clock: MockClock) -> None:
    """After drain_timeout, a Server.connect client is closed; no handler is cancelled, and its owner's task goes on."""
    run = in_memory()
    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(partial(serve_endpoints, echo, [run.endpoint], drain_timeout=3))
        client = server.connect(ALICE)
        server.stop()
        with client.transaction(), pytest.raises(trio.ClosedResourceError):
            await client.receive()
    assert trio.current_time() == 3
    assert (server.statistics().handlers_cancelled, server.statistics().clients) == (0, 0)
    with pytest.raises(trio.ClosedResourceError):
        await client.send(b"x")
    with pytest.raises(trio.ClosedResourceError):
        server.connect(ALICE)


async def test_no_conversation_begins_once_the_server_stops(start_in_memory: StartInMemory) -> None:
    """Server.connect raises ClosedResourceError while the server stops."""

    async def handler(client: Client) -> None:
        await client.receive()
        client.server.stop()
        with pytest.raises(trio.ClosedResourceError):
            client.server.connect(BOB)

    run = await start_in_memory(handler)
    run.put(b"x")
    await run.settle()
    assert run.endpoint.closed
    assert run.server.statistics().handler_errors == 0


async def test_the_simulated_server_itself(start_in_memory: StartInMemory) -> None:
    """On a simulated network too, Server.connect refuses the server's own address."""
    run = await start_in_memory(echo)
    with pytest.raises(ValueError, match="itself"):
        run.server.connect(SERVER)
