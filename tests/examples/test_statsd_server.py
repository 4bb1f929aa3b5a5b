"""The StatsD server: the sums of lines from existing clients, its bounds, and the events for its page.

test_statsd_page.py tests the page itself in a browser.
"""

from __future__ import annotations

import json
import random
import socket
import statistics
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from signal import SIGCONT, SIGSTOP, SIGTERM
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from hypothesis import given, strategies as st

from ..project.conftest import EXAMPLES, TIMEOUT, Example, Start, without_signals
from .conftest import load, program

h11 = pytest.importorskip("h11")
statsd_server = load("statsd_server")

pytestmark = without_signals

Event = dict[str, Any]


@attrs.frozen
class Running:
    """A running StatsD server."""

    example: Example
    url: str

    @contextmanager
    def follow(self, after: int = 0) -> Iterator[Iterator[Event]]:
        """Follow the events like a page that has received those up to ``after``."""
        request = urllib.request.Request(f"{self.url}events", headers={"Last-Event-ID": str(after)})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            lines = (line.decode().partition(": ") for line in answer)
            yield (json.loads(text) for field, _, text in lines if field == "data")

    def events_until(self, is_last: Callable[[Event], bool]) -> list[Event]:
        """Return all events up to the first for which a condition holds."""
        events = []
        with self.follow() as following:
            for event in following:
                events.append(event)
                if is_last(event):
                    return events
        raise AssertionError(f"never: {events[-1]}")

    def lines(self, count: int) -> list[Event]:
        """Return all events up to the one with which the given number of lines has arrived."""

        def have_come(event: Event) -> bool:
            names = ("accepted", "malformed", "refused_names", "refused_values")
            return sum(int(event["lines"][name]) for name in names) >= count

        return self.events_until(have_come)


RunStatsD = Callable[..., Running]


@pytest.fixture
def run(start: Start) -> RunStatsD:
    """Start a StatsD server that reports five times a second."""

    def run(*arguments: str) -> Running:
        example = start("statsd_server", "--page-port", "0", "--interval", "0.2", *arguments)
        return Running(example, example.next_line().removeprefix("page on "))

    return run


def total(events: list[Event], name: str) -> float:
    """Return the sum of a counter over all intervals."""
    counters = [event["metrics"]["counter"] for event in events]
    return sum(float(named[name]["count"]) for named in counters if name in named)


def timings(events: list[Event], name: str) -> dict[str, float]:
    """Return a timer's figures in the only interval with values, without the rate."""
    found = [event["metrics"]["timer"].get(name, {"count": 0}) for event in events]
    [figures] = [dict(figures) for figures in found if figures["count"]]
    assert figures.pop("rate") > 0
    return figures


# Existing clients


def test_statsd_from_pypi(run: RunStatsD) -> None:
    """Counters, gauges, timers and sets from the client ``statsd`` add up, also if several are in one datagram."""
    statsd = pytest.importorskip("statsd")
    server = run()
    client = statsd.StatsClient("127.0.0.1", server.example.port, prefix="shop", maxudpsize=8192)
    with closing(client._sock):
        client.incr("orders")
        client.incr("orders", 41)
        client.decr("orders", 2)
        client.gauge("stock", 10)
        client.gauge("stock", 5, delta=True)
        client.gauge("stock", -7, delta=True)
        with client.pipeline() as pipe:  # in one datagram
            for milliseconds in range(1, 201):
                pipe.timing("checkout", milliseconds)
            client.gauge("below", 1)
            pipe.gauge("below", -3)  # the client sends two lines
            for user in ("ada", "grace", "ada"):
                pipe.set("buyers", user)
        for _ in range(100):
            client.incr("sampled", rate=0.5)  # the client sends about half of them, with |@0.5
        client.incr("end")
        events = server.events_until(lambda event: "shop.end" in event["metrics"]["counter"])
    last = events[-1]
    assert last["metrics"]["counter"]["shop.orders"]["total"] == total(events, "shop.orders") == 40
    assert last["metrics"]["gauge"] == {"shop.stock": {"value": 8}, "shop.below": {"value": -3}}
    expected = {"count": 200, "min": 1, "mean": 100.5, "max": 200, "p50": 100, "p95": 190, "p99": 198}
    assert timings(events, "shop.checkout") == expected
    assert max(event["metrics"]["set"].get("shop.buyers", {"unique": 0})["unique"] for event in events) == 2
    assert last["lines"]["malformed"] == 0
    sampled = last["lines"]["accepted"] - (3 + 3 + 200 + 3 + 3 + 1)
    assert last["metrics"]["counter"].get("shop.sampled", {"total": 0})["total"] == 2 * sampled


