"""Charts as SVG. Text stays text, equal figures give equal files, and the background is white on any page."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from figures import REFERENCE, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROWTH = "growth-"  # the names of the shapes on the growth curve begin with this

TITLES = {
    "shapes": f"CPU time for each datagram as a ratio to {REFERENCE}",
    "echo": "CPU time for each echo, 64 clients with 4 datagrams in flight each",
    "round-trip": "Round trip of one datagram and its echo",
    "growth": "CPU time for each echo as the number of clients grows",
}

# The servers in the charts of several shapes, by the names that readers know.
NAMES = {
    "trio_udp": "trio_udp, task per client",
    "trio_udp datagram_handler": "trio_udp, datagram_handler",
    "trio_udp send_to_all": "trio_udp, send_to_all",
    "C": "C, recvmmsg",
    "C with GSO": "C, recvmmsg and GSO",
    "Rust": "Rust, std",
    "Go": "Go, net",
    "Node": "Node, dgram",
    "uvloop": "uvloop",
    "asyncio keeping memory": "asyncio, at best",
    "easynetwork": "easynetwork",
    "trio": "Trio's sockets",
}
PANELS = {
    "64x4": "64 clients, 4 datagrams in flight each",
    "256x1": "256 clients, 1 in flight each",
    "strangers": "Every datagram from a new address",
    "stream-out": "Stream from server, 1,200 bytes",
}

CUT = {"shapes": "Bars that end in » are longer than shown. "}

INK, SOFT, RULE = "#1f2937", "#6b7280", "#e5e7eb"
OURS, OURS_TOO, REFERENCE_COLOUR, OTHERS = "#c2410c", "#ea8a52", "#3b6fb6", "#c4cad3"
LONGEST = 2.5  # bars of other servers with greater ratios are cut off, and marked

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trio_udp",
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": RULE,
    "xtick.color": SOFT,
    "ytick.color": INK,
}


def growth(results: Results) -> dict[int, str]:
    """Return the shapes of the growth curve, by number of clients."""
    return {int(shape.removeprefix(GROWTH)): shape for shape in results.titles if shape.startswith(GROWTH)}


def draw(results: Results, folder: Path) -> list[str]:
    """Draw the charts that there are figures for; return their names."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # no machine has all of the fonts
    drawn = []
    for name, fill in {"shapes": _shapes, "echo": _echo, "round-trip": _round_trip, "growth": _growth}.items():
        with matplotlib.rc_context(cast("Any", STYLE)):
            layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.08)
            figure = Figure(layout=layout, facecolor="white", edgecolor=RULE, linewidth=2)
            if fill(figure, results):
                figure.suptitle(TITLES[name], x=0.015, ha="left", weight="bold", size=12)
                figure.supxlabel(
                    f"Less is better. {CUT.get(name, '')}{results.python}, {results.kept['machine']}.",
                    x=0.015,
                    ha="left",
                    size=8,
                    color=SOFT,
                )
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, edgecolor=RULE)
                drawn.append(name)
    return drawn


def _shapes(figure: Figure, results: Results) -> bool:
    """A panel for each of four shapes, with a bar for each server."""
    shapes = {it: title for it, title in PANELS.items() if REFERENCE in results.servers(it)}
    if not shapes:
        return False
    figure.set_size_inches(9.6, 6.4)
    for place, (shape, title) in enumerate(shapes.items(), 1):
        axes = figure.add_subplot(2, 2, place)
        axes.set_title(title, loc="left", size=10, color=INK)
        bars = []
        for server in results.servers(shape):
            ratio = results.ratio(shape, server)
            if ratio and server in NAMES:
                bars.append((server, ratio, ratio.show()))
        _bars(axes, bars, LONGEST)
        axes.axvline(1, color=REFERENCE_COLOUR, linewidth=1, linestyle=(0, (3, 3)), zorder=0)
    return True


