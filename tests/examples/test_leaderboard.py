"""The leaderboard: two servers with one Redis, which stops, dies and comes back."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import attrs
import pytest

from tests.conftest import free_port, plain_socket

EXAMPLE = Path(__file__).parents[2] / "examples" / "leaderboard.py"
TIMEOUT = 20  # seconds to wait for anything; a test that passes never takes that long

pytestmark = [
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server"),
    pytest.mark.skipif(importlib.util.find_spec("coredis") is None, reason="needs coredis"),
]


@contextmanager
def running(*command: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program until the block ends."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Return the first line of a program's output that contains a text."""
    assert process.stdout is not None
    return next(line for line in process.stdout if text in line)


@attrs.define
class Redis:
    """A Redis on loopback, which keeps nothing when it ends. Its port stays the same."""

    folder: Path
    port: int = attrs.field(factory=free_port, init=False)
    process: subprocess.Popen[str] = attrs.field(init=False)

    @contextmanager
    def run(self) -> Iterator[None]:
        options = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(self.folder)]
        with running("redis-server", "--port", str(self.port), *options) as self.process:
            read_until(self.process, "Ready to accept connections")
            yield


@attrs.define
class Machines:
    """A Redis that can be started, and the ports of two servers that use it."""

    redis: Redis
    one: int
    other: int


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    redis = Redis(tmp_path_factory.mktemp("redis"))
    with ExitStack() as stack:
        url = f"redis://127.0.0.1:{redis.port}"
        # Not -W error: coredis 6.9 does not close all its streams when it cannot connect.
        command = [sys.executable, str(EXAMPLE), "0"]
        processes = [stack.enter_context(running(*command, REDIS=url)) for _ in range(2)]
        serving = [read_until(process, "serving on ('0.0.0.0'") for process in processes]
        ports = [int(line.split(", ")[1].rstrip(")\n")) for line in serving]
        yield Machines(redis, *ports)
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            printed, _ = process.communicate(timeout=TIMEOUT)
            assert "Traceback" not in printed
            assert "0 handlers cancelled" in printed
            assert process.returncode == 0


def ask(port: int, *requests: bytes, host: str = "127.0.0.9") -> list[bytes]:
    """Send requests at once, each from its own address, and return the answers."""
    with ExitStack() as stack:
        peers = [stack.enter_context(plain_socket(host)) for _ in requests]
        for peer, request in zip(peers, requests, strict=True):
            peer.settimeout(TIMEOUT)
            peer.sendto(request, ("127.0.0.1", port))
        return [peer.recv(1000) for peer in peers]


def test_two_servers_one_score(machines: Machines) -> None:
    """Name and secret identify a player at any server and from any address; the best score counts."""
    one, other = machines.one, machines.other
    with machines.redis.run():
        assert ask(one, b"score alice wonderland 250") == [b"alice has 250 points, place 1\n"]
        assert ask(other, b"score alice wonderland 250", host="127.0.0.7") == [b"alice has 250 points, place 1\n"]
        assert ask(other, b"score bob sponge 300\n") == [b"bob has 300 points, place 1\n"]
        assert ask(one, b"score alice wonderland 100") == [b"alice has 250 points, place 2\n"]
        assert ask(one, b"score bob guess 999") == [b"wrong secret\n"]
        assert ask(one, b"top") == ask(other, b"top") == [b"bob 300\nalice 250\n"]
        usage = b"write: score NAME SECRET POINTS, or: top\n"
        for nonsense in (b"", b"score alice wonderland", b"score alice wonderland -1", b"score \xff x 1", b"top 10"):
            assert ask(one, nonsense) == [usage]


def test_redis_dies_and_comes_back(machines: Machines) -> None:
    """Without Redis, clients get an error at once; servers also start without it, and work when it is back."""
    redis, one, other, later = machines.redis, machines.one, machines.other, [b"try again later\n"]
    assert ask(one, b"top") == later
    for _ in range(2):
        with redis.run():
            assert ask(one, b"score alice wonderland 250") == [b"alice has 250 points, place 1\n"]
            assert ask(other, b"top") == [b"alice 250\n"]
            redis.process.kill()
            redis.process.wait()
        assert ask(one, b"top") == ask(other, b"top") == later
        assert ask(one, *[b"top"] * 100) == later * 100  # more than there are connections in the pool


def test_redis_stops_and_goes_on(machines: Machines) -> None:
    """While Redis does not answer, clients get an error within a few seconds; later the servers work again."""
    redis, one, other, later = machines.redis, machines.one, machines.other, [b"try again later\n"]
    with redis.run():
        assert ask(one, b"score alice wonderland 250") == [b"alice has 250 points, place 1\n"]
        redis.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        # The first has a connection, the other has none yet. Neither may lose a place in its pool.
        assert ask(one, *[b"top"] * 100) == later * 100
        assert ask(other, *[b"top"] * 100) == later * 100
        assert time.monotonic() - began < TIMEOUT / 2
        redis.process.send_signal(signal.SIGCONT)
        assert ask(one, *[b"top"] * 100) == ask(other, *[b"top"] * 100) == [b"alice 250\n"] * 100
