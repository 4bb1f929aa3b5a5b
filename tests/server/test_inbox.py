"""The inbox: its bounds, its two policies, and a model of it."""

from __future__ import annotations

import math
from collections import deque
from typing import Literal

import pytest
import trio
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trio_udp import Client, Limits
from trio_udp._endpoints import reader_of
from trio_udp._inbox import Inbox, Shared
from trio_udp._lifecycle import End

from ..conftest import ALICE, BOB, RunningInMemory, StartInMemory, check_adds_up, echo, in_memory


async def collect(
    start_in_memory: StartInMemory, limits: Limits, *payloads: bytes
) -> tuple[RunningInMemory, list[bytes]]:
    """Let payloads arrive while the handler is busy; return the payloads that it takes afterwards."""
    taken: list[bytes] = []
    go_on = trio.Event()

    async def handler(client: Client) -> None:
        await client.receive()
        await go_on.wait()
        taken.extend([payload async for payload in client])

    run = await start_in_memory(handler, limits=limits, idle_timeout=math.inf)
    run.put(b"")
    await run.settle()
    for payload in payloads:
        run.put(payload)
    await run.settle()
    go_on.set()
    await run.settle()
    check_adds_up(run.server)
    run.server.stop()
    await run.settle()
    return run, taken


async def test_a_full_inbox_drops_the_newest(start_in_memory: StartInMemory) -> None:
    """By default a full inbox drops and counts new datagrams, and keeps the waiting ones."""
    run, taken = await collect(start_in_memory, Limits(inbox_datagrams=3), *[b"%d" % i for i in range(10)])
    assert taken == [b"0", b"1", b"2"]
    assert run.server.statistics().dropped_inbox_full == 7


async def test_a_full_inbox_drops_the_oldest(start_in_memory: StartInMemory) -> None:
    """A full inbox with drop_oldest drops the datagram that has waited the longest."""
    limits = Limits(inbox_datagrams=3, when_inbox_full="drop_oldest")
    run, taken = await collect(start_in_memory, limits, *[b"%d" % i for i in range(10)])
    assert taken == [b"7", b"8", b"9"]
    assert run.server.statistics().dropped_inbox_full == 7


async def test_an_inbox_is_bounded_in_bytes(start_in_memory: StartInMemory) -> None:
    """An inbox is bounded in payload bytes too; empty datagrams take no bytes."""
    _, taken = await collect(start_in_memory, Limits(inbox_bytes=10), bytes(6), bytes(5), bytes(4), b"", b"x", b"")
    assert taken == [bytes(6), bytes(4), b"", b""]


async def test_dropping_the_oldest_stops_when_there_is_room(start_in_memory: StartInMemory) -> None:
    """drop_oldest drops no more than needed, and nothing for a datagram that can never fit."""
    limits = Limits(inbox_bytes=10, when_inbox_full="drop_oldest")
    run, taken = await collect(start_in_memory, limits, bytes(3), bytes(3), bytes(4), bytes(5), bytes(11))
    assert taken == [bytes(4), bytes(5)]
    assert run.server.statistics().dropped_inbox_full == 3


async def test_all_inboxes_are_bounded_together(start_in_memory: StartInMemory) -> None:
    """total_bytes bounds the payloads of all inboxes; a stranger whose datagram does not fit is no client."""

    async def handler(client: Client) -> None:
        await trio.sleep_forever()

    run = await start_in_memory(handler, limits=Limits(total_bytes=10))
    run.put(bytes(8), ALICE)
    run.put(bytes(3), BOB)
    await run.settle()
    assert run.server.statistics().clients == 1
    run.put(bytes(2), BOB)
    run.put(bytes(1), ALICE)
    run.put(b"", ALICE)
    await run.settle()
    statistics = run.server.statistics()
    assert (statistics.clients, statistics.waiting, statistics.dropped_inbox_full) == (2, 3, 2)
    check_adds_up(run.server)


async def test_one_client_does_not_drop_anothers_datagrams(start_in_memory: StartInMemory) -> None:
    """drop_oldest at total_bytes drops only the client's own datagrams, and only if that makes enough room."""

    async def handler(client: Client) -> None:
        await trio.sleep_forever()

    limits = Limits(total_bytes=10, when_inbox_full="drop_oldest")
    run = await start_in_memory(handler, limits=limits)
    run.put(bytes(6), ALICE)
    run.put(bytes(2), BOB)
    run.put(bytes(5), BOB)
    run.put(bytes(4), BOB)
    await run.settle()
    waiting = {c.peer_address: (c.statistics().waiting, c.statistics().bytes_received) for c in run.server.clients}
    assert waiting == {ALICE: (1, 6), BOB: (1, 11)}
    assert run.server.statistics().dropped_inbox_full == 2


async def test_a_payload_for_a_waiting_handler_needs_no_room(start_in_memory: StartInMemory) -> None:
    """A payload that goes straight to a waiting handler may be longer than inbox_bytes, and than total_bytes leaves."""
    taken = []

    async def handler(client: Client) -> None:
        if client.peer_address == ALICE:
            await trio.sleep_forever()
        async for payload in client:
            taken.append(payload)  # noqa: PERF401  # seen while the handler waits for more

    run = await start_in_memory(handler, idle_timeout=math.inf, limits=Limits(inbox_bytes=10, total_bytes=10))
    run.put(b"", BOB)
    await run.settle()
    run.put(bytes(10), ALICE)
    for _ in range(3):
        await run.settle()
        run.put(bytes(11), BOB)
        run.put(b"no room", BOB)
    await run.settle()
    assert taken == [b"", bytes(11), bytes(11), bytes(11)]
    assert run.server.statistics().dropped_inbox_full == 3
    check_adds_up(run.server)


