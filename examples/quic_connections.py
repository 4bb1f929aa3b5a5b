"""QUIC connections on a trio_udp server: aioquic's state machine without its network code.

A QUIC connection is not an address: its packets name it by an ID, and its address may change. So the handler of an
address only hands packets to the connections that they name, and each connection has a task of its own, which keeps
the time and sends. Strangers prove their address before anything is kept of them: ``accept`` answers with a Retry.

This is no program: http3_server.py says what the connections are for. Left out: 0-RTT, stateless resets, several
workers (a connection could change its address to one that another worker receives from).
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

MOST_CONNECTIONS, MOST_AT_ONE_ADDRESS = 1_000, 8
PATHS, PATH_TIME = 4, 1.0  # addresses of a connection; seconds until one that is not in use makes room for another
DRAIN_TIMEOUT = 10.0  # seconds for what is under way when the server stops
LATE = 1e-6  # seconds after the time that aioquic gives: it rounds, and then finds that nothing is due yet


@attrs.define(eq=False)
class Connection:
    """A connection: gives packets and the time to aioquic, and sends what aioquic wants to be sent.

    Attributes:
      nursery: For tasks of the connection; cancelled when it ends.
      paths: Since when it has each of its addresses, and the client there; ``None`` if only ``accept`` has seen it.
      pause: What its own task waits in; cancelled when there is something to do.
    """

    quic: QuicConnection
    server: "QuicServer"
    nursery: trio.Nursery = attrs.field(init=False)
    paths: dict[trio_udp.Address, tuple[float, trio_udp.Client | None]] = attrs.field(factory=dict)
    pause: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    closed: bool = False

    def take_event(self, event: QuicEvent) -> None:
        """Take what the peer does; for subclasses."""

    def has_sent(self) -> None:
        """Go on with what may have waited for this; for subclasses."""

    async def go_away(self) -> None:
        """Take on nothing new, and close as soon as all is done; for subclasses."""
        self.close()

    async def go_away_in_the_end(self) -> None:
        await self.server.stopping.wait()
        await self.go_away()

    def close(self, error_code: int = 0) -> None:
        self.quic.close(error_code)
        self.closed = True
        self.pause.cancel()

    def has_path(self, address: trio_udp.Address) -> bool:
        """Say whether packets may come from an address: one of the few that are known, or perhaps one more."""
        if address in self.paths:
            return True
        now = trio.current_time()
        if len(self.paths) == PATHS:  # one packet can be replayed from thousands of addresses
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
        """Take a packet from an address that it has a path to; ``send`` is to follow."""
        self.paths[address] = self.paths[address][0], client
        self.quic.receive_datagram(packet, address, trio.current_time())
        self.take_events()

    def take_events(self) -> None:
        while (event := self.quic.next_event()) is not None:
            if isinstance(event, ConnectionIdIssued):
                self.server.by_id[event.connection_id] = self
            elif isinstance(event, ConnectionIdRetired):
                self.server.by_id.pop(event.connection_id, None)
            else:
                self.take_event(event)

    async def run(self) -> None:
        """Do what is due, until the connection is over."""
        try:
            async with trio.open_nursery() as self.nursery:
                self.nursery.start_soon(self.go_away_in_the_end)
                self.pause.deadline = trio.current_time() + 1  # for the first packet, which accept has let in
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
            logging.exception("a connection has failed")
        finally:
            if self.quic.get_peer_address() is not None:
                self.quic.close()
                with trio.move_on_after(1, shield=True):
                    await self.send()
            self.server.forget(self)

    async def send(self) -> None:
        """Send what is due now, and set the time for the next."""
        datagrams = self.quic.datagrams_to_send(trio.current_time())
        for address, group in groupby(datagrams, key=itemgetter(1)):
            client = self.paths.get(address, (0.0, None))[1]
            if client is not None:
                with suppress(trio.ClosedResourceError):
                    await client.send_many([packet for packet, _ in group])
        due = self.quic.get_timer()
        self.pause.deadline = trio.current_time() if due is None else due + LATE
        self.has_sent()


def refusal(version: int, source: bytes, destination: bytes, error: QuicErrorCode) -> bytes:
    """Return a packet that closes a connection before it has begun."""
    crypto = CryptoPair()
    crypto.setup_initial(source, is_client=False, version=version)
    builder = QuicPacketBuilder(
        host_cid=source, peer_cid=destination, version=version, is_client=False, max_datagram_size=1_200
    )
    builder.start_packet(QuicPacketType.INITIAL, crypto)
    frame = builder.start_frame(QuicFrameType.TRANSPORT_CLOSE, capacity=TRANSPORT_CLOSE_FRAME_CAPACITY)
    for number in (error, QuicFrameType.PADDING, 0):  # of which frame; bytes of the reason
        frame.push_uint_var(number)
    return builder.flush()[0][0]


@attrs.define(eq=False)
class QuicServer:
    """All connections, by each ID that packets may name them with."""

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
        """Hand what comes from one address to the connections that it is for."""
        address = client.peer_address
        with client.transaction():  # while the server stops connections end in their own way
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
        """Return the connection that a packet is for, or begin it; or else what to answer, if anything."""
        if packet[:1] < b"\x80":
            destination, source = packet[1:9], b""
        else:  # in any version of QUIC (RFC 8999)
            end = 6 + int.from_bytes(packet[5:6], "big")
            destination, source = (
                packet[6:end],
                packet[end + 1 : end + 1 + int.from_bytes(packet[end : end + 1], "big")],
            )
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
        here = sum(address in other.paths for other in set(self.by_id.values()))
        if self.stopping.is_set() or here == MOST_AT_ONE_ADDRESS or len(self.nursery.child_tasks) >= MOST_CONNECTIONS:
            return refusal(version, destination, source, QuicErrorCode.CONNECTION_REFUSED)
        now = trio.current_time()
        if not header.token:
            name = os.urandom(8)
            token = self.tokens.create_token(
                address=address,
                original_destination_connection_id=destination,
                retry_source_connection_id=name,
                now=now,
            )
            return encode_quic_retry(version, name, source, destination, token)
        try:
            original = self.tokens.validate_token(
                address=address, destination_cid=destination, token=header.token, now=now
            )
        except ValueError:
            return refusal(version, destination, source, QuicErrorCode.INVALID_TOKEN)
        quic = QuicConnection(
            configuration=self.configuration,
            original_destination_connection_id=original,
            retry_source_connection_id=destination,
        )
        connection = self.by_id[destination] = self.by_id[quic.host_cid] = self.make(quic, self)
        connection.has_path(address)
        self.nursery.start_soon(connection.run)
        return connection

    def forget(self, connection: Connection) -> None:
        for name in [name for name, other in self.by_id.items() if other is connection]:
            del self.by_id[name]
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
    """Serve, until the server is stopped and its connections have ended.

    Args:
      make: Makes the object for a new connection.
      configuration: Of QUIC; it has the certificate.
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
        for client in list(server.clients):  # addresses without a connection
            client.close()
