"""QUIC connections on a trio_udp server: aioquic's state machine without its network code.

A QUIC connection is not an address: its packets name it by an ID, and its address may change. So a client's handler
only passes packets to the connections that they name. Each connection has a task of its own for timers and for sending.
Strangers prove their address before the server stores anything about them: ``accept`` answers with a Retry.

This module is not a program: http3_server.py runs HTTP/3 on these connections. Left out: 0-RTT, stateless resets,
several workers (the new address of a connection could belong to another worker).

In QUIC, one datagram may contain several packets. Here, a *packet* is the payload of a datagram.
"""

import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from itertools import groupby
from operator import itemgetter

import attrs
import trio
from aioquic.buffer import Buffer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import TRANSPORT_CLOSE_FRAME_CAPACITY, QuicConnection
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.events import ConnectionIdIssued, ConnectionIdRetired, QuicEvent
from aioquic.quic.packet import (
    QuicErrorCode,
    QuicFrameType,
    QuicPacketType,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.quic.retry import QuicRetryTokenHandler

import trio_udp

MAX_CONNECTIONS, MAX_CONNECTIONS_PER_ADDRESS = 1_000, 8
MAX_PATHS, PATH_TIME = 4, 1.0  # addresses of a connection; seconds until an unused one may be replaced
MAX_UNACKNOWLEDGED = 1_000_000  # bytes of a connection; beyond it, senders wait
MAX_PACKET = 1_500  # bytes; longer ones are dropped, as on most paths
MAX_GAPS, PER_GAP = 4_000_000, 4_000  # bytes of a connection that wait for missing ones; what each gap adds to them
DRAIN_TIMEOUT = 10.0  # seconds for connections to end when the server stops
LATE = 1e-6  # seconds added to aioquic's timer: it rounds, and exactly at that time nothing would be due yet


@attrs.define(eq=False)
class Connection:
    """A connection: passes packets and timers to aioquic, and sends the packets that aioquic makes.

    Attributes:
      nursery: For the tasks of the connection; cancelled when it ends.
      paths: For each of its addresses, the time it was added, and the client: ``None`` until a handler has a packet.
      pause: The scope in which the connection's task waits. Its deadline is the timer; cancel it to send at once.
      progress: Other tasks wait here until data has been sent or acknowledged, and there is room for more.
    """

    quic: QuicConnection
    server: "QuicServer"
    nursery: trio.Nursery = attrs.field(init=False)
    paths: dict[trio_udp.Address, tuple[float, trio_udp.Client | None]] = attrs.field(factory=dict)
    pause: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    progress: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)
    closed: bool = False

    def take_event(self, event: QuicEvent) -> None:
        """Handle an event from aioquic. Subclasses override this."""

    async def go_away(self) -> None:
        """Refuse new work, and close once all other work is done. Subclasses override this."""
        self.close()

    async def go_away_when_stopping(self) -> None:
        await self.server.stopping.wait()
        await self.go_away()

    def close(self, error_code: int = 0) -> None:
        self.quic.close(error_code)
        self.closed = True
        self.pause.cancel()

    def has_path(self, address: trio_udp.Address) -> bool:
        """Return whether the connection accepts packets from an address. Add a new address if there is room."""
        if address in self.paths:
            return True
        now = trio.current_time()
        if len(self.paths) == MAX_PATHS:  # an attacker can replay one packet from thousands of addresses
            unused = next(other for other in self.paths if other != self.quic.get_peer_address())
            since, client = self.paths[unused]
            if now < since + PATH_TIME:
                return False
            del self.paths[unused]
            if client is not None:
                client.close()
        self.paths[address] = now, None
        return True

    def take(self, packet: bytes, address: trio_udp.Address, client: trio_udp.Client) -> None:
        """Pass on a packet from one of the connection's addresses. The caller calls ``send`` afterwards."""
        self.paths[address] = self.paths[address][0], client
        self.quic.receive_datagram(packet, address, trio.current_time())
        self.take_events()
        # aioquic lets a peer skip bytes, and makes room for them: 22 packets took up 1 GB. And it goes through all gaps
        # for each piece: 300 packets that were full of them took a minute.
        receivers = [stream.receiver for stream in self.quic._streams.values()]
        if sum(len(each._buffer) + PER_GAP * len(each._ranges) for each in receivers) > MAX_GAPS:
            self.close(QuicErrorCode.INTERNAL_ERROR)

    def take_events(self) -> None:
        while (event := self.quic.next_event()) is not None:
            if isinstance(event, ConnectionIdIssued):
                self.server.by_id[event.connection_id] = self
            elif isinstance(event, ConnectionIdRetired):
                self.server.by_id.pop(event.connection_id, None)
            else:
                self.take_event(event)

    async def run(self) -> None:
        """Handle timers and send, until the connection is over."""
        try:
            async with trio.open_nursery() as self.nursery:
                self.nursery.start_soon(self.go_away_when_stopping)
                while not self.closed:
                    with self.pause:
                        await trio.sleep_forever()
                    self.pause = trio.CancelScope()
                    if (due := self.quic.get_timer()) is None:
                        break
                    if trio.current_time() > due:
                        self.quic.handle_timer(trio.current_time())
                        self.take_events()
                    await self.send()
                self.nursery.cancel_scope.cancel()
        except Exception:
            logging.exception("a connection failed")
        finally:
            if self.quic.get_peer_address() is not None:
                self.quic.close()
                with trio.move_on_after(1, shield=True):
                    await self.send()
            self.server.forget(self)

    async def send(self) -> None:
        """Send the packets that are due, and set the timer for the next ones."""
        datagrams = self.quic.datagrams_to_send(trio.current_time())
        for address, group in groupby(datagrams, key=itemgetter(1)):
            client = self.paths.get(address, (0.0, None))[1]
            if client is not None:
                with suppress(trio.ClosedResourceError):
                    await client.send_many([packet for packet, _ in group])
        due = self.quic.get_timer()
        self.pause.deadline = trio.current_time() if due is None else due + LATE
        if self.unacknowledged() <= MAX_UNACKNOWLEDGED:
            self.progress.unpark_all()

    def unacknowledged(self) -> int:
        """Return how many bytes the peer has not acknowledged yet. aioquic has no public name for this."""
        return sum(len(stream.sender._buffer) for stream in self.quic._streams.values())

    async def wait_for_room(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        while self.unacknowledged() > MAX_UNACKNOWLEDGED:
            await self.progress.park()


def refusal(version: int, source: bytes, destination: bytes, error: QuicErrorCode) -> bytes:
    """Return a packet that refuses a connection before it begins."""
    crypto = CryptoPair()
    crypto.setup_initial(source, is_client=False, version=version)
    builder = QuicPacketBuilder(
        host_cid=source, peer_cid=destination, version=version, is_client=False, max_datagram_size=1_200
    )
    builder.start_packet(QuicPacketType.INITIAL, crypto)
    frame = builder.start_frame(QuicFrameType.TRANSPORT_CLOSE, capacity=TRANSPORT_CLOSE_FRAME_CAPACITY)
    for number in (error, QuicFrameType.PADDING, 0):  # error code; no frame caused it; length of the reason
        frame.push_uint_var(number)
    return builder.flush()[0][0]


@attrs.define(eq=False)
class QuicServer:
    """All connections, by each ID that their packets may have."""

    configuration: QuicConfiguration
    make: Callable[[QuicConnection, "QuicServer"], Connection]
    nursery: trio.Nursery
    by_id: dict[bytes, Connection] = attrs.field(factory=dict)
    tokens: QuicRetryTokenHandler = attrs.field(factory=QuicRetryTokenHandler)
    stopping: trio.Event = attrs.field(factory=trio.Event)

    def accept(self, datagram: trio_udp.Datagram) -> bool | bytes:
        found = self.find(datagram.payload, datagram.peer_address)
        return found if isinstance(found, bytes) else found is not None

    async def handler(self, client: trio_udp.Client) -> None:
        """Pass each packet from one address to the connection that it names."""
        address = client.peer_address
        with client.transaction():  # so that connections can still receive during a drain
            while True:
                connections = set()
                for packet in await client.receive_many():
                    found = self.find(packet, address)
                    if isinstance(found, Connection):
                        found.take(packet, address, client)
                        connections.add(found)
                    elif found is not None:
                        await client.send(found)
                for connection in connections:
                    await connection.send()

    def find(self, packet: bytes, address: trio_udp.Address) -> Connection | bytes | None:
        """Return the connection that a packet names, or a new one, or a packet to answer with, or ``None``."""
        if len(packet) > MAX_PACKET:
            return None
        if packet[:1] < b"\x80":
            destination, source = packet[1:9], b""
        else:  # a long header, the same in all versions of QUIC (RFC 8999)
            end = 6 + int.from_bytes(packet[5:6], "big")
            length = int.from_bytes(packet[end : end + 1], "big")
            destination, source = packet[6:end], packet[end + 1 : end + 1 + length]
        if (connection := self.by_id.get(destination)) is not None:
            return connection if connection.has_path(address) else None
        if len(packet) < 1_200 or packet[0] < 0x80 or packet[1:5] == bytes(4):
            return None
        version, versions = int.from_bytes(packet[1:5], "big"), self.configuration.supported_versions
        if version not in versions:
            return encode_quic_version_negotiation(destination, source, versions)
        try:
            header = pull_quic_header(Buffer(data=packet))
        except ValueError:
            return None
        if header.packet_type is not QuicPacketType.INITIAL:
            return None
        if self.stopping.is_set() or len(self.nursery.child_tasks) >= MAX_CONNECTIONS:
            return refusal(version, destination, source, QuicErrorCode.CONNECTION_REFUSED)
        now = trio.current_time()
        if not header.token:
            new_id = os.urandom(8)
            token = self.tokens.create_token(
                address=address,
                original_destination_connection_id=destination,
                retry_source_connection_id=new_id,
                now=now,
            )
            return encode_quic_retry(version, new_id, source, destination, token)
        try:
            original = self.tokens.validate_token(
                address=address, destination_cid=destination, token=header.token, now=now
            )
        except ValueError:
            return refusal(version, destination, source, QuicErrorCode.INVALID_TOKEN)
        if sum(address in other.paths for other in set(self.by_id.values())) >= MAX_CONNECTIONS_PER_ADDRESS:
            return refusal(version, destination, source, QuicErrorCode.CONNECTION_REFUSED)
        quic = QuicConnection(
            configuration=self.configuration,
            original_destination_connection_id=original,
            retry_source_connection_id=destination,
        )
        connection = self.by_id[destination] = self.by_id[quic.host_cid] = self.make(quic, self)
        connection.has_path(address)
        connection.pause.deadline = now + 1  # until its handler passes on the first packet: so far only accept saw it
        self.nursery.start_soon(connection.run)
        return connection

    def forget(self, connection: Connection) -> None:
        for id_ in [id_ for id_, other in self.by_id.items() if other is connection]:
            del self.by_id[id_]
        for _, client in connection.paths.values():
            if client is not None:
                client.close()


async def serve(
    make: Callable[[QuicConnection, QuicServer], Connection],
    configuration: QuicConfiguration,
    serve_udp: Callable[..., Awaitable[None]],
    *,
    task_status: trio.TaskStatus[trio_udp.Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until the server is stopped and its connections have ended.

    Args:
      make: Called for each new connection; returns a :class:`Connection`.
      configuration: The settings of QUIC, including the certificate.
      serve_udp: A ``partial`` of ``trio_udp.serve`` or ``trio_udp.serve_endpoints``, without handler and ``accept``.
    """
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as connections:
            quic = QuicServer(configuration, make, connections)
            server: trio_udp.Server = await nursery.start(
                partial(
                    serve_udp,
                    quic.handler,
                    accept=quic.accept,
                    idle_timeout=2 * configuration.idle_timeout,
                    drain_timeout=2 * DRAIN_TIMEOUT,
                )
            )
            task_status.started(server)
            await server.wait_stopping()
            quic.stopping.set()
            connections.cancel_scope.deadline = trio.current_time() + DRAIN_TIMEOUT
        for client in list(server.clients):  # those of addresses that have no connection
            client.close()
