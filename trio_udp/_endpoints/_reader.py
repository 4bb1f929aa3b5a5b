"""Receiving from one socket: waiting for datagrams and reading them in batches.

A server's receive loop reads with :meth:`Reader.next_batch`. Where no server runs, see _one_by_one.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress

import attrs
import trio
from trio.lowlevel import Task, current_task

from .._trio import will_be_cancelled
from ._address import describe
from ._back_off import PAUSE, BackOff
from ._faults import Fault, fault_of, reason_for
from ._outbox import Outbox
from .engines import BATCH, Engine, Received

# Seconds. After a wait that was shorter than this, look for the next datagram in one more pass before waiting again:
# beginning a wait and being woken take as long as an answer. A round trip between two programs of one machine then
# takes a quarter less. Where datagrams come further apart, nothing changes.
SHORT_WAIT = 100e-6


@attrs.define(eq=False)
class Reader:
    """Reads one socket in batches.

    Attributes:
      shared: Another process holds the same socket and reads it after us.
      served: A server runs on the endpoint.
      awaited: A task waits for a datagram in :class:`OneByOne`.
      finished: The socket is no longer read; datagrams that arrive stay in the kernel.
      may_have_more: The kernel may have more datagrams: the last read filled its batch, or failed.
      ahead: Datagrams read but not yet handed out: :class:`OneByOne` returns one at a time.
      hand_out: Called with each batch that a server reads; see :meth:`next_batch`.
      early: :class:`EachPass` reads, just before the task in :meth:`next_batch` runs.
      fail: Ends the server with an error.
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
    hand_out: Callable[[list[Received]], None] = attrs.field(default=list.clear, init=False)
    early: bool = attrs.field(default=False, init=False)
    fail: Callable[[BaseException], None] = attrs.field(init=False)
    _looks_again: bool = attrs.field(default=False, init=False)  # before the next wait: see SHORT_WAIT
    _is_looking: bool = attrs.field(default=False, init=False)  # without a wait, so finding nothing is no fault
    _receiver: Task | None = attrs.field(default=None, init=False)  # the task in next_batch(), until the batch is read
    _failure: BaseException | None = attrs.field(default=None, init=False)  # raised in read_early()

    async def next_batch(self, *, wait: bool = True) -> bool:
        """Wait until datagrams have arrived, read a batch of at most ``BATCH``, and hand it out.

        Returns True, even if the batch is empty: truncated and malformed datagrams are counted and dropped, and a look
        before a wait (``SHORT_WAIT``) may find nothing.
        Checkpoints before it reads and never after, so that cancellation loses no datagram.

        Args:
          wait: If False, do not wait, and return False once the kernel has nothing more.

        Raises:
          trio.ClosedResourceError: The endpoint is closed.
        """
        engine, outbox = self.engine, self.outbox
        while True:
            self._receiver = task = current_task()
            try:
                if self.ahead or self.may_have_more or not wait:
                    await trio.lowlevel.checkpoint()
                elif self._looks_again and self.back_off.has_just_read:
                    self._is_looking = True
                    await trio.lowlevel.checkpoint()
                else:
                    if not self.early:  # otherwise Outbox.end_pass() sets it
                        outbox.turn.time = 0.0
                    began = trio.current_time()
                    task.custom_sleep_data = self
                    await engine.wait_readable()
                    self._looks_again = trio.current_time() - began < SHORT_WAIT
                if self._receiver is not None:
                    self._read_and_hand_out()
                    if self.early:  # the program has removed EachPass
                        outbox.end_pass()
            finally:
                self._receiver, self._is_looking = None, False
                if self._failure is not None:  # raise it even if this task has been cancelled since
                    try:
                        raise self._failure
                    finally:
                        self._failure = None
            if self.back_off.has_just_read:
                return True
            if self.back_off.persists() and (self.may_have_more or engine.is_readable()):
                outbox.release()
                if not wait:
                    return False
                outbox.turn.time = 0.0
                await trio.sleep(PAUSE)
            if not wait and not self.may_have_more:
                return False

    def read_early(self) -> None:
        """Read a batch and hand it out, right before the task in :meth:`next_batch` runs, unless it is cancelled."""
        receiver = self._receiver
        assert receiver is not None
        if not will_be_cancelled(receiver):
            self._receiver = None
            try:
                receiver.context.run(self._read_and_hand_out)
            except BaseException as error:  # Trio would only log it; next_batch() raises it
                self._failure = error

    def take_over(self) -> None:
        """Reserve the socket for a server.

        Raises:
          trio.BusyResourceError: Another server runs on it, or a task is receiving from it.
        """
        if self.served or self.awaited:
            raise trio.BusyResourceError("something else is already receiving from this endpoint")
        self.served = True

    def _read_and_hand_out(self) -> None:
        batch: list[Received] = []
        if self.ahead:  # read before the server took over
            batch = self.take_ahead(BATCH)
            self.back_off.read_something()
        elif self.finished and not self.engine.read_ahead:
            self.may_have_more = False
            self.back_off.read_nothing()
        else:
            self.may_have_more = self.read(batch)
        if batch:
            self.hand_out(batch)
        elif self.outbox.collecting:
            self.outbox.collect([], more_follow=False)

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
        elif self._is_looking and not may_have_more:
            self._looks_again = False
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


class EachPass(trio.abc.Instrument):
    """Reads and sends in each pass of Trio's scheduler, before and after the tasks run; for all servers of a run.

    So a handler runs in the pass in which Trio learns that its datagram has arrived, and its reply leaves at the end of
    that pass. If the receive loop's task read the socket, the handler would run one pass later: 8 µs more for a single
    question.
    """

    def __init__(self) -> None:
        self._readers: list[Reader] = []
        self._have_read: list[Reader] = []  # in this pass

    @staticmethod
    def of_this_run() -> EachPass:
        """Return the hook of this run of Trio."""
        hook = _hook.get()
        if hook is None:
            hook = EachPass()
            _hook.set(hook)
        return hook

    def add(self, reader: Reader) -> None:
        if not self._readers:
            trio.lowlevel.add_instrument(self)
        self._readers.append(reader)

    def discard(self, reader: Reader) -> None:
        self._readers.remove(reader)
        if not self._readers:
            _hook.set(None)
            with suppress(KeyError):  # the program has removed it
                trio.lowlevel.remove_instrument(self)

    def after_io_wait(self, timeout: float) -> None:
        for reader in self._readers:
            receiver = reader._receiver
            # Trio clears custom_sleep_data when it wakes a task.
            if receiver is not None and receiver.custom_sleep_data is None:
                self._have_read.append(reader)
                reader.read_early()

    def before_io_wait(self, timeout: float) -> None:
        while self._have_read:
            reader = self._have_read.pop()
            try:
                reader.outbox.end_pass(more_follow=reader.may_have_more)
            except BaseException as error:  # Trio would only log it, and call this hook no more
                reader.fail(error)


_hook: trio.lowlevel.RunVar[EachPass | None] = trio.lowlevel.RunVar("trio_udp", default=None)
