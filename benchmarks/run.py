"""Measure trio_udp and its peers under the same loads, and write the results down.

    pip install -e . --group benchmarks
    python benchmarks/run.py              # half an hour; writes benchmarks/results
    python benchmarks/run.py --quick      # two minutes, to see that everything runs; the figures mean little

Needs Linux and a C compiler. Peers that are not installed are left out. The rounds are interleaved, and every server
runs in a new process each time, so that a machine whose speed drifts slows all of them alike: compare the ratios within
a round, not the absolute figures.

This file says what is measured. servers.py is the servers, load.c the load, measure.py a single measurement, and
report.py makes tables and charts of them all. crowds.py is a program of its own, for 100,000 clients at once.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import report
from measure import HERE, LOAD_CORE, Load, build, measure
from servers import SERVERS, TECHNIQUES

ALL = ["C", *SERVERS]
ECHOING = [it for it in ALL if it not in ("trio_udp accept", "trio_udp send_to_all")]
OURS = ["trio_udp", "trio_udp portable"]
# Left out of the streams: servers that differ from another only in how they echo. socketserver has no streams.
STREAMING = ["C", *OURS, "uvloop", "asyncio", "asyncio keeping memory", "easynetwork", "anyio", "trio", "blocking"]
# Left out where there are many clients: what keeps nothing for each client and is slow, and so would only tell again
# what 64x4 has told.
CROWD = ["C", *OURS, "trio_udp all interfaces", "uvloop", "asyncio keeping memory", "easynetwork", "blocking"]
STRANGERS = [
    *CROWD,
    "trio_udp datagram_handler",
    "trio_udp accept",
    "trio_udp with limits",
    "trio_udp datagram_handler with limits",
]
FAN_OUT = ["C", *OURS, "trio_udp send_to_all", "uvloop", "asyncio", "asyncio keeping memory", "trio", "blocking"]


class Shape(NamedTuple):
    title: str
    load: Load
    servers: list[str]
    without: bool = False  # measure trio_udp with each technique switched off, too
    quick: bool = True  # part of a quick run


SHAPES = {
    # Which servers make sense where, and in which shapes trio_udp is measured without its techniques.
    "64x4": Shape("64 clients with 4 datagrams in flight each", Load("echo", 64, 256), ECHOING, without=True),
    "256x1": Shape("256 clients with 1 datagram in flight each", Load("echo", 256, 256), ECHOING, without=True),
    "1x64": Shape("1 client with 64 datagrams in flight", Load("echo", 1, 64), ECHOING, without=True),
    "ping-pong": Shape("1 client with 1 datagram in flight: round trip", Load("echo", 1, 1), ECHOING),
    "10k": Shape("10,000 live clients, 256 datagrams in flight", Load("echo", 10_000, 256), CROWD),
    "100k": Shape("100,000 live clients, 256 datagrams in flight", Load("echo", 100_000, 256), CROWD, quick=False),
    "strangers": Shape("Each datagram from a new client, 256 in flight", Load("once", 0, 256), STRANGERS),
    "stream-out": Shape("Stream of 1,200-byte datagrams from the server", Load("out"), STREAMING, without=True),
    "stream-in": Shape("Stream of 1,200-byte datagrams to the server", Load("in"), STREAMING, without=True),
    "fan-out": Shape("Each datagram is sent to 50 clients: cost of each datagram sent", Load("fan", 50), FAN_OUT),
    "memory": Shape("20,000 idle clients", Load("echo", 20_000, 64, memory=True), [*OURS, "easynetwork"]),
    **{
        f"growth-{clients}": Shape(
            f"{clients:,} live clients, 64 datagrams in flight",
            Load("echo", clients, 64),
            ["trio_udp", "uvloop"],
            quick=clients < 100_000,
        )
        for clients in (1, 10, 100, 1_000, 10_000, 100_000)
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round, without 100,000 clients")
    parser.add_argument("--rounds", type=int, help="default: 5, or 1 if quick")
    parser.add_argument("--only", nargs="+", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--servers", nargs="+", choices=ALL, metavar="SERVER", help=", ".join(ALL))
    parser.add_argument("--output", type=Path, help="default: benchmarks/results for a full run, else a new folder")
    arguments = parser.parse_args()
    quick: bool = arguments.quick
    rounds: int = arguments.rounds or (1 if quick else 5)
    warm, seconds = (0.1, 0.15) if quick else (0.3, 1.5)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # by way of every finally
    os.sched_setaffinity(0, {LOAD_CORE})  # to be out of the servers' way

    missing = {peer for peer in ("uvloop", "easynetwork", "anyio") if not find_spec(peer)}
    # For each shape, the servers to measure, and a technique that each is to do without.
    plan: dict[str, list[tuple[str, str | None]]] = {}
    for name, shape in SHAPES.items():
        if name in arguments.only if arguments.only else (shape.quick or not quick):
            servers = [it for it in shape.servers if it not in missing and it in (arguments.servers or ALL)]
            plan[name] = [(server, None) for server in servers]
            if shape.without and "trio_udp" in servers:
                plan[name] += [("trio_udp", technique) for technique in TECHNIQUES]

    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as programs:
        build(Path(programs))
        for number in range(rounds):
            for name, contestants in plan.items():
                first = number % max(1, len(contestants))
                for server, technique in contestants[first:] + contestants[:first]:
                    figures = measure(Path(programs), SHAPES[name].load, server, technique, warm, seconds)
                    run = {"shape": name, "server": server, "without": technique, "round": number}
                    runs.append(run | figures._asdict())
                    label = f"{server} without {technique}" if technique else server
                    print(f"{number + 1}/{rounds} {name:14} {label:34} {figures.micros:8.2f} µs", file=sys.stderr)

    full = not (quick or arguments.only or arguments.servers)
    output = arguments.output or (HERE / "results" if full else Path(tempfile.mkdtemp(prefix="trio-udp-benchmark-")))
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
        "rounds": rounds,
        "seconds": seconds,
        "titles": {name: SHAPES[name].title for name in plan},
        "runs": runs,
    }
    print(report.write(results, output))
    print(f"Written to {output}", file=sys.stderr)


def machine() -> str:
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    return f"{model}, {os.cpu_count()} cores, Linux {platform.release()}"


def versions() -> dict[str, str]:
    found = {platform.python_implementation(): platform.python_version()}
    for package in ("trio-udp", "trio", "uvloop", "easynetwork", "anyio"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


if __name__ == "__main__":
    main()
