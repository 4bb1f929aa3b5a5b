"""One payload for many clients: ``Server.send_to_all``."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from trio_udp import Address, Client, Endpoint, Limits, Server, serve, serve_endpoints
from trio_udp.testing._engine import SimulatedEngine

from ..conftest import ALICE, BOB, CAROL, Bystander, StartInMemory, check_adds_up, in_memory, narrow


async def listen(client: Client) -> None:
    """A handler that never answers."""
    async for _ in client:
        pass


def client_of(server: Server, address: Address) -> Client:
    [client] = [client for client in server.clients if client.peer_address == address]
    return client


async def test_all_clients_or_some(start_in_memory: StartInMemory) -> None:
    """send_to_all sends to every client, or to the given ones in their order."""
    run = await start_in_memory(listen)
    for address in (ALICE, BOB, CAROL):
        run.put(b"hello", address)
    await run.settle()
    await run.server.send_to_all(bytearray(b"all"))
    await run.server.send_to_all(b"some", [client_of(run.server, CAROL), client_of(run.server, ALICE)])
    await run.server.send_to_all(b"nobody", [])
    assert sorted(run.sent[:3]) == [(ALICE, b"all"), (BOB, b"all"), (CAROL, b"all")]
    assert run.sent[3:] == [(CAROL, b"some"), (ALICE, b"some")]
    assert client_of(run.server, ALICE).statistics().sent == 2


async def test_one_datagram_for_each_of_many(engine: str, nursery: trio.Nursery) -> None:
    """Hundreds of clients over both families get one datagram each, from the address that they sent to."""
    server: Server = await nursery.start(partial(serve, listen, 0))
    port = server.endpoints[0].local_address[1]
    with ExitStack() as stack:
        peers = []
        for number in range(300):
            family, host = (socket.AF_INET, "127.0.0.2") if number % 2 else (socket.AF_INET6, "::1")
            sock = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            sock.connect((host, port))
            sock.setblocking(False)
            sock.send(b"hello")
            peers.append(sock)
        with trio.fail_after(5):
            while server.statistics().delivered < 300:
                await trio.lowlevel.checkpoint()
        await server.send_to_all(b"news")
        assert [sock.recv(100) for sock in peers] == [b"news"] * 300
        assert server.statistics().sent == 300
        for sock in peers:
            with pytest.raises(BlockingIOError):
                sock.recv(100)


async def test_few_system_calls(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    """A payload for 640 clients takes 10 calls of the engine, one for each 64."""
    run = in_memory()
    calls: list[int] = []
    send = SimulatedEngine.send

    def counted(engine: SimulatedEngine, payloads: Sequence[bytes], *columns: Any) -> int:
        calls.append(len(payloads))
        return send(engine, payloads, *columns)

    monkeypatch.setattr(SimulatedEngine, "send", counted)
    server: Server = await nursery.start(serve_endpoints, listen, [run.endpoint])
    for port in range(1, 641):
        run.put(b"x", ("192.0.2.7", port))
    await run.settle()
    await server.send_to_all(b"news")
    assert calls == [64] * 10


async def test_other_tasks_run_in_between(start_in_memory: StartInMemory) -> None:
    """At most 64 datagrams leave between two turns of another task."""
    run = await start_in_memory(listen)
    for port in range(1, 1_001):
        run.put(b"x", ("192.0.2.7", port))
    await run.settle()
    bystander = Bystander(lambda: run.server.statistics().sent)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bystander.run)
        await trio.lowlevel.checkpoint()
        await run.server.send_to_all(b"news")
        nursery.cancel_scope.cancel()
    assert run.server.statistics().sent == 1_000
    assert 0 < bystander.most <= 128  # Trio orders the tasks of a pass at random


async def test_clients_that_have_ended_are_skipped(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """Closed, expired, evicted and returned clients get nothing, which is not an error."""

    async def handler(client: Client) -> None:
        if client.peer_address == CAROL:
            return
        async for payload in client:
            if payload == b"close":
                client.close()
                break
        await trio.sleep(100)  # cleans up

    run = await start_in_memory(handler, idle_timeout=8, limits=Limits(max_clients=4, when_full="evict_idle"))
    dave = ("192.0.2.4", 4000)
    run.put(b"close", ALICE)
    run.put(b"x", CAROL)
    run.put(b"x", dave)
    await run.settle()
    clients = list(run.server.clients)
    evicted = client_of(run.server, dave)
    evicted.idle_timeout = 1
    await trio.sleep(2)
    assert [client.ended for client in clients if client.peer_address == dave] == ["idle"]
    run.put(b"x", BOB)
    await run.settle()
    await run.server.send_to_all(b"news", [*clients, client_of(run.server, BOB)])
    await run.server.send_to_all(b"more")
    assert run.sent == [(BOB, b"news"), (BOB, b"more")]
    assert run.server.statistics().send_errors == 0


async def test_a_client_of_another_server(start_in_memory: StartInMemory) -> None:
    """A client of another server raises ValueError, and nothing is sent."""
    run, other = await start_in_memory(listen), await start_in_memory(listen)
    run.put(b"x")
    other.put(b"x")
    await run.settle()
    with pytest.raises(ValueError, match="another server"):
        await run.server.send_to_all(b"news", [*run.server.clients, *other.server.clients])
    assert run.sent == other.sent == []


async def test_a_full_send_buffer_is_counted(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A client whose datagram finds the send buffer full does not get it, and counts a send error."""
    run = await start_in_memory(listen, on=narrow())
    for address in (ALICE, BOB, CAROL):
        run.put(b"x", address)
    await run.settle()
    clients = [client_of(run.server, address) for address in (ALICE, BOB, CAROL)]
    await run.server.send_to_all(b"1", clients)
    assert trio.current_time() == 0
    assert run.sent == [(ALICE, b"1")]
    assert [dict(client.statistics().errors) for client in clients] == [{}, {"EAGAIN": 1}, {"EAGAIN": 1}]
    assert [client.statistics().sent for client in clients] == [1, 0, 0]
    await trio.sleep(2)
    await run.server.send_to_all(b"2", clients[1:])
    assert run.sent == [(ALICE, b"1"), (BOB, b"2")]
    assert run.server.statistics().send_errors == 3


