"""Runs the command line with ``--metrics``, and sends requests to its HTTP port."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

ROOT = Path(__file__).parents[2]

SECONDS = 20.0  # seconds to wait for anything; a test that passes never takes that long


@attrs.frozen
class Service:
    """A running command line.

    Attributes:
      process: With its standard error as text.
      port: For datagrams.
      http: ``http://127.0.0.1:PORT``.
    """

    process: subprocess.Popen[str]
    port: int
    http: str


def command(*options: str) -> list[str]:
    """Return the command that serves an echo with these options."""
    echo = ["--host", "127.0.0.1", "--port", "0", "trio_udp.operate._echo:echo"]
    return [sys.executable, "-W", "error", "-m", "trio_udp", *options, *echo]


def environment(*folders: Path) -> dict[str, str]:
    """Return the environment of a command that finds our package, and modules in these folders first."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*folders, ROOT]))}


@contextmanager
def service(*options: str) -> Iterator[Service]:
    """Run the command line until the block ends; the block begins when it serves."""
    with subprocess.Popen(
        command("--metrics", "0", *options), stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stderr is not None
        try:
            log = ""
            while "serving" not in log:
                line = process.stderr.readline()
                assert line, log
                log += line
            [http] = re.findall(r"metrics on (\S+)/metrics", log)
            [port] = re.findall(r"serving .* on 127.0.0.1:(\d+)", log)
            yield Service(process, int(port), http)
        finally:
            process.terminate()
            process.stderr.read()
            process.wait(SECONDS)


def ask(url: str, method: str = "GET") -> tuple[int, str]:
    """Return the status and the text of an HTTP response."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=SECONDS) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
