"""A whole server and a model of it agree under any sequence of events.

Each event of ``Model`` changes its lists as a server would, and records the same step for the real server. That server,
on a simulated network in virtual time, then performs the same steps, and must agree with the model after each of them.

(Not a ``RuleBasedStateMachine``: each run of one omits half of its rules, and rarely reaches a client that waits while
the server stops.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeAlias

import attrs
import pytest
import trio
from hypothesis import example, given, settings, strategies as st
from trio.testing import MockClock

from trio_udp import Client, Limits, Server, serve_endpoints
from trio_udp._endpoints import Address

from ..conftest import InMemory, check_adds_up, in_memory

PEERS = [("192.0.2.1", port) for port in range(1, 5)]
MAX_CLIENTS = 2
INBOX = 3
# Time passes in whole seconds, and timeouts are powers of two, so that they are never rounded; nor is the end of the
# drain at the same moment as one of them.
IDLE_TIMEOUT = 4
DRAIN_TIMEOUT = 6.5


@attrs.define(eq=False)
class Conversation:
    """The model of one client."""

    peer: Address
    number: int  # of this peer's
    inbox: list[bytes]
    log: list[object]  # the calls of its handler, and the result of each receive()
    idle_timeout: float = IDLE_TIMEOUT
    is_waiting: bool = False  # in receive()
    silent_since: int | None = None  # when the handler first waited after the last datagram it took
    call_has_taken: bool = False
    is_validated: bool = False
    in_transaction: bool = False
    is_closed: bool = False
    ended: str | None = None


def choose(conversations: list[Conversation], which: int) -> Conversation | None:
    return conversations[which % len(conversations)] if conversations else None


class Model:
    """The model of a server: plain lists and counters."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.now = 0
        self.conversations: list[Conversation] = []  # all there have ever been
        self.running: list[Conversation] = []  # in the order in which they began
        self.known: dict[Address, Conversation] = {}
        self.sent: list[tuple[Address, bytes]] = []
        self.counts: Counter[str] = Counter()
        self.drains_until: float | None = None
        self.is_over = False
        self.steps: list[tuple[Step, Snapshot]] = []

    # Events of strangers.

    def arrive(self, arrivals: list[tuple[Address, bytes]], eager: bool) -> None:
        """Datagrams of several peers arrive together; then handlers may take what waits, and wait for more."""
        self._put(arrivals)
        self._note(lambda real: real.put(arrivals))
        for conversation in self._at_work() if eager else ():
            self._receive(conversation, len(conversation.inbox) + 1)

    def _put(self, arrivals: list[tuple[Address, bytes]]) -> None:
        for peer, payload in () if self.is_over else arrivals:
            conversation = self.known.get(peer)
            if conversation is None:
                self._ask_admission(peer, payload)
            elif conversation.is_waiting:
                self._deliver(conversation, payload)
            elif len(conversation.inbox) < INBOX:
                conversation.inbox.append(payload)
            else:
                self.counts["dropped_inbox_full"] += 1
                if self.limits.when_inbox_full == "drop_oldest":
                    conversation.inbox = [*conversation.inbox[1:], payload]

    def _ask_admission(self, peer: Address, payload: bytes) -> None:
        if self.drains_until is not None:
            self.counts["refused_stopping"] += 1
        elif len(self.running) >= MAX_CLIENTS and not self._evict():
            self.counts["refused_full"] += 1
        else:
            number = sum(conversation.peer == peer for conversation in self.conversations)
            conversation = Conversation(peer, number, [payload], ["called"])
            self.conversations.append(conversation)
            self.running.append(conversation)
            self.known[peer] = conversation

    def _evict(self) -> bool:
        """End the client that has been silent the longest; of several, the one that began first."""
        evictable = [c for c in self._waiting() if not (c.is_validated or c.in_transaction)]
        if self.limits.when_full == "refuse" or not evictable:
            return False
        self.counts["clients_evicted"] += 1
        self._end(min(evictable, key=self._silence_began), "evicted")
        return True

    # Events of handlers.

    def receive(self, which: int) -> None:
        if conversation := choose(self._at_work(), which):
            self._receive(conversation, 1)

    def _receive(self, conversation: Conversation, times: int) -> None:
        for _ in range(times):
            if conversation.inbox:
                self._deliver(conversation, conversation.inbox.pop(0))
            elif conversation.is_closed:
                conversation.log.append("closed")
            elif conversation.ended is not None:
                conversation.log.append(conversation.ended)
            else:
                self._wait(conversation)
        self._note(lambda real: real.puppet(conversation).tell(*["receive"] * times))

    def _deliver(self, conversation: Conversation, payload: bytes) -> None:
        conversation.log.append(payload)
        conversation.is_waiting = False
        conversation.silent_since = None
        conversation.call_has_taken = True
        self.counts["delivered"] += 1

    def _wait(self, conversation: Conversation) -> None:
        """Wait in receive(), unless the channel ends at once."""
        conversation.is_waiting = True
        if conversation.silent_since is None:
            conversation.silent_since = self.now
        if self.drains_until is not None and not conversation.in_transaction:
            self._end(conversation, "stopping")
        else:
            self._end_if_idle(conversation)

    def _end_if_idle(self, conversation: Conversation) -> None:
        if self._silence_began(conversation) + conversation.idle_timeout <= self.now:
            self.counts["clients_expired"] += 1
            self._end(conversation, "idle")

    def _end(self, conversation: Conversation, reason: str) -> None:
        """End the channel of a client that waits."""
        conversation.log.append(reason)
        conversation.ended = reason
        conversation.is_waiting = False
        self._forget(conversation)

    def _forget(self, conversation: Conversation) -> None:
        if self.known.get(conversation.peer) is conversation:
            del self.known[conversation.peer]

    def give_up_receiving(self, which: int, meanwhile: list[bytes]) -> None:
        """Cancel a waiting receive. A datagram of that instant stays in the inbox; otherwise the silence goes on."""
        if conversation := choose(self._waiting(), which):
            self._give_up(conversation, meanwhile)

    def _give_up(self, conversation: Conversation, meanwhile: list[bytes]) -> None:
        conversation.is_waiting = False
        conversation.log.append("gave up")
        arrivals = [(conversation.peer, payload) for payload in meanwhile]
        self._put(arrivals)

        def step(real: RealServer) -> None:
            real.put(arrivals)
            real.puppet(conversation).receiving.cancel()

        self._note(step)

    def poll(self, which: int, patience: int, pause: int) -> None:
        """A handler waits for a limited number of seconds, and then does something else, such as sending a ping."""
        if conversation := choose(self._at_work(), which):
            self._receive(conversation, 1)
            self.time_passes(patience)
            if conversation.is_waiting:
                self._give_up(conversation, [])
            self.time_passes(pause)

    def reply(self, which: int, payload: bytes) -> None:
        conversation = choose(self.running, which)
        if conversation is None:
            return
        if conversation.is_closed:
            conversation.log.append("closed")
        else:
            self.sent.append((conversation.peer, payload))
        self._note(lambda real: real.puppet(conversation).reply(payload))

    def validate(self, which: int) -> None:
        if conversation := choose(self.running, which):
            conversation.is_validated = True
            self._note(lambda real: real.puppet(conversation).client.validate())

    def set_idle_timeout(self, which: int, seconds: float) -> None:
        conversation = choose(self.running, which)
        if conversation is None:
            return
        conversation.idle_timeout = seconds
        if conversation.is_waiting:
            self._end_if_idle(conversation)
        self._note(lambda real: setattr(real.puppet(conversation).client, "idle_timeout", seconds))

    def enter_or_leave_transaction(self, which: int) -> None:
        conversation = choose(self.running, which)
        if conversation is None:
            return
        entering = not conversation.in_transaction
        if entering:
            conversation.in_transaction = True
            if self.drains_until is not None and conversation.ended is None and not conversation.is_closed:
                self.known.setdefault(conversation.peer, conversation)
        else:
            self._leave_transaction(conversation)
        self._note(lambda real: real.puppet(conversation).enter_or_leave_transaction(entering))

    def _leave_transaction(self, conversation: Conversation) -> None:
        conversation.in_transaction = False
        if self.drains_until is not None:
            self._forget(conversation)
            if conversation.is_waiting:
                self._end(conversation, "stopping")

    def close(self, which: int) -> None:
        conversation = choose(self.running, which)
        if conversation is None:
            return
        if conversation.is_waiting:
            conversation.log.append("closed")
        self._close(conversation)
        self._note(lambda real: real.puppet(conversation).client.close())

    def _close(self, conversation: Conversation) -> None:
        conversation.is_waiting = False
        conversation.is_closed = True
        self._forget(conversation)
        self.counts["dropped_at_end"] += len(conversation.inbox)
        conversation.inbox = []

    def end_handler(self, which: int, how: str) -> None:
        """A handler ends. It is called again if datagrams wait and this call has taken any."""
        conversation = choose(self._at_work(), which)
        if conversation is None:
            return
        self.counts["handler_errors"] += how == "raise"
        self._leave_transaction(conversation)
        if conversation.inbox and conversation.call_has_taken:
            conversation.log.append("called")
            conversation.call_has_taken = False
        else:
            self._remove(conversation)
        self._note(lambda real: real.puppet(conversation).tell(how))

    def _remove(self, conversation: Conversation) -> None:
        self._close(conversation)
        self.running.remove(conversation)
        self.is_over = self.drains_until is not None and not self.running

    # Events of the clock and the caller.

    def time_passes(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            if self.drains_until is not None and self.drains_until < self.now:
                self.counts["handlers_cancelled"] += len(self.running)
                self._cancel_everything()
            for conversation in self._waiting():
                self._end_if_idle(conversation)
        self._note(lambda real: None)  # the snapshot says when it is to be

    def stop(self, arrivals: list[tuple[Address, bytes]]) -> None:
        """The server stops: it hands out datagrams that have arrived, then ends the waits outside of transactions."""
        self._put(arrivals)
        if self.drains_until is None:
            self.drains_until = self.now + DRAIN_TIMEOUT
            for conversation in self.running:
                if not conversation.in_transaction:
                    self._forget(conversation)
                    if conversation.is_waiting:
                        self._end(conversation, "stopping")
            self.is_over = not self.running

        def step(real: RealServer) -> None:
            real.put(arrivals)
            real.server.stop()

        self._note(step)

    def cancel_serve(self) -> None:
        self._cancel_everything()
        self._note(lambda real: real.serving.cancel())

    def _cancel_everything(self) -> None:
        for conversation in list(self.running):
            conversation.log.append("cancelled")
            self._remove(conversation)
        self.is_over = True

    def _waiting(self) -> list[Conversation]:
        return [conversation for conversation in self.running if conversation.is_waiting]

    def _at_work(self) -> list[Conversation]:
        return [conversation for conversation in self.running if not conversation.is_waiting]

    def _silence_began(self, conversation: Conversation) -> int:
        assert conversation.silent_since is not None
        return conversation.silent_since

    # The real server.

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
    *("clients_evicted", "clients_expired", "handler_errors", "handlers_cancelled"),
)


