"""The way in from one socket: waiting for datagrams and reading them in batches.

A server's receive loop reads with :meth:`Reader.receive_batch`. Where no server runs, see _one_by_one.py.
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
      shared: Others hold the same socket and read it after us.
      served: A server runs on the endpoint.
      awaited: A task waits for a datagram, where no server runs.
      finished: Nothing is read any more; what arrives stays in the kernel.
      ahead: Datagrams that were read and not handed out: a task without a server takes one at a time.
      refusal: The last time that the peer of a connected socket refused something, as long as nobody was told.
      back_off: What reading has come to.
    """

    engine: Engine
    outbox: Outbox
    shared: bool = False
    served: bool = attrs.field(default=False, init=False)
    awaited: bool = attrs.field(default=False, init=False)
    finished: bool = attrs.field(default=False, init=False)
    ahead: deque[Received] = attrs.field(factory=deque, init=False)
    refusal: ConnectionRefusedError | None = attrs.field(default=None, init=False)
    back_off: BackOff = attrs.field(factory=BackOff, init=False)
    _may_have_more: bool = attrs.field(default=False, init=False)  # the last read gave a whole batch

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
        if self.ahead:  # from before the server took over
            await trio.lowlevel.checkpoint()
            return self.take_ahead(BATCH)
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
                self.back_off.read_something()
            if batch:
                outbox.held = False
                return batch
            self.back_off.read_nothing()
            if self.back_off.persists() and (self._may_have_more or engine.is_readable()):
                outbox.release()
                outbox.turn.time = 0.0
                await trio.sleep(PAUSE)
            passes = max(passes, self._may_have_more)

    def take_over(self) -> None:
        """Reserve the socket for a server.

        Raises:
          trio.BusyResourceError: Another server runs on it, or a task is receiving from it.
        """
        if self.served or self.awaited:
            raise trio.BusyResourceError("something else is already receiving from this endpoint")
        self.served = True

    def take_ahead(self, most: int) -> list[Received]:
        """Take what was read ahead, at most so many datagrams."""
        return [self.ahead.popleft() for _ in range(min(most, len(self.ahead)))]

    def handed_out(self) -> tuple[int, int, int]:
        """Count what was handed out so far: datagrams, their bytes, and datagrams that were truncated instead."""
        counts = self.engine.counts
        bytes_ahead = sum(len(payload) for payload, _, _ in self.ahead)
        return counts.received - len(self.ahead), counts.bytes_received - bytes_ahead, counts.truncated

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

    def _count_error(self, error: OSError) -> None:
        outbox = self.outbox
        outbox.counts.count_receive_error(error)
        outbox.log.count(error)
        fault = fault_of(error)
        is_passing_answer = fault is Fault.ANSWER and self.back_off.read_answer()
        if not is_passing_answer and (fault is Fault.MACHINE or self.back_off.persists(1)):
            outbox.log.write(describe(self.engine.bound_address), error, reason_for(error))
        if isinstance(error, ConnectionRefusedError):
            self.refusal = error
