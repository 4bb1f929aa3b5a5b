"""A StatsD server with a live page: it aggregates counters, gauges, timers and sets, and shows its own statistics.

One ``datagram_handler`` receives the datagrams of all senders in arrival order, so a gauge has the last value that
arrived, regardless of its sender. Once a second, the server sends the figures of that second to each open page, as a
server-sent event. It keeps the events of the last two minutes for pages that open later or reconnect.

    pip install '.[examples]' && python examples/statsd_server.py        (then open the page that it names)
    echo "tea.cups:1|c" | nc -u -w0 127.0.0.1 8125

A datagram has one or more lines ``NAME:VALUE|TYPE``. A line may end with a sample rate, ``|@RATE``, and DogStatsD's
tags, ``|#TAGS``, which become part of the name. The types are ``c``, ``g`` (``+3`` and ``-3`` change the value),
``ms``, ``h``, ``d`` and ``s``.

Memory is bounded: lines beyond the limits below are refused and counted. Malformed lines are counted too. Left out:
forwarding to Graphite.
"""

import argparse
import re
import signal
import sys
import time
from functools import partial
from typing import Any, ClassVar

import attrs
import trio
from statsd_page import Page

import trio_udp

MAX_NAMES = 1_000  # metrics
MAX_VALUES = 200_000  # lines of timers and sets in one interval: 20 MB
MAX_SENDERS = 10_000  # addresses that are counted in one interval
FORGET_AFTER = 600.0  # seconds of silence after which a metric is forgotten
MAX_NUMBER, MIN_RATE = 1e15, 1e-6  # so that no sum becomes infinite

HISTORY = 120.0  # seconds that a page shows
GRACE = 1.0  # seconds for sending the last event after the server has stopped

