"""The bounded memory channel of one client: filled by the receive loop, emptied by one handler.

Not ``trio.open_memory_channel``: an inbox is bounded in bytes too, alone and together with all others, chooses what to
drop, and hands out what waits without running other tasks each time.
"""

from __future__ import annotations

from collections import deque
from typing import Any, cast

import attrs
import trio

from ._limits import Limits


def _make_sleep() -> object:
    asleep = trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.SUCCEEDED)  # noqa: ASYNC105
    try:
        return asleep.send(None)
    finally:
        asleep.close()


# What a task yields to Trio's loop to sleep until it is rescheduled or cancelled. It is what wait_task_rescheduled()
# yields, made once: the coroutines and the outcome that it makes for each wait cost 0.9 µs, of an echo of 6 µs.
# One will do for all tasks, since being cancelled needs nothing of ours done.
SLEEP = _make_sleep()

# What comes back: a payload, or this if there is none. When the task is cancelled, an outcome comes back that raises.
WOKEN: Any = None

# In place of a deque, which is 620 bytes, until two datagrams wait at once.
NOTHING: Any = ()


@attrs.define(eq=False)
class InboxTally:
    """Running counts over all inboxes of one server."""

    waiting: int = 0
    waiting_bytes: int = 0
    delivered: int = 0
    dropped_inbox_full: int = 0
    dropped_at_end: int = 0


@attrs.define(eq=False)
class Inbox:
    """Payloads in arrival order, and the task that waits for the next one."""

    _limits: Limits
    _totals: InboxTally
    payloads: deque[bytes] = attrs.field(default=NOTHING, init=False)
    receiver: trio.lowlevel.Task | None = attrs.field(default=None, init=False)
    delivered: int = attrs.field(default=0, init=False)
    dropped_inbox_full: int = attrs.field(default=0, init=False)
    dropped_at_end: int = attrs.field(default=0, init=False)
    # Bytes waiting are the difference of these two: running totals, so that each event costs one addition.
    bytes_received: int = attrs.field(default=0, init=False)
    _bytes_gone: int = attrs.field(default=0, init=False)

    @property
    def received(self) -> int:
        return self.delivered + len(self.payloads) + self.dropped_inbox_full + self.dropped_at_end

    def put(self, payload: bytes) -> None:
        """Give a datagram that has arrived to the task that waits for it, or keep it, or drop one by policy."""
        size = len(payload)
        limits, totals = self._limits, self._totals
        self.bytes_received += size
        if (
            len(self.payloads) >= limits.inbox_datagrams
            or self.bytes_received - self._bytes_gone > limits.inbox_bytes
            or totals.waiting_bytes + size > limits.total_bytes
        ) and not self._make_room(size):
            self._bytes_gone += size
            self.dropped_inbox_full += 1
            totals.dropped_inbox_full += 1
            self.wake()  # if all inboxes together were full, and this one empty: the client is not silent
            return
        receiver = self.receiver
        if receiver is not None and receiver.custom_sleep_data is self:  # is_awaited; then nothing waits here
            self._bytes_gone += size
            self.delivered += 1
            totals.delivered += 1
            trio.lowlevel.reschedule(receiver, cast("Any", payload))
            return
        if self.payloads is NOTHING:
            self.payloads = deque()
        self.payloads.append(payload)
        totals.waiting += 1
        totals.waiting_bytes += size

    def take(self) -> bytes:
        """Return the oldest payload; there must be one."""
        payload = self.payloads.popleft()
        size = len(payload)
        totals = self._totals
        self._bytes_gone += size
        totals.waiting_bytes -= size
        totals.waiting -= 1
        totals.delivered += 1
        self.delivered += 1
        return payload

    def shrink(self) -> None:
        """Give back the memory of an empty inbox."""
        if not self.payloads:
            self.payloads = NOTHING

    @property
    def is_awaited(self) -> bool:
        """Whether a task sleeps here, and nothing has happened yet that will wake it."""
        return self.receiver is not None and self.receiver.custom_sleep_data is self

    def wake(self) -> None:
        """Let the receiver, if there is one, look again."""
        if self.receiver is not None and self.is_awaited:
            trio.lowlevel.reschedule(self.receiver, WOKEN)

    def hand_over(self, successor: Inbox) -> None:
        """Move what waits here to an empty inbox of the same server, as if it had arrived there."""
        size = self.bytes_received - self._bytes_gone
        self.bytes_received -= size
        successor.bytes_received += size
        successor.payloads, self.payloads = self.payloads, NOTHING

    def drop_all(self) -> None:
        """Drop what waits here: the conversation is over."""
        while self.payloads:
            self._remove_oldest()
            self.dropped_at_end += 1
            self._totals.dropped_at_end += 1

    def _make_room(self, size: int) -> bool:
        """Drop what has waited the longest for one of ``size`` bytes, if that is the policy and is of any use."""
        limits, totals = self._limits, self._totals
        elsewhere = totals.waiting_bytes - (self.bytes_received - size - self._bytes_gone)
        bytes_allowed = min(limits.inbox_bytes, limits.total_bytes - elsewhere)
        if limits.when_inbox_full == "drop_newest" or size > bytes_allowed:
            return False
        while len(self.payloads) >= limits.inbox_datagrams or self.bytes_received - self._bytes_gone > bytes_allowed:
            self._remove_oldest()
            self.dropped_inbox_full += 1
            totals.dropped_inbox_full += 1
        return True

    def _remove_oldest(self) -> None:
        size = len(self.payloads.popleft())
        self._bytes_gone += size
        self._totals.waiting -= 1
        self._totals.waiting_bytes -= size
