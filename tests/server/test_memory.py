"""What a server still holds after its clients have gone."""

from __future__ import annotations

import gc
import tracemalloc

import trio
from trio.testing import MockClock

import trio_udp._idle

from ..conftest import StartInMemory, echo


async def test_a_crowd_that_has_expired_leaves_no_timetable(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """When the last of many silent clients has expired, the server frees the table of when to check them."""
    run = await start_in_memory(echo, idle_timeout=8)
    tracemalloc.start()
    try:
        for number in range(1_000):
            run.put(b"", ("192.0.2.1", 1_024 + number))
        await trio.sleep(1)
        assert run.server.statistics().clients == 1_000
        assert allocated_in_idle_py() > 30_000  # bytes: a set of 1,000
        await trio.sleep(20)
        assert run.server.statistics().clients_expired == 1_000
        assert allocated_in_idle_py() < 3_000
    finally:
        tracemalloc.stop()


def allocated_in_idle_py() -> int:
    gc.collect()
    snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, trio_udp._idle.__file__)])
    return sum(trace.size for trace in snapshot.traces)
