"""The servers that are compared, and the techniques of trio_udp that can be switched off: what runs in a process alone.

    python servers.py WHAT SERVER [TECHNIQUE]    prints its port, then serves on it until it is killed

Each server is written as its own documentation would have it. WHAT it does is one of five things:

    echo    answers every datagram with itself
    once    the same; a server that keeps something for each client forgets it after one datagram
    out     answers every datagram with a burst of OUT_BURST long ones
    in      acknowledges every IN_BURST-th datagram with its first bytes
    fan     echoes a client's first datagram if it begins with JOIN, and counts the client as a member; sends every
            other datagram to all members

This module imports nothing that not every server needs: a peer may be missing, and what is measured is also memory.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from easynetwork.servers.handlers import AsyncDatagramClient

    import trio_udp
    from trio_udp._endpoints import Outgoing, Received

STREAM_SIZE = 1_200  # bytes
OUT_BURST = 64
IN_BURST = 32
ACKNOWLEDGEMENT = 8  # bytes
JOIN = b"j"

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

MAX_CLIENTS = 200_000


def serve_trio_udp(what: str, host: str | None = "127.0.0.1", limits: trio_udp.Limits | None = None) -> None:
    members: list[trio_udp.Client] = []

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

    async def send_to_each(client: trio_udp.Client) -> None:
        async for payload in client:
            if payload.startswith(JOIN):
                members.append(client)
                await client.send(payload)
            else:
                for member in members:
                    await member.send(payload)

    handlers = {"echo": echo, "once": once, "out": send_bursts, "in": count, "fan": send_to_each}
    _run_trio_udp(handlers[what], host, limits)


def serve_trio_udp_portable(what: str) -> None:
    use_portable_engine()
    serve_trio_udp(what)


def serve_trio_udp_on_all_interfaces(what: str) -> None:
    serve_trio_udp(what, host=None)


def serve_trio_udp_with_limits(what: str) -> None:
    serve_trio_udp(what, limits=generous_limits())


def serve_trio_udp_to_all(what: str) -> None:
    members: list[trio_udp.Client] = []

    async def send_to_all(client: trio_udp.Client) -> None:
        async for payload in client:
            if payload.startswith(JOIN):
                members.append(client)
                await client.send(payload)
            else:
                await client.server.send_to_all(payload, members)

    _run_trio_udp({"fan": send_to_all}[what])


def serve_trio_udp_requests(what: str) -> None:
    import trio_udp

    @trio_udp.request_handler
    async def echo(payload: bytes, client: trio_udp.Client) -> bytes:
        return payload

    _run_trio_udp({"echo": echo}[what])


def serve_trio_udp_datagrams(what: str, limits: trio_udp.Limits | None = None) -> None:
    import trio_udp

    @trio_udp.datagram_handler
    def echo(datagram: trio_udp.Datagram) -> bytes:
        return datagram.payload

    _run_trio_udp({"echo": echo, "once": echo}[what], limits=limits)


def serve_trio_udp_datagrams_with_limits(what: str) -> None:
    serve_trio_udp_datagrams(what, generous_limits())


def serve_trio_udp_accept(what: str) -> None:
    async def never_called(client: trio_udp.Client) -> None:
        raise AssertionError(client)

    def answer(datagram: trio_udp.Datagram) -> bytes:
        return datagram.payload

    _run_trio_udp({"once": never_called}[what], accept=answer)


def generous_limits() -> trio_udp.Limits:
    """Limits that are looked at for each datagram and turn none away."""
    import trio_udp

    rate = trio_udp.RateLimit(per_second=1e9, burst=1_000_000)
    return trio_udp.Limits(max_clients=MAX_CLIENTS, rate_limit=rate, amplification=3)


def _run_trio_udp(
    handler: trio_udp.Handler,
    host: str | None = "127.0.0.1",
    limits: trio_udp.Limits | None = None,
    accept: trio_udp.Accept | None = None,
) -> None:
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
                    limits=limits or trio_udp.Limits(max_clients=MAX_CLIENTS),
                    accept=accept,
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
            members: list[tuple[str, int]] = []
            while True:
                payload, address = await sock.recvfrom(65_536)
                if what == "out":
                    for datagram in BURST:
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
    protocols = {"echo": Echo, "once": Echo, "out": SendBursts, "in": Count, "fan": SendToEach}
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
        members: list[tuple[str, int]] = []
        while True:
            payload, address = sock.recvfrom(65_536)
            if what == "out":
                for datagram in BURST:
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
    "trio_udp": serve_trio_udp,
    "trio_udp portable": serve_trio_udp_portable,
    "trio_udp request_handler": serve_trio_udp_requests,
    "trio_udp datagram_handler": serve_trio_udp_datagrams,
    "trio_udp accept": serve_trio_udp_accept,
    "trio_udp send_to_all": serve_trio_udp_to_all,
    "trio_udp with limits": serve_trio_udp_with_limits,
    "trio_udp datagram_handler with limits": serve_trio_udp_datagrams_with_limits,
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


def send_each_reply_at_once() -> None:
    from trio_udp._endpoints import Outbox

    Outbox.hold = lambda self: None  # type: ignore[method-assign]


def switch_segmentation_off() -> None:
    from trio_udp._endpoints.engines.linux import LinuxEngine
    from trio_udp._endpoints.engines.pktinfo import UDP_SEGMENT

    can_set = LinuxEngine._can_set
    LinuxEngine._can_set = (  # type: ignore[method-assign]
        lambda self, option, value: option != UDP_SEGMENT and can_set(self, option, value)
    )


def switch_coalescing_off() -> None:
    from trio_udp._endpoints.engines import coalescing

    coalescing.switch_on = lambda sock: None


def send_one_message_at_a_time() -> None:
    from trio_udp._endpoints.engines.linux import LinuxEngine

    send = LinuxEngine.send

    def send_singly(self: LinuxEngine, outgoing: Sequence[Outgoing]) -> int:
        self._at_once = 1  # message, of perhaps many segments
        is_alike = len(outgoing) > 1 and outgoing[0][1] == outgoing[1][1]
        return send(self, outgoing if is_alike else outgoing[:1])

    LinuxEngine.send = send_singly  # type: ignore[method-assign]


def decode_every_address() -> None:
    from trio_udp._endpoints.engines.linux import LinuxEngine

    receive = LinuxEngine.receive

    def receive_and_decode(self: LinuxEngine, batch: list[Received]) -> bool:
        drained = receive(self, batch)
        for _, route, _ in batch:
            self.peer_address(route)
        return drained

    LinuxEngine.receive = receive_and_decode  # type: ignore[method-assign]


def look_for_cancellation_by_coroutine() -> None:
    from trio_udp import _channel, _inbox

    # "Perhaps" each time, so that Trio's own checkpoint_if_cancelled() is asked.
    _channel.is_cancelled = _inbox.is_cancelled = lambda: True  # type: ignore[attr-defined]


# To add one: a function that patches the package, and its name here. It runs before anything is served, in the process
# of that server alone.
TECHNIQUES: dict[str, Callable[[], None]] = {
    "Linux engine": use_portable_engine,
    "holding replies": send_each_reply_at_once,
    "sendmmsg for many": send_one_message_at_a_time,
    "segmentation (GSO)": switch_segmentation_off,
    "coalescing (GRO)": switch_coalescing_off,
    "raw addresses": decode_every_address,
    "looking up cancellation": look_for_cancellation_by_coroutine,
}


def main() -> None:
    signal.alarm(LONGEST_LIFE)
    what, server, *without = sys.argv[1:]
    for technique in without:
        TECHNIQUES[technique]()
    SERVERS[server](what)


if __name__ == "__main__":
    main()
