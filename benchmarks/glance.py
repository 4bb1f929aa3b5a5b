"""The tables to begin with: few figures, those of all Pythons side by side. The documentation shows them, too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from figures import REFERENCE, Results, Spread
from tables import table

TASK, FUNCTION = "trio_udp", "trio_udp datagram_handler"
OTHERS = ["C", "Rust", "Go", "Node"]
RARE = "trio_udp gc.set_threshold"


class Row(NamedTuple):
    words: str
    shape: str
    task: str = TASK
    function: str = FUNCTION
    key: str = "micros"
    others: bool = True  # show other languages, too


RATIOS = [
    Row("64 clients, four datagrams in flight each", "64x4"),
    Row("1 client, 64 in flight", "1x64"),
    Row("256 clients, one in flight each", "256x1"),
    Row("10,000 clients", "10k"),
    Row("100,000 clients", "100k"),
    Row("every datagram from a new address", "strangers"),
    Row("every datagram from a new address, `accept` answers", "strangers", "trio_udp accept", "", others=False),
    Row("100,000 new clients at once", "arrival"),
    Row("100,000 new clients at once, with `gc.set_threshold`", "arrival", RARE, "", others=False),
    Row("one question, one answer, and again: CPU time", "ping-pong"),
    Row("one question, one answer, and again: round trip, p50", "ping-pong", key="round_trip_p50"),
    Row("10 clients on Unix-domain sockets, one in flight each", "unix"),
    Row("1 client on a Unix-domain socket, one in flight", "unix-1"),
    Row("stream of 1,200 bytes from the server, `send_many`", "stream-out", TASK, ""),
    Row("17 datagrams of 1,200 bytes for each request", "flight"),
    Row("stream of 1,200 bytes to the server", "stream-in"),
    Row("each datagram is sent to 50 clients by `send`", "fan-out", TASK, ""),
    Row("each datagram is sent to 50 clients by `send_to_all`", "fan-out", "trio_udp send_to_all", "", others=False),
]

SETTINGS = {"all interfaces instead of one address": " all interfaces", "rate and amplification limits": " with limits"}
SETTING_SHAPES = ["64x4", "1x64", "256x1", "strangers", "ping-pong"]

Figure = Callable[[Results], str]


def _per_second(shape: str, server: str = TASK) -> Figure:
    def show(results: Results) -> str:
        micros = results.spread(shape, server)
        return (
            "" if micros is None else Spread(*(1e6 / it for it in (micros.middle, micros.most, micros.least))).show(0)
        )

    return show


def _spread(shape: str, server: str, key: str = "micros", digits: int = 1, factor: float = 1) -> Figure:
    def show(results: Results) -> str:
        figures = results.spread(shape, server, key)
        return "" if figures is None else figures.show(digits, factor)

    return show


def _ratio(shape: str, server: str, to: str, key: str = "micros") -> Figure:
    def show(results: Results) -> str:
        ratio = results.ratio(shape, server, to, key)
        return "" if ratio is None else ratio.show()

    return show


def _beyond(shape: str, server: str, to: str, to_shape: str | None = None) -> Figure:
    def show(results: Results) -> str:
        difference = results.difference(shape, server, to, to_shape)
        return "" if difference is None else difference.show()

    return show


# On this machine: words, and the figure.
FIGURES: list[tuple[str, Figure]] = [
    ("echoes for each CPU second, four in flight for each client", _per_second("64x4")),
    ("echoes for each CPU second, four in flight, `datagram_handler`", _per_second("64x4", FUNCTION)),
    ("echoes for each CPU second, one in flight for each client", _per_second("256x1")),
    ("echoes for each CPU second, one in flight, `datagram_handler`", _per_second("256x1", FUNCTION)),
    ("datagrams of 1,200 bytes sent for each CPU second, `send_many`", _per_second("stream-out")),
    (
        f"datagrams of 1,200 bytes sent for each CPU second, as a multiple of {REFERENCE}'s",
        lambda results: _inverse(results.ratio("stream-out", TASK)),
    ),
    ("datagrams of 1,200 bytes received for each CPU second", _per_second("stream-in")),
    ("17 datagrams at a time: µs for each beyond what C takes, task", _beyond("flight", TASK, "C with GSO")),
    (
        "17 datagrams at a time: µs for each beyond what C takes, `datagram_handler`",
        _beyond("flight", FUNCTION, "C with GSO"),
    ),
    (
        "17 datagrams at a time: µs for each beyond what C takes, an `Endpoint` alone",
        _beyond("flight", "trio_udp Endpoint", "C with GSO"),
    ),
    ("a PROXY header: µs for each datagram", _beyond("proxied", TASK, TASK, "256x1")),
    ("credentials of a Unix-domain peer: µs for each datagram", _beyond("unix", "trio_udp with credentials", TASK)),
    ("round trip, p50, µs", _spread("ping-pong", TASK, "round_trip_p50")),
    ("round trip, p50, µs, `datagram_handler`", _spread("ping-pong", FUNCTION, "round_trip_p50")),
    ("bytes for an idle client", _spread("memory", TASK, "bytes_per_client", 0)),
    ("µs for a new client, 100,000 at once, `gc.set_threshold`", _spread("crowd", RARE, "new_micros")),
    ("µs for a new client, 100,000 at once, default thresholds", _spread("crowd", TASK, "new_micros")),
    ("longest pause while 100,000 come at once, ms, `gc.set_threshold`", _spread("crowd", RARE, "new_pause", 1, 1e3)),
    ("longest pause while 100,000 come at once, ms, default thresholds", _spread("crowd", TASK, "new_pause", 1, 1e3)),
    ("new clients unanswered, of 100,000", _spread("crowd", TASK, "new_lost", 0)),
    ("longest pause when 100,000 expire at once, ms", _spread("crowd", RARE, "expiry_pause", 1, 1e3)),
    ("longest pause when `stop()` ends 100,000, ms", _spread("crowd", RARE, "stop_pause", 1, 1e3)),
    (
        "two workers instead of one, some work for each datagram: rate",
        _ratio("workers-work", "2 workers", "1 worker", "rate"),
    ),
    ("two workers instead of one on the same core: CPU time of an echo", _ratio("workers", "2 workers", "1 worker")),
    (
        "two workers instead of one on the same core: CPU time of an echo, light load",
        _ratio("workers-light", "2 workers", "1 worker"),
    ),
    (
        "a supervisor with four workers and nothing to do, % of a core",
        _spread("workers-idle", "4 workers", "share_of_a_core", 1, 100),
    ),
    ("DTLS: KB for an idle client", _spread("dtls", TASK, "KB for each idle client")),
    ("DTLS: µs for a handshake", _spread("dtls", TASK, "µs for each handshake", 0)),
    ("DTLS: µs for an echo", _spread("dtls", TASK, "µs for each echo")),
    ("DTLS: µs for a forged ClientHello", _spread("dtls", TASK, "µs for each forged ClientHello")),
]


def _inverse(ratio: Spread | None) -> str:
    return "" if ratio is None else Spread(1 / ratio.middle, 1 / ratio.most, 1 / ratio.least).show(1)


def glance(everything: list[Results]) -> Iterable[str]:
    """The headings are what docs/performance.md finds the tables by."""
    yield "### CPU time for each datagram"
    yield _ratios(everything)
    yield "### What a setting adds"
    yield _settings(everything)
    yield "### How much that is"
    yield _figures(everything)


def _version(results: Results) -> str:
    return results.name.removeprefix("python-")


def _ratios(everything: list[Results]) -> str:
    """Ratios of CPU time: ours with each Python, then other languages, which do not depend on it."""
    newest = everything[0]
    header = [f"{REFERENCE} = 1"]
    for results in everything:
        header += [f"task per client, {_version(results)}", f"`datagram_handler`, {_version(results)}"]
    header += OTHERS
    rows = []
    for row in RATIOS:
        cells = [
            _show(results.ratio(row.shape, server, key=row.key))
            for results in everything
            for server in (row.task, row.function)
        ]
        others = [newest.ratio(row.shape, server, key=row.key) for server in OTHERS]
        cells += [f"{it.middle:.2f}" if it and row.others else "" for it in others]
        if any(cells):
            rows.append([row.words, *cells])
    return table(header, rows)


def _settings(everything: list[Results]) -> str:
    """What a setting adds, in percent of the CPU time of the same handler without it."""
    rows = []
    for results in everything:
        for words, suffix in SETTINGS.items():
            for handler, server in (("task per client", TASK), ("`datagram_handler`", FUNCTION)):
                ratios = [results.ratio(shape, server + suffix, to=server) for shape in SETTING_SHAPES]
                if any(ratios):
                    shown = [_percent(it) if it else "" for it in ratios]
                    rows.append([f"{words}, {handler}, {_version(results)}", *shown])
    return table(["", *SETTING_SHAPES], rows)


def _percent(ratio: Spread) -> str:
    middle, least, most = (f"{(it - 1) * 100:+.0f}" for it in ratio)
    return f"{middle} %" if least == most else f"{middle} % ({least} to {most})"


def _figures(everything: list[Results]) -> str:
    rows = [[words, *(figure(results) for results in everything)] for words, figure in FIGURES]
    return table(["on the machine of the results", *map(_version, everything)], [row for row in rows if any(row[1:])])


def _show(ratio: Spread | None) -> str:
    return ratio.show() if ratio else ""
