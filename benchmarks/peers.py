"""The servers in Python that trio_udp is compared with, each written as its own documentation recommends.

Each imports its library when it is called, because the library may be missing, and because memory is measured.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, cast

from traffic import ACKNOWLEDGEMENT, IN_BURST, JOIN, LONGEST_LIFE, RECEIVE_BUFFER, burst, enlarge, ready, unix_name

if TYPE_CHECKING:
    import asyncio

    from easynetwork.servers.handlers import AsyncDatagramClient

STREAMS = ("out", "flight")

# ---- on Trio ----


def serve_trio(what: str) -> None:
    import trio

    async def main() -> None:
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            await sock.bind(("127.0.0.1", 0))
            ready(sock.getsockname()[1])
            counted = 0
            datagrams = burst(what)
            members: list[tuple[str, int]] = []
            while True:
                payload, address = await sock.recvfrom(65_536)
                if what in STREAMS:
                    for datagram in datagrams:
                        await sock.sendto(datagram, address)
                elif what == "fan" and not payload.startswith(JOIN):
                    for member in members:
                        await sock.sendto(payload, member)
                elif what == "in":
                    counted += 1
                    if counted % IN_BURST == 0:
                        await sock.sendto(payload[:ACKNOWLEDGEMENT], address)
                else:
                    if what == "fan":
                        members.append(address)
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
            datagrams = burst(what)
            async for payload, (host, port) in udp:
                if what in STREAMS:
                    for datagram in datagrams:
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

    datagrams = burst(what)

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
                for datagram in datagrams:
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
    handlers = {"echo": Echo, "once": Once, "out": SendBursts, "flight": SendBursts, "in": Count}

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

    datagrams = burst(what)

    class Server(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast("asyncio.DatagramTransport", transport)
            self.counted = 0

    class Echo(Server):
        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            self.transport.sendto(data, addr)

    class SendBursts(Server):
        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            for datagram in datagrams:
                self.transport.sendto(datagram, addr)

    class Count(Server):
        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            self.counted += 1
            if self.counted % IN_BURST == 0:
                self.transport.sendto(data[:ACKNOWLEDGEMENT], addr)

    class SendToEach(Server):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.members: list[tuple[str, int]] = []

        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            if data.startswith(JOIN):
                self.members.append(addr)
                self.transport.sendto(data, addr)
            else:
                for member in self.members:
                    self.transport.sendto(data, member)

    protocols: dict[str, type[Server]]
    protocols = {
        "echo": Echo,
        "unix": Echo,
        "once": Echo,
        "out": SendBursts,
        "flight": SendBursts,
        "in": Count,
        "fan": SendToEach,
    }
    loop = asyncio.get_running_loop()
    if what == "unix":
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        bound.bind(unix_name())
        bound.setblocking(False)
        transport, _ = await loop.create_datagram_endpoint(protocols[what], sock=bound)
        ready(unix_name())
    else:
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
        datagrams = burst(what)
        members: list[tuple[str, int]] = []
        while True:
            payload, address = sock.recvfrom(65_536)
            if what in STREAMS:
                for datagram in datagrams:
                    sock.sendto(datagram, address)
            elif what == "fan" and not payload.startswith(JOIN):
                for member in members:
                    sock.sendto(payload, member)
            elif what == "in":
                counted += 1
                if counted % IN_BURST == 0:
                    sock.sendto(payload[:ACKNOWLEDGEMENT], address)
            else:
                if what == "fan":
                    members.append(address)
                sock.sendto(payload, address)


SERVERS: dict[str, Callable[[str], None]] = {
    "uvloop": serve_uvloop,
    "asyncio": serve_asyncio,
    "asyncio keeping memory": serve_asyncio,
    "easynetwork": serve_easynetwork,
    "anyio": serve_anyio,
    "trio": serve_trio,
    "socketserver": serve_socketserver,
    "blocking": serve_blocking,
}
