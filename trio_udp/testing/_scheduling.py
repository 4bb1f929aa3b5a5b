"""Randomness outside the network: Trio's order of the tasks of one pass, and the jitter of ``backoff``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from .._trio import seeded_scheduler
from ..layers.request import JITTER


def deterministic_scheduling(seed: int) -> AbstractContextManager[None]:
    """Let a seed decide in which order Trio runs its tasks, and the jitter of :func:`~trio_udp.backoff`, in a block.

    ``with deterministic_scheduling(seed): trio.run(...)`` does the same each time if the program does: with
    ``trio.testing.MockClock``, with a :class:`SimulatedNetwork` instead of a real one, and without threads. The fixture
    ``simulated_network`` does this for its test.
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