@pytest.mark.parametrize(
    "command",
    [["nc", "netcat-openbsd", "-u", "-w0", "127.0.0.1", "{port}"], ["socat", "socat", "-", "UDP4:127.0.0.1:{port}"]],
    ids=["nc", "socat"],
)
def test_netcat_and_socat(run: RunStatsD, command: list[str], tmp_path: Path) -> None:
    """Each line from a shell counts once, with any line endings, and with empty lines in between."""
    server = run()
    path = program(*command[:2])
    arguments = [argument.format(port=server.example.port) for argument in command[2:]]
    lines = tmp_path / "lines"  # not a pipe: with -w0, netcat ends if its input is not there yet
    lines.write_text("tea.cups:3|c\ntea.cups:4|c|@0.5\r\n\n\ntemperature:21.5|g\ntea.cups:1|c\n", newline="")
    with lines.open() as file:
        subprocess.run([path, *arguments], stdin=file, check=True, timeout=TIMEOUT)
    events = server.lines(4)
    assert events[-1]["metrics"]["counter"]["tea.cups"]["total"] == total(events, "tea.cups") == 12
    assert events[-1]["metrics"]["gauge"]["temperature"] == {"value": 21.5}
    assert server.example.stop() == ["lines: 4, malformed: 0, refused: 0, dropped by the kernel: 0"]


# Order, bounds and stopping


