"""Peers on a Unix-domain socket that do not read: each delays only its own datagrams."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

import trio_udp
from tests.conftest import StartServer, steps_in
from trio_udp import Client, Datagram
from trio_udp._endpoints import _sock_diag

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a receiver's own buffer counts")

SMALL = 50_000  # bytes of send buffer, which Linux doubles; room for 130 small datagrams


@pytest.fixture
def start(start_on_unix: StartServer) -> StartServer:
    return partial(start_on_unix, send_buffer=SMALL)


class Peer:
    """A socket that talks to the server, connected to it or not. The kernel does not limit a connected one."""

    def __init__(self, path: str, sockets: ExitStack, *, connected: bool) -> None:
        self.socket = sockets.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.socket.bind("")
        self.socket.setblocking(False)
        self.name: Any = self.socket.getsockname()
        self._path = path
        self._connected = connected
        if connected:
            self.socket.connect(path)

    def send(self, payload: bytes) -> None:
        if self._connected:
            self.socket.send(payload)
        else:
            self.socket.sendto(payload, self._path)

    async def ask(self, payload: bytes) -> bytes:
        await trio.lowlevel.wait_writable(self.socket)
        self.send(payload)
        return await self.receive()

    async def receive(self) -> bytes:
        await trio.lowlevel.wait_readable(self.socket)
        return self.socket.recv(100)

    def receive_nowait(self) -> list[bytes]:
        received = []
        with suppress(BlockingIOError):
            while True:
                received.append(self.socket.recv(100))
        return received


@pytest.fixture(params=["bound", "connected"])
def make_peer(request: pytest.FixtureRequest, path: str, sockets: ExitStack) -> Callable[[], Peer]:
    return partial(Peer, path, sockets, connected=request.param == "connected")


async def until(condition: Callable[[], bool]) -> None:
    """Wait in real time until the kernel reports a condition."""
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110  # nothing here sets an event
            await trio.sleep(0.001)


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def answer_often(client: Client) -> None:
    """Send as many answers as the payload says."""
    async for payload in client:
        for number in range(int(payload)):
            await client.send(b"%d" % number)


async def test_one_peer_does_not_hold_up_another(start: StartServer, make_peer: Callable[[], Peer]) -> None:
    """While ``send`` waits for a peer that does not read, others get their answers, and no task spins."""
    server = await start(answer_often)
    silent, other = make_peer(), make_peer()
    silent.send(b"1000")
    await trio.testing.wait_all_tasks_blocked(0.01)
    with trio.fail_after(10):
        for _ in range(500):
            assert await other.ask(b"1") == b"0"
    assert await steps_in(0.3) < 300
    (waiting,) = (client for client in server.clients if client.peer_address == silent.name)
    assert 0 < waiting.statistics().sent < 100
    assert server.statistics().send_errors == 0
    with trio.fail_after(10):
        assert [await silent.receive() for _ in range(1_000)] == [b"%d" % number for number in range(1_000)]


async def test_single_datagrams(start: StartServer, make_peer: Callable[[], Peer]) -> None:
    """Replies of a ``datagram_handler`` to a peer that does not read are dropped and counted; other replies are not."""
    server = await start(trio_udp.datagram_handler(lambda datagram: datagram.payload))
    silent, other = make_peer(), make_peer()
    with trio.fail_after(20):
        for number in range(500):
            await trio.lowlevel.wait_writable(silent.socket)
            silent.send(b"%d" % number)
            assert await other.ask(b"%d" % number) == b"%d" % number
    await settle()
    received = silent.receive_nowait()
    assert received == [b"%d" % number for number in range(len(received))]
    assert 0 < len(received) < 100
    assert server.statistics().errors == {"EAGAIN": 500 - len(received)}
    assert await silent.ask(b"again") == b"again"


async def test_many_silent_peers(start: StartServer, path: str, sockets: ExitStack) -> None:
    """A hundred silent peers, each with a fair share of the send buffer, leave enough room for one that reads."""
    await start(trio_udp.datagram_handler(lambda datagram: datagram.payload), send_buffer=None)
    silent = [Peer(path, sockets, connected=True) for _ in range(100)]
    other = Peer(path, sockets, connected=True)
    with trio.fail_after(30):
        for _ in range(100):
            for sock in silent:
                await trio.lowlevel.wait_writable(sock.socket)
                sock.send(bytes(50))
        for number in range(200):
            assert await other.ask(b"%d" % number) == b"%d" % number


async def test_without_room_nothing_waits(start: StartServer, make_peer: Callable[[], Peer]) -> None:
    """``send_nowait`` raises WouldBlock for a peer that does not read, and for no other peer."""
    clients: dict[Any, Client] = {}

    async def handler(client: Client) -> None:
        clients[client.peer_address] = client
        await trio.sleep_forever()

    await start(handler)
    silent, other = make_peer(), make_peer()
    for sock in (silent, other):
        sock.send(b"x")
        await settle()
    sent = 0
    with suppress(trio.WouldBlock):
        while True:
            clients[silent.name].send_nowait(b"%d" % sent)
            sent += 1
    clients[other.name].send_nowait(b"x")
    assert other.receive_nowait() == [b"x"]
    assert silent.receive_nowait() == [b"%d" % number for number in range(sent)]
    clients[silent.name].send_nowait(b"again")
    assert silent.receive_nowait() == [b"again"]


async def test_the_order_of_waiting_sends(
    start: StartServer, make_peer: Callable[[], Peer], nursery: trio.Nursery
) -> None:
    """Tasks that wait for one peer send in the order of their calls; a cancelled one is left out."""
    found: list[Client] = []

    async def handler(client: Client) -> None:
        found.append(client)
        await trio.sleep_forever()

    await start(handler)
    silent = make_peer()
    silent.send(b"x")
    await settle()
    (client,) = found
    sent = 0
    with suppress(trio.WouldBlock):
        while True:
            client.send_nowait(b"%d" % sent)
            sent += 1
    scope = trio.CancelScope()

    async def cancelled() -> None:
        with scope:
            await client.send(b"cancelled")

    nursery.start_soon(cancelled)
    await settle()
    for number in range(sent, sent + 20):
        nursery.start_soon(client.send, b"%d" % number)
        await settle()
    scope.cancel()
    await settle()
    with trio.fail_after(10):
        received = [await silent.receive() for _ in range(sent + 10)]
        with suppress(trio.WouldBlock):  # the others may still be waiting
            client.send_nowait(b"%d" % (sent + 20))
        received += [await silent.receive() for _ in range(10)]
    assert received == [b"%d" % number for number in range(sent + 20)]


async def test_a_peer_that_goes_away(start: StartServer, make_peer: Callable[[], Peer], nursery: trio.Nursery) -> None:
    """Sends that wait for a peer end when the peer is gone, and only that peer's client counts the errors."""
    server = await start(answer_often)
    silent, other = make_peer(), make_peer()
    silent.send(b"100")
    await trio.testing.wait_all_tasks_blocked(0.01)
    sent = server.statistics().sent
    silent.socket.close()
    await until(lambda: server.statistics().send_errors == 100 - sent)
    assert server.statistics().errors == {"ECONNREFUSED": 100 - sent}
    with trio.fail_after(5):
        assert await other.ask(b"1") == b"0"


