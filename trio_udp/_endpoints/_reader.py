"""Receiving from one socket: waiting for datagrams and reading them in batches.

A server's receive loop reads with :meth:`Reader.receive_batch`. Where no server runs, see _one_by_one.py.
"""

from __future__ import annotations

from collections import deque

import attrs
import trio

from ._address import describe
from ._back_off import PAUSE, BackOff
from ._faults import Fault, fault_of, reason_for
from ._outbox import Outbox
from .engines import BATCH, Engine, Received


@attrs.define(eq=False)
class Reader:
    """Reads one socket in batches.

    Attributes:
      shared: Another process holds the same socket and reads it after us.
      served: A server runs on the endpoint.
      awaited: A task waits for a datagram in :class:`OneByOne`.
      finished: The socket is no longer read; datagrams that arrive stay in the kernel.
      may_have_more: The last read returned a whole batch, so the kernel may have more.
      ahead: Datagrams read but not yet handed out: :class:`OneByOne` returns one at a time.
      refusal: The last refusal by the peer of a connected socket, until it is raised.
      back_off: Whether reading should pause.
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
    may_have_more: bool = attrs.field(default=False, init=False)

    async def receive_batch(self, *, wait: bool = True) -> list[Received]:
        """Wait until datagrams have arrived; return at least one, at most ``BATCH``, in arrival order.

        Also sends the replies that the outbox has collected. Checkpoints before it reads and never after, so that
        cancellation loses no datagram.

        Args:
          wait: If false, return an empty list once the kernel has nothing more. Also return one after a batch of
            nothing but truncated or malformed datagrams, so that a flood of them cannot keep the caller here.

        Raises:
          trio.ClosedResourceError: The endpoint is closed.
        """
        engine, outbox = self.engine, self.outbox
        batch: list[Received] = []
        if self.ahead:  # read before the server took over
            await trio.lowlevel.checkpoint()
            return self.take_ahead(BATCH)
        # Collect replies for two passes of Trio's scheduler. Trio runs the tasks of one pass in random order, so in the
        # first pass this task may run before the handlers that it has woken.
        passes = 2 if outbox.held else 1 if self.may_have_more or not wait else 0
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
            self.may_have_more = self.read(batch)
            if batch:
                outbox.held = False
                return batch
            if outbox.collecting:
                outbox.collect([], more_follow=False)
            if not wait and self.back_off.has_just_read:
                return batch
            if self.back_off.persists() and (self.may_have_more or engine.is_readable()):
                outbox.release()
                if not wait:
                    return batch
                outbox.turn.time = 0.0
                await trio.sleep(PAUSE)
            passes = max(passes, self.may_have_more)

    def take_over(self) -> None:
        """Reserve the socket for a server.

        Raises:
          trio.BusyResourceError: Another server runs on it, or a task is receiving from it.
        """
        if self.served or self.awaited:
            raise trio.BusyResourceError("something else is already receiving from this endpoint")
        self.served = True

    def take_ahead(self, most: int) -> list[Received]:
        """Remove and return at most ``most`` datagrams that were read ahead."""
        return [self.ahead.popleft() for _ in range(min(most, len(self.ahead)))]

    def read(self, batch: list[Received]) -> bool:
        """Append datagrams that have arrived to ``batch``, without waiting. True if the kernel may have more."""
        received = self.engine.counts.received
        may_have_more = True
        try:
            may_have_more = not self.engine.receive(batch)
        except OSError as error:
            if fault_of(error) is Fault.CLOSED:
                self.outbox.abandon(error)
                raise trio.ClosedResourceError("this endpoint is closed") from error
            self._count_error(error)
        if self.engine.counts.received > received:  # truncated and malformed ones count too
            self.back_off.read_something()
        else:
            self.back_off.read_nothing()
        return may_have_more

    def _count_error(self, error: OSError) -> None:
        outbox = self.outbox
        outbox.counts.count_receive_error(error)
        outbox.log.count(error)
        fault = fault_of(error)
        is_passing_answer = fault is Fault.ANSWER and self.back_off.read_answer()
        if not is_passing_answer and (fault is Fault.MACHINE or self.back_off.persists(1)):
            outbox.log.write(describe(self.engine.bound_address), error, reason_for(error))
        if isinstance(error, ConnectionRefusedError):
            self.refusal = error.with_traceback(None)  # it refers to this frame: avoid a reference cycle