def test_gauges_keep_arrival_order_over_20_senders(run: RunStatsD) -> None:
    """500 gauges, each set and changed by 20 senders in turn, have the values of arrival order."""
    server = run()
    senders = [server.example.peer(f"127.0.0.{number}") for number in range(2, 22)]
    rng = random.Random(1)
    expected = {f"gauge.{number}": {"value": 0.0} for number in range(500)}
    gauges = list(expected.items())
    for turn in range(20):
        for start in range(0, 500, 5):
            lines = []
            for name, gauge in gauges[start : start + 5]:
                value = rng.randrange(1000)
                text, gauge["value"] = rng.choice(
                    [(f"{value}", value), (f"+{value}", gauge["value"] + value), (f"-{value}", gauge["value"] - value)]
                )
                lines.append(f"{name}:{text}|g")
            senders[(start // 5 + turn * 7) % 20].send("\n".join(lines).encode())
        if turn % 5 == 4:
            server.lines((turn + 1) * 500)  # nothing may be dropped here
    events = server.lines(10_000)
    assert events[-1]["server"]["kernel_dropped"] == 0
    assert events[-1]["metrics"]["gauge"] == expected
    assert max(event["senders"] for event in events) == 20


def test_a_flood_of_invented_names(run: RunStatsD) -> None:
    """Names beyond the bound are counted as refused, and known names are not affected."""
    server = run()
    peer = server.example.peer()
    peer.send(b"known:1|c\nlevel:7|g")
    server.lines(2)
    for start in range(0, 20_000, 50):
        peer.send(b"\n".join(b"invented.%d:1|c" % number for number in range(start, start + 50)))
        peer.send(b"known:1|c\nlevel:+1|g")
        if start % 5_000 == 4_950:
            server.lines(2 + (start + 50) * 52 // 50)  # nothing may be dropped here
    last = server.lines(2 + 20_000 + 800)[-1]
    assert last["names"] == sum(map(len, last["metrics"].values())) == last["most_names"] == 1000
    assert last["lines"]["refused_names"] == 20_000 - 998
    assert last["metrics"]["counter"]["known"]["total"] == 401
    assert last["metrics"]["gauge"]["level"] == {"value": 407}


def test_too_many_values_in_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timers and sets together keep a bounded number of values an interval; the values beyond it count as refused."""
    monkeypatch.setattr(statsd_server, "MAX_VALUES", 4)
    statsd = statsd_server.StatsD(now=0.0)
    for line in (b"t:1|ms", b"s:a|s", b"t:2|ms", b"t:3|ms", b"t:4|ms", b"s:b|s", b"c:5|c"):
        statsd.add(line)
    figures = statsd.flush(1.0)
    assert figures["metrics"]["timer"]["t"]["max"] == 3
    assert figures["metrics"]["set"]["s"] == {"unique": 1}
    assert figures["metrics"]["counter"]["c"] == {"count": 5, "rate": 5, "total": 5}
    assert figures["lines"]["refused_values"] == 2
    statsd.add(b"t:5|ms")
    assert statsd.flush(2.0)["metrics"]["timer"]["t"]["max"] == 5


def test_silent_metrics_are_forgotten() -> None:
    """A metric is forgotten after ten minutes of silence; other metrics stay."""
    statsd = statsd_server.StatsD(now=0.0)
    statsd.add(b"silent:1|c")
    statsd.add(b"level:1|g")
    statsd.flush(599.0)
    statsd.add(b"level:+1|g")
    metrics = statsd.flush(601.0)["metrics"]
    assert (metrics["counter"], metrics["gauge"]) == ({}, {"level": {"value": 2}})


def test_datagrams_that_the_kernel_drops(run: RunStatsD) -> None:
    """The kernel drops datagrams while the server hangs; each datagram is counted as received or as dropped."""
    server = run()
    peer = server.example.peer()
    server.example.signal(SIGSTOP)
    for _ in range(30_000):
        peer.send(b"burst:1|c")
    server.example.signal(SIGCONT)
    events = server.events_until(lambda event: sum(map(event["server"].get, ("received", "kernel_dropped"))) == 30_000)
    counts = events[-1]["server"]
    assert counts["received"] == counts["delivered"] == events[-1]["metrics"]["counter"]["burst"]["total"]
    assert counts["kernel_dropped"] == sum(counts["lost"].values()) > 0


def test_datagrams_before_the_stop_are_in_the_last_event(run: RunStatsD) -> None:
    """Pages receive a last event with all datagrams that arrived before SIGTERM; then their streams end."""
    server = run()
    peer = server.example.peer()
    with server.follow() as following:
        next(following)
        server.example.signal(SIGSTOP)
        for number in range(300):
            peer.send(b"late:%d|g\nall:1|c" % number)
        server.example.signal(SIGTERM)
        server.example.signal(SIGCONT)
        last = list(following)[-1]
    assert last["metrics"]["gauge"]["late"] == {"value": 299}
    assert last["metrics"]["counter"]["all"]["total"] == 300
    assert server.example.wait() == ["lines: 600, malformed: 0, refused: 0, dropped by the kernel: 0"]


# Lines

MALFORMED = [
    *(
        b"nonsense",
        b"a",
        b":1|c",
        b"a:|c",
        b"a:1",
        b"a:1|",
        b"a:1|x",
        b"a:1|c|",
        b"a:1|c|@",
        b"a:1|c|#",
        b"a:1|c|@0.5|",
    ),
    *(b"a:one|c", b"a:1_000|c", b"a: 1|c", b"a:nan|g", b"a:inf|g", b"a:--1|g", b"a:+|g", b"a:1e999|g", b"a:1e16|c"),
    *(b"a:1|c|@0", b"a:1|c|@-1", b"a:1|c|@2", b"a:1|c|@1e-300", b"a:1|c|@x", b"\xff:1|c", b"a\x00b:1|c", b"a:1:2|ms"),
    *(b"a" * 201 + b":1|c", b"a:" + b"1" * 201 + b"|c", b"a:1|c|#" + b"t" * 201, b" \t", b"a:1|C"),
]


def test_malformed_lines(run: RunStatsD) -> None:
    """A malformed line is counted and makes no metric; the other lines of its datagram are accepted."""
    server = run()
    peer = server.example.peer()
    for line in MALFORMED:
        peer.send(b"good:1|c\n" + line + b"\ngood:1|c")
    last = server.lines(3 * len(MALFORMED))[-1]
    assert last["lines"]["malformed"] == len(MALFORMED)
    assert last["lines"]["last_malformed"] == "a:1|C"
    assert last["metrics"]["counter"].keys() == {"good"}
    assert last["metrics"]["counter"]["good"]["total"] == 2 * len(MALFORMED)
    assert last["names"] == 1
    assert last["server"]["handler_errors"] == 0


@pytest.mark.parametrize(
    ("lines", "kind", "name", "figures"),
    [
        ([b"c:1|c", b"c:2.5|c", b"c:-1|c"], "counter", "c", {"count": 2.5, "rate": 1.25, "total": 2.5}),
        ([b"c:3|c|@0.1", b"c:1|c|@0.25"], "counter", "c", {"count": 34, "rate": 17, "total": 34}),
        ([b"g:5|g", b"g:+2|g", b"g:-10|g"], "gauge", "g", {"value": -3}),
        ([b"g:-4|g"], "gauge", "g", {"value": -4}),
        ([b"g:+1|g", b"g:1.5e3|g", b"g:-.5|g"], "gauge", "g", {"value": 1499.5}),
        ([b"s:a|s", b"s:b|s", b"s:a|s", b"s:-1 x|s"], "set", "s", {"unique": 3}),
        (
            [b"t:%d|ms|@0.5" % value for value in (30, 10, 20)],
            "timer",
            "t",
            {"count": 6, "rate": 3, "min": 10, "mean": 20, "max": 30, "p50": 20, "p95": 30, "p99": 30},
        ),
        (
            [b"h:1|h", b"h:2|d"],
            "histogram",
            "h",
            {"count": 2, "rate": 1, "min": 1, "mean": 1.5, "max": 2, "p50": 1, "p95": 2, "p99": 2},
        ),
        ([b"t:1|c|#a:1,b", b"t:2|c"], "counter", "t #a:1,b", {"count": 1, "rate": 0.5, "total": 1}),
        (["größe in cm:1|c".encode()], "counter", "größe in cm", {"count": 1, "rate": 0.5, "total": 1}),
    ],
    ids=lambda value: value[0].decode() if isinstance(value, list) else "",
)
def test_figures(lines: list[bytes], kind: str, name: str, figures: dict[str, float]) -> None:
    """The lines of one interval, two seconds here, give these figures."""
    statsd = statsd_server.StatsD(now=10.0)
    for line in lines:
        statsd.add(line)
    assert statsd.flush(12.0)["metrics"][kind][name] == figures


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=250), st.integers(1, 100))
def test_percentile(values: list[int], percent: int) -> None:
    """A percentile is the smallest value that at least that percentage of all values do not exceed."""
    found = statsd_server.percentile(sorted(values), percent)
    assert found == min(v for v in values if sum(each <= v for each in values) * 100 >= percent * len(values))
    assert statsd_server.percentile(sorted(values), 50) == statistics.median_low(values)


number = st.from_regex(rb"[-+]?[0-9]{1,17}(\.[0-9])?(e[-+]?[0-9]{1,3})?", fullmatch=True)
kind = st.sampled_from([b"c", b"g", b"ms", b"h", b"d", b"s", b"c|@0.000001", b"ms|@0.1"])
lines = st.lists(st.binary(max_size=40) | st.builds(b"a:%b|%b".__mod__, st.tuples(number, kind)), max_size=12)


@given(lines)
def test_any_bytes(lines: list[bytes]) -> None:
    """No payload makes the handler raise, every line is counted once, and all figures are valid JSON."""
    statsd = statsd_server.StatsD(now=0.0)
    payload = b"\n".join(lines)
    statsd.handler(SimpleNamespace(payload=payload, peer_address=("192.0.2.1", 1)))
    figures = statsd.flush(1.0)
    json.dumps(figures, allow_nan=False)
    assert figures["lines"]["accepted"] + figures["lines"]["malformed"] == sum(map(bool, payload.splitlines()))


# The page over HTTP


def test_a_page_that_comes_back(run: RunStatsD) -> None:
    """A page that reconnects receives each event after its last one once, in order."""
    server = run()
    with server.follow() as following:
        first = [next(following)["time"] for _ in range(3)]
    with server.follow(after=first[0]) as following:
        again = [next(following)["time"] for _ in range(4)]
    assert again[:2] == first[1:]
    assert again == sorted(set(again))


def test_requests(run: RunStatsD) -> None:
    """The page has its files; other paths, methods and invalid HTTP are refused, and do not end the server."""
    server = run()

    def ask(path: str, method: str = "GET") -> tuple[int, str]:
        request = urllib.request.Request(server.url + path, method=method)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                assert bool(answer.read()) == (method == "GET")
                return answer.status, answer.headers["Content-Type"]
        except urllib.error.HTTPError as error:
            with error:
                return error.code, ""

    address = server.url.removeprefix("http://").rstrip("/").split(":")
    for request in (b"\r\n\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", bytes(100_000), b"GET /eve"):
        with socket.create_connection((address[0], int(address[1])), TIMEOUT) as sock:
            sock.send(request)
    assert ask("") == (200, "text/html; charset=utf-8")
    assert ask("page.js?1") == (200, "text/javascript; charset=utf-8")
    assert ask("__init__.py") == ask("../statsd_server.py") == ask("page.js/") == (404, "")
    assert ask("", "HEAD") == (200, "text/html; charset=utf-8")
    assert ask("", "POST") == (405, "")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8126", 200),
        ("[::1]:8126", 200),
        ("localhost", 200),
        ("server:8126", 200),
        ("evil.example:8126", 421),
        ("127.0.0.1.evil.example", 421),
        ("127.0.0.1@evil.example", 421),
        ("[evil.example", 421),
    ],
)
async def test_another_name_for_the_page(host: str, status: int) -> None:
    """A name that could be that of a stranger's web page, which now leads here, gets no events."""
    page = statsd_server.Page.load(10)
    page.publish({"secret": 1})
    page.close()
    browser, stream = trio.testing.memory_stream_pair()
    await browser.send_all(f"GET /events HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    await page.answer(stream)
    await stream.aclose()
    answer = b"".join([part async for part in browser])
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert (b"secret" in answer) == (status == 200)


def test_large_events() -> None:
    """The history of large events is shorter, so it needs no more memory; of others it has the length asked for."""
    large, small = statsd_server.Page.load(120), statsd_server.Page.load(120)
    for _ in range(150):
        large.publish({"names": "x" * 1_000_000})
        small.publish({"names": "x"})
    assert (len(large.events), len(small.events)) == (49, 120)


@pytest.mark.parametrize("sent", [b"", b"GET /events HTTP/1.1\r\n", b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n"])
async def test_a_slow_browser(sent: bytes, autojump_clock: trio.testing.MockClock) -> None:
    """A browser that sends its request too slowly, or reads no events, is disconnected after 5 seconds."""
    page = statsd_server.Page.load(10)
    page.publish({})
    ours, theirs = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(page.answer, ours)
        with trio.fail_after(1):
            await theirs.send_all(sent)
        await trio.testing.wait_all_tasks_blocked()
        assert page.connections == 1
    assert trio.current_time() == 5
    assert page.connections == 0


async def test_too_many_connections(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    """With 32 open connections, another one is closed without an answer."""
    page = statsd_server.Page.load(10)
    for _ in range(32):
        nursery.start_soon(page.answer, trio.testing.memory_stream_pair()[0])
    await trio.testing.wait_all_tasks_blocked()
    await page.answer(trio.testing.memory_stream_pair()[0])
    assert trio.current_time() == 0
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM], ids=["datagrams", "page"])
def test_a_port_in_use(kind: socket.SocketKind) -> None:
    """The error for a port in use names it in one line."""
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            taken.listen()
        port = str(taken.getsockname()[1])
        ports = [port, "--page-port", "0"] if kind == socket.SOCK_DGRAM else ["0", "--page-port", port]
        command = [sys.executable, "-W", "error", str(EXAMPLES / "statsd_server.py"), *ports]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert (ended.returncode, ended.stdout) == (1, "")
    [line] = ended.stderr.splitlines()
    assert port in line
