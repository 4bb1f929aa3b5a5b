"""Sending on one socket: a queue, the line of tasks that wait for room, and the counts of sent datagrams."""

from __future__ import annotations

import errno
import inspect
import os
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import repeat
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import trio

from .._log import FaultLog
from .._statistics import Sender, SocketCounts
from .._trio import run_context
from ._address import MAX_PAYLOAD_IPV4, describe
from ._echoes import Echoes
from ._faults import Fault, fault_of, reason_for
from .engines import BATCH, Engine, Outgoing, Route, by_peer

if TYPE_CHECKING:
    from typing_extensions import Buffer

    Payload: TypeAlias = Buffer
    """What can be sent: any bytes-like object."""
else:
    Payload = bytes | bytearray | memoryview  # for readers of annotations

# A checkpoint at every send and receive would cost more than the datagram itself. A task that only sends, or only takes
# datagrams that already wait, lets other tasks run once in this many calls.
YIELD_EVERY = 64

INTERNET = (socket.AF_INET, socket.AF_INET6)

# Seconds to wait when the socket polls as writable but sending still fails with EAGAIN. Some systems have room then,
# but not for a long datagram.
FULL_THOUGH_WRITABLE = 0.01

# While the kernel may have more datagrams, replies are kept back for so many more batches at most, and at most so many
# replies. With a datagram_handler, an echo to 64 clients with four datagrams each costs 0.61 of uvloop with this, and
# 0.85 if each batch is answered by itself.
MOST_DELAYS = 3
MOST_KEPT_BACK = MOST_DELAYS * BATCH

# The most replies in a held outbox: those above, and the replies to one more batch.
MOST_HELD = MOST_KEPT_BACK + BATCH

# A row (datagrams of one sender on one route) of this length leaves at once, even while the outbox is held. It needs no
# tuple for each datagram then, and its peer can ask again before the server waits. So 12 datagrams to each of 64 peers
# cost a fifth less than if they wait for the end of the pass, and 17 to one peer a quarter less. Four to each of 64
# peers would cost a quarter more.
LONG_ROW = 12


def hint(payload: object) -> str:
    """Return a hint about the likely mistake behind a wrong payload, to end an error message."""
    if isinstance(payload, str):
        return ": use .encode()"
    return ": is there an await missing?" if inspect.isawaitable(payload) else ""


@attrs.define(eq=False)
class Turn:
    """Counts the datagrams taken and sent since other tasks last ran for certain, and holds the time of the batch.

    A server has one for all its clients, a :class:`ServerTurn`; a connection has its own. Each batch renews it, before
    it is handed out. No handler runs meanwhile, so a handler that sees a renewed Turn has let other tasks run.

    Attributes:
      taken: Datagrams taken from inboxes without a pause.
      sent: Datagrams sent without a pause and without taking one in between.
      time: When the current batch arrived, on Trio's clock; 0 once the server waits for more datagrams.
        Handlers that begin to wait need not read the clock.
    """

    taken: int = 0
    sent: int = 0
    time: float = 0.0

    def begin_batch(self) -> None:
        """Renew the turn: a batch has arrived, and other tasks have run since the previous one."""
        self.taken = 1  # put() hands one datagram to a waiting task without counting it
        self.sent = 0
        self.time = trio.current_time()

    def now(self) -> float:
        """Return the time of the current batch, or the current time if there is no batch."""
        return self.time or trio.current_time()

    @property
    def context(self) -> dict[str, Any]:
        """Trio's :func:`run_context`, looked up each time: a connection may be used in another thread than before."""
        return run_context()


@attrs.define(eq=False)
class ServerTurn(Turn):
    """The Turn of a server, which runs in one thread, so it looks up the run context once."""

    context: dict[str, Any] = attrs.field(factory=run_context, init=False)