async def test_amplification_holds_for_each(start_in_memory: StartInMemory) -> None:
    """A client at its amplification limit is skipped and counted; the others get the payload."""
    run = await start_in_memory(listen, limits=Limits(amplification=3))
    run.put(b"long enough", ALICE)
    run.put(b"x", BOB)
    run.put(b"x", CAROL)
    await run.settle()
    client_of(run.server, CAROL).validate()
    await run.server.send_to_all(b"news")
    assert sorted(run.sent) == [(ALICE, b"news"), (CAROL, b"news")]
    assert client_of(run.server, BOB).statistics().sends_withheld == 1
    assert run.server.statistics().sends_withheld == 1


async def test_a_dropped_datagram_does_not_count_towards_amplification(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """A datagram that was dropped at a full send buffer does not count towards the amplification limit."""
    run = await start_in_memory(listen, on=narrow(), limits=Limits(amplification=1))
    run.put(b"1234", ALICE)
    run.put(b"1234", BOB)
    await run.settle()
    alice, bob = client_of(run.server, ALICE), client_of(run.server, BOB)
    await run.server.send_to_all(b"news", [alice, bob])
    assert run.sent == [(ALICE, b"news")]
    await trio.sleep(10)
    await bob.send(b"news")
    assert run.sent_to(BOB) == [b"news"]
    assert bob.statistics().sends_withheld == 0


async def test_payloads_that_cannot_be_sent(start_in_memory: StartInMemory) -> None:
    """A payload that is too long or not bytes-like raises before anything is sent."""
    run = await start_in_memory(listen)
    run.put(b"x")
    await run.settle()
    with pytest.raises(OSError, match="too long"):
        await run.server.send_to_all(bytes(65_508))
    with pytest.raises(TypeError):
        await run.server.send_to_all("news")  # type: ignore[arg-type]
    assert run.sent == []
    check_adds_up(run.server)


async def test_a_closed_endpoint_is_skipped(engine: str, nursery: trio.Nursery) -> None:
    """The clients of an endpoint that was closed are skipped; those of the others get the payload."""
    with ExitStack() as stack:
        peers, endpoints = [], []
        for host in ("127.0.0.1", "127.0.0.2"):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind((host, 0))
            endpoints.append(Endpoint.from_socket(sock))
            peer = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            peer.connect(endpoints[-1].local_address)
            peer.setblocking(False)
            peers.append(peer)
        server: Server = await nursery.start(serve_endpoints, listen, endpoints)
        for peer in peers:
            peer.send(b"x")
        with trio.fail_after(5):
            while len(server.clients) < 2:
                await trio.lowlevel.checkpoint()
        clients = list(server.clients)
        endpoints[0].close()
        await server.send_to_all(b"news", clients)
        assert peers[1].recv(100) == b"news"
        with pytest.raises(OSError, match=r".+"):
            peers[0].recv(100)
