"""One end of a simulated network: what a socket would be. See :class:`trio_udp._endpoints._engine.Engine`."""

from __future__ import annotations

import errno
import io
import os
from collections import deque
from typing import TYPE_CHECKING, cast

import attrs
import trio

from .._endpoints import BATCH, Address, Datagram, Route
from .._endpoints._address import family_of, max_payload
from .._endpoints._engine import Outgoing
from .._statistics import EndpointTally, KernelFigures

if TYPE_CHECKING:
    from ._network import SimulatedNetwork

# Bytes of kernel memory that a datagram takes besides its payload, and the size of a buffer that nobody has asked to be
# another, both as on Linux: a socket holds 277 small datagrams.
OVERHEAD = 768
DEFAULT_BUFFER = 212_992


def on_this_machine(address: Address) -> Address:
    """The unspecified address means any of this machine's own where one is to be written to, or from: the loopback."""
    host, *rest = address
    return cast("Address", ({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), *rest))


@attrs.define(eq=False)
class SimulatedEngine:
    """Buffers between one address of the network and an endpoint. A route is the peer address and the local one."""

    _network: SimulatedNetwork
    bound_address: Address
    peer: Address | None = None  # that it is connected to
    _max_datagram_size: int = 65_535
    _receive_buffer: int | None = None
    _send_buffer: int | None = None

    family: int = attrs.field(init=False)
    connected: bool = attrs.field(init=False)
    tally: EndpointTally = attrs.field(factory=EndpointTally, init=False)
    closed: bool = attrs.field(default=False, init=False)
    _arrived: deque[Datagram | OSError] = attrs.field(factory=deque, init=False)  # and not yet read
    _arrived_bytes: int = attrs.field(default=0, init=False)
    _dropped: int = attrs.field(default=0, init=False)
    _refused: bool = attrs.field(default=False, init=False)  # and nobody has been told
    _unsent: deque[tuple[float, int]] = attrs.field(factory=deque, init=False)  # when it will have left, and its bytes
    _unsent_bytes: int = attrs.field(default=0, init=False)
    _line_free_at: float = attrs.field(default=0.0, init=False)
    _waiting: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, init=False)

    @property
    def socket(self) -> trio.socket.SocketType:
        # An OSError, like that of an option which a real socket does not have.
        raise io.UnsupportedOperation("an endpoint of a SimulatedNetwork has no socket")

    @family.default
    def _(self) -> int:
        return family_of(self.bound_address)

    @connected.default
    def _(self) -> bool:
        return self.peer is not None

    # What arrives.

    def put(self, payload: bytes, route: Route) -> bool:
        """Take in a datagram; False if the receive buffer is full. Like Linux, it may overflow by the last one."""
        if self._arrived_bytes >= self._receive_buffer_size:
            self._dropped += 1
            return False
        self._arrived.append((payload, route))
        self._arrived_bytes += OVERHEAD + len(payload)
        self._waiting.unpark_all()
        return True

    def put_error(self, error: OSError) -> None:
        """Let a read fail, after what has arrived before it."""
        self._arrived.append(error)
        self._waiting.unpark_all()

    def refuse(self) -> None:
        """Let the next call fail, be it a read or a send: the peer's port is closed."""
        self._refused = True
        self._waiting.unpark_all()

    def receive(self, batch: list[Datagram]) -> bool:
        self._network._catch_up()
        self._raise_errors()
        tally = self.tally
        while self._arrived and len(batch) < BATCH:
            arrived = self._arrived.popleft()
            if isinstance(arrived, BlockingIOError):
                return True
            if isinstance(arrived, OSError):
                raise arrived
            length = len(arrived[0])
            self._arrived_bytes -= OVERHEAD + length
            tally.received += 1
            if length <= self._max_datagram_size:
                tally.bytes_received += length
                batch.append(arrived)
            else:
                tally.bytes_received += self._max_datagram_size + 1
                tally.truncated += 1
        return not self._arrived

    def is_readable(self) -> bool:
        return bool(self._arrived) or self._refused

    async def wait_readable(self) -> None:
        await trio.lowlevel.checkpoint()
        while not self.closed and not self.is_readable():
            await self._waiting.park()
        self._check_open()

    def kernel_figures(self) -> KernelFigures:
        return KernelFigures(
            dropped=self._dropped,
            queued=self._arrived_bytes,
            receive_buffer=self._receive_buffer_size,
        )

    # What is sent.

    def send(self, outbox: deque[Outgoing]) -> None:
        now = self._network._catch_up()
        total = self.tally
        while outbox:
            payload, route, tally = outbox[0]
            source, destination = self.local_address(route), self.peer_address(route)
            self._raise_errors()
            self._network._check_route(source, destination)
            if not self._has_room(now):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            outbox.popleft()
            length = len(payload)
            self._network._send(payload, source, destination, now, self._queue(now, length))
            for counts in (tally, total):
                counts.sent += 1
                counts.bytes_sent += length

    async def wait_writable(self) -> None:
        await trio.lowlevel.checkpoint()
        while not self.closed and not self._has_room(trio.current_time()):
            with trio.move_on_at(self._unsent[0][0]):
                await self._waiting.park()
        self._check_open()

    def _queue(self, now: float, length: int) -> float:
        """Put a datagram into the send buffer; return when the last of it will have left."""
        bandwidth = self._network.bandwidth
        self._line_free_at = max(now, self._line_free_at) + (length / bandwidth if bandwidth else 0)
        if self._line_free_at > now:
            self._unsent.append((self._line_free_at, OVERHEAD + length))
            self._unsent_bytes += OVERHEAD + length
        return self._line_free_at

    def forget_time(self) -> None:
        """The times known are those of another clock."""
        self._unsent.clear()
        self._unsent_bytes = 0
        self._line_free_at = 0.0

    def _has_room(self, now: float) -> bool:
        while self._unsent and self._unsent[0][0] <= now:
            self._unsent_bytes -= self._unsent.popleft()[1]
        return self._unsent_bytes < (self._send_buffer or DEFAULT_BUFFER)

    # Addresses.

    def route(self, address: Address) -> Route:
        return on_this_machine(address), on_this_machine(self.bound_address)

    def max_payload(self, route: Route) -> int:
        return max_payload(self.peer_address(route))

    def peer_address(self, route: Route) -> Address:
        return cast("tuple[Address, Address]", route)[0]

    def local_address(self, route: Route) -> Address:
        return cast("tuple[Address, Address]", route)[1]

    # The end.

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._network._remove(self)
            self._waiting.unpark_all()

    def abandon(self) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.closed:
            raise trio.ClosedResourceError("this endpoint is closed")

    def _raise_errors(self) -> None:
        if self.closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if self._refused:  # told once, and before anything else
            self._refused = False
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))

    @property
    def _receive_buffer_size(self) -> int:
        return self._receive_buffer or DEFAULT_BUFFER
