"""Trio's own dice: it runs the tasks of one pass in random order, so that nobody relies on any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio


@contextmanager
def deterministic_scheduling(seed: int) -> Iterator[None]:
    """Let a seed decide in which order Trio runs its tasks.

    ``with deterministic_scheduling(seed): trio.run(...)`` does the same each time, if what runs does: with
    ``trio.testing.MockClock``, a :class:`SimulatedNetwork` in place of the real one, and no threads. The fixture
    ``simulated_network`` does this for its test.
    """
    check_seed(seed)
    # Trio has no public way. Its own plugin for pytest sets the same two, for Hypothesis.
    scheduler = trio._core._run
    state, allowed = scheduler._r.getstate(), scheduler._ALLOW_DETERMINISTIC_SCHEDULING
    scheduler._r.seed(seed)
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    try:
        yield
    finally:
        scheduler._r.setstate(state)
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = allowed  # type: ignore[misc]


def check_seed(seed: object) -> None:
    if not isinstance(seed, int):  # None would mean another one each time
        raise TypeError(f"seed must be an int, not {seed!r}")
