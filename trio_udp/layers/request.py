"""Ask until there is an answer: a function over any channel. The protocol decides what an answer looks like."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import attrs
import trio

from .._handlers import is_async
from .._limits import check_number, check_seconds

T = TypeVar("T")

# A random generator of its own, so that trio_udp.testing can make runs repeatable without touching the program's.
JITTER = random.Random()

# Seconds from a refusal to the next receive: a channel that refuses for ever must not make this loop spin.
PAUSE = 0.01

_asking: set[int] = set()  # ids of channels with a running request, which keeps its channel alive


class NoAnswerError(trio.TooSlowError):
    """:func:`request` got no answer in any of its waits.

    Attributes:
      attempts: How often it asked.
      unmatched: Payloads that arrived meanwhile and were dropped, because ``matches`` rejected them.
      refused: Refusals by the network: the peer's port was closed.
    """

    attempts: int
    unmatched: int
    refused: int

    def __init__(self, attempts: int, unmatched: int, refused: int) -> None:
        super().__init__(attempts, unmatched, refused)
        self.attempts, self.unmatched, self.refused = attempts, unmatched, refused

    def __str__(self) -> str:
        return (
            f"no answer; asked {self.attempts} times, {self.refused} refused; {self.unmatched} payloads did not match"
        )


@attrs.frozen
class Backoff(Iterable[float]):
    """Waits with random jitter, drawn again in each iteration."""

    first: float
    attempts: int
    factor: float
    jitter: float
    most: float

    def __iter__(self) -> Iterator[float]:
        wait = self.first
        for _ in range(self.attempts):
            yield wait * JITTER.uniform(1 - self.jitter, 1 + self.jitter)
            wait = min(wait * self.factor, self.most)


def backoff(
    first: float = 1.0, *, attempts: int = 4, factor: float = 2.0, jitter: float = 0.1, most: float = 60.0
) -> Iterable[float]:
    """Return growing waits for :func:`request`: by default about 1, 2, 4 and 8 seconds. Can be reused.

    Args:
      first: Seconds to wait for an answer after asking for the first time.
      attempts: How often to ask.
      factor: The length of each wait as a multiple of the previous one.
      jitter: Each wait is longer or shorter by up to this fraction, at random, so that clients that lost their answers
        at the same time do not ask again at the same time.
      most: Seconds of the longest wait, before jitter.

    Raises:
      TypeError, ValueError: An argument is invalid.
    """
    if not isinstance(attempts, int) or isinstance(attempts, bool):
        raise TypeError(f"attempts must be an int, not {attempts!r}")
    if attempts < 1:
        raise ValueError(f"attempts must be at least 1, not {attempts!r}")
    first, most = check_seconds("first", first), check_seconds("most", most)
    if not first <= most:
        raise ValueError(f"most must be at least first, {first!r}, not {most!r}")
    factor, jitter = check_number("factor", factor), check_number("jitter", jitter)
    if not 1 <= factor < float("inf"):
        raise ValueError(f"factor must be at least 1, not {factor!r}")
    if not 0 <= jitter < 1:
        raise ValueError(f"jitter must be at least 0 and less than 1, not {jitter!r}")
    return Backoff(first, attempts, factor, jitter, most)


async def request(
    channel: trio.abc.Channel[T], payload: T, matches: Callable[[T], object], *, waits: Iterable[float] = backoff()
) -> T:
    """Send a payload and return the answer to it; send it again, after each wait without one.

    The server may get it more than once. Any other payload that arrives meanwhile is dropped, above all late and
    duplicate answers to earlier requests. Otherwise one of those would be taken for the answer to this request, and
    every later answer for that to the next.

    Args:
      channel: Any channel: a :class:`Connection`, a :class:`Client`, a :class:`TypedChannel`.
      payload: The request, with something in it that its answer repeats, for example a random number.
      matches: ``matches(payload)`` says whether a payload is the answer. It sees every payload that arrives, also from
        anyone who can forge the peer's address. Its exceptions are raised here.
      waits: Seconds to wait for an answer, each time that the request is sent: ``backoff(...)``, or any numbers. A
        generator can decide each wait when its turn comes.

    Errors:
      :class:`NoAnswerError`, a ``trio.TooSlowError``, after the last wait. A ``ConnectionRefusedError`` is not raised,
      since the server may be restarting: it means "no answer yet". ``trio.BusyResourceError``: another request, or
      another receiver, uses the channel. Other errors of the channel are raised unchanged. An invalid argument raises
      ``TypeError`` or ``ValueError``.

    Cancellation:
      Loses no payload that the channel holds. The next request drops an answer that comes late.
    """
    if not isinstance(channel, trio.abc.SendChannel) or not isinstance(channel, trio.abc.ReceiveChannel):
        raise TypeError(f"channel must be a trio.abc.Channel, not {channel!r}")
    if not callable(matches) or is_async(matches):
        raise TypeError(f"matches must be a plain function of a payload, not {matches!r}")
    if not isinstance(waits, Iterable):
        raise TypeError(f"waits must be numbers of seconds, such as (1, 2) or backoff(), not {waits!r}")
    if id(channel) in _asking:
        raise trio.BusyResourceError("another task is already making a request over this channel")
    attempts = unmatched = refused = 0
    _asking.add(id(channel))
    try:
        for wait in waits:
            with trio.move_on_after(check_seconds("each of waits", wait)):
                attempts += 1
                refused += await _send(channel, payload)
                while True:
                    try:
                        answer = await channel.receive()
                    except ConnectionRefusedError:
                        refused += 1
                        await trio.sleep(PAUSE)
                        continue
                    if matches(answer):
                        return answer
                    unmatched += 1
    finally:
        _asking.discard(id(channel))
    if not attempts:
        raise ValueError(f"waits must have at least one number of seconds, and {waits!r} has none (left)")
    raise NoAnswerError(attempts, unmatched, refused)


async def _send(channel: trio.abc.Channel[T], payload: T) -> int:
    """Send, at most twice, because the refusal of an earlier datagram may keep this one back. Return the refusals."""
    for refused in range(2):
        try:
            await channel.send(payload)
            return refused
        except ConnectionRefusedError:
            pass
    return 2
