"""Idle expiry: ends conversations whose peer has been silent for too long, with one task for all of them.

Each inbox whose handler has begun to wait has one *due* time, at which its timeout may have passed, and is checked only
then. If the handler has waited long enough, the conversation ends. If it has begun another wait meanwhile, the inbox
gets a new due time. If it is at work, the inbox gets one at its next wait. Due times are rounded up to multiples of an
eighth of the timeout (*ticks*), so that conversations that began at about the same time are checked together, and no
inbox needs a timer.
"""

from __future__ import annotations

import heapq
import math

import attrs
import trio

from ._endpoints import BATCH
from ._inbox import Inbox
from ._lifecycle import IDLE

# Due times are rounded up to this fraction of the timeout.
COARSENESS = 1 / 8

NO_INBOXES: set[Inbox] = set()


@attrs.define(eq=False)
class IdleExpiry:
    """The inboxes of one server, by the tick at which each is due."""

    _inboxes: dict[float, set[Inbox]] = attrs.field(factory=dict, init=False)
    _ticks: list[float] = attrs.field(factory=list, init=False)  # a heap of the keys
    _alarm: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)

    def watch(self, inbox: Inbox, since: float) -> None:
        """Check an inbox once it may have been silent for its idle timeout, counted from ``since``."""
        when = since + inbox.idle_timeout
        inbox.due = when
        if when == math.inf:
            return
        if step := inbox.idle_timeout * COARSENESS:  # 0 if it underflows
            inbox.due = when = when + -when % step
        inboxes = self._inboxes.get(when)
        if inboxes is None:
            inboxes = self._inboxes[when] = set()
            heapq.heappush(self._ticks, when)
            if when < self._alarm.deadline:
                self._alarm.deadline = when
        inboxes.add(inbox)

    def forget(self, inbox: Inbox) -> None:
        """Do not check an inbox any more."""
        if inbox.due is not None:
            inboxes = self._inboxes.get(inbox.due)  # None if due is math.inf
            if inboxes is not None:
                inboxes.discard(inbox)
                if not inboxes:
                    self._drop_tick(inbox.due)
            inbox.due = None

    def timeout_changed(self, inbox: Inbox) -> None:
        """Check an inbox at the time that its new idle timeout requires."""
        if inbox.due is not None:
            self.forget(inbox)
            self.watch(inbox, inbox.waiting_since)  # if this is in the past, the inbox is checked at once

    async def run(self) -> None:
        """End conversations when their idle timeout is over; never returns."""
        while True:
            if self._check_due(trio.current_time()) == BATCH:  # more may be due: let other tasks run first
                await trio.lowlevel.checkpoint()
                continue
            # watch() moves the deadline forward.
            with trio.CancelScope(deadline=self._ticks[0] if self._ticks else math.inf) as self._alarm:
                await trio.sleep_forever()

    def _check_due(self, now: float) -> int:
        """Check up to ``BATCH`` inboxes that are due; return their number."""
        # Not in run(), where a local variable would keep the set of the last tick while the task sleeps: it never
        # shrinks, and takes 8 MB after 100,000 clients.
        checked = 0
        while self._ticks and self._ticks[0] <= now and checked < BATCH:
            inboxes = self._inboxes.get(self._ticks[0], NO_INBOXES)
            while inboxes and checked < BATCH:
                self._check(inboxes.pop(), now)
                checked += 1
            if not inboxes:
                self._inboxes.pop(heapq.heappop(self._ticks), None)
        return checked

    def _drop_tick(self, when: float) -> None:
        del self._inboxes[when]
        # Dropped ticks stay in the heap until their time. Rebuild the heap if distant ones accumulate.
        if len(self._ticks) > 2 * len(self._inboxes) + BATCH:
            self._ticks = list(self._inboxes)
            heapq.heapify(self._ticks)

    def _check(self, inbox: Inbox, now: float) -> None:
        if not inbox.may_expire:
            inbox.due = None  # at work: the next wait registers it again
        elif inbox.waiting_since + inbox.idle_timeout <= now:
            inbox.due = None
            inbox.finish(IDLE)
        else:
            inbox.shrink()  # here because this runs only about once per idle timeout
            self.watch(inbox, inbox.waiting_since)
