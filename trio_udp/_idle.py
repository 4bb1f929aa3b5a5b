"""Idle expiry: ends conversations whose peer has been silent for too long, with one task for all of them.

Each inbox is *due* at one moment, when its timeout could be over; only then is it looked at. Either its handler has
been waiting for long enough, or the next moment is known. Moments are rounded up to multiples of an eighth of the
timeout (*ticks*), so that conversations that began at about the same time are looked at together, and an inbox costs no
timer.
"""

from __future__ import annotations

import heapq
import math

import attrs
import trio

from ._endpoints import BATCH
from ._inbox import Inbox
from ._lifecycle import IDLE

# The part of an idle timeout that moments are rounded up to. It is also how late a timeout can be.
COARSENESS = 1 / 8

NOBODY: set[Inbox] = set()


@attrs.define(eq=False)
class IdleExpiry:
    """The inboxes of one server, by the tick at which each is due."""

    _inboxes: dict[float, set[Inbox]] = attrs.field(factory=dict, init=False)
    _ticks: list[float] = attrs.field(factory=list, init=False)  # a heap of the keys
    _alarm: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)

    def watch(self, inbox: Inbox, since: float) -> None:
        """Look at an inbox when it has been silent for its idle timeout, counted from ``since``."""
        when = since + inbox.idle_timeout
        inbox.due = when
        if when == math.inf:
            return
        if step := inbox.idle_timeout * COARSENESS:  # 0 where that is less than the least number
            inbox.due = when = when + -when % step
        inboxes = self._inboxes.get(when)
        if inboxes is None:
            inboxes = self._inboxes[when] = set()
            heapq.heappush(self._ticks, when)
            if when < self._alarm.deadline:
                self._alarm.deadline = when
        inboxes.add(inbox)

    def forget(self, inbox: Inbox) -> None:
        """Let go of an inbox."""
        if inbox.due is not None:
            inboxes = self._inboxes.get(inbox.due)  # none where it is due at no time
            if inboxes is not None:
                inboxes.discard(inbox)
                if not inboxes:
                    self._drop_tick(inbox.due)
            inbox.due = None

    def timeout_changed(self, inbox: Inbox) -> None:
        """Look at an inbox in time for another idle timeout."""
        if inbox.due is not None:
            self.forget(inbox)
            self.watch(inbox, inbox.waiting_since)  # in the past where no silence lasts: then look at it now

    async def run(self) -> None:
        """End conversations when their idle timeout is over; runs for ever."""
        while True:
            now = trio.current_time()
            looked_at = 0
            while self._ticks and self._ticks[0] <= now and looked_at < BATCH:
                inboxes = self._inboxes.get(self._ticks[0], NOBODY)
                while inboxes and looked_at < BATCH:
                    self._look_at(inboxes.pop(), now)
                    looked_at += 1
                if not inboxes:
                    self._inboxes.pop(heapq.heappop(self._ticks), None)
            if looked_at == BATCH:  # more may be due: let others run first
                await trio.lowlevel.checkpoint()
                continue
            # An alarm clock: watch() puts it forward.
            with trio.CancelScope(deadline=self._ticks[0] if self._ticks else math.inf) as self._alarm:
                await trio.sleep_forever()

    def _drop_tick(self, when: float) -> None:
        del self._inboxes[when]
        # The heap lets go of a tick when its time has come. Handlers may set many timeouts that are far away.
        if len(self._ticks) > 2 * len(self._inboxes) + BATCH:
            self._ticks = list(self._inboxes)
            heapq.heapify(self._ticks)

    def _look_at(self, inbox: Inbox, now: float) -> None:
        if not inbox.may_expire:
            inbox.due = None  # at work: it is watched again when the next wait begins
        elif inbox.waiting_since + inbox.idle_timeout <= now:
            inbox.due = None
            inbox.finish(IDLE)
        else:
            inbox.shrink()  # here because it is seldom: about once in an idle timeout
            self.watch(inbox, inbox.waiting_since)