@attrs.frozen
class Snapshot:
    """The observable state of a server, which must be the same for both."""

    now: float
    logs: dict[Address, list[list[object]]]  # of each peer's conversations
    sent: list[tuple[Address, bytes]]
    counts: dict[str, int]
    clients: int
    waiting: int  # datagrams
    is_over: bool


class Puppet:
    """A handler that follows orders, and all of its calls for one client."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.log: list[object] = []
        self.receiving = trio.CancelScope()
        self._transaction = ExitStack()
        self._to_do, self._orders = trio.open_memory_channel[str](math.inf)

    def tell(self, *orders: str) -> None:
        """Make the handler follow these orders in turn: "receive", and finally perhaps "return" or "raise"."""
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

    async def call(self) -> None:
        self.log.append("called")
        try:
            with self._transaction:
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
        puppets = self.puppets.setdefault(client.peer_address, [])
        if all(puppet.client is not client for puppet in puppets):
            puppets.append(Puppet(client))
        await next(puppet for puppet in puppets if puppet.client is client).call()

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
    """Perform the steps on the real server until it disagrees with the model."""
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
arrivals = st.tuples(st.sampled_from(PEERS), payloads)
some = st.integers(0, 5)  # for choose()


def event(name: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.tuples(st.just(name), *arguments)


ALWAYS = [
    event("arrive", st.lists(arrivals, min_size=1, max_size=1), st.just(True)),
    event("arrive", st.lists(arrivals, min_size=1, max_size=6), st.booleans()),
    event("time_passes", st.integers(1, 3)),
]
SOMETIMES = [
    event("receive", some),
    event("give_up_receiving", some, st.lists(payloads, max_size=2)),
    event("poll", some, st.integers(1, 3), st.integers(1, 4)),
    event("reply", some, payloads),
    event("validate", some),
    event("set_idle_timeout", some, st.sampled_from([2.0, 8.0, math.inf])),
    event("enter_or_leave_transaction", some),
    event("close", some),
    event("end_handler", some, st.sampled_from(["return", "raise"])),
]
# Only a few kinds in each run: among all kinds, several steps of one kind in a row are rare.
events = st.lists(st.sampled_from(SOMETIMES), min_size=1, max_size=4, unique_by=id).flatmap(
    lambda kinds: st.lists(st.one_of(*ALWAYS, *kinds), min_size=15, max_size=40)
)


# Rarely found at random: the server checks between two waits of one silence ...
POLLS = [
    ("arrive", [(PEERS[0], b"")], True),
    ("time_passes", 1),
    ("arrive", [(PEERS[0], b"")], False),
    ("time_passes", 1),
    ("poll", 0, 1, 2),
    ("receive", 0),
    ("time_passes", 1),
]
# ... or the timeout changes there.
CHANGES_TIMEOUT = [
    ("arrive", [(PEERS[0], b"")], True),
    ("time_passes", 1),
    ("give_up_receiving", 0, []),
    ("set_idle_timeout", 0, 2.0),
    ("receive", 0),
    ("time_passes", 1),
]


@pytest.mark.no_cover  # heavy
@settings(max_examples=250, deadline=None)
@example(before=POLLS, end=("stop", []), after=[], limits=Limits())
@example(before=CHANGES_TIMEOUT, end=("stop", []), after=[], limits=Limits())
@given(
    before=events,
    end=st.one_of(
        event("stop", st.just([])), event("stop", st.lists(arrivals, min_size=1, max_size=6)), event("cancel_serve")
    ),
    after=events,
    limits=st.builds(
        partial(Limits, max_clients=MAX_CLIENTS, inbox_datagrams=INBOX),
        when_full=st.sampled_from(["refuse", "evict_idle"]),
        when_inbox_full=st.sampled_from(["drop_newest", "drop_oldest"]),
    ),
)
def test_a_server_agrees_with_its_model(
    before: list[tuple[Any, ...]], end: tuple[Any, ...], after: list[tuple[Any, ...]], limits: Limits
) -> None:
    """A server and its model agree on clients, results of each receive, sent datagrams, and every counter."""
    model = Model(limits)
    for name, *arguments in [*before, end, *after, ("cancel_serve",)]:
        getattr(model, name)(*arguments)
    trio.run(play, model.steps, limits, clock=MockClock(autojump_threshold=0))
