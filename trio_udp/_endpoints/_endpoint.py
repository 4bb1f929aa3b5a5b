"""A bound socket: waiting for it, reading and writing it in batches, and its counters."""

from __future__ import annotations

import errno
import socket as stdlib_socket
from collections import deque
from contextlib import suppress

import attrs
import trio

from .._log import FaultLog
from .._statistics import EndpointStatistics, SendTally
from ._address import Address, family_of
from ._choice import engine_for
from ._engine import BATCH, Datagram, Engine, Outgoing, Route
from ._faults import Fault, fault_of, reason_for
from ._socket import is_connected

INTERNET = (stdlib_socket.AF_INET, stdlib_socket.AF_INET6)

# A socket that polls as readable has something to read, be it an answer to something sent earlier. If more than this
# many reads in a row gave nothing, and there is still an error or it still polls as readable, then that is a fault that
# lasts (one is IP_RECVERR with nobody to read the error queue): look only every so many seconds, so as not to burn the
# processor. No stranger can bring this about: a datagram with a wrong checksum polls as readable and gives nothing, but
# then it is gone.
FRUITLESS_READS = 8
PAUSE = 0.1

# Reads in a row that gave answers to something sent earlier, and nothing else. So many are not the network's any more.
MANY_ANSWERS = 1_024

# Seconds to wait when the socket polls as writable and sending still fails with EAGAIN, as on a Unix-domain socket:
# there it is the peer's buffer that is full, which polling does not show.
FULL_THOUGH_WRITABLE = 0.01


