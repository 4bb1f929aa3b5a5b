"""The way in from one socket: waiting for datagrams and reading them in batches.

A server's receive loop reads with :meth:`Reader.receive_batch`. A connection, and an endpoint that no server runs on,
take one datagram at a time with :meth:`Reader.next`.
"""

from __future__ import annotations

from collections import deque

import attrs
import trio

from ._address import describe
from ._faults import Fault, fault_of, reason_for
from ._outbox import Outbox
from .engines import BATCH, Engine, Received

# A socket that polls as readable has something to read, even if it is only the answer to something sent earlier. If
# more reads in a row than this gave nothing, and there is still an error or the socket still polls as readable, then
# the fault persists (one is IP_RECVERR with nobody reading the error queue): look only once in PAUSE seconds, to spare
# the CPU. No stranger can cause this: a datagram with a wrong checksum polls as readable and gives nothing, but then it
# is gone.
FRUITLESS_READS = 8
PAUSE = 0.1

# Reads in a row that gave answers to something sent earlier, and nothing else. More than this are not the network's.
MANY_ANSWERS = 1_024


@attrs.define(eq=False)
class BackOff:
    """Tells a fault that persists from one that passes, so that reading does not burn the CPU or fill the log."""

    _fruitless_reads: int = attrs.field(default=0, init=False)
    _answers: int = attrs.field(default=0, init=False)

    def read_something(self) -> None:
        self._fruitless_reads = self._answers = 0

    def read_nothing(self) -> None:
        self._fruitless_reads += 1

    def read_answer(self) -> bool:
        """Note the network's answer to something sent earlier. False if there have been too many in a row."""
        if self._answers == MANY_ANSWERS:
            return False
        self._answers += 1
        self._fruitless_reads = 0
        return True

    def persists(self, reads: int = 0) -> bool:
        """Whether there have been too many, counting so many more that are not noted yet."""
        return self._fruitless_reads + reads > FRUITLESS_READS


