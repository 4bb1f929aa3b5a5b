"""The shapes of traffic that are measured, and the servers in each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection
from typing import NamedTuple, Protocol

import crowds
import native
import ours
import peers
import workers
from measure import Arrival, Contestant, Figures, IdleMemory, Load, MeasurementFailed, Pace
from native import HERE, Programs
from techniques import TECHNIQUES

# The best that each language can do, then trio_udp, then the alternatives for users of Python.
LANGUAGES = ["C", "Rust", "Go", "Node"]
OURS = ["trio_udp", "trio_udp datagram_handler"]
# Settings that cost something, each of which is compared with the same handler without it.
SETTINGS = [
    *("trio_udp all interfaces", "trio_udp datagram_handler all interfaces"),
    *("trio_udp with limits", "trio_udp datagram_handler with limits"),
]
PYTHONS = ["uvloop", "asyncio", "asyncio keeping memory", "easynetwork", "anyio", "trio", "socketserver", "blocking"]
ECHOING = [*LANGUAGES, *OURS, *SETTINGS, "trio_udp portable", "trio_udp request_handler", *PYTHONS]
# For shapes in which the slow servers would only repeat the result of 64x4.
QUICK_ONES = [*LANGUAGES, *OURS, *SETTINGS, "uvloop", "asyncio keeping memory", "blocking"]
CROWD = ["C", *OURS, "uvloop", "asyncio keeping memory", "easynetwork"]
STREAMING = [*LANGUAGES, "C with GSO", "trio_udp", "trio_udp portable"]
ON_PYTHON = ["uvloop", "asyncio", "asyncio keeping memory", "easynetwork", "trio", "blocking"]

ON_UNIX = [*OURS, "trio_udp with credentials", "uvloop", "asyncio", "asyncio keeping memory"]
TWO_WORKERS = ["1 worker", "2 workers"]

SERVERS = list(dict.fromkeys([*native.NATIVE, *ours.SERVERS, *peers.SERVERS, *workers.SERVERS]))
PACKAGES = ["trio-udp", "trio", "uvloop", "easynetwork", "anyio", "pyOpenSSL"]
NEEDS = {"uvloop": "uvloop", "easynetwork": "easynetwork", "anyio": "anyio"}  # which module, by server

FEW_ROUNDS = 3  # for shapes that take long, and for techniques and settings of trio_udp


class Measurement(Protocol):
    def measure(self, programs: Programs, contestant: Contestant, pace: Pace, /) -> Figures: ...


class Dtls(NamedTuple):
    """Runs dtls.py, a separate program, because its load speaks DTLS and is written in Python."""

    def measure(self, programs: Programs, contestant: Contestant, pace: Pace) -> Figures:
        command = [sys.executable, str(HERE / "dtls.py"), "--json", "--server", contestant.server]
        done = subprocess.run(
            [*command, "--scale", str(pace.scale / 2)],  # at full scale it would take too long
            stdout=subprocess.PIPE,
            text=True,
            timeout=200,
            preexec_fn=lambda: os.sched_setaffinity(0, workers.ALL_CORES),
        )
        if done.returncode:
            raise MeasurementFailed(f"{' '.join(command)}: exit status {done.returncode}")
        figures: Figures = json.loads(done.stdout)
        return figures


class Shape(NamedTuple):
    title: str
    measurement: Measurement
    servers: list[str]
    without: Collection[str] = ()  # techniques: trio_udp is also measured without each
    rounds: int | None = None  # None: as many as requested
    needs: str | None = None  # a module that must be installed


def _growth(clients: int) -> Shape:
    title = f"{clients:,} live client{'s' * (clients > 1)}, 64 datagrams in flight"
    return Shape(title, Load("echo", clients, 64), [*OURS, "uvloop"], rounds=FEW_ROUNDS)


def _on_unix(clients: int) -> Shape:
    title = f"{clients} client{'s' * (clients > 1)} over Unix-domain sockets, 1 datagram in flight each"
    return Shape(title, Load("unix", clients), ON_UNIX, rounds=FEW_ROUNDS)


SHAPES = {
    "64x4": Shape("64 clients with 4 datagrams in flight each", Load("echo", 64, 256), ECHOING, [*TECHNIQUES]),
    "1x64": Shape("1 client with 64 datagrams in flight", Load("echo", 1, 64), QUICK_ONES),
    "256x1": Shape("256 clients with 1 datagram in flight each", Load("echo", 256, 256), ECHOING, [*TECHNIQUES]),
    "ping-pong": Shape(
        "1 client with 1 datagram in flight: round trip", Load("echo", 1, 1), ECHOING, ["looking before waiting"]
    ),
    "strangers": Shape(
        "Each datagram from a new client, 256 in flight",
        Load("once", 0, 256),
        [*QUICK_ONES, "trio_udp accept", "trio_udp portable", "easynetwork"],
    ),
    "stream-out": Shape(
        "Stream of 1,200-byte datagrams from the server, 64 for each request",
        Load("out"),
        [*STREAMING, *ON_PYTHON],
        [*TECHNIQUES],
    ),
    "flight": Shape(
        "17 datagrams of 1,200 bytes for each request, as a sans-IO protocol sends them",
        Load("flight"),
        [*STREAMING, "trio_udp datagram_handler", "trio_udp Endpoint", *ON_PYTHON],
    ),
    "stream-in": Shape(
        "Stream of 1,200-byte datagrams to the server",
        Load("in"),
        [*LANGUAGES, *OURS, "trio_udp portable", *ON_PYTHON],
        [*TECHNIQUES],
    ),
    "fan-out": Shape(
        "Each datagram is sent to 50 clients: cost of each datagram sent",
        Load("fan", 50),
        [*LANGUAGES, "trio_udp", "trio_udp send_to_all", "uvloop", "asyncio keeping memory", "trio", "blocking"],
    ),
    "proxied": Shape(
        "The same 256 clients behind a PROXY header in front of each datagram", Load("proxied", 256, 256), OURS
    ),
    "unix": _on_unix(10),
    "unix-1": _on_unix(1),
    "10k": Shape("10,000 live clients, 256 datagrams in flight", Load("echo", 10_000, 256), CROWD),
    "100k": Shape("100,000 live clients, 256 datagrams in flight", Load("echo", 100_000, 256), CROWD),
    "arrival": Shape(
        "100,000 new clients at once, measured by the clients",
        Arrival(100_000, 256),
        [*LANGUAGES, *OURS, "trio_udp gc.set_threshold", "uvloop", "asyncio keeping memory", "easynetwork"],
        rounds=FEW_ROUNDS,
    ),
    "crowd": Shape(
        "100,000 clients: all arrive at once, expire at once, arrive again, and stop() ends them",
        crowds.Crowd(100_000),
        [*crowds.SERVERS],
        rounds=FEW_ROUNDS,
    ),
    "memory": Shape(
        "20,000 idle clients", IdleMemory(20_000), ["trio_udp", "trio_udp portable", "easynetwork"], rounds=FEW_ROUNDS
    ),
    "workers": Shape("Workers that share one core, 256 clients, 256 in flight", workers.ECHO, TWO_WORKERS),
    "workers-light": Shape("Workers that share one core, 256 clients, 16 in flight", workers.LIGHT, TWO_WORKERS),
    "workers-work": Shape(
        "Workers on all cores, about 50 µs of work for each datagram, 256 in flight", workers.WORK, TWO_WORKERS
    ),
    "workers-idle": Shape(
        "A supervisor and its idle workers", workers.IdleWorkers(5), ["4 workers"], rounds=FEW_ROUNDS
    ),
    "dtls": Shape("DTLS, ECDSA P-256", Dtls(), ["trio_udp", "trio"], rounds=FEW_ROUNDS, needs="OpenSSL"),
    **{f"growth-{clients}": _growth(clients) for clients in (1, 10, 100, 1_000, 10_000, 100_000)},
}

# A quick run shows that everything works: every server once, and every shape that does not take long.
QUICK_SHAPE = "64x4"  # with all servers and without each technique
QUICK_SERVERS = [
    *("C", "C with GSO", "uvloop"),
    *OURS,
    *(f"trio_udp {it}" for it in ("accept", "send_to_all", "Endpoint", "gc.set_threshold", "with credentials")),
    *workers.SERVERS,
]


def plan(quick: bool, only: list[str] | None, servers: list[str] | None) -> dict[str, list[Contestant]]:
    """Return the contestants of each shape."""
    contestants = {}
    for name, shape in SHAPES.items():
        if only and name not in only:
            continue
        if quick and not only and (name in ("10k", "100k") or name.startswith("growth")):
            continue
        is_short = quick and not servers and name != QUICK_SHAPE
        everybody = [Contestant(it) for it in shape.servers] + [Contestant("trio_udp", it) for it in shape.without]
        contestants[name] = [
            it
            for it in everybody
            if (servers is None or it.server in servers)
            and not (is_short and (it.without or it.server not in QUICK_SERVERS))
        ]
    return {name: them for name, them in contestants.items() if them}
