"""Measure the workers of the command line: the cost of a datagram in all of their processes together."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from measure import SERVER_CORE, START_TIMEOUT, Contestant, Figures, Load, MeasurementFailed, Pace
from native import HERE, Programs
from traffic import RECEIVE_BUFFER

SERVERS = {"1 worker": 1, "2 workers": 2, "4 workers": 4}


class Workers(NamedTuple):
    """``trio-udp --workers N``, with a handler of work.py."""

    handler: str
    load: Load
    cores: frozenset[int]  # for all workers together

    def measure(self, programs: Programs, contestant: Contestant, pace: Pace) -> Figures:
        with _serving(SERVERS[contestant.server], self.handler, self.cores) as (port, pids):
            return self.load.put_on(programs, port, pids, pace)


class IdleWorkers(NamedTuple):
    """The supervisor and its workers without traffic."""

    seconds: float

    def measure(self, programs: Programs, contestant: Contestant, pace: Pace) -> Figures:
        with _serving(SERVERS[contestant.server], "echo", ALL_CORES) as (_, pids):
            before, began = _cpu_seconds(pids), time.monotonic()
            time.sleep(self.seconds * pace.scale)
            return {"share_of_a_core": (_cpu_seconds(pids) - before) / (time.monotonic() - began)}


ALL_CORES = frozenset(os.sched_getaffinity(0))

# An echo is so cheap that the load cannot keep two workers busy on a core each. So they share a core, and the figure is
# the CPU time of an echo.
ECHO = Workers("echo", Load("echo", 256, 256), frozenset({SERVER_CORE}))
LIGHT = ECHO._replace(load=Load("echo", 256, 16))
# With some work for each datagram, the load is small in comparison, and the workers have all cores.
WORK = Workers("work", Load("echo", 256, 256), ALL_CORES)


@contextmanager
def _serving(workers: int, handler: str, cores: frozenset[int]) -> Iterator[tuple[str, list[int]]]:
    """Start the command line; yield its port and its processes once all of them run."""
    options = ["--workers", str(workers), "--host", "127.0.0.1", "--port", "0", "--drain", "1"]
    options += ["--receive-buffer", str(RECEIVE_BUFFER), "--app-dir", str(HERE)]
    command = [sys.executable, "-m", "trio_udp", *options, f"work:{handler}"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: os.sched_setaffinity(0, cores)
    ) as supervisor:
        try:
            assert supervisor.stderr is not None
            ready = select.select([supervisor.stderr], [], [], START_TIMEOUT)[0]
            said = supervisor.stderr.readline() if ready else ""
            serving = re.search(r"serving .* on 127\.0\.0\.1:(\d+)", said)
            if serving is None:
                supervisor.kill()
                raise MeasurementFailed(f"{' '.join(command)}: has not started\n{said}{supervisor.stderr.read()}")
            yield serving[1], [supervisor.pid, *_children(supervisor.pid)]
        finally:
            supervisor.terminate()
            try:
                supervisor.wait(START_TIMEOUT)
            except subprocess.TimeoutExpired:
                supervisor.kill()


def _children(pid: int) -> list[int]:
    """Return child processes, regardless of the thread that started them: proc(5)."""
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def _cpu_seconds(pids: list[int]) -> float:
    """Return the user and system time of processes, in steps of the kernel's tick: proc(5)."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(of_one[11]) + int(of_one[12]) for of_one in fields) / os.sysconf("SC_CLK_TCK")
