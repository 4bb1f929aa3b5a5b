"""Tables and charts of the results.

    python benchmarks/report.py FOLDER    # writes them again, from the python-*.json in FOLDER

A folder of results has, for each Python, its figures (python-3.11.json) and all tables of them (python-3.11.md). Read
results.md first: it has all Pythons side by side. The charts show the first. The documentation includes tables
from results.md, and finds them by their headings.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import charts
import claims
from crowds import ROWS as CROWD_ROWS
from figures import REFERENCE, Results, Spread, kept_in
from glance import glance
from native import HERE
from tables import table

METHOD = f"""\
Times in µs are the server's CPU time for each datagram, user and system. The server has a core of its own, and the load
has another. A round starts every server once. In most tables all servers of a round run at once, and the load moves
from one to the next several times a second. In the others a round is one turn. Ratios compare CPU times of the same
turn, because the speed of a machine drifts; unless the table says otherwise, they are ratios to {REFERENCE}. Figures
are medians of all turns, followed in brackets by the lowest and the highest, without a tenth of the turns at either
end. Payloads have 64 bytes, unless the table says otherwise. *Lost* datagrams were not answered within five seconds;
datagrams *out of order* overtook an earlier one of their client. Both are totals of all turns."""


def write(kept: dict[str, Any], folder: Path) -> str:
    """Keep the results of one run beside those with other Pythons; return the page of all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    Results(kept).keep(folder)
    return write_pages(folder)


def write_pages(folder: Path) -> str:
    everything = kept_in(folder)
    for results in everything:
        _write(folder / f"{results.name}.md", _of_one_python(results))
    drawn = charts.draw(everything[0], folder) if find_spec("matplotlib") else []
    return _write(folder / "results.md", _of_all(everything, drawn))


def _write(file: Path, sections: Iterable[str]) -> str:
    text = "\n\n".join(sections) + "\n"
    file.write_text(text)
    return text


# ---- the first page ----


def _of_all(everything: list[Results], drawn: list[str]) -> Iterable[str]:
    yield "# Benchmark results"
    if any(results.kept["quick"] for results in everything):
        yield "**From a quick run, which only shows that everything works. The figures mean little.**"
    yield METHOD
    yield table(
        ["Python", "all tables", "trio", "uvloop", "date", "rounds", "minutes", "machine"],
        [
            [
                results.python,
                f"[{results.name}]({results.name}.md)",
                *(results.kept["versions"][name] for name in ("trio", "uvloop")),
                *(str(results.kept[key]) for key in ("date", "rounds", "minutes", "machine")),
            ]
            for results in everything
        ],
    )
    for name in drawn:
        yield f"![{charts.TITLES[name]}]({name}.svg)"
    yield "## At a glance"
    yield from glance(everything)
    yield "## What is compared, and what is not"
    yield (HERE / "compared.md").read_text().strip()
    yield "## Claims in the documentation, and the measured figures"
    yield claims.table_of(everything[0])


# ---- the page of one Python ----


def _of_one_python(results: Results) -> Iterable[str]:
    kept = results.kept
    yield f"# Benchmark results with {results.python}"
    versions = ", ".join(f"{name} {version}" for name, version in kept["versions"].items())
    left_out = "; ".join(f"{name}, {reason}" for name, reason in kept["left_out"].items()) or "nothing"
    failures = "; ".join(kept["failures"]) or "nothing"
    yield table(
        ["", ""],
        [
            ["date", kept["date"]],
            ["machine", kept["machine"]],
            ["versions", versions],
            ["left out", left_out],
            ["failed", failures],
            ["rounds", f"{kept['rounds']}, each {kept['seconds']} s for each server, in {kept['turns']} turns or one"],
        ],
    )
    yield METHOD
    for shape, title in results.titles.items():
        if shape.startswith(charts.GROWTH) or not results.servers(shape):
            continue
        yield f"## {title}"
        yield _shape_table(results, shape)
    if growth := charts.growth(results):
        yield f"## {charts.TITLES['growth']}, 64 datagrams in flight"
        yield _growth_table(results, growth)
    if results.techniques()[0]:
        yield "## trio_udp without one of its techniques, as a ratio to trio_udp with all of them"
        yield _technique_table(results)


def _shape_table(results: Results, shape: str) -> str:
    keys = [*results.turns(shape, results.servers(shape)[0])[0]]
    if shape == "crowd":
        return _table_by_figure(results, shape, CROWD_ROWS)
    if "micros" in keys:
        return _time_table(results, shape)
    shown = {"share_of_a_core": ("% of a core", 100, 2), "bytes_per_client": ("bytes for each client", 1, 0)}
    return _table_by_figure(results, shape, {key: shown.get(key, (key, 1, 1)) for key in keys})


def _time_table(results: Results, shape: str) -> str:
    """A row for each server."""
    servers = results.servers(shape)
    reference = REFERENCE if REFERENCE in servers else servers[0]
    has_round_trips = results.titles[shape].endswith("round trip")
    header = ["server", "µs", f"/ {reference}", "datagrams/s", "per CPU second", "lost", "out of order"]
    if has_round_trips:
        header += ["round trip p50, µs", f"/ {reference}", "p99, µs"]
    if shape == "arrival":
        header += ["longest round trip, ms"]
    rows = []
    for server in sorted(servers, key=lambda it: results.middle(shape, it) or 0):
        turns = results.turns(shape, server)
        row = [
            server,
            _show(results.spread(shape, server)),
            _show(results.ratio(shape, server, reference)),
            f"{results.middle(shape, server, 'rate'):,.0f}",
            f"{1e6 / (results.middle(shape, server) or 1):,.0f}",
            *(f"{sum(figures[key] for figures in turns):.0f}" for key in ("lost", "out_of_order")),
        ]
        if has_round_trips:
            row += [
                _show(results.spread(shape, server, "round_trip_p50"), 1),
                _show(results.ratio(shape, server, reference, "round_trip_p50")),
                f"{results.middle(shape, server, 'round_trip_p99'):.1f}",
            ]
        if shape == "arrival":
            row += [_show(results.spread(shape, server, "round_trip_longest"), 1, 1e-3)]
        rows.append(row)
    return table(header, rows)


def _table_by_figure(results: Results, shape: str, figures: dict[str, tuple[str, float, int]]) -> str:
    """A row for each figure, and a column for each server."""
    servers = results.servers(shape)
    rows = [
        [title, *(_show(results.spread(shape, server, key), digits, factor) for server in servers)]
        for key, (title, factor, digits) in figures.items()
    ]
    return table(["", *servers], rows)


def _growth_table(results: Results, growth: dict[int, str]) -> str:
    servers = list(dict.fromkeys(server for shape in growth.values() for server in results.servers(shape)))
    rows = [
        [f"{clients:,}", *(_show(results.spread(shape, server)) for server in servers)]
        for clients, shape in growth.items()
    ]
    return table(["clients", *(f"{server}, µs" for server in servers)], rows)


def _technique_table(results: Results) -> str:
    techniques, shapes = results.techniques()
    rows = [
        [it, *(_show(results.ratio(shape, "trio_udp", to="trio_udp", without=it)) for shape in shapes)]
        for it in techniques
    ]
    return table(["without", *shapes], rows)


def _show(spread: Spread | None, digits: int = 2, factor: float = 1) -> str:
    return spread.times(factor).show(digits) if spread else ""


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
