"""The results of one run of the benchmark with one Python: medians, spreads, and ratios within a turn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeAlias

REFERENCE = "uvloop"  # ratios are to this server, unless another is named


class Spread(NamedTuple):
    """The median of several turns, and the lowest and the highest, without a tenth of them at either end."""

    middle: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        values = sorted(values)
        outside = len(values) // 10
        return cls(median(values), values[outside], values[-1 - outside]) if values else None

    def times(self, factor: float) -> Spread:
        return Spread(*(value * factor for value in self))

    def inverse(self) -> Spread:
        return Spread(1 / self.middle, 1 / self.most, 1 / self.least)

    def show(self, digits: int = 2) -> str:
        middle, least, most = (f"{value:,.{digits}f}" for value in self)
        return middle if least == most else f"{middle} ({least} - {most})"


class Results:
    """The results of one run, as run.py keeps them."""

    def __init__(self, kept: dict[str, Any]) -> None:
        self.kept = kept
        self.python: str = kept["python"]
        self.titles: dict[str, str] = kept["titles"]
        self._figures: dict[tuple[str, str, str | None], dict[int, dict[str, float]]] = {}
        for run in kept["runs"]:
            key = run["shape"], run["server"], run["without"]
            self._figures.setdefault(key, {})[run["turn"]] = run["figures"]

    @property
    def name(self) -> str:
        """The name of its files: the version of Python without the last number."""
        found = re.search(r"(\d+)\.(\d+)", self.python)
        assert found
        return f"python-{found[0]}{'t' if 'free-threaded' in self.python else ''}"

    @property
    def age(self) -> tuple[int, ...]:
        """Greater for a newer Python."""
        return tuple(map(int, re.findall(r"\d+", self.python)))

    def servers(self, shape: str) -> list[str]:
        return [server for in_shape, server, without in self._figures if in_shape == shape and without is None]

    def techniques(self) -> tuple[list[str], list[str]]:
        """Return the techniques that trio_udp was measured without, and the shapes that this was measured in."""
        found = [(without, shape) for shape, _, without in self._figures if without]
        return list(dict.fromkeys(it for it, _ in found)), list(dict.fromkeys(it for _, it in found))

    def turns(self, shape: str, server: str, without: str | None = None) -> list[dict[str, float]]:
        return [*self._figures.get((shape, server, without), {}).values()]

    def spread(self, shape: str, server: str, key: str = "micros") -> Spread | None:
        return Spread.of(figures[key] for figures in self.turns(shape, server))

    def middle(self, shape: str, server: str, key: str = "micros") -> float | None:
        spread = self.spread(shape, server, key)
        return spread and spread.middle

    def ratio(
        self, shape: str, server: str, to: str = REFERENCE, key: str = "micros", without: str | None = None
    ) -> Spread | None:
        """Return the ratios of two servers in the same turns."""
        mine, theirs = self._figures.get((shape, server, without), {}), self._figures.get((shape, to, None), {})
        return Spread.of(figures[key] / theirs[at][key] for at, figures in mine.items() if at in theirs)

    def difference(self, shape: str, server: str, to: str, to_shape: str | None = None) -> Spread | None:
        """Return how many more µs one server takes than another in the same turns."""
        key = "micros"
        mine, theirs = (
            self._figures.get((shape, server, None), {}),
            self._figures.get((to_shape or shape, to, None), {}),
        )
        return Spread.of(figures[key] - theirs[at][key] for at, figures in mine.items() if at in theirs)

    def keep(self, folder: Path) -> None:
        """Write the results into a folder, a line for each run."""
        head = {key: value for key, value in self.kept.items() if key != "runs"}
        runs = ",\n".join(json.dumps(run | {"figures": _short(run["figures"])}) for run in self.kept["runs"])
        text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
        (folder / f"{self.name}.json").write_text(f'{text},\n "runs": [\n{runs}\n]\n}}\n')


def _short(figures: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{figure:.6g}") for name, figure in figures.items()}


def kept_in(folder: Path) -> list[Results]:
    """Return all results in a folder: those with the most shapes first, then the newest Python."""
    found = [Results(json.loads(file.read_text())) for file in folder.glob("python-*.json")]
    return sorted(found, key=lambda results: (len(results.titles), results.age), reverse=True)


# ---- figures to look up, in any results ----

Figure: TypeAlias = Callable[[Results], Spread | None]


def value(shape: str, server: str, key: str = "micros", factor: float = 1) -> Figure:
    def look_up(results: Results) -> Spread | None:
        spread = results.spread(shape, server, key)
        return spread and spread.times(factor)

    return look_up


def per_second(shape: str, server: str) -> Figure:
    """Datagrams for each second of CPU time."""

    def look_up(results: Results) -> Spread | None:
        micros = results.spread(shape, server)
        return micros and micros.inverse().times(1e6)

    return look_up


def ratio(
    shape: str,
    server: str,
    to: str = REFERENCE,
    key: str = "micros",
    without: str | None = None,
    *,
    inverse: bool = False,
) -> Figure:
    def look_up(results: Results) -> Spread | None:
        found = results.ratio(shape, server, to, key, without)
        return found and (found.inverse() if inverse else found)

    return look_up


def beyond(shape: str, server: str, to: str, to_shape: str | None = None) -> Figure:
    """How many more µs one server takes than another."""
    return lambda results: results.difference(shape, server, to, to_shape)
