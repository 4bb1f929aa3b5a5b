"""Tables and charts of what was measured.

python benchmarks/report.py FOLDER    # writes them again, from the results.json in FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = dict[str, Any]
Runs = list[dict[str, Any]]  # of one server in one shape, round after round

REFERENCE = "uvloop"  # what ratios are to
GROWTH = "growth-"  # how the names of the shapes begin that make up the growth curve

# The servers in the charts of several shapes, from the back to the front.
COLOURS = {
    "C": "#111827",
    "blocking": "#8b93a1",
    "easynetwork": "#4d9078",
    "asyncio keeping memory": "#8fb1e8",
    "uvloop": "#2563eb",
    "trio_udp portable": "#f59e0b",
    "trio_udp": "#c2410c",
    "trio_udp datagram_handler": "#7e22ce",
}
OTHERS = "#c3c8d0"

CHARTS = {
    "echo": "CPU time per echo, 64 clients with 4 datagrams in flight each",
    "shapes": f"CPU time per datagram as a ratio to {REFERENCE}",
    "growth": "CPU time per echo as clients become more",
}


def write(results: Results, folder: Path) -> str:
    """Write results.json, results.md and the charts; return what is in results.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    charts = _draw(results, folder) if find_spec("matplotlib") else []
    text = "\n\n".join(_sections(results, charts)) + "\n"
    (folder / "results.md").write_text(text)
    return text


# ---- figures ----


def _select(results: Results, shape: str, without: str | None = None) -> dict[str, Runs]:
    """The runs of each server in a shape, with all of its techniques or without one."""
    selected: dict[str, Runs] = {}
    for run in results["runs"]:
        if run["shape"] == shape and run["without"] == without:
            selected.setdefault(run["server"], []).append(run)
    return selected


def _middle(runs: Runs, key: str = "micros") -> float:
    return float(median(run[key] for run in runs))


def _spread(runs: Runs, key: str = "micros") -> tuple[float, float]:
    values = [run[key] for run in runs]
    return min(values), max(values)


def _ratio(runs: Runs, reference: Runs) -> float:
    """The median of the ratios of CPU time within a round."""
    return float(median(run["micros"] / other["micros"] for run, other in zip(runs, reference, strict=True)))


def _growth(results: Results) -> dict[int, str]:
    """From numbers of clients to the shapes that tell their cost."""
    return {int(shape.removeprefix(GROWTH)): shape for shape in results["titles"] if shape.startswith(GROWTH)}


# ---- tables ----


def _sections(results: Results, charts: list[str]) -> Iterable[str]:
    yield "# Benchmark results"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    yield _table(["", ""], [["date", results["date"]], ["machine", results["machine"]], ["versions", versions]])
    yield (
        f"Rounds: {results['rounds']}, of {results['seconds']} seconds for each server; figures are medians. "
        "µs: CPU time of the server for each datagram. The ratio, too, is one of CPU times: to "
        f"{REFERENCE} in the same round. Lost (not answered within five seconds) and disordered: in all rounds "
        "together, warming up included. Payloads have 64 bytes where nothing else is said."
    )
    for chart in charts:
        yield f"![{CHARTS[chart]}]({chart}.svg)"

    for shape, title in results["titles"].items():
        servers = _select(results, shape)
        if shape == "memory" and servers:
            yield f"## {title}"
            yield _memory_table(servers)
        elif not shape.startswith(GROWTH) and servers:
            yield f"## {title}"
            yield _time_table(shape, servers)
    if growth := _growth(results):
        yield f"## {CHARTS['growth']}, 64 datagrams in flight"
        yield _growth_table(results, growth)
    if any(run["without"] for run in results["runs"]):
        yield "## trio_udp without one of its techniques, as a ratio to trio_udp with all of them"
        yield _technique_table(results)


def _time_table(shape: str, servers: dict[str, Runs]) -> str:
    rows = []
    header = ["server", "µs", "least - most", f"/ {REFERENCE}", "datagrams/s", "per CPU second", "lost", "disordered"]
    if shape == "ping-pong":
        header += ["round trip p50, µs", "p99, µs"]
    for server, runs in sorted(servers.items(), key=lambda item: _middle(item[1])):
        least, most = _spread(runs)
        row = [
            server,
            f"{_middle(runs):.2f}",
            f"{least:.2f} - {most:.2f}",
            f"{_ratio(runs, servers[REFERENCE]):.2f}" if REFERENCE in servers else "",
            f"{_middle(runs, 'rate'):,.0f}",
            f"{1e6 / _middle(runs):,.0f}",
            str(sum(run["lost"] for run in runs)),
            str(sum(run["out_of_order"] for run in runs)),
        ]
        if shape == "ping-pong":
            row += [f"{_middle(runs, 'round_trip_p50'):.1f}", f"{_middle(runs, 'round_trip_p99'):.1f}"]
        rows.append(row)
    return _table(header, rows)