LINE = re.compile(
    rb"([^\x00-\x1f\x7f:|]{1,200}):([^|]{1,200})\|(c|g|ms|h|d|s)(?:\|@([^|]{1,20}))?(?:\|#([^\x00-\x1f\x7f|]{1,200}))?"
)
NUMBER = re.compile(rb"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


def number(text: bytes) -> float:
    if NUMBER.fullmatch(text) is None or abs(value := float(text)) > MAX_NUMBER:
        raise ValueError(f"not a number: {text!r}")
    return value


def percentile(ordered: list[float], percent: int) -> float:
    """Return the smallest value that at least ``percent`` % of the values do not exceed (nearest rank)."""
    return ordered[-(-len(ordered) * percent // 100) - 1]


@attrs.define
class Metric:
    """The values of one name in the current interval. ``flush`` returns their figures and begins the next interval."""

    keeps_values: ClassVar[bool] = False
    changed: float = 0.0  # time of the last line, on Trio's clock

    def add(self, text: bytes, weight: float) -> None:
        """Add a value that represents ``weight`` values. Raises ``ValueError`` if it cannot be parsed."""
        raise NotImplementedError

    def flush(self, seconds: float) -> dict[str, float]:
        raise NotImplementedError


@attrs.define
class Counter(Metric):
    count: float = 0.0
    total: float = 0.0

    def add(self, text: bytes, weight: float) -> None:
        value = number(text) * weight
        self.count += value
        self.total += value

    def flush(self, seconds: float) -> dict[str, float]:
        count, self.count = self.count, 0.0
        return {"count": count, "rate": count / seconds, "total": self.total}


@attrs.define
class Gauge(Metric):
    value: float = 0.0

    def add(self, text: bytes, weight: float) -> None:
        value = number(text)
        self.value = self.value + value if text[:1] in b"+-" else value

    def flush(self, seconds: float) -> dict[str, float]:
        return {"value": self.value}


@attrs.define
class Timer(Metric):
    keeps_values = True
    values: list[float] = attrs.field(factory=list)
    count: float = 0.0  # larger than the number of values if they are a sample

    def add(self, text: bytes, weight: float) -> None:
        self.values.append(number(text))
        self.count += weight

    def flush(self, seconds: float) -> dict[str, float]:
        values, count = sorted(self.values), self.count
        self.values, self.count = [], 0.0
        if not values:
            return {"count": 0.0, "rate": 0.0}
        figures = {"min": values[0], "mean": sum(values) / len(values), "max": values[-1]}
        figures |= {f"p{percent}": percentile(values, percent) for percent in (50, 95, 99)}
        return {"count": count, "rate": count / seconds} | figures


class Histogram(Timer):
    """A timer for values that are not milliseconds."""


@attrs.define
class Set(Metric):
    keeps_values = True
    members: set[int] = attrs.field(factory=set)  # 64-bit hashes, which strangers cannot predict

    def add(self, text: bytes, weight: float) -> None:
        self.members.add(hash(text))

    def flush(self, seconds: float) -> dict[str, float]:
        members, self.members = self.members, set()
        return {"unique": len(members)}


TYPES: dict[bytes, type[Metric]] = {
    b"c": Counter,
    b"g": Gauge,
    b"ms": Timer,
    b"h": Histogram,
    b"d": Histogram,  # DogStatsD's distributions
    b"s": Set,
}


@attrs.define(eq=False)
class StatsD:
    """All metrics, and the counts of lines. Each line is counted exactly once."""

    metrics: dict[tuple[type[Metric], str], Metric] = attrs.field(factory=dict)
    accepted: int = 0
    malformed: int = 0
    last_malformed: str = ""
    refused_names: int = 0
    refused_values: int = 0
    values: int = 0  # kept in this interval
    senders: set[object] = attrs.field(factory=set)  # in this interval
    now: float = attrs.field(kw_only=True)  # the end of the last interval, in seconds

    def handler(self, datagram: trio_udp.Datagram) -> None:
        if len(self.senders) < MAX_SENDERS:
            self.senders.add(datagram.peer_address)
        for line in datagram.payload.splitlines():
            if line:
                try:
                    self.add(line)
                except ValueError:
                    self.malformed += 1
                    self.last_malformed = line[:200].decode(errors="backslashreplace")

    def add(self, line: bytes) -> None:
        """Handle one line. Raises ``ValueError`` if it is malformed."""
        found = LINE.fullmatch(line)
        if found is None:
            raise ValueError(f"not NAME:VALUE|TYPE: {line!r}")
        name, value, letters, rate, tags = found.groups()
        share = 1.0 if rate is None else number(rate)
        if not MIN_RATE <= share <= 1:
            raise ValueError(f"not a sample rate: {rate!r}")
        kind = TYPES[letters]
        key = (kind, name.decode() + ("" if tags is None else f" #{tags.decode()}"))
        metric = self.metrics.get(key)
        if metric is None and len(self.metrics) >= MAX_NAMES:
            self.refused_names += 1
        elif kind.keeps_values and self.values >= MAX_VALUES:
            self.refused_values += 1
        else:
            metric = metric or kind()
            metric.add(value, 1 / share)
            metric.changed = self.now
            self.metrics[key] = metric
            self.values += kind.keeps_values
            self.accepted += 1

    def flush(self, now: float) -> dict[str, object]:
        """Return the figures of the interval that ends now, and forget metrics that have been silent too long."""
        seconds, self.now = max(now - self.now, 1e-3), now
        self.metrics = {key: metric for key, metric in self.metrics.items() if now - metric.changed < FORGET_AFTER}
        metrics: dict[str, dict[str, dict[str, float]]] = {kind.__name__.lower(): {} for kind in TYPES.values()}
        for (kind, name), metric in sorted(self.metrics.items(), key=lambda item: item[0][1]):
            metrics[kind.__name__.lower()][name] = metric.flush(seconds)
        lines = {
            "accepted": self.accepted,
            "malformed": self.malformed,
            "last_malformed": self.last_malformed,
            "refused_names": self.refused_names,
            "refused_values": self.refused_values,
        }
        counts = {"names": len(self.metrics), "most_names": MAX_NAMES, "senders": len(self.senders)}
        self.values, self.senders = 0, set()
        return {"seconds": seconds, "metrics": metrics, "lines": lines, **counts}


def show(address: tuple[Any, ...]) -> str:
    host, port, *_ = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def main(host: str | None, port: int, page_host: str, page_port: int, interval: float) -> None:
    endpoints = await trio_udp.open_endpoints(port, host=host)
    try:
        listeners = await trio.open_tcp_listeners(page_port, host=page_host)
    except OSError as error:
        for endpoint in endpoints:
            endpoint.close()
        raise OSError(f"no page on port {page_port} of {page_host}: {error.strerror or error}") from error
    statsd, page = StatsD(now=trio.current_time()), Page.load(int(HISTORY / interval))
    begun = int(time.time() * 1000)  # a new value tells the page that all counts have restarted

    def report(server: trio_udp.Server) -> None:
        statistics = server.statistics()
        counts = attrs.asdict(statistics) | {"lost": statistics.lost}
        about = {"begun": begun, "interval": interval, "addresses": [show(each.local_address) for each in endpoints]}
        page.publish({**about, **statsd.flush(trio.current_time()), "server": counts})

    async def report_regularly(server: trio_udp.Server) -> None:
        while True:
            await trio.sleep_until(statsd.now + interval)
            report(server)

    async with trio.open_nursery() as answers, trio.open_nursery() as background:
        background.start_soon(partial(trio.serve_listeners, page.answer, listeners, handler_nursery=answers))
        async with trio.open_nursery() as serving:
            handler = trio_udp.datagram_handler(statsd.handler)
            stop_signals = {signal.SIGINT, signal.SIGTERM}
            serve = partial(trio_udp.serve_endpoints, handler, endpoints, stop_signals=stop_signals)
            server: trio_udp.Server = await serving.start(serve)
            background.start_soon(report_regularly, server)
            for endpoint in server.endpoints:
                print(f"listening on {show(endpoint.local_address)}", flush=True)
            for listener in listeners:
                print(f"page on http://{show(listener.socket.getsockname())}/", flush=True)
        # The server has handled everything that had reached the machine when the signal came.
        report(server)
        page.close()
        answers.cancel_scope.deadline = trio.current_time() + GRACE
        background.cancel_scope.cancel()
    refused = statsd.refused_names + statsd.refused_values
    print(f"lines: {statsd.accepted}, malformed: {statsd.malformed}, refused: {refused}", end=", ")
    print(f"dropped by the kernel: {server.statistics().kernel_dropped}")


def port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65_535:
        raise ValueError
    return value


def seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 60:
        raise ValueError
    return value


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", nargs="?", type=port, default=8125)
    parser.add_argument("--host", default="127.0.0.1", help="name or address to bind (default: %(default)s)")
    parser.add_argument("--page-host", default="127.0.0.1", help="the same for the page, which has no access control")
    parser.add_argument("--page-port", type=port, default=8126, metavar="PORT")
    parser.add_argument("--interval", type=seconds, default=1.0, metavar="SECONDS", help="from 0.1 to 60 (default: 1)")
    arguments = parser.parse_args()
    try:
        trio.run(main, arguments.host, arguments.port, arguments.page_host, arguments.page_port, arguments.interval)
    except OSError as error:
        sys.exit(f"{parser.prog}: {error}")