@attrs.define(eq=False)
class Reader:
    """Reads one socket.

    Attributes:
      served: A server runs on the endpoint, so nobody else may read.
      shared: Others hold the same socket and read it after us.
      finished: Nothing is read any more; what arrives stays in the kernel.
      tells_refusals: Raise ``ConnectionRefusedError`` where the peer of a connected socket refused something, once.
    """

    engine: Engine
    outbox: Outbox
    shared: bool = False
    tells_refusals: bool = False
    served: bool = attrs.field(default=False, init=False)
    finished: bool = attrs.field(default=False, init=False)
    _may_have_more: bool = attrs.field(default=False, init=False)  # the last read gave a whole batch
    _back_off: BackOff = attrs.field(factory=BackOff, init=False)
    _ahead: deque[Received] = attrs.field(factory=deque, init=False)  # read by next(), not yet returned
    _someone_waits: bool = attrs.field(default=False, init=False)
    _refusal: OSError | None = attrs.field(default=None, init=False)  # not yet raised

    @property
    def waiting(self) -> int:
        """Datagrams that were read and that :meth:`next` has not returned yet."""
        return len(self._ahead)

    async def receive_batch(self, *, wait: bool = True) -> list[Received]:
        """Wait until datagrams have arrived; return at least one, at most ``BATCH``, in arrival order.

        Sends what the outbox has collected meanwhile. Checkpoints before it reads and never after, so that cancellation
        loses nothing.

        Args:
          wait: If false, return an empty list once the kernel has nothing more.

        Raises:
          trio.ClosedResourceError: The endpoint is closed.
        """
        engine, outbox = self.engine, self.outbox
        batch: list[Received] = []
        if self._ahead:
            await trio.lowlevel.checkpoint()
            return self.many_nowait(BATCH)
        # Two passes of Trio's scheduler for replies to collect in: Trio runs the tasks of one pass in random order, so
        # in the first this task may be back before the handlers that it has woken have run.
        passes = 2 if outbox.held else 1 if self._may_have_more or not wait else 0
        while True:
            if passes:
                passes -= 1
                await trio.lowlevel.checkpoint()
            elif not wait:
                return batch
            else:
                outbox.held = False
                outbox.turn.time = 0.0
                await engine.wait_readable()
            if outbox.queue:
                outbox.send_collected()
            if self.finished and not engine.read_ahead:
                return batch
            received = engine.counts.received
            self._may_have_more = self.read(batch)
            if engine.counts.received > received:  # a truncated datagram counts too
                self._back_off.read_something()
            if batch:
                outbox.held = False
                return batch
            self._back_off.read_nothing()
            if self._back_off.persists() and (self._may_have_more or engine.is_readable()):
                outbox.release()
                outbox.turn.time = 0.0
                await trio.sleep(PAUSE)
            passes = max(passes, self._may_have_more)

    async def next(self) -> Received:
        """Wait for the next datagram and return it.

        Always notices cancellation, and then loses nothing. Other tasks run at least once in a batch of 64.

        Raises:
          trio.ClosedResourceError: The endpoint is closed.
          trio.BusyResourceError: A server, or another task, reads from it.
          ConnectionRefusedError: Where refusals are told: the peer refused something that was sent earlier.
        """
        if self._ahead and not self._someone_waits and not self.served:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await self._read_ahead()
        self.outbox.turn.sent = 0
        return self._ahead.popleft()

    def next_nowait(self) -> Received:
        """Like :meth:`next`, without waiting.

        Raises:
          trio.WouldBlock: Nothing has arrived, or another task is about to receive it.
        """
        self.outbox.check_open()
        self._check_not_served()
        if self._someone_waits:
            raise trio.WouldBlock
        if not self._ahead and not self._read_ahead_nowait():
            raise trio.WouldBlock
        return self._ahead.popleft()

    def many_nowait(self, most: int) -> list[Received]:
        """Return what was read already, at most so many datagrams."""
        return [self._ahead.popleft() for _ in range(min(most, len(self._ahead)))]

    def taken_so_far(self) -> tuple[int, int, int]:
        """Return the datagrams and bytes that were received, less those that still wait here; and those truncated."""
        counts = self.engine.counts
        bytes_waiting = sum(len(payload) for payload, _, _ in self._ahead)
        return counts.received - len(self._ahead), counts.bytes_received - bytes_waiting, counts.truncated

    def discard(self) -> int:
        """Drop what was read already; return how many datagrams that was."""
        count = len(self._ahead)
        self._ahead.clear()
        return count

    def take_over(self) -> None:
        """Reserve the socket for a server.

        Raises:
          trio.BusyResourceError: Another server runs on it, or a task is receiving from it.
        """
        if self.served or self._someone_waits:
            raise trio.BusyResourceError("something else is already receiving from this endpoint")
        self.served = True

    def read(self, batch: list[Received]) -> bool:
        """Append what has arrived to ``batch``, without waiting. True if the kernel may have more."""
        try:
            return not self.engine.receive(batch)
        except OSError as error:
            if fault_of(error) is Fault.CLOSED:
                self.outbox.abandon(error)
                raise trio.ClosedResourceError("this endpoint is closed") from error
            self._count_error(error)
        return True

    def raise_refusal(self) -> None:
        """Raise the refusal by the peer that was not raised yet, if there is one."""
        if self._refusal is not None:
            refusal, self._refusal = self._refusal, None
            raise refusal

    async def _read_ahead(self) -> None:
        """Let other tasks run, until a batch has arrived."""
        self._check_not_served()
        if self._someone_waits:
            raise trio.BusyResourceError("another task is already receiving")
        self._someone_waits = True
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            while not self._ahead:
                self.outbox.check_open()
                if self._read_ahead_nowait():
                    # Not to be cancelled: what was read is received, even if the caller has just given up.
                    await trio.lowlevel.cancel_shielded_checkpoint()
                    return
                if self._back_off.persists() and self.engine.is_readable():
                    await trio.sleep(PAUSE)
                await self.engine.wait_readable()
                self._read_ahead_nowait()
        finally:
            self._someone_waits = False

    def _read_ahead_nowait(self) -> bool:
        """Read a batch, if one has arrived; tell whether there is something to return."""
        self.raise_refusal()
        batch: list[Received] = []
        self.read(batch)
        self._ahead.extend(batch)
        if batch:
            self._back_off.read_something()
        else:
            self._back_off.read_nothing()
            self.raise_refusal()
        return bool(batch)

    def _check_not_served(self) -> None:
        if self.served:
            raise trio.BusyResourceError("a server is receiving from this endpoint")

    def _count_error(self, error: OSError) -> None:
        outbox = self.outbox
        outbox.counts.count_receive_error(error)
        outbox.log.count(error)
        fault = fault_of(error)
        is_passing_answer = fault is Fault.ANSWER and self._back_off.read_answer()
        if not is_passing_answer and (fault is Fault.MACHINE or self._back_off.persists(1)):
            outbox.log.write(describe(self.engine.bound_address), error, reason_for(error))
        if self.tells_refusals and isinstance(error, ConnectionRefusedError):
            self._refusal = error