@pytest.mark.parametrize("ends", ["endpoint", "client"])
async def test_closing_while_sends_wait(start: StartServer, make_peer: Callable[[], Peer], ends: str) -> None:
    """A send that waits raises ClosedResourceError when its endpoint or its client is closed."""
    caught = []

    async def handler(client: Client) -> None:
        await client.receive()
        try:
            while True:
                await client.send(b"x")
        except trio.ClosedResourceError:
            caught.append(client)
            raise

    server = await start(handler)
    server.add_endpoint(await trio_udp.open_unix_endpoint(f"\0trio_udp other {os.getpid()}"))
    make_peer().send(b"x")
    await trio.testing.wait_all_tasks_blocked(0.01)
    (client,) = server.clients
    if ends == "endpoint":
        client.endpoint.close()
    else:
        client.close()
    await until(lambda: bool(caught))
    assert caught == [client]
    assert server.statistics().handler_errors == 0


async def test_closing_an_endpoint_without_a_server(
    path: str, make_peer: Callable[[], Peer], nursery: trio.Nursery
) -> None:
    """On an endpoint without a server too, a waiting reply and a waiting ``send_to`` raise ClosedResourceError."""
    endpoint = await trio_udp.open_unix_endpoint(path, send_buffer=SMALL)
    silent = make_peer()
    silent.send(b"x")
    datagram: Datagram = await endpoint.receive()
    with suppress(trio.WouldBlock):
        while True:
            datagram.reply_nowait(b"x")
    with pytest.raises(trio.WouldBlock):
        endpoint.send_to_nowait(b"x", silent.name)
    raised = []

    async def wait(send: Callable[[], Awaitable[None]]) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await send()
        raised.append(send)

    for send in (partial(datagram.reply, b"x"), partial(endpoint.send_to, b"x", silent.name)):
        nursery.start_soon(wait, send)
    await trio.testing.wait_all_tasks_blocked(0.01)
    endpoint.close()
    await until(lambda: len(raised) == 2)


