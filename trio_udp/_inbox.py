"""The bounded memory channel of one client: filled by the receive loop, emptied by one handler.

It is not a ``trio.open_memory_channel`` because it is also bounded in bytes, by itself and together with all other
inboxes; it drops by policy; and receiving a datagram that waits already is not a full checkpoint each time.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Generator
from typing import Any

import attrs
import trio
from trio.lowlevel import Task, reschedule

from ._channel import ChannelState
from ._endpoints import YIELD_EVERY
from ._lifecycle import DRAINING, IDLE, OPEN, RUNNING, STOPPING, End, Phase
from ._limits import Limits
from ._trio import SLEEP

# Stands in for an empty deque, which takes 620 bytes, until the first datagram has to wait.
NOTHING: Any = ()

# Wakes a sleeping receiver without a payload, so that it checks the inbox again.
LOOK_AGAIN: Any = None


@attrs.define(eq=False)
class Shared:
    """The state that all inboxes of one server share: their limits, the server's phase, and running counts."""

    limits: Limits
    phase: Phase = attrs.field(default=RUNNING, init=False)
    waiting_bytes: int = attrs.field(default=0, init=False)
    handed_over: int = attrs.field(default=0, init=False)  # to a waiting task, without being kept
    kept: int = attrs.field(default=0, init=False)
    taken: int = attrs.field(default=0, init=False)  # of the kept ones
    removed: int = attrs.field(default=0, init=False)  # of the kept ones, and dropped
    dropped_inbox_full: int = attrs.field(default=0, init=False)
    dropped_at_end: int = attrs.field(default=0, init=False)

    @property
    def delivered(self) -> int:
        return self.handed_over + self.taken

    @property
    def waiting(self) -> int:
        return self.kept - self.taken - self.removed


