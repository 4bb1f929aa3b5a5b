"""The bounded memory channel of one client: filled by the receive loop, emptied by one handler.

Not ``trio.open_memory_channel``: an inbox is bounded in bytes too, alone and together with all others, chooses what
to drop, and has a single receiver, which makes it about four times cheaper per datagram.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import attrs
import trio

from ._limits import Limits


@attrs.define(eq=False)
class InboxTotals:
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
    _totals: InboxTotals
    payloads: deque[bytes] = attrs.field(factory=deque, init=False)
    receiver: trio.lowlevel.Task | None = attrs.field(default=None, init=False)
    waiting_bytes: int = attrs.field(default=0, init=False)
    received: int = attrs.field(default=0, init=False)
    bytes_received: int = attrs.field(default=0, init=False)
    delivered: int = attrs.field(default=0, init=False)
    dropped_inbox_full: int = attrs.field(default=0, init=False)
    dropped_at_end: int = attrs.field(default=0, init=False)

    def put(self, payload: bytes) -> None:
        """Add a datagram that has arrived, or drop one by policy; wake the receiver. Never waits."""
        size = len(payload)
        totals = self._totals
        self.received += 1
        self.bytes_received += size
        if self._is_full_for(size) and not self._make_room(size):
            self.dropped_inbox_full += 1
            totals.dropped_inbox_full += 1
            return
        self.payloads.append(payload)
        self.waiting_bytes += size
        totals.waiting += 1
        totals.waiting_bytes += size
        if self.receiver is not None:
            self.wake()

    def take(self) -> bytes:
        """Return the oldest payload; there must be one."""
        payload = self._remove_oldest()
        self.delivered += 1
        self._totals.delivered += 1
        return payload

    async def wait(self) -> None:
        """Sleep until something is put here or :meth:`wake` is called; a cancelled wait takes nothing with it."""
        self.receiver = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._give_up)

    def wake(self) -> None:
        """Let the receiver, if there is one, look again."""
        if self.receiver is not None:
            trio.lowlevel.reschedule(self.receiver)
            self.receiver = None

    def hand_over(self, successor: Inbox) -> None:
        """Move what waits here to an empty inbox of the same server, as if it had arrived there."""
        successor.payloads = self.payloads
        successor.waiting_bytes = successor.bytes_received = self.waiting_bytes
        successor.received = len(self.payloads)
        self.received -= successor.received
        self.bytes_received -= self.waiting_bytes
        self.payloads = deque()
        self.waiting_bytes = 0

    def drop_all(self) -> None:
        """Drop what waits here: the conversation is over."""
        while self.payloads:
            self._remove_oldest()
            self.dropped_at_end += 1
            self._totals.dropped_at_end += 1

    def _is_full_for(self, size: int) -> bool:
        limits = self._limits
        return (
            len(self.payloads) >= limits.inbox_datagrams
            or self.waiting_bytes + size > limits.inbox_bytes
            or self._totals.waiting_bytes + size > limits.total_bytes
        )

    def _make_room(self, size: int) -> bool:
        limits, totals = self._limits, self._totals
        if limits.when_inbox_full == "drop_newest":
            return False
        if size > limits.inbox_bytes or totals.waiting_bytes - self.waiting_bytes + size > limits.total_bytes:
            return False  # dropping everything that waits here would not be enough
        while self._is_full_for(size):
            self._remove_oldest()
            self.dropped_inbox_full += 1
            totals.dropped_inbox_full += 1
        return True

    def _remove_oldest(self) -> bytes:
        payload = self.payloads.popleft()
        size = len(payload)
        self.waiting_bytes -= size
        self._totals.waiting -= 1
        self._totals.waiting_bytes -= size
        return payload

    def _give_up(self, _: Any) -> trio.lowlevel.Abort:
        self.receiver = None
        return trio.lowlevel.Abort.SUCCEEDED