async def test_the_drain_waits_for_a_slow_peer(start: StartServer, make_peer: Callable[[], Peer]) -> None:
    """A handler that waits for a slow peer when the server stops has ``drain_timeout`` seconds to finish."""
    server = await start(answer_often)
    slow = make_peer()
    slow.send(b"300")
    await trio.testing.wait_all_tasks_blocked(0.01)
    server.stop()
    with trio.fail_after(10):
        assert [await slow.receive() for _ in range(300)] == [b"%d" % number for number in range(300)]
    assert server.statistics().handlers_cancelled == 0


async def test_send_to_all(start: StartServer, make_peer: Callable[[], Peer]) -> None:
    """``send_to_all`` reaches every peer that reads; for one that does not, the datagram is dropped and counted."""
    server = await start(answer_often)
    silent, other = make_peer(), make_peer()
    silent.send(b"1000")
    other.send(b"1")
    await trio.testing.wait_all_tasks_blocked(0.01)
    other.receive_nowait()
    await server.send_to_all(b"news")
    assert other.receive_nowait() == [b"news"]
    assert {client.peer_address: client.statistics().errors for client in server.clients} == {
        silent.name: {"EAGAIN": 1},
        other.name: {},
    }


async def test_a_fast_stream_to_one_peer(start: StartServer, make_peer: Callable[[], Peer]) -> None:
    """A peer that reads gets far more than its share of the send buffer, without a noticeable pause."""
    await start(answer_often)
    reader = make_peer()
    reader.send(b"5000")
    with trio.fail_after(10):
        for number in range(5_000):
            assert await reader.receive() == b"%d" % number


async def test_empty_datagrams(start: StartServer, path: str, sockets: ExitStack) -> None:
    """A peer that hides behind an empty datagram, which looks like an empty queue, takes no more than its share."""
    server = await start(trio_udp.datagram_handler(lambda datagram: datagram.payload))
    silent, other = (Peer(path, sockets, connected=True) for _ in range(2))
    with trio.fail_after(20):
        for number in range(300):
            await trio.lowlevel.wait_writable(silent.socket)
            silent.send(b"x" if number else b"")
            assert await other.ask(b"y") == b"y"
    await settle()
    received = silent.receive_nowait()
    assert 0 < len(received) < 100
    assert server.statistics().errors == {"EAGAIN": 300 - len(received)}


async def test_without_sock_diag_there_are_no_shares(
    start: StartServer, path: str, sockets: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without sock_diag there are no shares: peers that do not read can leave no room for others."""
    monkeypatch.setattr(_sock_diag, "NETLINK_SOCK_DIAG", 31)  # a protocol that no kernel knows
    server = await start(trio_udp.datagram_handler(lambda datagram: datagram.payload))
    silent, other = (Peer(path, sockets, connected=True) for _ in range(2))
    with trio.fail_after(20):
        for _ in range(300):
            await trio.lowlevel.wait_writable(silent.socket)
            silent.send(b"x")
            await settle()
        held = len(silent.receive_nowait())
        assert held > 100
        assert server.statistics().errors == {"EAGAIN": 300 - held}
        assert await other.ask(b"y") == b"y"
