"""Trio's random task order: Trio runs the tasks of one pass in random order, so that no program relies on one."""

from __future__ import annotations

from contextlib import AbstractContextManager

from .._trio import seeded_scheduler


def deterministic_scheduling(seed: int) -> AbstractContextManager[None]:
    """Let a seed decide in which order Trio runs its tasks, until the ``with`` block ends.

    ``with deterministic_scheduling(seed): trio.run(...)`` does the same each time if the program does: with
    ``trio.testing.MockClock``, with a :class:`SimulatedNetwork` instead of a real one, and without threads. The fixture
    ``simulated_network`` does this for its test.
    """
    check_seed(seed)
    return seeded_scheduler(seed)


def check_seed(seed: object) -> None:
    if not isinstance(seed, int):  # None would mean a different seed each time
        raise TypeError(f"seed must be an int, not {seed!r}")
