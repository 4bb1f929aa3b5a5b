"""A whole server beside a model of it: whatever happens in whatever order, both do the same.

Each event of ``Model`` says in lists what a server does, and notes how to bring the same about at the real one. That,
on a simulated network in virtual time, is then taken through the same steps, and has to agree after each of them.

(Not a ``RuleBasedStateMachine``: that leaves out half of its rules in each run, and seldom gets as far as a client that
waits while the server stops.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeAlias

import attrs
import trio
from hypothesis import given, settings, strategies as st
from trio.testing import MockClock

from trio_udp import Client, Limits, Server, serve_endpoints
from trio_udp._endpoints import Address

from .conftest import InMemory, check_adds_up, in_memory

PEERS = [("192.0.2.1", port) for port in range(1, 5)]
MAX_CLIENTS = 2
INBOX = 3
# Time passes in whole seconds, so that idle timeouts are never rounded, nor at the same moment as the drain's.
IDLE_TIMEOUT = 4
DRAIN_TIMEOUT = 6.5


@attrs.define(eq=False)
class Conversation:
    """What the model knows of one handler call."""

    peer: Address
    number: int  # of this peer's
    inbox: list[bytes] = attrs.field(factory=list)
    log: list[object] = attrs.field(factory=list)  # what each receive() has come to
    waiting_since: int | None = None
    has_taken: bool = False
    in_transaction: bool = False
    is_closed: bool = False
    ended: str | None = None


def choose(conversations: list[Conversation], which: int) -> Conversation | None:
    return conversations[which % len(conversations)] if conversations else None


class Model:
    """What a server does, said in lists."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.now = 0
        self.conversations: list[Conversation] = []  # all there have ever been
        self.running: list[Conversation] = []
        self.known: dict[Address, Conversation] = {}
        self.waiting: list[Conversation] = []  # in receive(), the longest first
        self.sent: list[tuple[Address, bytes]] = []
        self.counts: Counter[str] = Counter()
        self.drains_until: float | None = None
        self.is_over = False
        self.steps: list[tuple[Step, Snapshot]] = []

    # What strangers do.

    def arrive(self, arrivals: list[tuple[Address, bytes]], eager: bool) -> None:
        """Together, and then perhaps handlers take what they can get and wait for more."""
        for peer, payload in arrivals:
            self._put(peer, payload)

        self._note(lambda real: real.put(arrivals))
        for conversation in self._at_work() if eager else ():
            self._receive(conversation, len(conversation.inbox) + 1)

    def _put(self, peer: Address, payload: bytes) -> None:
        if self.is_over:
            return
        conversation = self.known.get(peer)
        if conversation is None:
            if self.drains_until is not None:
                self.counts["refused_stopping"] += 1
                return
            if len(self.running) >= MAX_CLIENTS and not self._evict():
                self.counts["refused_full"] += 1
                return
            self._begin(peer, [payload])
        elif conversation.waiting_since is not None:
            self._deliver(conversation, payload)
        elif len(conversation.inbox) < INBOX:
            conversation.inbox.append(payload)
        else:
            self.counts["dropped_inbox_full"] += 1
            if self.limits.when_inbox_full == "drop_oldest":
                conversation.inbox = [*conversation.inbox[1:], payload]

    def _evict(self) -> bool:
        evictable = [conversation for conversation in self.waiting if not conversation.in_transaction]
        if self.limits.when_full == "refuse" or not evictable:
            return False
        self.counts["clients_evicted"] += 1
        self._end(evictable[0], "evicted")
        return True

    def _begin(self, peer: Address, inbox: list[bytes]) -> None:
        number = sum(conversation.peer == peer for conversation in self.conversations)
        conversation = Conversation(peer, number, inbox)
        self.conversations.append(conversation)
        self.running.append(conversation)
        if self.drains_until is None:
            self.known[peer] = conversation

    # What handlers do.

    def receive(self, which: int) -> None:
        if conversation := choose(self._at_work(), which):
            self._receive(conversation, 1)

    def _receive(self, conversation: Conversation, times: int) -> None:
        for _ in range(times):
            if conversation.inbox:
                self._deliver(conversation, conversation.inbox.pop(0))
            elif conversation.is_closed:
                conversation.log.append("closed")
            else:
                self._wait(conversation)
        self._note(lambda real: real.puppet(conversation).tell(*["receive"] * times))

    def _deliver(self, conversation: Conversation, payload: bytes) -> None:
        self._wait_no_more(conversation)
        conversation.log.append(payload)
        conversation.has_taken = True
        self.counts["delivered"] += 1

    def _wait(self, conversation: Conversation) -> None:
        """Wait in receive(), or begin to wait anew."""
        self._wait_no_more(conversation)
        if conversation.ended is None and self.drains_until is not None and not conversation.in_transaction:
            conversation.ended = "stopping"
        if conversation.ended is not None:
            conversation.log.append(conversation.ended)
        else:
            conversation.waiting_since = self.now
            self.waiting.append(conversation)

    def _wait_no_more(self, conversation: Conversation) -> None:
        if conversation.waiting_since is not None:
            conversation.waiting_since = None
            self.waiting.remove(conversation)

    def _end(self, conversation: Conversation, reason: str) -> None:
        conversation.ended = reason
        self._forget(conversation)
        self._wait(conversation)

    def _forget(self, conversation: Conversation) -> None:
        if self.known.get(conversation.peer) is conversation:
            del self.known[conversation.peer]

    def give_up_receiving(self, which: int, meanwhile: list[bytes]) -> None:
        """It is cancelled; what arrives just then stays in the inbox."""
        conversation = choose(self.waiting, which)
        if conversation is None:
            return
        self._wait_no_more(conversation)
        conversation.log.append("gave up")
        arrivals = [(conversation.peer, payload) for payload in meanwhile]
        for arrival in arrivals:
            self._put(*arrival)

        def step(real: RealServer) -> None:
            real.put(arrivals)
            real.puppet(conversation).receiving.cancel()

        self._note(step)

    def reply(self, which: int, payload: bytes) -> None:
        conversation = choose(self.running, which)
        if conversation is None:
            return
        if conversation.is_closed:
            conversation.log.append("closed")
        else:
            self.sent.append((conversation.peer, payload))
        self._note(lambda real: real.puppet(conversation).reply(payload))

    def enter_or_leave_transaction(self, which: int) -> None:
        conversation = choose(self.running, which)
        if conversation is None:
            return
        entering = conversation.in_transaction = not conversation.in_transaction
        if conversation.ended is None and not conversation.is_closed and self.drains_until is not None:
            if entering:
                self.known.setdefault(conversation.peer, conversation)
            else:
                self._forget(conversation)
        if conversation.waiting_since is not None:
            self._wait(conversation)
        self._note(lambda real: real.puppet(conversation).enter_or_leave_transaction(entering))

    def close(self, which: int) -> None:
        conversation = choose(self.running, which)
        if conversation is None:
            return
        if conversation.waiting_since is not None:
            self._wait_no_more(conversation)
            conversation.log.append("closed")
        self._close(conversation)
        self._note(lambda real: real.puppet(conversation).client.close())

    def _close(self, conversation: Conversation) -> None:
        conversation.is_closed = True
        self._forget(conversation)
        self.counts["dropped_at_end"] += len(conversation.inbox)
        conversation.inbox = []

    def end_handler(self, which: int, how: str) -> None:
        """What it leaves behind is for a successor, if it has taken anything itself."""
        conversation = choose(self._at_work(), which)
        if conversation is None:
            return
        self.counts["handler_errors"] += how == "raise"
        left_behind = conversation.inbox if conversation.has_taken else []
        if left_behind:
            conversation.inbox = []
            self._forget(conversation)
            self._begin(conversation.peer, left_behind)
        self._remove(conversation)
        self._note(lambda real: real.puppet(conversation).tell(how))

    def _remove(self, conversation: Conversation) -> None:
        self._wait_no_more(conversation)
        self._close(conversation)
        self.running.remove(conversation)
        self.is_over = self.drains_until is not None and not self.running

    # What the clock and the caller do.

    def time_passes(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            if self.drains_until is not None and self.drains_until < self.now:
                self._cancel_everything()
            for conversation in list(self.waiting):
                assert conversation.waiting_since is not None
                if conversation.waiting_since + IDLE_TIMEOUT <= self.now:
                    self.counts["clients_expired"] += 1
                    self._end(conversation, "idle")
        self._note(lambda real: None)  # the snapshot says when it is to be

    def stop(self) -> None:
        """Nobody is known any more but those in a transaction, and who waits for more is told."""
        if self.drains_until is None:
            self.drains_until = self.now + DRAIN_TIMEOUT
            for conversation in self.running:
                if not conversation.in_transaction:
                    self._forget(conversation)
                    if conversation.waiting_since is not None:
                        self._wait(conversation)
            self.is_over = not self.running
        self._note(lambda real: real.server.stop())

    def cancel_serve(self) -> None:
        self._cancel_everything()
        self._note(lambda real: real.serving.cancel())

    def _cancel_everything(self) -> None:
        for conversation in list(self.running):
            conversation.log.append("cancelled")
            self._remove(conversation)
        self.is_over = True

    # The real one.

    def _at_work(self) -> list[Conversation]:
        return [conversation for conversation in self.running if conversation.waiting_since is None]

    def _note(self, step: Step) -> None:
        logs: dict[Address, list[list[object]]] = {}
        for conversation in self.conversations:
            logs.setdefault(conversation.peer, []).append(list(conversation.log))
        counts = {name: self.counts[name] for name in COUNTS}
        waiting = sum(len(conversation.inbox) for conversation in self.running)
        snapshot = Snapshot(self.now, logs, list(self.sent), counts, len(self.running), waiting, self.is_over)
        self.steps.append((step, snapshot))


COUNTS = (
    *("delivered", "dropped_inbox_full", "dropped_at_end", "refused_full", "refused_stopping"),
    *("clients_evicted", "clients_expired", "handler_errors"),
)


@attrs.frozen
class Snapshot:
    """What can be seen of a server, and must be the same for both."""

    now: float
    logs: dict[Address, list[list[object]]]  # of each peer's conversations
    sent: list[tuple[Address, bytes]]
    counts: dict[str, int]
    clients: int
    waiting: int  # datagrams
    is_over: bool


class Puppet:
    """A handler call that does as it is told."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.log: list[object] = []
        self.receiving = trio.CancelScope()
        self._transaction = ExitStack()
        self._to_do, self._orders = trio.open_memory_channel[str](math.inf)

    def tell(self, *orders: str) -> None:
        """Let it carry these out one after the other: "receive", and at last perhaps "return" or "raise"."""
        for order in orders:
            self._to_do.send_nowait(order)

    def reply(self, payload: bytes) -> None:
        try:
            self.client.send_nowait(payload)
        except trio.ClosedResourceError:
            self.log.append("closed")

    def enter_or_leave_transaction(self, entering: bool) -> None:
        if entering:
            self._transaction.enter_context(self.client.transaction())
        else:
            self._transaction.close()

    async def run(self) -> None:
        try:
            while True:
                order = await self._orders.receive()
                if order == "return":
                    return
                if order == "raise":
                    raise ValueError("as told")
                await self._receive()
        except trio.Cancelled:
            self.log.append("cancelled")
            raise

    async def _receive(self) -> None:
        with trio.CancelScope() as self.receiving:
            try:
                self.log.append(await self.client.receive())
            except trio.EndOfChannel:
                self.log.append(self.client.ended)
            except trio.ClosedResourceError:
                self.log.append("closed")
        if self.receiving.cancelled_caught:
            self.log.append("gave up")


@attrs.define(eq=False)
class RealServer:
    """A server on a simulated network, whose handlers are puppets."""

    run: InMemory
    serving: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    server: Server = attrs.field(init=False)
    puppets: dict[Address, list[Puppet]] = attrs.field(factory=dict, init=False)

    async def serve(self, limits: Limits, *, task_status: trio.TaskStatus[Server]) -> None:
        with self.serving:
            await serve_endpoints(
                self._handle,
                [self.run.endpoint],
                idle_timeout=IDLE_TIMEOUT,
                limits=limits,
                on_error=lambda client, error: None,
                drain_timeout=DRAIN_TIMEOUT,
                task_status=task_status,
            )

    async def _handle(self, client: Client) -> None:
        puppet = Puppet(client)
        self.puppets.setdefault(client.peer_address, []).append(puppet)
        await puppet.run()

    def put(self, arrivals: list[tuple[Address, bytes]]) -> None:
        for peer, payload in arrivals:
            self.run.put(payload, peer)

    def puppet(self, conversation: Conversation) -> Puppet:
        return self.puppets[conversation.peer][conversation.number]

    def snapshot(self) -> Snapshot:
        s = self.server.statistics()
        return Snapshot(
            now=trio.current_time(),
            logs={peer: [list(puppet.log) for puppet in puppets] for peer, puppets in self.puppets.items()},
            sent=self.run.sent,
            counts={name: getattr(s, name) for name in COUNTS},
            clients=s.clients,
            waiting=s.waiting,
            is_over=self.run.endpoint.closed,
        )


Step: TypeAlias = Callable[[RealServer], object]


async def play(steps: list[tuple[Step, Snapshot]], limits: Limits) -> None:
    """Take the real one through the steps, as far as it agrees."""
    async with trio.open_nursery() as nursery:
        real = RealServer(in_memory())
        real.server = await nursery.start(real.serve, limits)
        for step, expected in steps:
            step(real)
            await real.run.settle()
            await trio.sleep_until(expected.now)
            await real.run.settle()
            found = real.snapshot()
            check_adds_up(real.server)
            if found != expected:
                break
        real.serving.cancel()
    check_adds_up(real.server)
    assert found == expected


payloads = st.sampled_from([b"", b"1", b"2"])
some = st.integers(0, 5)  # for choose()


def event(name: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.tuples(st.just(name), *arguments)


events = st.lists(
    st.one_of(
        event("arrive", st.lists(st.tuples(st.sampled_from(PEERS), payloads), min_size=1, max_size=6), st.booleans()),
        event("receive", some),
        event("give_up_receiving", some, st.lists(payloads, max_size=2)),
        event("reply", some, payloads),
        event("enter_or_leave_transaction", some),
        event("close", some),
        event("end_handler", some, st.sampled_from(["return", "raise"])),
        event("time_passes", st.integers(1, 3)),
    ),
    min_size=15,
    max_size=40,
)


@settings(max_examples=500, deadline=None)
@given(
    before=events,
    end=st.sampled_from(["stop", "stop", "stop", "cancel_serve"]),
    after=events,
    limits=st.builds(
        partial(Limits, max_clients=MAX_CLIENTS, inbox_datagrams=INBOX),
        when_full=st.sampled_from(["refuse", "evict_idle"]),
        when_inbox_full=st.sampled_from(["drop_newest", "drop_oldest"]),
    ),
)
def test_a_server_does_what_its_model_does(
    before: list[tuple[Any, ...]], end: str, after: list[tuple[Any, ...]], limits: Limits
) -> None:
    """Who is known, what each receive has come to, what was sent, when it is over, and every count."""
    model = Model(limits)
    for name, *arguments in [*before, (end,), *after, ("cancel_serve",)]:
        getattr(model, name)(*arguments)
    trio.run(play, model.steps, limits, clock=MockClock(autojump_threshold=0))
