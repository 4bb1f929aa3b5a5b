"""Measure trio_udp and other servers under the same loads, and write the results to files.

    pip install -e '.[dtls]' --group benchmarks
    python benchmarks/run.py              # half an hour; writes benchmarks/results
    python benchmarks/run.py --quick      # a few minutes; shows that everything works, the figures mean little

Needs Linux and a C compiler. Servers whose library, compiler or interpreter is not installed are left out, and the
results list them. Results are kept for each version of Python: run it once with each.

The speed of a machine drifts. So the rounds are interleaved, and each starts every server anew. In most shapes the
servers of a round are loaded in short turns. Ratios within a turn mean more than absolute figures.

shapes.py lists the measurements, measure.py makes one, servers.py starts the servers, load.c is the load, and report.py
makes tables and charts. crowds.py and dtls.py also run alone.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import random
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import report
from measure import LOAD_CORE, Contestant, Load, MeasurementFailed, Outcome, Pace
from native import HERE, Programs, build
from shapes import FEW_ROUNDS, NEEDS, PACKAGES, SERVERS, SHAPES, Measurement, plan

FULL, QUICK = Pace(warm=0.3, seconds=1, scale=1, turns=15), Pace(warm=0.05, seconds=0.1, scale=0.02, turns=2)
FAILURES = (MeasurementFailed, AssertionError, subprocess.SubprocessError)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round, with few servers in most shapes")
    parser.add_argument("--rounds", type=int, help="default: 5, or 1 if quick")
    parser.add_argument("--only", nargs="+", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--servers", nargs="+", choices=SERVERS, metavar="SERVER", help=", ".join(SERVERS))
    parser.add_argument("--output", type=Path, help="default: benchmarks/results for a full run, else a new folder")
    arguments = parser.parse_args()
    quick: bool = arguments.quick
    rounds: int = arguments.rounds or (1 if quick else 5)
    pace = QUICK if quick else FULL

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that every finally block runs
    os.sched_setaffinity(0, {LOAD_CORE})  # so that the load does not slow the servers down
    contestants = plan(quick, arguments.only, arguments.servers)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        programs = build(Path(folder))
        left_out = what_is_missing(programs)
        for name, reason in left_out.items():
            print(f"left out: {name}, {reason}", file=sys.stderr)
        contestants = {
            shape: [it for it in them if it.server not in left_out]
            for shape, them in contestants.items()
            if shape not in left_out
        }
        runs, failures = measure(contestants, rounds, pace, programs)

    full = not (quick or arguments.only or arguments.servers)
    output = arguments.output or (HERE / "results" if full else Path(tempfile.mkdtemp(prefix="trio-udp-benchmark-")))
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "machine": machine(),
        "python": f"{platform.python_implementation()} {platform.python_version()}{free_threaded()}",
        "versions": versions() | programs.versions,
        "left_out": left_out,
        "failures": failures,
        "quick": quick,
        "rounds": rounds,
        "seconds": pace.seconds,
        "turns": pace.turns,
        "titles": {name: SHAPES[name].title for name in contestants},
        "runs": runs,
    }
    print(report.write(results, output))
    print(f"Written to {output}", file=sys.stderr)
    if failures:
        sys.exit("\n".join(["failed:", *failures]))


def measure(
    contestants: dict[str, list[Contestant]], rounds: int, pace: Pace, programs: Programs
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure round by round; return the runs and the failures."""
    runs: list[dict[str, Any]] = []
    failures: list[str] = []
    for number in range(rounds):
        for name, them in contestants.items():
            shape = SHAPES[name]
            if number >= (shape.rounds or rounds):
                continue
            order = [it for it in them if it.without is None or number < FEW_ROUNDS]
            random.Random(number).shuffle(order)  # so that no server always follows the same one
            measured = {}
            for turn, contestant, outcome in outcomes(shape.measurement, programs, order, pace):
                if isinstance(outcome, Exception):  # keep the results of the others
                    print(outcome, file=sys.stderr)
                    reason = " ".join(str(outcome).split())
                    failures.append(f"{name}, {contestant}, round {number + 1}: {reason:.200}")
                else:
                    measured[contestant, turn] = outcome
                    micros = f"{outcome['micros']:8.2f} µs" if "micros" in outcome else ""
                    print(f"{number + 1}/{rounds} {name:14} {contestant!s:44} {micros}", file=sys.stderr)
            for contestant, turn in itertools.product(them, range(pace.turns)):
                if (contestant, turn) in measured:
                    at, figures = number * pace.turns + turn, measured[contestant, turn]
                    runs.append({"shape": name, **contestant._asdict(), "turn": at, "figures": figures})
    return runs, failures


def outcomes(
    measurement: Measurement, programs: Programs, contestants: list[Contestant], pace: Pace
) -> Iterator[Outcome]:
    """Measure each contestant, in turns or once."""
    if isinstance(measurement, Load) and measurement.can_take_turns:
        yield from measurement.measure_in_turns(programs, contestants, pace)
        return
    for contestant in contestants:
        try:
            yield 0, contestant, measurement.measure(programs, contestant, pace)
        except FAILURES as failure:
            yield 0, contestant, failure


def what_is_missing(programs: Programs) -> dict[str, str]:
    """Return the servers and shapes that cannot be measured here, each with the reason."""
    modules = NEEDS | {name: shape.needs for name, shape in SHAPES.items() if shape.needs}
    missing = {name: f"no module `{module}` here" for name, module in modules.items() if not find_spec(module)}
    return programs.left_out | missing


def machine() -> str:
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    return f"{model}, {os.cpu_count()} cores, Linux {platform.release()}"


def free_threaded() -> str:
    return ", free-threaded" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


if __name__ == "__main__":
    main()
