"""Reliable requests: each addition is done once, through networks that lose, duplicate and reorder."""

from __future__ import annotations

import itertools
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import trio
from trio.testing import MockClock

import trio_udp
from trio_udp.testing import SimulatedNetwork, deterministic_scheduling

from ..conftest import SERVER
from ..project.conftest import EXAMPLES, TIMEOUT, Start, ask, waiting, without_signals
from .conftest import load

reliable = load("reliable")


def add_through(network: SimulatedNetwork, people: int, additions: int) -> tuple[list[int], int, int]:
    """Let some clients add 1 a few times each; return all totals that they received, and the server's."""
    account = reliable.Account()
    totals: list[int] = []

    async def person() -> None:
        async with await network.connect(*SERVER) as connection:
            totals.extend([await reliable.add(connection, 1) for _ in range(additions)])

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            endpoint = network.endpoint(*SERVER)
            serve = partial(trio_udp.serve_endpoints, account.handler, [endpoint], idle_timeout=reliable.IDLE_TIMEOUT)
            await nursery.start(serve)
            async with trio.open_nursery() as adding:
                for _ in range(people):
                    adding.start_soon(person)
            nursery.cancel_scope.cancel()

    with deterministic_scheduling(network.seed):
        trio.run(main, clock=MockClock(autojump_threshold=0))
    return totals, account.additions, account.total


@pytest.mark.parametrize("seed", range(3))
def test_every_addition_is_done_once(seed: int) -> None:
    """With 30 % loss, duplicates and reordering, each addition is done once, and each answer is another total."""
    network = SimulatedNetwork(seed=seed, loss=0.3, duplicate=0.3, reorder=0.3, latency=(0.01, 0.8))
    totals, additions, total = add_through(network, people=10, additions=10)
    assert sorted(totals) == list(range(1, 101))
    assert (additions, total) == (100, 100)
    assert len([event for event in network.events if event.fate == "arrived" and event.destination == SERVER]) > 150


@without_signals
def test_repeated_requests(start: Start) -> None:
    """A repeated request gets the same answer, and its work is done once; other clients are independent."""
    example = start("reliable", "--host", "127.0.0.1")
    one, two = example.peer(), example.peer()
    assert [ask(one, b"a 10") for _ in range(3)] == [b"a 10"] * 3
    assert ask(two, b"a 5") == b"a 15"
    for _ in range(3):
        one.send(b"b 1")  # at once: the work for the first is not finished
    assert [one.recv(100) for _ in range(3)] == [b"b 16"] * 3
    for payload in (b"", b"c", b"c x", b"\xff"):
        one.send(payload)
    assert ask(one, b"a 10") == b"a 10"
    assert waiting(one) == []
    assert example.stop() == ["3 additions for 12 requests"]


@contextmanager
def lossy_path(port: int) -> Iterator[int]:
    """Return a port that leads to a server on 127.0.0.1, and loses three of ten datagrams in each direction."""
    lost = itertools.cycle([True, False, False, True, False, False, False, True, False, False])
    inside, outside = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    until, stop = socket.socketpair()
    with inside, outside, until, stop:
        outside.bind(("127.0.0.1", 0))
        inside.connect(("127.0.0.1", port))
        client = None

        def carry() -> None:
            nonlocal client
            while until not in (readable := select.select([inside, outside, until], [], [])[0]):
                if outside in readable:
                    payload, client = outside.recvfrom(100)
                    if not next(lost):
                        inside.send(payload)
                if inside in readable:
                    payload = inside.recv(100)
                    if not next(lost) and client is not None:
                        outside.sendto(payload, client)

        thread = threading.Thread(target=carry)
        thread.start()
        try:
            yield outside.getsockname()[1]
        finally:
            stop.send(b"x")
            thread.join()


def run_client(port: int, *amounts: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / "reliable.py"), str(port), "--add", *map(str, amounts)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)


@without_signals
def test_over_a_lossy_path(start: Start) -> None:
    """With 30 % loss of real datagrams in each direction, the example's client gets every total."""
    example = start("reliable", "--host", "127.0.0.1")
    with lossy_path(example.port) as port:
        done = run_client(port, 10, 20, -2)
    assert (done.stdout.split(), done.stderr, done.returncode) == (["10", "30", "28"], "", 0)
    assert example.stop() == ["3 additions for 4 requests"]
