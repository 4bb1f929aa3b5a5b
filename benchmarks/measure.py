"""One measurement: start a server on one CPU, load it from another, and end both in any case."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import servers

if sys.platform != "linux":
    sys.exit("Needs Linux: recvmmsg, UDP_GRO, /proc.")

HERE = Path(__file__).parent
SERVER_CORE = min(os.sched_getaffinity(0))
LOAD_CORE = max(os.sched_getaffinity(0))

START_TIMEOUT = 30  # seconds, for a server to start
LOAD_TIMEOUT = 120  # seconds for a load, even if a server is slow to accept 100,000 clients

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


class Load(NamedTuple):
    what: str  # the servers do; see servers.py
    clients: int = 1  # 0: every datagram comes from a new client; for "fan", the number of members
    in_flight: int = 1  # datagrams in flight, of all clients together
    memory: bool = False  # measure the server's memory for each client


class Figures(NamedTuple):
    micros: float  # of the server's CPU time, for each datagram
    rate: float  # datagrams a second
    lost: int  # like the next, from the first datagram, warming up included
    out_of_order: int
    round_trip_p50: float  # in microseconds
    round_trip_p99: float
    bytes_per_client: float | None


def build(folder: Path) -> None:
    """Compile the C programs: a load in Python would be slower than the servers under test."""
    names = ("STREAM_SIZE", "OUT_BURST", "IN_BURST", "RECEIVE_BUFFER", "LONGEST_LIFE")
    definitions = [f"-D{name}={getattr(servers, name)}" for name in names] + [f'-DJOIN="{servers.JOIN.decode()}"']
    compiler = os.environ.get("CC", "cc")
    for name in ("load", "server"):
        command = [compiler, "-O2", "-Wall", *definitions, "-o", str(folder / name), str(HERE / f"{name}.c")]
        try:
            subprocess.run(command, check=True, timeout=60)
        except FileNotFoundError:
            sys.exit(f"The load is written in C, and there is no compiler {compiler!r}. Install one, or set CC.")


def measure(programs: Path, load: Load, server: str, technique: str | None, warm: float, seconds: float) -> Figures:
    """Measure a server, optionally without one technique, in a new process."""
    what = load.what
    if server == "C":
        command = [str(programs / "server"), what]
    else:
        command = [sys.executable, str(HERE / "servers.py"), what, server]
        if technique:
            command.append(technique)

    bytes_per_client = None
    with running(command, ENVIRONMENT.get(server, {})) as (process, port):
        address = [str(programs / "load"), str(port), str(process.pid), str(warm), str(seconds)]
        if what in ("out", "in"):
            result = run_load([*address, what])
        elif what == "fan":
            result = run_load([*address, what, str(load.clients)])
        else:
            if load.memory:
                run_load([*address, "echo", "1", "1"])  # so that imports and buffers do not count
                before = resident_bytes(process.pid)
            result = run_load([*address, "echo", str(load.clients), str(load.in_flight)])
            if load.memory:
                bytes_per_client = (resident_bytes(process.pid) - before) / load.clients
        if not result["datagrams"]:
            raise _Failed("has not answered while it was measured")
    return Figures(
        micros=result["server_seconds"] / result["datagrams"] * 1e6,
        rate=result["datagrams"] / result["seconds"],
        lost=int(result["lost"]),
        out_of_order=int(result["out_of_order"]),
        round_trip_p50=result["round_trip_p50"],
        round_trip_p99=result["round_trip_p99"],
        bytes_per_client=bytes_per_client,
    )


class _Failed(Exception):
    pass


@contextmanager
def running(command: list[str], environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a server; yield its process and its port."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **environment},
            preexec_fn=lambda: os.sched_setaffinity(0, {SERVER_CORE}),
        ) as process,
    ):
        try:
            assert process.stdout is not None
            if not select.select([process.stdout], [], [], START_TIMEOUT)[0]:
                raise _Failed(f"has not started within {START_TIMEOUT} seconds")
            port = process.stdout.readline()
            if not port:
                raise _Failed("has not started")
            yield process, int(port)
            if process.poll() is not None:
                raise _Failed("has ended while it was measured")
        except _Failed as failure:
            process.kill()
            errors.seek(0)
            sys.exit(f"{' '.join(command)}: {failure}\n{errors.read()}")
        finally:
            process.kill()  # and leaving the with statement waits for it


def run_load(command: list[str]) -> dict[str, float]:
    """Run the load to its end; return its results."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise _Failed(f"could not be measured within {LOAD_TIMEOUT} seconds") from None
    if done.returncode:
        raise _Failed(f"could not be measured: {done.stderr.strip()}")
    result: dict[str, float] = json.loads(done.stdout)
    return result


def resident_bytes(pid: int) -> int:
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
