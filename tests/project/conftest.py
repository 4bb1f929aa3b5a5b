"""Helpers to run examples, as scripts and with the command line."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from signal import SIGTERM, Signals
from typing import TypeAlias, TypeVar

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

TIMEOUT = 60.0  # seconds to wait for anything; a test that passes never takes that long

# For tests that run an example.
without_signals = pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send SIGTERM to be handled")


class Example:
    """A running example server. Its sockets, and those of its peers, are closed at the end of the test."""

    def __init__(self, process: subprocess.Popen[str], cleanup: ExitStack) -> None:
        assert process.stdout is not None
        self._process = process
        self._stdout = process.stdout
        self._cleanup = cleanup
        self.host, self.port = self.find_address()

    def find_address(self) -> tuple[str, int]:
        self.listening = self.next_line()
        host, _, port = self.listening.removeprefix("listening on ").rpartition(":")
        return host.strip("[]"), int(port)

    def peer(self, host: str | None = None) -> socket.socket:
        """Open a socket that is connected to the server, from ``host`` if that is given."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        sock = self._cleanup.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        sock.settimeout(TIMEOUT)
        if host is not None:
            sock.bind((host, 0))
        sock.connect(("127.0.0.1" if self.host == "0.0.0.0" else self.host, self.port))
        return sock

    def next_line(self) -> str:
        """The next line on standard output; empty when the process has ended."""
        return self._stdout.readline().rstrip("\n")

    def signal(self, signal_number: Signals) -> None:
        """Send a signal to the process."""
        self._process.send_signal(signal_number)

    def stop(self, signal_number: Signals = SIGTERM) -> list[str]:
        """Send a signal, and return what the server prints from now on. It must exit with status 0."""
        self.signal(signal_number)
        return self.wait()

    def wait(self) -> list[str]:
        """Wait until the server has ended with exit status 0, and return what it prints until then."""
        lines = self._stdout.read().splitlines()
        assert self._process.wait() == 0
        return lines

    def finish(self) -> None:
        """Stop the server if the test has not. A server that has ended by itself fails the test."""
        if self._process.poll() is None:
            self.signal(SIGTERM)
        self.wait()


class Served(Example):
    """An example that logs to standard error, as the command line does and scripts with ``logging.basicConfig``.

    Attributes:
      serving: The line that names the first address.
      errors: Lines of standard error that are not of level INFO; there once the process has ended. The test clears the
        ones that it expects.
    """

    def find_address(self) -> tuple[str, int]:
        self.errors: list[str] = []
        assert self._process.stderr is not None
        self._stderr = self._process.stderr
        while True:
            self.serving = self._stderr.readline()
            assert self.serving, "ended before it served"
            if found := re.search(r"serving .*?on (?:\('(.+)', (\d+)\)|([\d.]+):(\d+))", self.serving):
                return found[1] or found[3], int(found[2] or found[4])
            assert "INFO" in self.serving, self.serving

    def wait(self) -> list[str]:
        lines = super().wait()
        self.errors += [line for line in self._stderr.read().splitlines() if "INFO" not in line]
        return lines

    def finish(self) -> None:
        super().finish()
        assert self.errors == []


Start: TypeAlias = Callable[..., Example]
Serve: TypeAlias = Callable[..., Served]


@pytest.fixture
def start(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Start]:
    """Start example servers that print their address: ``start("dns_server", "--host", "127.0.0.1")``.

    Each runs in ``tmp_path``. At the end of the test it must exit with status 0, and must not have written to standard
    error what the test has not read from ``capfd``. It gets its port as the last argument, unless that is ``None``.
    """
    with ExitStack() as cleanup:

        def start(name: str, *arguments: str, port: int | None = 0) -> Example:
            # -u: its lines are read here while it runs. -W error: an example has no warnings.
            command = [sys.executable, "-u", "-W", "error", str(EXAMPLES / f"{name}.py"), *arguments]
            if port is not None:
                command.append(str(port))
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
            return _watched(Example, process, cleanup)

        yield start
    assert capfd.readouterr().err == ""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start servers with the command line: ``serve("login:handler", "--workers", "2", ANSWER_TIME="0.2")``.

    A target without a colon is run as a script. Each runs in ``tmp_path``, on a port that the kernel chooses. At the
    end of the test it must exit with status 0, and must not have logged anything above INFO, except for what the test
    has removed from ``errors``.
    """
    with ExitStack() as cleanup:

        def serve(target: str, *arguments: str, host: str = "127.0.0.1", **environment: str) -> Served:
            name, colon, attribute = target.partition(":")
            command = [sys.executable, "-u", "-W", "error", str(EXAMPLES / f"{name}.py"), "0"]
            if colon:
                options = ["--port", "0", "--host", host, *arguments]
                target = f"{EXAMPLES / name}.py:{attribute}"
                command = [sys.executable, "-W", "error", "-m", "trio_udp", *options, target]
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
            )
            return _watched(Served, process, cleanup)

        yield serve


AnyExample = TypeVar("AnyExample", bound=Example)


def _watched(kind: type[AnyExample], process: subprocess.Popen[str], cleanup: ExitStack) -> AnyExample:
    """End a process with the test, or after a time limit."""
    cleanup.enter_context(process)
    # Reading a pipe has no timeout, but it ends when the process ends.
    watchdog = threading.Timer(TIMEOUT, process.kill)
    watchdog.start()
    cleanup.callback(watchdog.cancel)
    try:
        example = kind(process, cleanup)
    except BaseException:
        process.kill()
        raise
    cleanup.callback(example.finish)
    return example


def ask(peer: socket.socket, payload: bytes) -> bytes:
    """Send a datagram and return the next one that arrives."""
    peer.send(payload)
    return peer.recv(65_535)


def waiting(peer: socket.socket) -> list[bytes]:
    """Return all datagrams that have arrived at a socket and were not received yet."""
    peer.setblocking(False)
    payloads = []
    try:
        while True:
            payloads.append(peer.recv(65_535))
    except BlockingIOError:
        return payloads
    finally:
        peer.settimeout(TIMEOUT)
