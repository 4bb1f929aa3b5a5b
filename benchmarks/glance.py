"""The first tables of the results: the main figures, all Pythons side by side. The documentation shows them too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from figures import REFERENCE, Figure, Results, Spread, beyond, per_second, ratio, value
from tables import table

TASK, FUNCTION = "trio_udp", "trio_udp datagram_handler"
OTHERS = ["C", "Rust", "Go", "Node"]
RARE = "trio_udp gc.set_threshold"
ALONE = "trio_udp Endpoint"
ONE, TWO = "1 worker", "2 workers"


class Row(NamedTuple):
    words: str
    shape: str
    task: str = TASK
    function: str = FUNCTION
    key: str = "micros"
    others: bool = True  # show other languages too


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
    Row("1 client, one in flight: CPU time", "ping-pong"),
    Row("1 client, one in flight: round trip, p50", "ping-pong", key="round_trip_p50"),
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

# For the table of absolute figures: words, the figure, and the digits to print.
FIGURES: list[tuple[str, Figure, int]] = [
    ("echoes for each CPU second, four in flight for each client", per_second("64x4", TASK), 0),
    ("echoes for each CPU second, four in flight, `datagram_handler`", per_second("64x4", FUNCTION), 0),
    ("echoes for each CPU second, one in flight for each client", per_second("256x1", TASK), 0),
    ("echoes for each CPU second, one in flight, `datagram_handler`", per_second("256x1", FUNCTION), 0),
    ("datagrams of 1,200 bytes sent for each CPU second, `send_many`", per_second("stream-out", TASK), 0),
    (f"the same as a multiple of {REFERENCE}'s", ratio("stream-out", TASK, inverse=True), 1),
    ("datagrams of 1,200 bytes received for each CPU second", per_second("stream-in", TASK), 0),
    ("17 for each request: µs for each datagram beyond C, task per client", beyond("flight", TASK, "C with GSO"), 2),
    (
        "17 for each request: µs for each datagram beyond C, `datagram_handler`",
        beyond("flight", FUNCTION, "C with GSO"),
        2,
    ),
    ("17 for each request: µs for each datagram beyond C, `Endpoint`", beyond("flight", ALONE, "C with GSO"), 2),
    ("a PROXY header: µs for each datagram", beyond("proxied", TASK, TASK, "256x1"), 2),
    ("credentials of a Unix-domain peer: µs for each datagram", beyond("unix", f"{TASK} with credentials", TASK), 2),
    ("round trip, p50, µs", value("ping-pong", TASK, "round_trip_p50"), 1),
    ("round trip, p50, µs, `datagram_handler`", value("ping-pong", FUNCTION, "round_trip_p50"), 1),
    ("bytes for an idle client", value("memory", TASK, "bytes_per_client"), 0),
    ("µs for a new client, 100,000 at once, `gc.set_threshold`", value("crowd", RARE, "new_micros"), 1),
    ("µs for a new client, 100,000 at once, default thresholds", value("crowd", TASK, "new_micros"), 1),
    ("longest pause while 100,000 arrive at once, ms, `gc.set_threshold`", value("crowd", RARE, "new_pause", 1e3), 1),
    ("longest pause while 100,000 arrive at once, ms, default thresholds", value("crowd", TASK, "new_pause", 1e3), 1),
    ("new clients unanswered, of 100,000", value("crowd", TASK, "new_lost"), 0),
    ("longest pause when 100,000 expire at once, ms", value("crowd", RARE, "expiry_pause", 1e3), 1),
    ("longest pause when `stop()` ends 100,000, ms", value("crowd", RARE, "stop_pause", 1e3), 1),
    ("two workers, 50 µs of work for each datagram: rate, 1 worker = 1", ratio("workers-work", TWO, ONE, "rate"), 2),
    ("two workers on one core: CPU time of an echo, 1 worker = 1", ratio("workers", TWO, ONE), 2),
    ("two workers on one core, light load: CPU time of an echo, 1 worker = 1", ratio("workers-light", TWO, ONE), 2),
    ("four idle workers, % of a core", value("workers-idle", "4 workers", "share_of_a_core", 100), 1),
    ("DTLS: KB for an idle client", value("dtls", TASK, "KB for each idle client"), 1),
    ("DTLS: µs for a handshake", value("dtls", TASK, "µs for each handshake"), 0),
    ("DTLS: µs for an echo", value("dtls", TASK, "µs for each echo"), 1),
    ("DTLS: µs for a forged ClientHello", value("dtls", TASK, "µs for each forged ClientHello"), 1),
]


def glance(everything: list[Results]) -> Iterable[str]:
    """Yield the tables with their headings, by which docs/performance.md finds them."""
    yield "### CPU time for each datagram"
    yield _ratios(everything)
    yield "### What a setting adds"
    yield _settings(everything)
    yield "### Absolute figures"
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
    """The CPU time that a setting adds, in percent of that of the same handler without it."""
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
    rows = [[words, *(_show(look_up(it), digits) for it in everything)] for words, look_up, digits in FIGURES]
    return table(["on the machine of the results", *map(_version, everything)], [row for row in rows if any(row[1:])])


def _show(spread: Spread | None, digits: int = 2) -> str:
    return spread.show(digits) if spread else ""
