"""Who is known: the table of clients, the bound on their number, eviction and idle expiry.

Expiry needs neither a task nor a timer for each client. A client costs the table one look in each idle period: when it
is due, either its handler has been waiting for long enough, or the time to look again is known.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import trio

from ._client import Client
from ._endpoints import BATCH, Endpoint, Route
from ._inbox import Inbox, InboxTally
from ._limits import Limits

if TYPE_CHECKING:
    from ._serve import Server


# Looks at clients are put off to the next multiple of this part of their idle timeout, so that clients that began at
# about the same time are looked at together. It is also how late an idle timeout can be.
COARSENESS = 1 / 8


Check: TypeAlias = "list[Any]"


@attrs.define(eq=False)
class ClientTable:
    """Every client whose handler runs, and which of them a route leads to."""

    limits: Limits
    _idle_timeout: float
    _now: Callable[[], float]
    # A client that has ended or closed is not known any more, though it may be running: its address is free.
    known: dict[Endpoint, dict[Route, Client]]
    running: dict[Client, None] = attrs.field(factory=dict, init=False)
    totals: InboxTally = attrs.field(factory=InboxTally, init=False)

    stopping: trio.Event = attrs.field(factory=trio.Event, init=False)
    all_gone: trio.Event = attrs.field(factory=trio.Event, init=False)  # stopping, and no handler runs any more

    started: int = attrs.field(default=0, init=False)
    expired: int = attrs.field(default=0, init=False)
    evicted: int = attrs.field(default=0, init=False)

    # Who may be evicted, the one that has been waiting the longest first; kept only where eviction is asked for.
    _evictable: OrderedDict[Client, None] | None = attrs.field(init=False)

    # A heap of [when to look, number, client]; no client where it is void. Numbers decide where the time is the same.
    _checks: list[Check] = attrs.field(factory=list, init=False)
    _numbers: Iterator[int] = attrs.field(factory=itertools.count, init=False)
    _alarm: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)

    @_evictable.default
    def _(self) -> OrderedDict[Client, None] | None:
        return OrderedDict() if self.limits.when_full == "evict_idle" else None

    @property
    def overfull(self) -> bool:
        """Whether evicted handlers are still there."""
        return len(self.running) > self.limits.max_clients

    def make_room(self) -> bool:
        """Whether a stranger may become a client; evicts another one for it where that is the policy."""
        if len(self.running) < self.limits.max_clients:
            return True
        if self._evictable is None or len(self.running) >= self.limits.max_clients + BATCH:
            return False
        for client in self._evictable:
            if client._is_waiting:  # or else a datagram has just woken it
                self.evicted += 1
                client._end("evicted")
                return True
        return False

    def has_room_for(self, payload: bytes) -> bool:
        """Whether a stranger's first datagram would fit into its inbox: no client is begun for nothing."""
        size = len(payload)
        return size <= self.limits.inbox_bytes and self.totals.waiting_bytes + size <= self.limits.total_bytes

    def add(self, server: Server, endpoint: Endpoint, route: Route) -> Client:
        """A new client for a stranger on an endpoint."""
        client = Client(endpoint, route, server, self, Inbox(self.limits, self.totals), self._idle_timeout)
        client._limited = self.limits.amplification is not None
        self.running[client] = None
        self.started += 1
        if not self.stopping.is_set():
            self.known[endpoint][route] = client
        return client

    def hand_over(self, client: Client) -> Client | None:
        """Remove a client whose handler has ended; return the one that takes over what it has left, if anything.

        A handler that did not take a single datagram has no successor: it would be called for ever.
        """
        successor = None
        if client._inbox.payloads and client._inbox.delivered:
            self.forget(client)
            successor = self.add(client.server, client._endpoint, client._route)
            successor._take_over_from(client)
        self.remove(client)
        return successor

    def remove(self, client: Client) -> None:
        """The client's handler has ended: nothing can be done with it any more."""
        client.close()
        del self.running[client]
        if self.stopping.is_set() and not self.running:
            self.all_gone.set()

    def forget(self, client: Client) -> None:
        """The next datagram from the client's address is a stranger's."""
        known = self.known[client._endpoint]
        if known.get(client._route) is client:  # not its successor
            del known[client._route]
        self.waits_no_more(client)
        self._void_check(client)

    def abandon(self, endpoint: Endpoint | None = None) -> None:
        """Close the clients of an endpoint that is closed, or all clients."""
        for client in list(self.running):
            if endpoint is None or client._endpoint is endpoint:
                client._abandoned = True
                client.close()

    def stop(self) -> None:
        """From now on, nobody is known except clients in a transaction; channels end once their inbox is empty."""
        if self.stopping.is_set():
            return
        self.stopping.set()
        for client in list(self.running):
            if not client._transactions:
                self.forget(client)
                client._inbox.wake()  # to find its channel ended
        if not self.running:
            self.all_gone.set()

    def transaction_changed(self, client: Client) -> None:
        """The client has entered or left a transaction: if it waits, it begins to wait anew, under the other rules."""
        client._inbox.wake()
        if self.stopping.is_set() and not client._closed and client.ended is None:
            if client._transactions:
                self.known[client._endpoint].setdefault(client._route, client)
            else:
                self.forget(client)

    def begins_to_wait(self, client: Client) -> None:
        client._waiting_since = self._now()
        if client._check is None:
            self._check_later(client)
            client._inbox.shrink()  # here because it is seldom: the first time, and then about once in an idle timeout
        if self._evictable is not None and not client._transactions:
            self._evictable[client] = None

    def waits_no_more(self, client: Client) -> None:
        if self._evictable is not None:
            self._evictable.pop(client, None)

    def timeout_changed(self, client: Client) -> None:
        """The client has another idle timeout. If it is longer, looking at the client too early does no harm."""
        since = client._waiting_since if client._is_waiting else self._now()
        if client._check is None or since + client._idle_timeout < client._check[0]:
            self._void_check(client)
            if client._is_waiting:
                self._check_later(client)

    def _check_later(self, client: Client) -> None:
        """See to it that a client that waits is looked at when its idle timeout is over."""
        when = client._waiting_since + client._idle_timeout
        if when == math.inf:
            return
        if step := client._idle_timeout * COARSENESS:  # 0 where that is less than the least number
            when += -when % step
        client._check = [when, next(self._numbers), client]
        # Those of short conversations are void long before they are due.
        if len(self._checks) > 2 * len(self.running) + 1_000:
            self._checks = [check for check in self._checks if check[2] is not None]
            heapq.heapify(self._checks)
        heapq.heappush(self._checks, client._check)
        if when < self._alarm.deadline:
            self._alarm.deadline = when

    async def expire_forever(self) -> None:
        """End clients whose idle timeout is over."""
        while True:
            now = self._now()
            for _ in range(BATCH):
                if not self._checks or self._checks[0][0] > now:
                    break
                _, _, client = heapq.heappop(self._checks)
                if client is not None:
                    client._check = None
                    self._look_at(client, now)
            else:  # more than a batch was due: let others run before the next
                await trio.lowlevel.checkpoint()
                continue
            # An alarm clock: _check_later puts it forward.
            with trio.CancelScope(deadline=self._checks[0][0] if self._checks else math.inf) as self._alarm:
                await trio.sleep_forever()

    def _look_at(self, client: Client, now: float) -> None:
        if not client._is_waiting:
            return  # at work; what comes next begins with its next wait
        if client._waiting_since + client._idle_timeout <= now:
            self.expired += 1
            client._end("idle")
        else:
            self._check_later(client)

    def _void_check(self, client: Client) -> None:
        """Let the heap let go of a client."""
        if client._check is not None:
            client._check[2] = None
            client._check = None


class ClientsView(Collection["Client"]):
    """A live, read-only look at the clients whose handlers run. Iterating it goes over those there at the start."""

    def __init__(self, table: ClientTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table.running)

    def __contains__(self, client: object) -> bool:
        return client in self._table.running

    def __iter__(self) -> Iterator[Client]:
        return iter(list(self._table.running))

    def __repr__(self) -> str:
        return f"<{len(self)} clients>"