@attrs.define(eq=False)
class Outbox:
    """Sends datagrams, those to one peer in the order of the calls.

    While the outbox is *held*, replies wait in its queue, and leave together in as few system calls as possible. Only a
    long row leaves at once; see ``LONG_ROW``. The receive loop holds the outbox when it hands out several datagrams, at
    least until the end of that pass of Trio's scheduler; see :meth:`end_pass`.

    Attributes:
      held: Replies wait in the queue, until the end of the pass or longer.
      may_keep_back: They may wait for the replies to the next batch; see :meth:`end_pass`.
      collecting: Replies of a ``datagram_handler`` are being kept back; see :meth:`collect`.
      echoes: The datagrams that the server on this endpoint may receive from itself; ``None`` without a server.
      own: Counts datagrams that belong to no client or connection: ``send_to``, and replies to single datagrams.
    """

    engine: Engine
    log: FaultLog
    turn: Turn = attrs.field(factory=Turn, init=False)
    counts: SocketCounts = attrs.field(factory=SocketCounts, init=False)
    own: Sender = attrs.field(factory=Sender, init=False)
    echoes: Echoes | None = attrs.field(default=None, init=False)
    queue: list[Outgoing] = attrs.field(factory=list, init=False)
    held: bool = attrs.field(default=False, init=False)
    may_keep_back: bool = attrs.field(default=False, init=False)
    collecting: bool = attrs.field(default=False, init=False)
    _collected: list[Outgoing] = attrs.field(factory=list, init=False)  # by collect()
    _delays: int = attrs.field(default=0, init=False)  # of the replies that are kept back, in batches

    # Trio lets only one task wait for a socket to become writable: the holder of this lock. Other senders wait in line.
    _line: trio.StrictFIFOLock = attrs.field(factory=trio.StrictFIFOLock, init=False)
    _stuck: trio.Event = attrs.field(factory=trio.Event, init=False)  # the queue met a full send buffer

    def copy(self, payload: Payload, route: Route) -> bytes:
        """Copy a payload to bytes, and check that one datagram on the route can carry it.

        Raises:
          OSError: ``EMSGSIZE``: it is too long.
          TypeError: It is not bytes-like.
        """
        if type(payload) is not bytes:
            # memoryview rejects numbers and lists. bytes(5) and bytes([1, 2]) would succeed and mean something else.
            try:
                payload = bytes(memoryview(payload))
            except TypeError:
                raise TypeError(f"a payload is bytes, not {type(payload).__name__}{hint(payload)}") from None
        # Every route carries at least as much as IPv4. Computing this route's limit would cost more than the rest.
        if len(payload) > MAX_PAYLOAD_IPV4 and len(payload) > (most := self.engine.max_payload(route)):
            detail = f"{len(payload)} bytes, and a datagram carries {most} at most"
            raise OSError(errno.EMSGSIZE, f"{os.strerror(errno.EMSGSIZE)}: {detail}")
        return payload

    def copy_row(self, payloads: Iterable[Payload], route: Route) -> tuple[list[bytes], list[int]]:
        """Like :meth:`copy`, for several payloads; return the copies and their sizes."""
        # Copy one at a time: an iterator may yield one buffer again and again, each time with other content.
        copies = [payload if type(payload) is bytes else self.copy(payload, route) for payload in payloads]
        sizes = list(map(len, copies))
        if sizes and max(sizes) > MAX_PAYLOAD_IPV4:
            for payload in copies:
                self.copy(payload, route)  # checks the length
        return copies, sizes

    def hold(self) -> None:
        """Hold the outbox, at least until the end of this pass, unless senders wait in line.

        Call it only if several replies are likely: a single one leaves earlier without it.
        """
        self.held = self.may_keep_back = not self._line.locked()

    def end_pass(self, *, more_follow: bool = False) -> None:
        """Send the held replies, or keep them back for those to the next batch. Called right before Trio waits for I/O.

        Args:
          more_follow: The kernel may have more datagrams.
        """
        self.turn.time = 0.0
        if self.held and not self._keeps_back(self.queue, more_follow and self.may_keep_back):
            self.held = False
            sent = self.counts.sent + len(self.queue)
            try:
                self.send_queue()
            finally:
                if self.counts.sent != sent or self.engine.wakes_tasks:
                    # A failed send may have woken tasks, after Trio has decided how long to wait. Interrupt that wait.
                    trio.lowlevel.current_trio_token().run_sync_soon(int, idempotent=True)

    def release(self) -> None:
        """Send all datagrams that were kept back, and hold no more: later datagrams leave at once."""
        self.held = False
        self.send_queue()
        if self.collecting:
            self.collect([], more_follow=False)

    def send_queue(self) -> None:
        """Send the queue. Datagrams that find no room leave as soon as there is some, by ``empty_when_stuck``."""
        self.flush()
        if self.queue:
            self._stuck.set()

    def send(self, outgoing: list[Outgoing], *, raising: bool = False) -> int:
        """Send as many datagrams as there is room for, after all earlier ones; return their number.

        Args:
          outgoing: An error counts for the sender of the datagram that it concerns.
          raising: Also raise the kernel's error, as for datagrams that the program itself addresses. The datagrams
            before the failed one have been sent.

        Raises:
          trio.ClosedResourceError: The endpoint is closed.
        """
        if self.held and not raising and len(self.queue) + len(outgoing) <= MOST_HELD:
            self.queue += outgoing
            return len(outgoing)
        if self._line.locked() and not self.held:
            return 0
        return self._send_now(outgoing, raising)

    def send_row(
        self, payloads: list[bytes], sizes: list[int], route: Route, sender: Sender, *, raising: bool = False
    ) -> int:
        """Like :meth:`send`, for datagrams of one sender on one route.

        Makes no tuple for each datagram, unless it has to wait in the queue: 64 datagrams take 7 µs less. A row of
        ``LONG_ROW`` or more leaves at once even while the outbox is held, unless earlier datagrams wait in the queue.
        """
        if self.queue or self._line.locked() or (self.held and len(payloads) < LONG_ROW):
            return self.send(list(zip(payloads, repeat(route), repeat(sender))), raising=raising)
        sent = self._give_to_kernel(payloads, sizes, [route] * len(payloads), [sender] * len(payloads), raising)
        if sent < len(payloads):
            self.check_open()
        return sent

    def send_or_drop(self, outgoing: list[Outgoing]) -> list[Outgoing]:
        """Send datagrams; drop those that find no room, count them under ``EAGAIN``, and return them.

        On a closed endpoint that is all of them.
        """
        unsent = outgoing if self.engine.closed else outgoing[self.send(outgoing) :]
        for _, _, sender in unsent:
            self._count_dropped(sender)
        return unsent

    def send_row_or_drop(self, payloads: list[bytes], sizes: list[int], route: Route, sender: Sender) -> None:
        """Like :meth:`send_or_drop`, for datagrams of one sender on one route."""
        sent = 0 if self.engine.closed else self.send_row(payloads, sizes, route, sender)
        for _ in payloads[sent:]:
            self._count_dropped(sender)

    def collect(self, replies: list[Outgoing], *, more_follow: bool) -> None:
        """Send the replies of a ``datagram_handler``, perhaps together with those to the next batch.

        While the kernel may have more datagrams, replies are kept back for up to four batches. They leave sorted by
        peer, each peer's in order, so that the kernel takes the replies to one peer as one message (GSO). Replies that
        find no room are dropped and counted under ``EAGAIN``.

        Args:
          more_follow: The kernel may have more datagrams.
        """
        self._collected += replies
        self.collecting = self._keeps_back(self._collected, more_follow)
        if not self.collecting:
            collected, self._collected = self._collected, []
            if collected:
                self.send_or_drop(by_peer(collected))

    def _keeps_back(self, replies: list[Outgoing], may_keep_back: bool) -> bool:
        """Whether to keep replies back once more. A flood of datagrams that get no reply must not hold them up."""
        keeps_back = may_keep_back and 0 < len(replies) <= MOST_KEPT_BACK and self._delays < MOST_DELAYS
        self._delays = self._delays + 1 if keeps_back else 0
        return keeps_back

    async def wait_for_room(self, outgoing: Outgoing, *, raising: bool = False) -> None:
        """Wait for room, first come first served, and send a datagram.

        If the wait is cancelled, the datagram is not sent.
        """
        async with self._line:
            while True:
                await self.engine.wait_writable()
                if self._send_now([outgoing], raising):
                    return
                await trio.sleep(FULL_THOUGH_WRITABLE)

    async def empty(self) -> None:
        """Wait until the queue is empty or the endpoint is closed."""
        self.held = False  # or replies would enter the queue ahead of the tasks in line
        with suppress(trio.ClosedResourceError):
            async with self._line:
                while self.queue:
                    await self.engine.wait_writable()
                    self.flush()
                    if self.queue:
                        await trio.sleep(FULL_THOUGH_WRITABLE)

    async def empty_when_stuck(self) -> None:
        """Send queued datagrams that met a full send buffer as soon as it has room. Runs until the endpoint closes."""
        while not self.engine.closed:
            await self._stuck.wait()
            await self.empty()
            self._stuck = trio.Event()

    def flush(self) -> None:
        """Send as much of the queue as the kernel takes now.

        More than ``BATCH`` replies leave sorted by peer, like those of :meth:`collect`. Fewer need no sorting: they
        usually answer one batch, and a handler sends all its replies to that in one go.
        """
        if not self.queue:  # another task has sent it while the caller waited for room
            return
        outgoing, self.queue = self.queue, []
        if len(outgoing) > BATCH:
            outgoing = by_peer(outgoing)
        payloads, routes, senders = zip(*outgoing)
        counts = self.counts
        done, done_before = None, counts.sent + counts.send_errors
        try:
            done = self._give_to_kernel(payloads, list(map(len, payloads)), routes, senders)
        finally:
            if done is None:  # an error that is not the network's, such as a log handler's: send nothing twice
                done = counts.sent + counts.send_errors - done_before
            self.queue[:0] = outgoing[done:]

    def count_unanswerable(self, sender: Sender) -> None:
        """Count a reply to a source that cannot be answered; see ``is_answerable``."""
        error = OSError(errno.EDESTADDRREQ, "the source of the datagram cannot be answered")
        sender.count_send_error(error)
        self.counts.count_send_error(error)

    def close(self) -> None:
        """Send what the kernel takes now, and count the rest as send errors (``EAGAIN``)."""
        self.release()
        for _, _, sender in self.queue:
            self._count_send_error(sender, OSError(errno.EAGAIN, "closed before the send buffer had room"))
        self.queue.clear()
        self._stuck.set()  # to end empty_when_stuck()

    def check_open(self) -> None:
        if self.engine.closed:
            raise trio.ClosedResourceError("this endpoint is closed")

    def abandon(self, error: OSError) -> None:
        """Give up a socket whose file descriptor is gone. Log the error unless the endpoint itself closed it."""
        if not self.engine.closed:
            self.log.count(error)
            self.log.write(describe(self.engine.bound_address), error, reason_for(error))
        self.engine.abandon()
        self._stuck.set()

    def _send_now(self, outgoing: list[Outgoing], raising: bool = False) -> int:
        if self.queue:  # first and alone, because ``raising`` is about the errors of ``outgoing`` only
            self.send_queue()
            self.check_open()
            if self.queue:
                return 0
        if len(outgoing) == 1:  # the same as below, at a tenth of the cost
            ((payload, route, sender),) = outgoing
            sent = self._give_to_kernel((payload,), (len(payload),), (route,), (sender,), raising)
        else:
            payloads, routes, senders = zip(*outgoing)
            sent = self._give_to_kernel(payloads, list(map(len, payloads)), routes, senders, raising)
        if sent < len(outgoing):
            self.check_open()
        return sent

    def _give_to_kernel(
        self,
        payloads: Sequence[bytes],
        sizes: Sequence[int],
        routes: Sequence[Route],
        senders: Sequence[Sender],
        raising: bool = False,
    ) -> int:
        """Send datagrams; return how many the kernel has taken or refused. There is no room for the rest.

        An error may be the answer to an earlier datagram: see udp(7). So after an error of that kind, and with
        ``raising`` after any error, the datagram is tried once more. If the second try fails, the error is the
        datagram's own, and the datagram is dropped.

        Without ``raising`` the first error is counted at once. With it, the error is counted only after the second try
        has shown that it belongs to an earlier datagram.
        """
        done, failed = 0, None
        while payloads:
            try:
                count = self.engine.send(payloads, sizes, routes)
            except OSError as error:
                fault = fault_of(error)
                if fault is Fault.CLOSED:
                    self.abandon(error)
                if fault in (Fault.CLOSED, Fault.WAIT):
                    self.held = False  # so that the next sender notices at once
                    break
                if raising and self.engine.connected and isinstance(error, ConnectionRefusedError):
                    self._count_receive_error(error)  # the datagram has not been sent: tell the program
                    raise
                if failed is None and (raising or fault is Fault.ANSWER) and self.engine.family in INTERNET:
                    failed = error.with_traceback(None)  # it refers to this frame: avoid a reference cycle
                    if not raising:
                        self._count_receive_error(error)
                    continue
                failed, count = None, 1
                self._count_send_error(senders[0], error)
                if raising:
                    raise
            else:
                if failed is not None:
                    if raising:
                        self._count_receive_error(failed)
                    failed = None
                if count == len(payloads):  # the usual case
                    self._count_sent(sizes, senders)
                    return done + count
                self._count_sent(sizes[:count], senders[:count])
            done += count
            payloads, sizes, routes, senders = payloads[count:], sizes[count:], routes[count:], senders[count:]
        if failed is not None and raising:
            self._count_receive_error(failed)
        return done

    def _count_sent(self, sizes: Sequence[int], senders: Sequence[Sender]) -> None:
        counts, sent, bytes_sent, sender = self.counts, len(sizes), sum(sizes), senders[0]
        # All datagrams of one sender take a tenth of the loop's time.
        if sent == 1 or (senders[-1] is sender and senders.count(sender) == sent):
            sender.sent += sent
            sender.bytes_sent += bytes_sent
        else:
            for sender, size in zip(senders, sizes):
                sender.sent += 1
                sender.bytes_sent += size
        counts.sent += sent
        counts.bytes_sent += bytes_sent

    def _count_dropped(self, sender: Sender) -> None:
        self._count_send_error(sender, OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)))

    def _count_send_error(self, sender: Sender, error: OSError) -> None:
        sender.count_send_error(error)
        self.counts.count_send_error(error)
        self.log.count(error)
        if fault_of(error) is Fault.MACHINE:
            self.log.write(describe(self.engine.bound_address), error, reason_for(error))

    def _count_receive_error(self, error: OSError) -> None:
        self.counts.count_receive_error(error)
        self.log.count(error)
