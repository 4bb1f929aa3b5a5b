"""What the documentation says about speed and memory, and the figure that each is from.

A claim that is not in this list has no place in the documentation. ``tests/project/test_benchmarks.py`` checks that the
words are there; whether the figure still fits is for whoever publishes new results to see, in results.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from figures import Results
from tables import table


class Claim(NamedTuple):
    document: str
    words: str
    said: float | None  # None: words only, for the reader to compare
    unit: str
    row: str  # where the figure is in the results
    measured: Callable[[Results], float | None]


def table_of(results: Results) -> str:
    rows = []
    for claim in CLAIMS:
        measured = claim.measured(results)
        shown = "not measured" if measured is None else f"{measured:,.3g} {claim.unit}".strip()
        if measured is not None and claim.said is not None and not 0.85 < measured / claim.said < 1.18:
            shown = f"**{shown}**"
        rows.append([f"`{claim.document}`", f"“{claim.words.replace('|', '·')}”", claim.row, shown])
    return table(["where", "words", "row of the results", "measured"], rows)


def _ratio(shape: str, server: str, to: str = "uvloop", key: str = "micros") -> Callable[[Results], float | None]:
    def measured(results: Results) -> float | None:
        ratio = results.ratio(shape, server, to, key)
        return ratio and ratio.middle

    return measured


def _figure(shape: str, server: str, key: str = "micros", factor: float = 1) -> Callable[[Results], float | None]:
    def measured(results: Results) -> float | None:
        middle = results.middle(shape, server, key)
        return middle and middle * factor

    return measured


def _worth(technique: str, shape: str) -> Callable[[Results], float | None]:
    """The share of CPU time that a technique saves."""

    def measured(results: Results) -> float | None:
        ratio = results.ratio(shape, "trio_udp", to="trio_udp", without=technique)
        return ratio and 100 * (1 - 1 / ratio.middle)

    return measured


CLAIMS: list[Claim] = []