def _memory_table(servers: dict[str, Runs]) -> str:
    rows = []
    for server, runs in servers.items():
        least, most = _spread(runs, "bytes_per_client")
        rows.append([server, f"{_middle(runs, 'bytes_per_client'):,.0f}", f"{least:,.0f} - {most:,.0f}"])
    return _table(["server", "bytes for each client", "least - most"], rows)


def _growth_table(results: Results, growth: dict[int, str]) -> str:
    by_clients = {clients: _select(results, shape) for clients, shape in growth.items()}
    names = list(dict.fromkeys(name for servers in by_clients.values() for name in servers))
    rows = [
        [f"{clients:,}", *(f"{_middle(servers[name]):.2f}" if name in servers else "" for name in names)]
        for clients, servers in by_clients.items()
    ]
    return _table(["clients", *(f"{name}, µs" for name in names)], rows)


def _technique_table(results: Results) -> str:
    techniques = list(dict.fromkeys(run["without"] for run in results["runs"] if run["without"]))
    shapes = list(dict.fromkeys(run["shape"] for run in results["runs"] if run["without"]))
    rows = []
    for technique in techniques:
        row = [technique]
        for shape in shapes:
            ratio = _ratio(_select(results, shape, technique)["trio_udp"], _select(results, shape)["trio_udp"])
            row.append(f"{ratio:.2f}")
        rows.append(row)
    return _table(["without", *shapes], rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its first column to the left and figures to the right."""
    alignment = ["---", *(["---:"] * (len(header) - 1))] if any(header) else ["---"] * len(header)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, alignment, *rows])


# ---- charts ----


def _draw(results: Results, folder: Path) -> list[str]:
    """Draw the charts that there are figures for; return their names."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    drawn = []
    for name, draw in {"echo": _draw_echo, "shapes": _draw_shapes, "growth": _draw_growth}.items():
        # Text stays text, and the same figures make the same file. The card is white, whatever the page is.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "trio_udp"}):
            figure = Figure(figsize=(8, 4.5), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1), facecolor="white")
            axes = figure.add_subplot()
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(CHARTS[name], loc="left")
            if draw(axes, results):
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                drawn.append(name)
    return drawn


def _draw_echo(axes: Axes, results: Results) -> bool:
    """Bars with whiskers from the least to the most."""
    servers = sorted(_select(results, "64x4").items(), key=lambda item: -_middle(item[1]))
    for server, runs in servers:
        middle, (least, most) = _middle(runs), _spread(runs)
        colour = COLOURS["trio_udp"] if server.startswith("trio_udp") else OTHERS
        axes.barh(server, middle, color=colour, xerr=[[middle - least], [most - middle]], ecolor="#374151", capsize=3)
        axes.annotate(f"{middle:.1f}", (most, server), (5, 0), textcoords="offset points", va="center")
    axes.set_xlabel("µs, less is better; the whiskers reach from the best round to the worst")
    return bool(servers)


def _draw_shapes(axes: Axes, results: Results) -> bool:
    """A row for each shape, and in it a dot for each server."""
    shapes = [it for it in results["titles"] if not it.startswith(GROWTH) and REFERENCE in _select(results, it)]
    if not shapes:
        return False
    for server, colour in COLOURS.items():
        rows, ratios = [], []
        for row, shape in enumerate(shapes):
            servers = _select(results, shape)
            if server in servers:
                rows.append(row)
                ratios.append(_ratio(servers[server], servers[REFERENCE]))
        axes.plot(ratios, rows, "o", color=colour, label=server, markersize=8, clip_on=False)
    axes.set_yticks(range(len(shapes)), shapes)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xticks([0.25, 0.5, 1, 2, 4, 8], ["¼", "½", "1", "2", "4", "8"])
    axes.minorticks_off()
    axes.grid(axis="y", color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.axvline(1, color=COLOURS[REFERENCE], linewidth=1)
    axes.set_xlabel("ratio, less is better")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return True


def _draw_growth(axes: Axes, results: Results) -> bool:
    """A curve for each server over the number of clients."""
    curves: dict[str, dict[int, Runs]] = {}
    for clients, shape in _growth(results).items():
        for server, runs in _select(results, shape).items():
            curves.setdefault(server, {})[clients] = runs
    if not curves:
        return False
    for server, points in curves.items():
        middles = [_middle(runs) for runs in points.values()]
        whiskers = [
            [middle - _spread(runs)[0] for middle, runs in zip(middles, points.values(), strict=True)],
            [_spread(runs)[1] - middle for middle, runs in zip(middles, points.values(), strict=True)],
        ]
        axes.errorbar(list(points), middles, whiskers, fmt="o-", color=COLOURS[server], label=server, capsize=3)
    axes.set_xscale("log")
    axes.set_xticks(list(_growth(results)), [f"{clients:,}" for clients in _growth(results)])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("live clients")
    axes.set_ylabel("µs, less is better")
    axes.legend(frameon=False)
    return True


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write(json.loads((target / "results.json").read_text()), target)
