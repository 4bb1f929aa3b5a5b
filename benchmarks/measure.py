"""Measurements: start servers on one core, load them from another, and always end all of them."""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeAlias

import native
from native import HERE, Programs
from traffic import FLIGHT, OUT_BURST

if sys.platform != "linux":
    sys.exit("Needs Linux: recvmmsg, UDP_GRO, /proc.")

SERVER_CORE = min(os.sched_getaffinity(0))
LOAD_CORE = max(os.sched_getaffinity(0))

START_TIMEOUT = 30  # seconds, for a server to start
LOAD_TIMEOUT = 120  # seconds for a load, even if a server is slow to accept 100,000 clients

# A server with more clients than this may be busy with them after its turn, while others are measured.
MOST_IN_TURNS = 1_000

# asyncio allocates 256 KiB for each datagram that it reads. Depending on the history of the process, glibc either takes
# that from the system and returns it each time, or keeps it. The difference is almost a factor of three, so both are
# measured. See mallopt(3). Without glibc these variables have no effect.
ENVIRONMENT = {
    "asyncio": {"MALLOC_MMAP_THRESHOLD_": "131072"},
    "asyncio keeping memory": {
        "MALLOC_MMAP_THRESHOLD_": "1000000000",
        "MALLOC_TRIM_THRESHOLD_": "1000000000",
        "MALLOC_TOP_PAD_": "4000000",
    },
}

Figures: TypeAlias = dict[str, float]  # by name; "micros" is the server's CPU time for each datagram


class MeasurementFailed(Exception):
    """A server or a load failed. The text has its command and its output."""


class Pace(NamedTuple):
    """The length and size of a measurement."""

    warm: float  # seconds
    seconds: float
    scale: float  # of the number of clients in shapes where all of them arrive or leave at once
    turns: int = 1  # that the seconds are divided into, where servers take turns


class Contestant(NamedTuple):
    """A server, optionally without one technique."""

    server: str
    without: str | None = None

    def __str__(self) -> str:
        return f"{self.server} without {self.without}" if self.without else self.server

    def command(self, programs: Programs, what: str) -> list[str]:
        if self.server in native.NATIVE:
            return [*programs.servers[self.server], what, *(["gso"] if self.server.endswith("GSO") else [])]
        return [sys.executable, str(HERE / "servers.py"), what, self.server, *([self.without] if self.without else [])]

    def environment(self) -> dict[str, str]:
        return native.ENVIRONMENT if self.server in native.NATIVE else ENVIRONMENT.get(self.server, {})


Outcome: TypeAlias = tuple[int, Contestant, Figures | Exception]  # the first is the turn


