"""Measure the cost of 100,000 clients: memory, and how long other tasks wait when all clients arrive or leave at once.

    python benchmarks/crowds.py                # two minutes; prints a table. run.py measures the same
    python benchmarks/crowds.py --types        # also lists the objects of an idle client

Needs Linux and a C compiler. Each run is a new process. 100,000 clients arrive over a real socket, and all of them
expire at once. Then 100,000 arrive again, and the server stops. Some runs use the garbage collector's default
thresholds; in others ``gc.set_threshold`` makes full collections rare.

A pause is the longest time that another task, which only yields, waits for its next turn. Other processes can only make
it longer, so the table shows the best run: the minimum of the maxima. A pause in CPU time excludes other processes.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import trio
from measure import LOAD_CORE, Contestant, Figures, Pace, resident_bytes, run_load, running
from native import Programs, build

import trio_udp

IN_FLIGHT = 256  # datagrams of new clients in transit

THRESHOLDS = {"default": gc.get_threshold(), "700, 10, 1000": (700, 10, 1_000)}
SERVERS = {"trio_udp": "default", "trio_udp gc.set_threshold": "700, 10, 1000"}  # as run.py calls them

# The most that an idle client may cost, and the longest that other tasks may wait when all clients leave.
TARGETS = {"objects": 8, "bytes": 2_300, "expiry_pause_cpu": 0.005, "stop_pause_cpu": 0.005}

Run: TypeAlias = dict[str, Any]

ROWS = {
    # By key of a run: title, factor from seconds to the unit printed, and digits printed.
    "objects": ("idle client: objects that the collector sees", 1, 2),
    "bytes": ("idle client: bytes", 1, 0),
    "new_micros": ("new client: µs of CPU", 1, 1),
    "new_seconds": ("all arrive: seconds", 1, 2),
    "new_pause": ("all arrive: longest pause, ms", 1e3, 2),
    "new_pause_cpu": ("all arrive: longest pause, ms of CPU", 1e3, 2),
    "new_collection": ("all arrive: longest garbage collection, ms", 1e3, 2),
    "new_lost": ("all arrive: unanswered", 1, 0),
    "expiry_micros": ("all expire: µs of CPU each", 1, 1),
    "expiry_pause": ("all expire: longest pause, ms", 1e3, 2),
    "expiry_pause_cpu": ("all expire: longest pause, ms of CPU", 1e3, 2),
    "expiry_collection": ("all expire: longest garbage collection, ms", 1e3, 2),
    "stop_micros": ("stop(): µs of CPU each", 1, 1),
    "stop_pause": ("stop(): longest pause, ms", 1e3, 2),
    "stop_pause_cpu": ("stop(): longest pause, ms of CPU", 1e3, 2),
    "stop_collection": ("stop(): longest garbage collection, ms", 1e3, 2),
}


# ---- in the process of the server ----


class LeapingClock(trio.abc.Clock):
    """A clock that can be moved forward, so that a run need not wait for idle timeouts."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return time.perf_counter() + self.ahead

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return deadline - self.current_time()


class Pauses:
    """The longest time that a task has waited for its turn, and the longest garbage collection."""

    def __init__(self) -> None:
        self.reset()
        gc.callbacks.append(self._collection)

    def reset(self) -> None:
        self.longest = self.longest_cpu = self.longest_collection = 0.0

    def figures(self) -> Run:
        return {"pause": self.longest, "pause_cpu": self.longest_cpu, "collection": self.longest_collection}

    def _collection(self, phase: str, info: dict[str, int]) -> None:
        now = time.perf_counter()
        if phase == "start":
            self._began = now
        else:
            self.longest_collection = max(self.longest_collection, now - self._began)

    async def watch(self, every: float, until: Callable[[], bool]) -> None:
        """Yield continuously, or every ``every`` seconds while the CPU time of other tasks is measured."""
        before, cpu_before = time.perf_counter(), time.thread_time()
        while not until():
            if every:
                await trio.sleep(every)
            else:
                await trio.lowlevel.checkpoint()
            now, cpu_now = time.perf_counter(), time.thread_time()
            self.longest = max(self.longest, now - before - every)
            self.longest_cpu = max(self.longest_cpu, cpu_now - cpu_before - every)
            before, cpu_before = now, cpu_now


async def serve_crowd(clock: LeapingClock) -> None:
    """Serve. Execute each command from standard input, and answer it with figures in JSON."""

    async def echo(client: trio_udp.Client) -> None:
        async for payload in client:
            await client.send(payload)

    async def serve(task_status: trio.TaskStatus[trio_udp.Server]) -> None:
        limits = trio_udp.Limits(max_clients=1_000_000)
        await trio_udp.serve(
            echo, 0, host="127.0.0.1", limits=limits, idle_timeout=60, drain_timeout=30, task_status=task_status
        )
        ended.set()

    ended = trio.Event()
    pauses = Pauses()
    async with trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(serve)
        print(server.endpoints[0].local_address[1], flush=True)
        while True:
            with trio.CancelScope() as until_told:
                async with trio.open_nursery() as watching:
                    watching.start_soon(pauses.watch, 0.001, bool)  # bool() is False: until it is cancelled
                    await trio.lowlevel.wait_readable(sys.stdin.fileno())
                    until_told.cancel()
            command = sys.stdin.readline().strip()
            if not command:
                sys.exit("standard input has ended")
            figures: Run = {"cpu": time.process_time(), "clients": len(server.clients)} | pauses.figures()
            if command == "count":
                gc.collect()
                figures["bytes"] = resident_bytes(os.getpid())
                figures["types"] = Counter(type(it).__name__ for it in gc.get_objects())
            elif command in ("expire", "stop"):
                pauses.reset()
                before = time.process_time()
                if command == "stop":
                    server.stop()
                    await pauses.watch(0, until=ended.is_set)
                else:
                    clock.ahead += 1_000
                    await pauses.watch(0, until=lambda: not server.clients)
                # The watching task takes little of this CPU time: one turn in each pass of Trio's scheduler.
                figures |= pauses.figures() | {"cpu": time.process_time() - before}
            print(json.dumps(figures), flush=True)
            pauses.reset()