async def test_a_slow_client_delays_no_other(start_in_memory: StartInMemory) -> None:
    """While one inbox overflows, another client loses nothing."""

    async def handler(client: Client) -> None:
        async for payload in client:
            if client.peer_address == ALICE:
                await trio.sleep_forever()
            await client.send(payload)

    run = await start_in_memory(handler)
    wanted = [b"%d" % i for i in range(500)]
    for payload in wanted:
        for _ in range(5):
            run.put(payload, ALICE)
        run.put(payload, BOB)
    await run.settle()
    assert run.sent_to(BOB) == wanted
    assert run.server.statistics().dropped_inbox_full == 2_500 - 1 - 256
    check_adds_up(run.server)


@pytest.mark.parametrize("policy", ["drop_newest", "drop_oldest"])
async def test_an_echo_keeps_up_with_any_burst(
    start_in_memory: StartInMemory, policy: Literal["drop_newest", "drop_oldest"]
) -> None:
    """A handler that only receives and sends loses no datagram of any burst."""
    run = await start_in_memory(echo, limits=Limits(when_inbox_full=policy))
    wanted = [b"%d" % i for i in range(10_000)]
    for payload in wanted:
        run.put(payload)
    await run.settle()
    assert run.sent_to(ALICE) == wanted


class InboxModel(RuleBasedStateMachine):
    """Two inboxes that share totals behave like a model of two lists, under any sequence of events."""

    def __init__(self, policy: Literal["drop_newest", "drop_oldest"] = "drop_newest") -> None:
        super().__init__()
        self.limits = Limits(inbox_datagrams=4, inbox_bytes=12, total_bytes=16, when_inbox_full=policy)
        self.shared = Shared(self.limits)
        self.outbox = reader_of(in_memory().endpoint).outbox
        self.outbox.turn.time = 1.0  # as while a batch is handed out: there is no clock outside of Trio
        self.inboxes = [self._new_inbox() for _ in range(2)]
        self.models: list[deque[bytes]] = [deque(), deque()]
        self.arrived = self.delivered = self.dropped_full = self.dropped_at_end = 0

    def _new_inbox(self) -> Inbox:
        return Inbox(self.outbox, self.outbox.engine.route(ALICE), self.shared, math.inf)

    def _fits(self, which: int, payload: bytes) -> bool:
        mine, both = self.models[which], [*self.models[0], *self.models[1]]
        return len(mine) < 4 and sum(map(len, mine)) + len(payload) <= 12 and sum(map(len, both)) + len(payload) <= 16

    @rule(which=st.integers(0, 1), payload=st.binary(max_size=14))
    def put(self, which: int, payload: bytes) -> None:
        self.inboxes[which].put(payload)
        self._arrives(which, payload)

    @rule(which=st.integers(0, 1), payloads=st.lists(st.binary(max_size=5), max_size=6))
    def keep_row(self, which: int, payloads: list[bytes]) -> None:
        self.inboxes[which].keep_row(payloads)
        for payload in payloads:
            self._arrives(which, payload)

    def _arrives(self, which: int, payload: bytes) -> None:
        self.arrived += 1
        mine = self.models[which]
        if not self._fits(which, payload) and self.limits.when_inbox_full == "drop_oldest":
            kept = mine.copy()
            while mine and not self._fits(which, payload):
                mine.popleft()
            if self._fits(which, payload):
                self.dropped_full += len(kept) - len(mine)
            else:
                mine.extend(kept)
        if self._fits(which, payload):
            mine.append(payload)
        else:
            self.dropped_full += 1

    @precondition(lambda self: self.models[0])
    @rule()
    def take(self) -> None:
        assert self.inboxes[0].receive_nowait() == self.models[0].popleft()
        self.delivered += 1

    @precondition(lambda self: not self.models[0])
    @rule()
    def find_nothing(self) -> None:
        with pytest.raises(trio.WouldBlock):
            self.inboxes[0].receive_nowait()

    @rule(most=st.integers(0, 5))
    def take_many(self, most: int) -> None:
        mine = self.models[0]
        wanted = [mine.popleft() for _ in range(min(most, len(mine)))]
        assert self.inboxes[0].take_many(most) == wanted
        self.delivered += len(wanted)

    @rule()
    def close_and_begin_another(self) -> None:
        closed, self.inboxes[0] = self.inboxes[0], self._new_inbox()
        closed.finish(End.CLOSED)
        assert not closed.payloads
        assert closed.dropped_at_end == len(self.models[0])
        self.dropped_at_end += len(self.models[0])
        self.models[0].clear()

    @rule(which=st.integers(0, 1))
    def shrink(self, which: int) -> None:
        self.inboxes[which].shrink()

    @invariant()
    def everything_adds_up(self) -> None:
        for inbox, model in zip(self.inboxes, self.models, strict=True):
            assert list(inbox.payloads) == list(model)
            dropped = inbox.dropped_inbox_full + inbox.dropped_at_end
            assert inbox.received == inbox.delivered + len(model) + dropped
        shared = self.shared
        assert shared.waiting == sum(map(len, self.models))
        assert shared.waiting_bytes == sum(len(payload) for model in self.models for payload in model)
        assert shared.delivered == self.delivered
        assert shared.dropped_inbox_full == self.dropped_full
        assert shared.dropped_at_end == self.dropped_at_end
        assert self.arrived == self.delivered + shared.waiting + self.dropped_full + self.dropped_at_end


class DropOldestModel(InboxModel):
    def __init__(self) -> None:
        super().__init__("drop_oldest")


TestDropNewest = InboxModel.TestCase
TestDropOldest = DropOldestModel.TestCase
TestDropNewest.settings = TestDropOldest.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
