"""Starting workers in a test, and the command line in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import pytest
import trio

import trio_udp

ROOT = Path(__file__).parents[2]
APPS = "tests.operate.apps"
TIMEOUT = 20.0  # seconds to wait for anything; a test that passes never takes that long


@attrs.define(eq=False)
class Workers:
    """Starts and stops workers in a nursery."""

    nursery: trio.Nursery
    _ended: dict[trio_udp.Supervisor, trio.Event] = attrs.field(factory=dict, init=False)

    async def start(self, target: str = "tell_pid", **options: Any) -> trio_udp.Supervisor:
        """Start workers on 127.0.0.1 with keywords of ``serve_workers``; by default two that answer with their pid."""
        defaults: dict[str, Any] = {"host": "127.0.0.1", "workers": 2, "app_dir": str(ROOT), "log_format": "none"}
        target = target if ":" in target else f"{APPS}:{target}"
        ended = trio.Event()

        async def run(task_status: trio.TaskStatus[trio_udp.Supervisor]) -> None:
            try:
                await trio_udp.serve_workers(target, 0, **(defaults | options), task_status=task_status)
            finally:
                ended.set()

        supervisor: trio_udp.Supervisor = await self.nursery.start(run)
        self._ended[supervisor] = ended
        return supervisor

    async def ended(self, supervisor: trio_udp.Supervisor) -> None:
        with trio.fail_after(TIMEOUT):
            await self._ended[supervisor].wait()

    async def stop(self, supervisor: trio_udp.Supervisor) -> trio_udp.ServerStatistics:
        """Stop, wait until all workers have ended, and return the final statistics."""
        supervisor.stop()
        await self.ended(supervisor)
        assert supervisor.drained
        assert {worker.state for worker in supervisor.workers} == {"dead"}
        return supervisor.statistics()


@pytest.fixture
def workers(nursery: trio.Nursery) -> Workers:
    return Workers(nursery)


def port_of(supervisor: trio_udp.Supervisor) -> int:
    port: int = supervisor.addresses[0][1]
    return port


@attrs.define(eq=False)
class Process:
    """A running command line."""

    process: subprocess.Popen[str]
    port: int

    @property
    def pid(self) -> int:
        return self.process.pid

    def children(self) -> list[int]:
        """The worker processes."""
        tasks = Path(f"/proc/{self.pid}/task").glob("*/children")  # a thread starts them
        return [int(pid) for path in tasks for pid in path.read_text().split()]

    def peer(self) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.settimeout(TIMEOUT)
        sock.connect(("127.0.0.1", self.port))
        return sock

    def end(self, signal_number: int) -> tuple[int, list[str]]:
        """Send a signal; return the exit status, and the lines that are logged from then on."""
        os.kill(self.pid, signal_number)
        return self.wait()

    def wait(self) -> tuple[int, list[str]]:
        """Return the exit status, and the lines on standard error after all processes have closed it."""
        assert self.process.stderr is not None
        lines = self.process.stderr.read().splitlines()
        return self.process.wait(), lines


RunCommand: TypeAlias = Callable[..., Process]


@pytest.fixture
def run_command() -> Iterator[RunCommand]:
    """Start ``python -m trio_udp`` with arguments, in a process group of its own, on a port that the kernel chooses."""
    with ExitStack() as cleanup:

        def run(*arguments: str, **environment: str) -> Process:
            process = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "trio_udp", "--port", "0", *arguments],
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=os.environ | environment,
                start_new_session=True,
            )
            cleanup.enter_context(process)
            # Reading a pipe has no timeout, but it ends when the processes end.
            watchdog = threading.Timer(TIMEOUT, partial(os.killpg, process.pid, signal.SIGKILL))
            watchdog.start()
            cleanup.callback(watchdog.cancel)
            cleanup.callback(process.kill)
            assert process.stderr is not None
            first = process.stderr.readline()
            serving = re.search(r"serving \S+ on \S+:(\d+)", first)
            assert serving, first
            return Process(process, int(serving[1]))

        yield run
