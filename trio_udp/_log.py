"""The package's log, with limits on how often strangers and faults can make it write."""

from __future__ import annotations

import errno
import logging
from collections import Counter, deque
from collections.abc import Callable
from functools import cache
from itertools import islice

import attrs
import trio

LOGGER = logging.getLogger("trio_udp")

# Logs each message with the same arguments once, not once for each socket: a program may open thousands.
warn_once = cache(LOGGER.warning)

# A stranger who has found a payload that makes a handler raise can send it a million times.
TRACEBACKS_PER_SECOND = 10

# Lines about payloads that do not decode, for all peers together.
LINES_PER_SECOND = 10

# The least time between two lines with the same reason, or about the same errno of the same socket.
SECONDS_OF_SILENCE = 60


@attrs.define(eq=False)
class ErrorLog:
    """Logs the first errors of each second with their tracebacks, and the number of the others."""

    _now: Callable[[], float]
    _written: deque[float] = attrs.field(factory=lambda: deque(maxlen=TRACEBACKS_PER_SECOND), init=False)  # times
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
        """Log the number of suppressed errors, if there are any."""
        if self._suppressed:
            LOGGER.error("%d more errors suppressed", self._suppressed)
            self._suppressed = 0

    async def write_suppressed_in_time(self) -> None:
        """Log the number of suppressed errors as soon as the limit allows, even if no further error comes."""
        while True:
            await self._suppressing.wait()
            await trio.sleep_until(self._written[0] + 1)
            self._suppressing = trio.Event()
            self.write_suppressed()


@attrs.define(eq=False)
class FaultLog:
    """Logs the errors of a socket: each errno at once, then at most once a minute."""

    _count: Counter[int] = attrs.field(factory=Counter, init=False)  # by errno, since it was last written
    _silent_until: dict[int, float] = attrs.field(factory=dict, init=False)

    def count(self, error: OSError) -> None:
        self._count[error.errno or 0] += 1

    def write(self, socket: str, error: OSError, reason: str) -> None:
        code = error.errno or 0
        try:
            now = trio.current_time()
        except RuntimeError:  # an endpoint may be closed outside of Trio
            return
        if now >= self._silent_until.get(code, now):
            self._silent_until[code] = now + SECONDS_OF_SILENCE
            name, count = errno.errorcode.get(code, str(code)), self._count.pop(code)
            LOGGER.warning("%s: %s (%d since last logged): %s", socket, name, count, reason)


@attrs.define(eq=False)
class WarningLog:
    """Logs warnings that strangers can cause: each reason at once, then at most once a minute."""

    _silent_until: dict[str, float] = attrs.field(factory=dict, init=False)

    def warn(self, reason: str, message: str, *args: object) -> None:
        now = trio.current_time()
        if now >= self._silent_until.get(reason, now):
            self._silent_until[reason] = now + SECONDS_OF_SILENCE
            LOGGER.warning(message, *args)


@attrs.define(eq=False)
class PeerLog:
    """Logs payloads that do not decode: at most one line a minute for each peer, and ten lines a second for all.

    It remembers the lines of one minute, so strangers with any number of addresses cannot make it grow without bound.
    """

    _written: dict[str, float] = attrs.field(factory=dict, init=False)  # when, by peer; the oldest first

    def __call__(self, channel: object, payload: bytes, error: Exception) -> None:
        now, peer, written = trio.current_time(), repr(getattr(channel, "peer_address", channel)), self._written
        while written and not now - SECONDS_OF_SILENCE < written[oldest := next(iter(written))] <= now:
            del written[oldest]
        if peer in written:
            return
        last = list(islice(reversed(written.values()), LINES_PER_SECOND))
        if len(last) < LINES_PER_SECOND or now - last[-1] >= 1:
            written[peer] = now
            reason = f"{type(error).__name__}: {error}"[:200]  # may quote the payload, so it is cut and escaped
            LOGGER.warning("skipped a payload of %d bytes from %s: %r", len(payload), peer, reason)
