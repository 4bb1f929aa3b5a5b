"""The servers that are compared, and the techniques of trio_udp that can be switched off: what runs in a process alone.

    python servers.py WHAT SERVER [TECHNIQUE]    prints its port, then serves on it until it is killed

Each server is written as its own documentation would have it. WHAT it does is one of four things:

    echo    answers every datagram with itself
    once    the same; a server that keeps something for each client forgets it after one datagram
    out     answers every datagram with a burst of OUT_BURST long ones
    in      acknowledges every IN_BURST-th datagram with its first bytes

This module imports nothing that not every server needs: a peer may be missing, and what is measured is also memory.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import asyncio
    from collections import deque

    from easynetwork.servers.handlers import AsyncDatagramClient

    import trio_udp

STREAM_SIZE = 1_200  # bytes
OUT_BURST = 64
IN_BURST = 32
ACKNOWLEDGEMENT = 8  # bytes

# What is sent in a burst: each begins with its number.
BURST = [bytes([number]) + bytes(STREAM_SIZE - 1) for number in range(OUT_BURST)]

# Every server gets the same receive buffer. By default it would be just too small for 256 datagrams in flight.
RECEIVE_BUFFER = 1 << 20

# Seconds after which a server ends by itself, should nobody be left to end it.
LONGEST_LIFE = 900


def enlarge(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)


def ready(port: int) -> None:
    print(port, flush=True)


# ---- trio_udp ----


def serve_trio_udp(what: str, host: str | None = "127.0.0.1") -> None:
    async def echo(client: trio_udp.Client) -> None:
        async for payload in client:
            await client.send(payload)

    async def once(client: trio_udp.Client) -> None:
        await client.send(await client.receive())

    async def send_bursts(client: trio_udp.Client) -> None:
        async for _ in client:
            await client.send_many(BURST)

    async def count(client: trio_udp.Client) -> None:
        counted = 0
        async for payload in client:
            counted += 1
            if counted % IN_BURST == 0:
                await client.send(payload[:ACKNOWLEDGEMENT])

    _run_trio_udp({"echo": echo, "once": once, "out": send_bursts, "in": count}[what], host)


def serve_trio_udp_portable(what: str) -> None:
    use_portable_engine()
    serve_trio_udp(what)


def serve_trio_udp_on_all_interfaces(what: str) -> None:
    serve_trio_udp(what, host=None)


def serve_trio_udp_requests(what: str) -> None:
    import trio_udp

    @trio_udp.request_handler
    async def echo(payload: bytes, client: trio_udp.Client) -> bytes:
        return payload

    _run_trio_udp({"echo": echo}[what], "127.0.0.1")


def _run_trio_udp(handler: Callable[[trio_udp.Client], Awaitable[object]], host: str | None) -> None:
    import trio

    import trio_udp

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            server: trio_udp.Server = await nursery.start(
                lambda task_status: trio_udp.serve(
                    handler,
                    0,
                    host=host,
                    receive_buffer=RECEIVE_BUFFER,
                    limits=trio_udp.Limits(max_clients=200_000),
                    task_status=task_status,
                )
            )
            ready(server.endpoints[0].local_address[1])

    trio.run(main)


# ---- other servers on Trio ----


def serve_trio(what: str) -> None:
    import trio

    async def main() -> None:
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            await sock.bind(("127.0.0.1", 0))
            ready(sock.getsockname()[1])
            counted = 0
            while True:
                payload, address = await sock.recvfrom(65_536)
                if what == "out":
                    for datagram in BURST:
                        await sock.sendto(datagram, address)
                elif what == "in":
                    counted += 1
                    if counted % IN_BURST == 0:
                        await sock.sendto(payload[:ACKNOWLEDGEMENT], address)
                else:
                    await sock.sendto(payload, address)

    trio.run(main)


def serve_anyio(what: str) -> None:
    import anyio
    from anyio.abc import SocketAttribute

    async def main() -> None:
        async with await anyio.create_udp_socket(local_host="127.0.0.1") as udp:
            enlarge(udp.extra(SocketAttribute.raw_socket))
            ready(udp.extra(SocketAttribute.local_port))
            counted = 0
            async for payload, (host, port) in udp:
                if what == "out":
                    for datagram in BURST:
                        await udp.sendto(datagram, host, port)
                elif what == "in":
                    counted += 1
                    if counted % IN_BURST == 0:
                        await udp.sendto(payload[:ACKNOWLEDGEMENT], host, port)
                else:
                    await udp.sendto(payload, host, port)

    anyio.run(main, backend="trio")


def serve_easynetwork(what: str) -> None:
    import trio
    from easynetwork.protocol import DatagramProtocol
    from easynetwork.serializers.abc import AbstractPacketSerializer
    from easynetwork.servers.async_udp import AsyncUDPNetworkServer
    from easynetwork.servers.handlers import AsyncDatagramRequestHandler

    class Raw(AbstractPacketSerializer[bytes, bytes]):
        def serialize(self, packet: bytes) -> bytes:
            return packet

        def deserialize(self, data: bytes) -> bytes:
            return data

    class Echo(AsyncDatagramRequestHandler[bytes, bytes]):
        async def handle(self, client: AsyncDatagramClient[bytes]) -> AsyncGenerator[None, bytes]:
            while True:
                await client.send_packet((yield))

    class Once(AsyncDatagramRequestHandler[bytes, bytes]):
        async def handle(self, client: AsyncDatagramClient[bytes]) -> AsyncGenerator[None, bytes]:
            await client.send_packet((yield))

    class SendBursts(AsyncDatagramRequestHandler[bytes, bytes]):
        async def handle(self, client: AsyncDatagramClient[bytes]) -> AsyncGenerator[None, bytes]:
            while True:
                yield
                for datagram in BURST:
                    await client.send_packet(datagram)

    class Count(AsyncDatagramRequestHandler[bytes, bytes]):
        async def handle(self, client: AsyncDatagramClient[bytes]) -> AsyncGenerator[None, bytes]:
            counted = 0
            while True:
                payload = yield
                counted += 1
                if counted % IN_BURST == 0:
                    await client.send_packet(payload[:ACKNOWLEDGEMENT])

    handlers: dict[str, type[AsyncDatagramRequestHandler[bytes, bytes]]]
    handlers = {"echo": Echo, "once": Once, "out": SendBursts, "in": Count}

    async def main() -> None:
        server = AsyncUDPNetworkServer("127.0.0.1", 0, DatagramProtocol(Raw()), handlers[what](), backend="trio")
        async with server, trio.open_nursery() as nursery:
            is_up = trio.Event()
            nursery.start_soon(lambda: server.serve_forever(is_up_event=is_up))
            await is_up.wait()
            (sock,) = server.get_sockets()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            ready(sock.getsockname()[1])

    trio.run(main)


# ---- asyncio ----


async def _serve_protocol(what: str) -> None:
    import asyncio

    class Server(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast("asyncio.DatagramTransport", transport)
            self.counted = 0

    class Echo(Server):
        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            self.transport.sendto(data, addr)

    class SendBursts(Server):
        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            for datagram in BURST:
                self.transport.sendto(datagram, addr)

    class Count(Server):
        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            self.counted += 1
            if self.counted % IN_BURST == 0:
                self.transport.sendto(data[:ACKNOWLEDGEMENT], addr)

    protocols: dict[str, type[Server]] = {"echo": Echo, "once": Echo, "out": SendBursts, "in": Count}
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(protocols[what], local_addr=("127.0.0.1", 0))
    sock = transport.get_extra_info("socket")
    enlarge(sock)
    ready(sock.getsockname()[1])
    await asyncio.sleep(LONGEST_LIFE)


def serve_asyncio(what: str) -> None:
    import asyncio

    asyncio.run(_serve_protocol(what))


def serve_uvloop(what: str) -> None:
    import uvloop

    uvloop.run(_serve_protocol(what))


# ---- blocking ----


def serve_socketserver(what: str) -> None:
    import socketserver

    class Echo(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            payload, sock = self.request
            sock.sendto(payload, self.client_address)

    with socketserver.UDPServer(("127.0.0.1", 0), {"echo": Echo}[what]) as server:
        enlarge(server.socket)
        ready(server.server_address[1])
        server.serve_forever()


def serve_blocking(what: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        enlarge(sock)
        sock.bind(("127.0.0.1", 0))
        ready(sock.getsockname()[1])
        counted = 0
        while True:
            payload, address = sock.recvfrom(65_536)
            if what == "out":
                for datagram in BURST:
                    sock.sendto(datagram, address)
            elif what == "in":
                counted += 1
                if counted % IN_BURST == 0:
                    sock.sendto(payload[:ACKNOWLEDGEMENT], address)
            else:
                sock.sendto(payload, address)


SERVERS: dict[str, Callable[[str], None]] = {
    "trio_udp": serve_trio_udp,
    "trio_udp portable": serve_trio_udp_portable,
    "trio_udp request_handler": serve_trio_udp_requests,
    "trio_udp all interfaces": serve_trio_udp_on_all_interfaces,
    "uvloop": serve_uvloop,
    "asyncio": serve_asyncio,
    "asyncio keeping memory": serve_asyncio,
    "easynetwork": serve_easynetwork,
    "anyio": serve_anyio,
    "trio": serve_trio,
    "socketserver": serve_socketserver,
    "blocking": serve_blocking,
}


# ---- techniques of trio_udp, each a function that switches one off ----


def use_portable_engine() -> None:
    os.environ["TRIO_UDP_ENGINE"] = "portable"


def switch_corking_off() -> None:
    from trio_udp import Endpoint

    Endpoint.cork = lambda self: None  # type: ignore[method-assign]


def switch_merging_off() -> None:
    from trio_udp._endpoints._linux import LinuxEngine

    lay_out = LinuxEngine._lay_out
    LinuxEngine._lay_out = (  # type: ignore[method-assign]
        lambda self, memory, outbox, merges: lay_out(self, memory, outbox, False)
    )


def switch_joining_off() -> None:
    from trio_udp._endpoints._linux import LinuxEngine
    from trio_udp._endpoints._socket import UDP_GRO

    can_set = LinuxEngine._can_set
    LinuxEngine._can_set = (  # type: ignore[method-assign]
        lambda self, option, value: can_set(self, option, 0 if option == UDP_GRO else value)
    )


def send_one_message_at_a_time() -> None:
    from trio_udp._endpoints._linux import LinuxEngine

    send = LinuxEngine.send

    def send_singly(self: LinuxEngine, outbox: deque[Any]) -> None:
        self._messages_at_once = 1
        send(self, outbox)

    LinuxEngine.send = send_singly  # type: ignore[method-assign]


def decode_every_address() -> None:
    from trio_udp._endpoints._linux import LinuxEngine

    receive = LinuxEngine.receive

    def receive_and_decode(self: LinuxEngine, batch: list[Any]) -> bool:
        drained = receive(self, batch)
        for _, route in batch:
            self.peer_address(route)
        return drained

    LinuxEngine.receive = receive_and_decode  # type: ignore[method-assign]


def look_for_cancellation_by_coroutine() -> None:
    from trio_udp import _conversation

    class PerhapsCancelled:
        """Passes for a task that is cancelled, so that Trio's own checkpoint_if_cancelled() is asked each time."""

        effectively_cancelled = True

    PerhapsCancelled._cancel_status = PerhapsCancelled  # type: ignore[attr-defined]
    _conversation.current_task = lambda: PerhapsCancelled  # type: ignore


# To add one: a function that patches whatever it must, and its name here. It runs before anything is served, in the
# process of that server alone.
TECHNIQUES: dict[str, Callable[[], None]] = {
    "Linux engine": use_portable_engine,
    "corking": switch_corking_off,
    "sendmmsg for many": send_one_message_at_a_time,
    "merging (GSO)": switch_merging_off,
    "joining (GRO)": switch_joining_off,
    "raw addresses": decode_every_address,
    "looking up cancellation (send)": look_for_cancellation_by_coroutine,
}


def main() -> None:
    signal.alarm(LONGEST_LIFE)
    what, server, *without = sys.argv[1:]
    for technique in without:
        TECHNIQUES[technique]()
    SERVERS[server](what)


if __name__ == "__main__":
    main()
