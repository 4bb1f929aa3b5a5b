"""Randomness outside the network: Trio's task order within one pass, and the jitter of ``backoff``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from .._trio import seeded_scheduler
from ..layers.request import JITTER


def deterministic_scheduling(seed: int) -> AbstractContextManager[None]:
    """Let a seed determine Trio's task order and the jitter of :func:`~trio_udp.backoff` within a block.

    ``with deterministic_scheduling(seed): trio.run(...)`` then gives the same run each time, if the program itself is
    deterministic: with ``trio.testing.MockClock``, with a :class:`SimulatedNetwork` instead of a real one, and without
    threads. The fixture ``simulated_network`` does this for its test.

    Raises:
      TypeError: The seed is not an int.
    """
    check_seed(seed)
    return _seeded(seed)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    state = JITTER.getstate()
    JITTER.seed(seed)
    try:
        with seeded_scheduler(seed):
            yield
    finally:
        JITTER.setstate(state)


def check_seed(seed: object) -> None:
    if not isinstance(seed, int):  # None would mean a different seed each time
        raise TypeError(f"seed must be an int, not {seed!r}")