class Load(NamedTuple):
    """Clients in closed loops, which keep a server busy."""

    what: str  # see traffic.py
    clients: int = 1  # 0: every datagram comes from a new client; for "fan", the number of members
    in_flight: int = 1  # datagrams in flight, of all clients together

    def arguments(self) -> list[str]:
        bursts = {"out": OUT_BURST, "flight": FLIGHT}
        if self.what in bursts:
            return ["out", str(bursts[self.what])]
        if self.what in ("fan", "unix"):
            return [self.what, str(self.clients)]
        if self.what == "in":
            return ["in"]
        how = self.what if self.what == "proxied" else "echo"
        return [how, str(self.clients), str(self.in_flight)]

    @property
    def can_take_turns(self) -> bool:
        return self.clients <= MOST_IN_TURNS and self.what != "fan"  # whose members stay after a turn

    def measure(self, programs: Programs, contestant: Contestant, pace: Pace) -> Figures:
        with running(contestant.command(programs, self.what), contestant.environment()) as (process, address):
            return self.put_on(programs, address, [process.pid], pace)

    def measure_in_turns(self, programs: Programs, contestants: list[Contestant], pace: Pace) -> Iterator[Outcome]:
        """Start all servers at once, and load them in turn for a fraction of a second, several times.

        The speed of a machine can change by half within seconds. Turns that follow each other closely meet the same
        conditions, so their ratio means more than that of two long measurements.
        """
        warm_up = pace._replace(seconds=pace.warm)
        paced = pace._replace(warm=pace.warm / pace.turns, seconds=pace.seconds / pace.turns)
        stacks = {contestant: ExitStack() for contestant in contestants}
        servers: dict[Contestant, tuple[subprocess.Popen[str], str]] = {}
        try:
            for turn in range(-1, pace.turns):  # in the first one they start and warm up
                for contestant in random.Random(turn).sample([*stacks], len(stacks)):
                    try:
                        if turn < 0:
                            start = running(contestant.command(programs, self.what), contestant.environment())
                            servers[contestant] = stacks[contestant].enter_context(start)
                        process, address = servers[contestant]
                        figures = self.put_on(programs, address, [process.pid], warm_up if turn < 0 else paced)
                    except MeasurementFailed as failure:
                        with suppress(MeasurementFailed):
                            stacks.pop(contestant).close()
                        yield max(0, turn), contestant, failure
                    else:
                        if turn >= 0:
                            yield turn, contestant, figures
        finally:
            for stack in stacks.values():
                with suppress(MeasurementFailed):  # the figures are there
                    stack.close()

    def put_on(self, programs: Programs, address: str, pids: list[int], pace: Pace) -> Figures:
        """Load a running server, and measure its processes."""
        server = [address, ",".join(map(str, pids)), str(pace.warm), str(pace.seconds)]
        result = run_load([programs.load, *server, *self.arguments()])
        if not result["datagrams"]:
            raise MeasurementFailed("did not answer during the measurement")
        return result | {
            "micros": result["server_seconds"] / result["datagrams"] * 1e6,
            "rate": result["datagrams"] / result["seconds"],
        }


class Arrival(NamedTuple):
    """New clients that arrive all at once, measured from the first datagram to the last."""

    clients: int
    in_flight: int

    def measure(self, programs: Programs, contestant: Contestant, pace: Pace) -> Figures:
        load = Load("echo", int(self.clients * pace.scale), self.in_flight)
        return load.measure(programs, contestant, pace._replace(warm=-1))


class IdleMemory(NamedTuple):
    """The server's memory for each client that has sent one datagram and is idle."""

    clients: int

    def measure(self, programs: Programs, contestant: Contestant, pace: Pace) -> Figures:
        clients = int(self.clients * pace.scale)
        with running(contestant.command(programs, "echo"), contestant.environment()) as (process, address):
            Load("echo").put_on(programs, address, [process.pid], pace)  # so that imports and buffers do not count
            before = resident_bytes(process.pid)
            Load("echo", clients, 64).put_on(programs, address, [process.pid], pace._replace(warm=-1))
            return {"bytes_per_client": (resident_bytes(process.pid) - before) / clients}


@contextmanager
def running(
    command: list[str], environment: dict[str, str], cores: frozenset[int] = frozenset({SERVER_CORE})
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server; yield its process, and its port or name, which it prints as its first line."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **environment},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        ) as process,
    ):
        try:
            assert process.stdout is not None
            if not select.select([process.stdout], [], [], START_TIMEOUT)[0]:
                raise MeasurementFailed(f"did not start within {START_TIMEOUT} seconds")
            address = process.stdout.readline().strip()
            if not address:
                raise MeasurementFailed("did not start")
            yield process, address
            if process.poll() is not None:
                raise MeasurementFailed("ended during the measurement")
        except MeasurementFailed as failure:
            process.kill()
            errors.seek(0)
            raise MeasurementFailed(f"{' '.join(command)}: {failure}\n{errors.read()}") from None
        finally:
            process.kill()  # the end of the with statement waits for it


def run_load(command: list[str]) -> dict[str, float]:
    """Run the load until it ends; return its results."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise MeasurementFailed(f"could not be measured within {LOAD_TIMEOUT} seconds") from None
    if done.returncode:
        raise MeasurementFailed(f"could not be measured: {done.stderr.strip()}")
    result: dict[str, float] = json.loads(done.stdout)
    return result


def resident_bytes(pid: int) -> int:
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
