"""Errors of the user's own functions, in the log: with traceback, but not without end."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import attrs
import trio

LOGGER = logging.getLogger("trio_udp")

# A stranger who finds a payload that makes a handler raise can send a million of them.
TRACEBACKS_PER_SECOND = 10


@attrs.define(eq=False)
class ErrorLog:
    """Writes the first errors of any second in full, and of the others only how many there were."""

    _now: Callable[[], float]
    _written: deque[float] = attrs.field(factory=lambda: deque(maxlen=TRACEBACKS_PER_SECOND), init=False)  # when
    _suppressed: int = attrs.field(default=0, init=False)
    _suppressing: trio.Event = attrs.field(factory=trio.Event, init=False)

    def write(self, error: Exception, message: str, *args: object) -> None:
        now = self._now()
        if len(self._written) < TRACEBACKS_PER_SECOND or now - self._written[0] >= 1:
            self.write_suppressed()
            self._written.append(now)
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
        """See to it that the number is written when errors may be again, even if none follows."""
        while True:
            await self._suppressing.wait()
            await trio.sleep_until(self._written[0] + 1)
            self._suppressing = trio.Event()
            self.write_suppressed()