@attrs.define(eq=False, repr=False)
class Endpoint:
    """A bound datagram socket and its counters; what :func:`serve_endpoints` serves on.

    Made by :func:`open_endpoints` or :meth:`from_socket`. For users: ``socket``, ``local_address``, ``closed``,
    ``statistics``, ``close`` and ``aclose``. The rest is between the parts of this package, and may change.
    """

    _engine: Engine

    # While the endpoint is corked, replies collect here and leave together.
    _outbox: deque[Outgoing] = attrs.field(factory=deque, init=False)
    _corked: int = attrs.field(default=0, init=False)  # passes of the scheduler that the cork stays for

    # Trio lets one task at a time wait for a socket to become writable. Whoever holds this may; the rest queue here.
    _turn: trio.StrictFIFOLock = attrs.field(factory=trio.StrictFIFOLock, init=False)
    _stuck: trio.Event = attrs.field(factory=trio.Event, init=False)  # corked replies met a full send buffer

    _drained: bool = attrs.field(default=True, init=False)  # the kernel had nothing more when we last looked
    _fruitless_reads: int = attrs.field(default=0, init=False)
    _answers_in_a_row: int = attrs.field(default=0, init=False)

    _log: FaultLog = attrs.field(factory=FaultLog, init=False)

    # Sends since a task that sends was last known to let others run; see YIELD_EVERY.
    sent_in_a_row: int = attrs.field(default=0, init=False)

    receive_buffer_requested: int = attrs.field(default=0, init=False)  # bytes; 0 where nobody has

    # A connected socket has one peer, and is told when that refuses something. Only a Connection wants to hear of it,
    # and then of each refusal once: either the next receive_batch() raises it, or the one that waits is woken for it.
    tells_refusals: bool = attrs.field(default=False, init=False)
    _refusal: OSError | None = attrs.field(default=None, init=False)
    _wait: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)

    @classmethod
    def from_socket(
        cls, sock: stdlib_socket.socket | trio.socket.SocketType, *, max_datagram_size: int = 65_535
    ) -> Endpoint:
        """Make an endpoint of a bound datagram socket that someone else opened.

        The endpoint owns the socket from now on: it is made non-blocking, and closed with the endpoint. (Closing a
        ``socket.socket`` that was passed in directly goes unnoticed until something arrives: Trio is not told.)

        Args:
          sock: A ``socket.socket`` or ``trio.socket`` of type ``SOCK_DGRAM``.
          max_datagram_size: Longest payload to accept, in bytes; longer datagrams are counted as truncated.

        Raises:
          TypeError, ValueError: It is not a socket, not a datagram socket, or not bound.
        """
        check_max_datagram_size(max_datagram_size)
        # A trio.socket may also come from a socket factory of the user's, and have no socket inside.
        if not isinstance(getattr(sock, "_sock", sock), stdlib_socket.socket):
            raise TypeError(f"expected a socket of the operating system's, not a {type(sock).__name__}")
        if sock.type != stdlib_socket.SOCK_DGRAM:
            raise ValueError(f"not a datagram socket: {sock!r}")
        is_inet = sock.family in INTERNET
        if sock.getsockname()[1] == 0 if is_inet else not sock.getsockname() and not is_connected(sock):
            raise ValueError(f"not bound to an address: {sock!r}")
        if isinstance(sock, stdlib_socket.socket):
            sock = trio.socket.from_stdlib_socket(sock)
        return cls(engine_for(sock, max_datagram_size))

    def __repr__(self) -> str:
        return f"<trio_udp.Endpoint {self.local_address}{' closed' if self.closed else ''}>"

    @property
    def socket(self) -> trio.socket.SocketType:
        """The bound socket, for options and inspection. Reading or writing it directly is not counted."""
        return self._engine.socket

    @property
    def local_address(self) -> Address:
        """The address the socket is bound to, as ``getsockname`` gives it."""
        return self._engine.bound_address

    @property
    def closed(self) -> bool:
        """Whether the socket is closed, by :meth:`aclose` or otherwise."""
        return self._engine.closed

    def statistics(self) -> EndpointStatistics:
        """Counts since the endpoint was made; also available once it is closed."""
        tally, kernel = self._engine.tally, self._engine.kernel_figures()
        return EndpointStatistics(
            received=tally.received,
            bytes_received=tally.bytes_received,
            truncated=tally.truncated,
            sent=tally.sent,
            bytes_sent=tally.bytes_sent,
            receive_errors=tally.receive_errors,
            send_errors=tally.send_errors,
            errors=tally.errors,
            kernel_dropped=kernel.dropped,
            kernel_queued=kernel.queued,
            receive_buffer=kernel.receive_buffer,
            receive_buffer_requested=self.receive_buffer_requested,
        )

    def close(self) -> None:
        """Close the socket; what is in the outbox leaves if the kernel takes it now. Idempotent."""
        try:
            self.uncork()
            while self._outbox:
                self._count_send_error(OSError(errno.EAGAIN, "closed before the send buffer had room"))
        finally:
            self._engine.close()

    async def aclose(self) -> None:
        """Close the endpoint. A server that runs on it loses this endpoint's clients; see :func:`serve_endpoints`."""
        self.close()
        await trio.lowlevel.checkpoint()

    # What follows is for the receive loop, for clients and for connections.

    def max_payload(self, route: Route) -> int:
        """Length of the longest payload that one datagram can carry on a route."""
        return self._engine.max_payload(route)

    def can_send_to(self, address: Address) -> bool:
        """Whether the socket is of the address's family, and not connected to a peer."""
        return not self._engine.connected and self._engine.family == family_of(address)

    def route(self, address: Address) -> Route:
        """The route to an address that has not necessarily written to us."""
        return self._engine.route(address)

    def peer_address_of(self, route: Route) -> Address:
        """The address at the other end of a route."""
        return self._engine.peer_address(route)

    def local_address_of(self, route: Route) -> Address:
        """Our own address at this end of a route."""
        return self._engine.local_address(route)

    async def receive_batch(self) -> list[Datagram]:
        """Wait until datagrams have arrived; return at least one, at most ``BATCH``, in arrival order.

        Checkpoints before it reads and never after, so that cancellation loses nothing.

        Raises:
          trio.ClosedResourceError: The endpoint is closed.
          ConnectionRefusedError: Where refusals are to be told: the peer refused something that was sent earlier.
        """
        batch: list[Datagram] = []
        while True:
            self.raise_refusal()
            if not self._drained or self._corked:
                await trio.lowlevel.checkpoint()
            elif self.tells_refusals:
                with trio.CancelScope() as self._wait:
                    await self._engine.wait_readable()
            else:
                await self._engine.wait_readable()
            self._send_collected()
            received = self._engine.tally.received
            self._drained = self.read(batch)
            if self._engine.tally.received > received:  # be it truncated
                self._fruitless_reads = self._answers_in_a_row = 0
            if batch:
                self._corked = 0
                self.sent_in_a_row = 0
                return batch
            if self._corked:
                self._corked -= 1
            self._fruitless_reads += 1
            if self._fruitless_reads > FRUITLESS_READS and (not self._drained or self._engine.is_readable()):
                self.uncork()
                await trio.sleep(PAUSE)

    def read(self, batch: list[Datagram]) -> bool:
        """Append what has arrived to ``batch``, without waiting; True if the kernel has no more."""
        try:
            return self._engine.receive(batch)
        except OSError as error:
            if fault_of(error) is Fault.CLOSED:
                self._abandon(error)
                raise trio.ClosedResourceError("this endpoint is closed") from error
            self._count_receive_error(error)
        return False

    def raise_refusal(self) -> None:
        """Raise the refusal by the peer that nobody has been told of yet, if there is one."""
        if self._refusal is not None:
            refusal, self._refusal = self._refusal, None
            raise refusal

    def send_nowait(self, payload: bytes, route: Route, tally: SendTally) -> None:
        """Send a datagram after those sent before it.

        Raises:
          trio.WouldBlock: The send buffer is full, or others are waiting for it.
          trio.ClosedResourceError: The endpoint is closed.
        """
        if self._corked and len(self._outbox) < BATCH - 1:
            self._outbox.append((payload, route, tally))
        elif self._turn.locked():
            raise trio.WouldBlock
        elif not self._send_now([(payload, route, tally)]):
            raise trio.WouldBlock

    def send_many_nowait(self, payloads: list[bytes], route: Route, tally: SendTally) -> int:
        """Send datagrams after those sent before them, as many as there is room for; return how many.

        Raises:
          trio.ClosedResourceError: The endpoint is closed.
        """
        if self._turn.locked() and not self._corked:
            return 0
        outgoing = [(payload, route, tally) for payload in payloads]
        if self._corked and len(self._outbox) + len(outgoing) < BATCH:
            self._outbox.extend(outgoing)
            return len(outgoing)
        return self._send_now(outgoing)

    async def send(self, payload: bytes, route: Route, tally: SendTally) -> None:
        """Send a datagram for which :meth:`send_nowait` found no room: wait for it, first come first served.

        Cancelling it means that the datagram is not sent.
        """
        async with self._turn:
            while True:
                await self._engine.wait_writable()
                if self._send_now([(payload, route, tally)]):
                    return
                await trio.sleep(FULL_THOUGH_WRITABLE)

    def cork(self) -> None:
        """Collect replies until the caller comes back for the next batch, and then send them together.

        Worth it for more than one reply; a lone one is better off at once.
        """
        # Two passes: Trio runs the tasks of one pass in random order, so in the first the receive loop may be back
        # before the handlers that it has woken have run.
        if not self._turn.locked():
            self._corked = 2

    def uncork(self) -> None:
        """Send what was collected, and from now on at once."""
        self._corked = 0
        self._send_collected()

    async def flush(self) -> None:
        """Wait until the outbox is empty, or the endpoint closed."""
        self._corked = 0  # nobody is to put anything into the outbox ahead of those who wait for their turn
        with suppress(trio.ClosedResourceError):
            async with self._turn:
                while self._outbox:
                    await self._engine.wait_writable()
                    self._flush()
                    if self._outbox:
                        await trio.sleep(FULL_THOUGH_WRITABLE)

    async def flush_when_stuck(self) -> None:
        """See to it that replies of a batch that met a full send buffer leave when it has room; runs for ever."""
        while not self.closed:
            await self._stuck.wait()
            await self.flush()
            self._stuck = trio.Event()

    def _send_collected(self) -> None:
        self._flush()
        if self._outbox:
            self._stuck.set()

    def _send_now(self, outgoing: list[Outgoing]) -> int:
        """Send what is in the outbox, and then these, as far as the kernel takes them; return how many of these."""
        outbox = self._outbox
        outbox.extend(outgoing)
        self._flush()
        if not outbox:
            return len(outgoing)
        # First in, first out: what is left is the last of ours, and before that perhaps something older.
        left = min(len(outbox), len(outgoing))
        for _ in range(left):
            outbox.pop()
        if outbox:
            self._stuck.set()
        if self.closed:
            raise trio.ClosedResourceError("this endpoint is closed")
        return len(outgoing) - left

    def _flush(self) -> None:
        """Send what is in the outbox, as far as the kernel takes it now."""
        repeated: Outgoing | None = None
        while self._outbox:
            try:
                self._engine.send(self._outbox)
            except OSError as error:
                fault = fault_of(error)
                if fault is Fault.CLOSED:
                    self._abandon(error)
                if fault in (Fault.CLOSED, Fault.WAIT):
                    self._corked = 0  # so that whoever sends next is told at once
                    return
                if fault is Fault.ANSWER and self._outbox[0] is not repeated and self._engine.family in INTERNET:
                    # The answer to an earlier datagram; this one has not been tried yet. See udp(7).
                    repeated = self._outbox[0]
                    self._count_receive_error(error)
                else:
                    self._count_send_error(error)
            except (TypeError, ValueError, OverflowError) as error:
                # Not an address that one can send to, such as that of a Unix-domain socket which has none.
                self._count_send_error(OSError(errno.EDESTADDRREQ, str(error)))

    def _abandon(self, error: OSError) -> None:
        """End, for the file descriptor is gone; if it was not we who have closed it, say so."""
        if not self.closed:
            self._log.count(error)
            self._log.write(self, error, reason_for(error))
        self._engine.abandon()

    def _count_receive_error(self, error: OSError) -> None:
        self._engine.tally.count_receive_error(error)
        self._log.count(error)
        fault = fault_of(error)
        if fault is Fault.ANSWER and self._answers_in_a_row < MANY_ANSWERS:
            self._answers_in_a_row += 1
            self._fruitless_reads = 0  # the read that has met it was not in vain
        elif fault is Fault.MACHINE or self._fruitless_reads >= FRUITLESS_READS:  # it lasts, whosever it is
            self._log.write(self, error, reason_for(error))
        if self.tells_refusals and isinstance(error, ConnectionRefusedError):
            self._refusal = error
            self._wait.cancel()

    def _count_send_error(self, error: OSError) -> None:
        _, _, tally = self._outbox.popleft()
        tally.count_send_error(error)
        self._engine.tally.count_send_error(error)
        self._log.count(error)
        if fault_of(error) is Fault.MACHINE:
            self._log.write(self, error, reason_for(error))


def check_max_datagram_size(size: int) -> None:
    if not isinstance(size, int):
        raise TypeError(f"max_datagram_size must be an int, not {size!r}")
    if not 1 <= size <= 65_535:
        raise ValueError(f"max_datagram_size must be from 1 to 65535, not {size!r}")