def _echo(figure: Figure, results: Results) -> bool:
    """A bar for each server."""
    bars = []
    for server in results.servers("64x4"):
        micros, ratio = results.spread("64x4", server), results.ratio("64x4", server)
        if micros and not server.endswith(("interfaces", "limits")):
            bars.append((server, micros, f"{micros.show(1)} µs" + (f", ratio {ratio.middle:.2f}" if ratio else "")))
    figure.set_size_inches(9.6, 0.9 + 0.27 * len(bars))
    if bars:
        _bars(figure.add_subplot(), bars)
    return bool(bars)


def _round_trip(figure: Figure, results: Results) -> bool:
    bars = []
    for server in results.servers("ping-pong"):
        p50 = results.spread("ping-pong", server, "round_trip_p50")
        cpu = results.middle("ping-pong", server)
        if p50 and server in NAMES:
            bars.append((server, p50, f"{p50.show(0)} µs, CPU {cpu:.0f} µs"))
    figure.set_size_inches(9.6, 0.9 + 0.29 * len(bars))
    if bars:
        _bars(figure.add_subplot(), bars)
    return bool(bars)


def _bars(axes: Axes, bars: list[tuple[str, Any, str]], longest: float | None = None) -> None:
    """Draw bars in order of size, each with its spread and a label. Bars that are too long are cut off."""
    bars.sort(key=lambda bar: bar[1].middle)
    ours = [value.most for server, value, _ in bars if server.startswith("trio_udp")]
    end = min(max(longest, *ours), bars[-1][1].most) if longest else bars[-1][1].most
    for row, (_, value, label) in enumerate(bars):
        server = bars[row][0]
        is_cut = value.middle > end
        axes.barh(row, min(value.middle, end), height=0.68, color=_colour(server))
        if is_cut:
            axes.text(end * 0.985, row, f"{label}  »", va="center", ha="right", size=9, color=INK)
            continue
        axes.plot([value.least, min(value.most, end)], [row, row], color=INK, linewidth=1.2, solid_capstyle="butt")
        box = {"facecolor": "white", "linewidth": 0, "pad": 1.5}
        axes.text(min(value.most, end) + end * 0.025, row, label, va="center", size=9, color=INK, bbox=box)
    axes.set_yticks(
        range(len(bars)), [NAMES.get(server, server.replace("trio_udp ", "trio_udp, ")) for server, _, _ in bars]
    )
    for tick, (server, _, _) in zip(axes.get_yticklabels(), bars, strict=True):
        tick.set_fontweight("bold" if server.startswith("trio_udp") else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, end * 1.6)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _colour(server: str) -> str:
    if server == "trio_udp":
        return OURS
    return OURS_TOO if server.startswith("trio_udp") else REFERENCE_COLOUR if server == REFERENCE else OTHERS


def _growth(figure: Figure, results: Results) -> bool:
    """A curve for each server over the number of clients."""
    shapes = growth(results)
    servers = list(dict.fromkeys(server for shape in shapes.values() for server in results.servers(shape)))
    if not servers:
        return False
    figure.set_size_inches(9.6, 3.6)
    axes = figure.add_subplot()
    ends = []
    for server in servers:
        points = {at: spread for at, shape in shapes.items() if (spread := results.spread(shape, server))}
        axes.fill_between(
            [*points], [it.least for it in points.values()], [it.most for it in points.values()],
            color=_colour(server), alpha=0.15, linewidth=0,
        )  # fmt: skip
        axes.plot([*points], [it.middle for it in points.values()], "o-", color=_colour(server), markersize=4)
        ends.append((points[max(points)].middle, max(points), server))
    axes.set_xscale("log")
    axes.set_xlim(right=max(shapes) * 8 ** (len(shapes) / 4))
    axes.set_xticks([*shapes], [f"{clients:,}" for clients in shapes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    least_gap, place = axes.get_ylim()[1] / 14, 0.0  # so that names do not overlap
    for last, at, server in sorted(ends):
        place = max(last, place + least_gap)
        axes.annotate(
            NAMES.get(server, server), (at, place), (9, 0), textcoords="offset points", va="center", size=9,
            color=_colour(server), weight="bold",
        )  # fmt: skip
    axes.grid(axis="y", color=RULE)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("live clients, 64 datagrams in flight")
    axes.set_ylabel("µs; the band: minimum to maximum")
    return True
