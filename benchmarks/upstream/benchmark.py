"""What the patches beside this file change in the cost of Trio's primitives.

    pip download --no-binary :all: --no-deps trio==0.35.0
    python benchmarks/upstream/benchmark.py trio-0.35.0.tar.gz          # ten minutes; prints tables
    python benchmarks/upstream/benchmark.py trio-0.35.0.tar.gz --udp    # trio_udp's own benchmark, 256 clients

It unpacks Trio once for each patch, and applies the patch. Each measurement is a new process. Instructions are counted
by ``valgrind --tool=cachegrind``, where it is installed, and are the same in every run to within 1 %. CPU time is
measured in interleaved rounds, and differs from run to run; the tables show the median of its ratios to unpatched Trio
in the same round.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio
from trio.lowlevel import Abort, Task, checkpoint, current_task, reschedule, wait_task_rescheduled

HERE = Path(__file__).parent
PATCHES = ["instruments", "waking", "cancel-scopes"]
UNPATCHED = "unpatched"
ROUNDS = 3
NUMBER = 3_200  # under valgrind, which is slow
GROUP = 16


# ---- what is measured: each does something of the kind ``number`` times ----


async def checkpoints(number: int) -> None:
    for _ in range(number):
        await checkpoint()


async def wakes(number: int) -> None:
    """Wake sleeping tasks, 16 in a pass."""
    tasks: list[Task] = []

    async def sleeper() -> None:
        tasks.append(current_task())
        while True:
            await wait_task_rescheduled(lambda _: Abort.SUCCEEDED)

    async with trio.open_nursery() as nursery:
        for _ in range(GROUP):
            nursery.start_soon(sleeper)
        await checkpoint()
        await checkpoint()
        for _ in range(number // GROUP):
            for task in tasks:
                reschedule(task)
            await checkpoint()  # before or after the sleepers
            await checkpoint()  # after them
        nursery.cancel_scope.cancel()


async def events(number: int) -> None:
    """Set an event that another task waits for."""
    event = trio.Event()

    async def waiter() -> None:
        while True:
            await event.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiter)
        await checkpoint()
        for _ in range(number):
            old, event = event, trio.Event()
            old.set()
            await checkpoint()
        nursery.cancel_scope.cancel()


async def channels(number: int) -> None:
    """Send an object to a task by one memory channel, and receive it back by another."""
    to_echo, questions = trio.open_memory_channel[int](0)
    from_echo, answers = trio.open_memory_channel[int](0)

    async def echo() -> None:
        async for value in questions:
            await from_echo.send(value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo)
        for value in range(number):
            await to_echo.send(value)
            await answers.receive()
        nursery.cancel_scope.cancel()


async def locks(number: int) -> None:
    lock = trio.Lock()
    for _ in range(number):
        async with lock:
            pass


async def timeouts(number: int) -> None:
    for _ in range(number):
        with trio.move_on_after(10):  # noqa: ASYNC100 - what it costs by itself
            pass


async def nurseries(number: int) -> None:
    """Open a nursery, run one task in it, close it."""

    async def task() -> None:
        pass

    for _ in range(number):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task)


async def tcp(number: int) -> None:
    """Send a byte to a TCP server, and receive it back, with a timeout."""

    async def echo(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, echo, [listener])
        async with await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1]) as stream:
            for _ in range(number):
                with trio.fail_after(10):
                    await stream.send_all(b"x")
                    await stream.receive_some(100)
        nursery.cancel_scope.cancel()


SHAPES: dict[str, Callable[[int], Awaitable[None]]] = {
    "checkpoint()": checkpoints,
    "wake a sleeping task": wakes,
    "there and back by memory channels": channels,
    "move_on_after()": timeouts,
    "nursery with one task": nurseries,
    "set an Event that a task waits for": events,
    "take and release a Lock": locks,
    "there and back by TCP, fail_after()": tcp,
}


# ---- the measurements ----


def unpack(sdist: Path, folder: Path) -> dict[str, Path]:
    """Unpack Trio once unpatched, and once with each patch; return where to import each from."""
    trees = {}
    for name in [UNPATCHED, *PATCHES]:
        with tarfile.open(sdist) as archive:
            archive.extractall(folder / name, filter="data")
        (tree,) = (folder / name).iterdir()
        if name != UNPATCHED:
            with open(HERE / f"{name}.patch") as text:
                subprocess.run(["patch", "-p1", "--silent"], cwd=tree, stdin=text, check=True, timeout=60)
        trees[name] = tree / "src"
        run(trees[name], "checkpoint()", 1)  # compiles its modules
    return trees


def run(tree: Path, shape: str, number: int, *tool: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*tool, sys.executable, __file__, "--shape", shape, "--number", str(number)],
        env={**os.environ, "PYTHONPATH": str(tree), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": ""},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )


def instructions(tree: Path, shape: str, number: int) -> int:
    """Count the instructions of a whole process."""
    tool = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
    (found,) = re.findall(r"I *refs: *([\d,]+)", run(tree, shape, number, *tool).stderr)
    return int(found.replace(",", ""))


def cpu_micros(tree: Path, shape: str) -> float:
    return float(run(tree, shape, 30_000).stdout)


def compare(trees: dict[str, Path]) -> None:
    counts = shutil.which("valgrind") is not None
    # What starting and ending takes.
    start = [instructions(tree, "checkpoint()", 1) for tree in trees.values()] if counts else []
    patched = " | ".join(list(trees)[1:])
    print(f"| | instructions, unpatched | {patched} | µs of CPU, unpatched | {patched} |")
    print("|---" * (2 * len(trees) + 1) + "|", flush=True)
    for shape in SHAPES:
        if counts and "TCP" not in shape:  # how often a socket is polled differs from run to run
            all_in_all = [instructions(tree, shape, NUMBER) for tree in trees.values()]
            counted = [(whole - began) / NUMBER for whole, began in zip(all_in_all, start, strict=True)]
            row = [f"{counted[0]:,.0f}", *(f"{(it / counted[0] - 1) * 100:+.1f} %" for it in counted[1:])]
        else:
            row = ["-"] * len(trees)
        rounds = [[cpu_micros(tree, shape) for tree in trees.values()] for _ in range(ROUNDS)]
        row.append(f"{min(it[0] for it in rounds):.2f}")
        for position in range(1, len(trees)):
            ratio = statistics.median(it[position] / it[0] for it in rounds)
            row.append(f"{(ratio - 1) * 100:+.0f} %")
        print(f"| {shape} | {' | '.join(row)} |", flush=True)


def compare_udp(trees: dict[str, Path]) -> None:
    """Measure trio_udp's echo server under 256 clients with one datagram in flight each, on each Trio."""
    sys.path.insert(0, str(HERE.parent))
    import native
    from measure import LOAD_CORE, Contestant, Load, Pace

    os.sched_setaffinity(0, {LOAD_CORE})
    rounds: list[list[float]] = []
    with tempfile.TemporaryDirectory() as programs:
        built = native.build(Path(programs))
        for number in range(ROUNDS):
            print(f"{number + 1}/{ROUNDS}", file=sys.stderr)
            rounds.append([])
            for tree in trees.values():
                os.environ["PYTHONPATH"] = f"{tree}{os.pathsep}{HERE.parents[1]}"
                figures = Load("echo", 256, 256).measure(built, Contestant("trio_udp"), Pace(0.5, 3, 1))
                rounds[-1].append(figures["micros"])
    print("| Trio | CPU for each datagram, ratio to unpatched, median (lowest to highest) |")
    print("|---|---|")
    for position, name in enumerate(trees):
        ratios = sorted(it[position] / it[0] for it in rounds)
        print(f"| {name} | {statistics.median(ratios):.3f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdist", nargs="?", type=Path, help="trio-0.35.0.tar.gz")
    parser.add_argument("--udp", action="store_true")
    parser.add_argument("--shape", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.shape:
        began = time.process_time()
        trio.run(SHAPES[arguments.shape], arguments.number)
        print((time.process_time() - began) / arguments.number * 1e6)
    elif arguments.sdist is None:
        parser.error("which source distribution of Trio?")
    else:
        with tempfile.TemporaryDirectory() as folder:
            (compare_udp if arguments.udp else compare)(unpack(arguments.sdist, Path(folder)))


if __name__ == "__main__":
    main()