def serve_crowd_in_this_process(threshold: tuple[int, int, int]) -> None:
    gc.set_threshold(*threshold)
    clock = LeapingClock()
    trio.run(serve_crowd, clock, clock=clock)


# ---- in the process of the benchmark ----


class Crowd(NamedTuple):
    """Clients that arrive and expire all at once, arrive again, and are connected when the server stops."""

    clients: int

    def measure(self, programs: Programs, contestant: Contestant, pace: Pace) -> Figures:
        run = run_once(programs, SERVERS[contestant.server], int(self.clients * pace.scale))
        return {key: run[key] for key in ROWS}


def run_once(programs: Programs, threshold: str, clients: int) -> Run:
    command = [sys.executable, str(Path(__file__)), "--serve", threshold]
    with running(command, {}) as (process, port):

        def tell(what: str) -> Run:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(what + "\n")
            process.stdin.flush()
            figures: Run = json.loads(process.stdout.readline())
            return figures

        def come(number: int) -> Run:
            started = time.perf_counter()
            load = [programs.load, port, str(process.pid), "0", "0", "echo"]
            result: Run = run_load([*load, str(number), str(min(number, IN_FLIGHT))])
            return result | {"took": time.perf_counter() - started}

        come(1)  # so that imports and buffers do not count
        before = tell("count")
        begun = tell("look")
        came = come(clients)
        after = tell("look")
        assert after["clients"] >= clients, after  # one more if the first client had another port
        idle = tell("count")
        expired = tell("expire")
        assert expired["clients"] == after["clients"], expired
        come(clients)
        stopped = tell("stop")
        assert stopped["clients"] >= clients, stopped
    types: Counter[str] = Counter(idle["types"])
    types.subtract(before["types"])
    return {
        "objects": types.total() / clients,
        "bytes": (idle["bytes"] - before["bytes"]) / clients,
        "new_micros": (after["cpu"] - begun["cpu"]) / clients * 1e6,
        "new_seconds": came["took"],
        "new_pause": after["pause"],
        "new_pause_cpu": after["pause_cpu"],
        "new_collection": after["collection"],
        "new_lost": came["lost"],
        "expiry_micros": expired["cpu"] / clients * 1e6,
        "expiry_pause": expired["pause"],
        "expiry_pause_cpu": expired["pause_cpu"],
        "expiry_collection": expired["collection"],
        "stop_micros": stopped["cpu"] / clients * 1e6,
        "stop_pause": stopped["pause"],
        "stop_pause_cpu": stopped["pause_cpu"],
        "stop_collection": stopped["collection"],
        "types": {name: count / clients for name, count in types.most_common() if count >= clients / 2},
    }


def best(runs: list[Run], key: str) -> float:
    """Return the figure of the least disturbed run: the minimum. For lost answers return the worst, the maximum."""
    choose = max if key == "new_lost" else min
    return float(choose(run[key] for run in runs))


def print_table(runs: dict[str, list[Run]]) -> None:
    width = max(len(title) for title, _, _ in ROWS.values())
    print(f"{'gc.set_threshold':{width}}", *(f"{name:>14}" for name in runs), f"{'target':>10}")
    for key, (title, factor, digits) in ROWS.items():
        figures = [f"{best(of_one, key) * factor:>14,.{digits}f}" for of_one in runs.values()]
        target = TARGETS.get(key, math.nan) * factor
        print(f"{title:{width}}", *figures, "" if math.isnan(target) else f"{target:>10,g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threshold", nargs="+", choices=THRESHOLDS, default=list(THRESHOLDS))
    parser.add_argument("--types", action="store_true", help="print which objects each idle client consists of")
    parser.add_argument("--serve", choices=THRESHOLDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve_crowd_in_this_process(THRESHOLDS[arguments.serve])
        return

    os.sched_setaffinity(0, {LOAD_CORE})  # so that the load does not slow the server down
    runs: dict[str, list[Run]] = {threshold: [] for threshold in arguments.threshold}
    with tempfile.TemporaryDirectory() as folder:
        programs = build(Path(folder))
        for number in range(arguments.runs):
            for threshold, of_one in runs.items():
                print(f"{number + 1}/{arguments.runs} {threshold}", file=sys.stderr)
                of_one.append(run_once(programs, threshold, arguments.clients))
    print(
        f"{arguments.clients:,} clients, best of {arguments.runs} runs. "
        f"{platform.python_implementation()} {platform.python_version()}, trio {version('trio')}, "
        f"trio_udp from {Path(trio_udp.__file__).parent}"
    )
    print_table(runs)
    if arguments.types:
        print("Objects of each idle client:")
        for name, count in next(iter(runs.values()))[0]["types"].items():
            print(f"{count:8.2f} {name}")


if __name__ == "__main__":
    main()