@attrs.define(eq=False)
class Inbox(ChannelState):
    """Payloads in arrival order, the task that waits for the next one, and when its wait began.

    Attributes:
      receiver: The task that is receiving. It sleeps while its ``custom_sleep_data`` is this inbox; Trio clears that
        field whenever it wakes a task.
      transactions: The number of open ``with client.transaction()`` blocks.
      waiting_since: When the receiver began to wait, on Trio's clock: the beginning of the peer's silence.
      idle_timeout: Seconds of silence after which the conversation ends.
      due: When idle expiry next checks that time; ``None`` if it will not.
    """

    shared: Shared
    idle_timeout: float
    payloads: deque[bytes] = attrs.field(default=NOTHING, init=False)
    receiver: Task | None = attrs.field(default=None, init=False)
    transactions: int = attrs.field(default=0, init=False)
    waiting_since: float = attrs.field(default=0.0, init=False)
    due: float | None = attrs.field(default=None, init=False)
    bytes_received: int = attrs.field(default=0, init=False)
    delivered: int = attrs.field(default=0, init=False)
    dropped_inbox_full: int = attrs.field(default=0, init=False)
    dropped_at_end: int = attrs.field(default=0, init=False)
    _waiting_bytes: int = attrs.field(default=0, init=False)
    # The value of ``delivered`` when a wait was cut short. While they are equal, the peer has been silent since that
    # wait began.
    _silent_at: int = attrs.field(default=-1, init=False)

    @property
    def received(self) -> int:
        return self.delivered + len(self.payloads) + self.dropped_inbox_full + self.dropped_at_end

    @property
    def is_awaited(self) -> bool:
        """Whether a task sleeps here and nothing has woken it yet."""
        return self.receiver is not None and self.receiver.custom_sleep_data is self

    @property
    def may_expire(self) -> bool:
        """Whether silence counts toward the idle timeout now."""
        return self.is_awaited

    def __aiter__(self) -> Inbox:
        return self

    @trio.lowlevel.enable_ki_protection  # like reschedule(): Ctrl-C cannot interrupt it
    def put(self, payload: bytes) -> None:
        """Hand an arrived datagram to the waiting task, or keep it, or drop one by policy.

        The receive loop has a copy of the first case: see ``to_clients``.
        """
        size = len(payload)
        shared = self.shared
        self.bytes_received += size
        receiver = self.receiver
        if receiver is not None and receiver.custom_sleep_data is self:  # is_awaited, inlined; the inbox is then empty
            self.delivered += 1
            shared.handed_over += 1
            self.outbox.turn.context["runner"].reschedule(receiver, payload)  # reschedule(), inlined
            return
        limits = shared.limits
        if (
            len(self.payloads) >= limits.inbox_datagrams
            or self._waiting_bytes + size > limits.inbox_bytes
            or shared.waiting_bytes + size > limits.total_bytes
        ) and not self._make_room(size):
            self.dropped_inbox_full += 1
            shared.dropped_inbox_full += 1
            return
        if self.payloads is NOTHING:
            self.payloads = deque()
        self.payloads.append(payload)
        self._waiting_bytes += size
        shared.kept += 1
        shared.waiting_bytes += size

    def keep_row(self, payloads: list[bytes]) -> None:
        """Like :meth:`put`, for several datagrams, right after a :meth:`put`: no task waits for them any more."""
        size = sum(map(len, payloads))
        limits, shared = self.shared.limits, self.shared
        if (
            len(self.payloads) + len(payloads) > limits.inbox_datagrams
            or self._waiting_bytes + size > limits.inbox_bytes
            or shared.waiting_bytes + size > limits.total_bytes
        ):
            for payload in payloads:
                self.put(payload)
            return
        if self.payloads is NOTHING:
            self.payloads = deque()
        self.payloads += payloads
        self.bytes_received += size
        self._waiting_bytes += size
        shared.kept += len(payloads)
        shared.waiting_bytes += size

    def put_first(self, payload: bytes) -> None:
        """Keep the first datagram of a new client. Admission has checked that there is room for it."""
        shared, size = self.shared, len(payload)
        self.payloads = deque()
        self.payloads.append(payload)
        self.bytes_received = self._waiting_bytes = size
        shared.kept += 1
        shared.waiting_bytes += size

    @types.coroutine  # "yield from" here means "await"
    def __anext__(self, over: type[Exception] = StopAsyncIteration) -> Generator[Any, Any, bytes]:
        """Wait for the next payload and take it; raise ``over`` once the channel has ended.

        Every receiver waits here; ``async for`` calls it directly. It is a generator that yields to Trio's loop itself,
        because a task that wakes resumes every coroutine on its stack, and each of them costs time. The payload that
        arrives during the sleep is the value that the task wakes with, so cancellation cannot lose it.
        """
        if self.receiver is not None:
            raise trio.BusyResourceError("another task is already receiving from this client")
        turn = self.outbox.turn
        if self.payloads:
            if turn.taken < YIELD_EVERY:
                if turn.context["task"]._cancel_status.effectively_cancelled:  # will_be_cancelled(), inlined
                    yield from trio.lowlevel.checkpoint_if_cancelled()  # noqa: ASYNC105
                turn.taken += 1
                turn.sent = 0
                payload = self.payloads.popleft()  # take(), inlined: 3 % of an echo to a client with a full inbox
                size = len(payload)
                self.delivered += 1
                self._waiting_bytes -= size
                shared = self.shared
                shared.taken += 1
                shared.waiting_bytes -= size
                return payload
            self.receiver = turn.context["task"]  # reserve the datagram for this task
            try:
                turn.taken = 1
                yield from trio.lowlevel.checkpoint()  # noqa: ASYNC105
            finally:
                self.receiver = None
        shared = self.shared
        while not self.payloads:
            if self.end is not OPEN or shared.phase is DRAINING or self.delivered == self._silent_at:
                if self._is_over(turn.now()):
                    turn.taken += 1  # so that a handler that ignores the end lets other tasks run
                    if turn.taken < YIELD_EVERY:
                        yield from trio.lowlevel.checkpoint_if_cancelled()  # noqa: ASYNC105
                    else:
                        turn.taken = 0
                        yield from trio.lowlevel.checkpoint()  # noqa: ASYNC105
                    self.check_open()
                    raise over
                if self.delivered != self._silent_at:
                    self.waiting_since = turn.now()
            else:
                self.waiting_since = turn.time or trio.current_time()
            if self.due is None:
                self._watch()
            self.receiver = task = turn.context["task"]
            task.custom_sleep_data = self
            try:
                outcome = yield SLEEP
            finally:
                self.receiver = None
            if type(outcome) is bytes:
                turn.sent = 0
                return outcome
            self._silent_at = self.delivered
            if outcome is not LOOK_AGAIN:
                try:
                    outcome.unwrap()  # raises Cancelled
                finally:
                    del outcome  # the error's traceback refers to this frame: avoid a reference cycle
        turn.sent = 0
        return self.take()

    def receive_nowait(self) -> bytes:
        """Take the next payload without waiting.

        Raises:
          trio.WouldBlock: Nothing waits, or another task is about to take it.
          trio.EndOfChannel, trio.ClosedResourceError: The channel has ended.
        """
        if self.receiver is not None and not self.is_awaited:
            raise trio.WouldBlock
        if not self.payloads:
            if self._is_over(self.outbox.turn.now()):
                self.check_open()
                raise trio.EndOfChannel
            raise trio.WouldBlock
        return self.take()

    def take(self) -> bytes:
        """Remove and return the oldest payload; there must be one."""
        payload = self.payloads.popleft()
        size = len(payload)
        shared = self.shared
        self._waiting_bytes -= size
        shared.waiting_bytes -= size
        shared.taken += 1
        self.delivered += 1
        return payload

    def take_many(self, most: int) -> list[bytes]:
        """Remove and return the oldest payloads, at most ``most``."""
        many = [self.take() for _ in range(min(most, len(self.payloads)))]
        self.outbox.turn.taken += len(many)
        return many

    def wake(self) -> None:
        """Wake the sleeping receiver, if there is one, to check the inbox again."""
        if self.receiver is not None and self.receiver.custom_sleep_data is self:
            reschedule(self.receiver, LOOK_AGAIN)

    def finish(self, end: End) -> None:
        ChannelState.finish(self, end)
        if self.payloads and self.is_closed:
            self.drop_all()
        if self.receiver is not None:
            self.wake()

    def drop_all(self) -> None:
        """Drop and count all waiting payloads."""
        while self.payloads:
            self._remove_oldest()
            self.dropped_at_end += 1
            self.shared.dropped_at_end += 1

    def shrink(self) -> None:
        """Release the memory of an empty inbox."""
        if not self.payloads:
            self.payloads = NOTHING

    def _watch(self) -> None:
        """Register with idle expiry. Called when a wait begins and ``due`` is ``None``."""

    def _is_over(self, now: float) -> bool:
        """Whether the channel has ended. Ends it first if a drain or the idle timeout says so."""
        if self.end is OPEN:
            if self.shared.phase is DRAINING and not self.transactions:
                self.finish(STOPPING)
            elif self.delivered == self._silent_at and now >= self.waiting_since + self.idle_timeout:
                self.finish(IDLE)  # several cancelled waits together lasted the timeout
        return self.end is not OPEN

    def _make_room(self, size: int) -> bool:
        """Drop the oldest payloads until ``size`` bytes fit; False if the policy forbids that or they can never fit."""
        limits, shared = self.shared.limits, self.shared
        elsewhere = shared.waiting_bytes - self._waiting_bytes
        bytes_allowed = min(limits.inbox_bytes, limits.total_bytes - elsewhere)
        if limits.when_inbox_full == "drop_newest" or size > bytes_allowed:
            return False
        while len(self.payloads) >= limits.inbox_datagrams or self._waiting_bytes + size > bytes_allowed:
            self._remove_oldest()
            self.dropped_inbox_full += 1
            shared.dropped_inbox_full += 1
        return True

    def _remove_oldest(self) -> None:
        size = len(self.payloads.popleft())
        self._waiting_bytes -= size
        self.shared.removed += 1
        self.shared.waiting_bytes -= size
