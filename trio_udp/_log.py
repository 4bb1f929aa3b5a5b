"""Errors of the user's own functions, in the log: with traceback, but not without end."""

from __future__ import annotations

import logging
from collections.abc import Callable

import attrs
import trio

LOGGER = logging.getLogger("trio_udp")

# A stranger who finds a payload that makes a handler raise can send a million of them.
TRACEBACKS_PER_SECOND = 10


@attrs.define(eq=False)
class ErrorLog:
    """Writes the first errors of every second in full, and of the others only how many there were."""

    _now: Callable[[], float]
    _second_ends: float = attrs.field(default=float("-inf"), init=False)
    _written: int = attrs.field(default=0, init=False)
    _suppressed: int = attrs.field(default=0, init=False)
    _suppressing: trio.Event = attrs.field(factory=trio.Event, init=False)

    def write(self, error: Exception, message: str, *args: object) -> None:
        now = self._now()
        if now >= self._second_ends:
            self.write_suppressed()
            self._second_ends = now + 1
            self._written = 0
        if self._written < TRACEBACKS_PER_SECOND:
            self._written += 1
            LOGGER.error(message, *args, exc_info=error)
        else:
            self._suppressed += 1
            self._suppressing.set()

    def write_suppressed(self) -> None:
        """Write how many errors were not written, if any."""
        if self._suppressed:
            LOGGER.error("%d more errors suppressed", self._suppressed)
            self._suppressed = 0

    async def write_suppressed_in_time(self) -> None:
        """See to it that the number is written when the second is over, even if no error follows."""
        while True:
            await self._suppressing.wait()
            await trio.sleep_until(self._second_ends)
            self._suppressing = trio.Event()
            self.write_suppressed()
