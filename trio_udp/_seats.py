"""The clients of a server: one record for each, the bound on their number, and eviction."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from operator import length_hint
from typing import Any

import attrs
import trio

from ._construction import constant_defaults
from ._endpoints import BATCH, Origin, Reader, Received, Route, host_key
from ._idle import IdleExpiry
from ._inbox import Inbox, Shared
from ._lifecycle import DRAINING, EVICTED, IDLE, LOST, OPEN, STOPPING, End
from ._rate import NO_BUCKET, Bucket, RateLimiter
from ._statistics import EndpointStatistics

# These counts begin when a server takes over an endpoint. (Datagrams that the kernel drops are counted for the socket.)
COUNTED = (
    *("received", "bytes_received", "truncated", "refused_malformed"),
    *("sent", "bytes_sent", "receive_errors", "send_errors"),
)

# The most clients examined for one eviction, so that a flood of strangers stays cheap.
MOST_LOOKS = 64


@attrs.define(eq=False)
class Place(Origin):
    """One endpoint of a server, and the clients on it.

    Attributes:
      known: The clients by route. A client that has ended is no longer in it, even while its handler still runs: its
        address is free for a new client.
      until_stop: Cancelled when the server stops, to wake the receive loop.
      rest: The datagrams of the current batch that are not yet handed out.
      network_of: Returns the key of a route's network; set if the server has a rate limit.
      before: The endpoint's counts when the server took over.
    """

    reader: Reader = attrs.field(kw_only=True)
    known: dict[Route, Seat] = attrs.field(factory=dict, init=False)
    until_stop: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    rest: Iterator[Received] = attrs.field(factory=lambda: iter(()), init=False)
    network_of: Callable[[Route], bytes] = attrs.field(init=False)
    before: EndpointStatistics = attrs.field(init=False)

    @before.default
    def _(self) -> EndpointStatistics:
        counts, ahead = self.endpoint.statistics(), self.reader.ahead
        # Datagrams that were read ahead and not yet handed out count for the server.
        return attrs.evolve(
            counts,
            received=counts.received - len(ahead),
            bytes_received=counts.bytes_received - sum(len(payload) for payload, _, _ in ahead),
        )

    def statistics(self) -> EndpointStatistics:
        """Return the endpoint's counts since the server took over."""
        now, before = self.endpoint.statistics(), self.before
        since = {name: getattr(now, name) - getattr(before, name) for name in COUNTED}
        return attrs.evolve(now, errors=Counter(now.errors) - Counter(before.errors), **since)

    @property
    def has_nothing_to_read(self) -> bool:
        """Whether every datagram that has arrived has been handed out."""
        reader, engine = self.reader, self.reader.engine
        if length_hint(self.rest) or self.in_accept or reader.ahead or engine.read_ahead:
            return False
        return reader.shared or engine.closed or not engine.is_readable()


@constant_defaults
@attrs.define(eq=False)
class Seat(Inbox):
    """Everything that a server knows about one client, from admission to the end of its handler.

    Attributes:
      place: The endpoint that the client is on.
      has_handler: A handler runs. Otherwise ``Server.connect`` made the client, and its owner closes it.
      answerable: Its source address can be sent to.
      validated: Its handler has called ``Client.validate``.
      requests: Running requests of a ``request_handler`` with ``concurrency``.
      bucket: The rate limit's bucket: its network's, or once validated its host's.
    """

    shared: Seats
    place: Place
    has_handler: bool = True
    answerable: bool = attrs.field(default=True, init=False)
    validated: bool = attrs.field(default=False, init=False)
    requests: int = attrs.field(default=0, init=False)
    bucket: Bucket = attrs.field(default=NO_BUCKET, init=False)
    requests_timed_out: int = attrs.field(default=0, init=False)
    sends_withheld: int = attrs.field(default=0, init=False)
    _amplified: float = attrs.field(default=0.0, init=False)  # bytes sent before it was validated
    # Bytes that may be sent before it is validated, as last computed; -1: not yet computed.
    _allowed: float = attrs.field(default=-1.0, init=False)
    _host: bytes | None = attrs.field(default=None, init=False)  # if clients are counted by host
    # ``waiting_since`` when the seat was last put at the end of the queue for eviction.
    queued_since: float = attrs.field(default=-1.0, init=False)

    @property
    def may_expire(self) -> bool:
        return self.is_awaited and not self.requests

    @property
    def may_be_evicted(self) -> bool:
        """Whether the handler waits and nothing would be lost."""
        return self.is_awaited and not (self.validated or self.transactions or self.requests)

    def finish(self, end: End) -> None:
        """End the conversation: the next datagram from this address comes from a stranger."""
        seats, known = self.shared, self.place.known
        if end is IDLE:
            seats.expired += 1
        if known.get(self.route) is self:  # not a later client of the same address
            del known[self.route]
        if self.due is not None:
            seats.idle.forget(self)
        if seats.evicts:
            seats.unqueue(self)
        Inbox.finish(self, end)  # super() would cost a tenth of a new client
        if not self.has_handler and self.is_closed:
            seats.remove(self)

    def enter_transaction(self) -> None:
        self.transactions: int = self.transactions + 1
        self.shared.in_transaction.add(self)
        if self.shared.phase is DRAINING and self.end is OPEN and not self.place.reader.shared:
            self.place.known.setdefault(self.route, self)

    def leave_transaction(self) -> None:
        self.transactions -= 1
        if not self.transactions:
            self.shared.in_transaction.discard(self)
            if self.shared.phase is DRAINING and self.end is OPEN:
                self.place.known.pop(self.route, None)
                self.wake()  # to find its channel ended

    def set_idle_timeout(self, seconds: float) -> None:
        self.idle_timeout = seconds
        self.shared.idle.timeout_changed(self)

    def validate(self) -> None:
        self.limited: bool = not self.answerable
        if not self.validated:
            self.validated = True
            self.shared.unqueue(self)
            if self.shared.limiter is not None:
                self.bucket = self.shared.limiter.bucket_of_host(self.outbox.engine.host(self.route))

    def reserve(self, size: int) -> bool:
        amplified = self._amplified + size
        if amplified > self._allowed and not self._allows_more(amplified):
            return False
        self._amplified = amplified
        return True

    def _allows_more(self, amplified: float) -> bool:
        """Whether the bytes received by now allow this many bytes to be sent. Counts the datagram if they do not."""
        if not self.answerable:
            self.outbox.count_unanswerable(self)
            return False
        amplification = self.shared.limits.amplification
        if amplification is not None:
            self._allowed = amplification * self.bytes_received
            if amplified > self._allowed:
                self.sends_withheld += 1
                self.shared.sends_withheld += 1
                return False
        return True

    def give_back(self, size: int) -> None:
        self._amplified -= size

    def begin_request(self) -> None:
        self.requests += 1

    def end_request(self) -> None:
        """Note that a running request has ended. After the last one, silence begins again."""
        self.requests -= 1
        if not self.requests and self.is_awaited:
            self.waiting_since: float = self.outbox.turn.now()
            self.shared.idle.forget(self)
            self.shared.idle.watch(self, self.waiting_since)

    def count_timed_out_request(self) -> None:
        self.requests_timed_out += 1
        self.shared.requests_timed_out += 1

    def count_for_host(self) -> None:
        """Count this client for its host from now on."""
        self._host = host_key(self.outbox.engine.host(self.route))
        self.shared.of_host[self._host] = self.shared.of_host.get(self._host, 0) + 1

    def leave_host(self) -> None:
        if self._host is not None:
            left = self.shared.of_host[self._host] = self.shared.of_host[self._host] - 1
            if not left:
                del self.shared.of_host[self._host]

    def _watch(self) -> None:
        self.shrink()
        self.shared.idle.watch(self, self.waiting_since)

    def _is_over(self, now: float) -> bool:
        if self.end is OPEN and self.place.reader.shared and self.shared.phase is DRAINING:
            self.finish(STOPPING)  # the endpoint is no longer read, so no datagram can come
        return super()._is_over(-math.inf if self.requests else now)


@attrs.define(eq=False)
class Seats(Shared):
    """Every client of one server.

    Attributes:
      running: The clients whose handlers run, each with the ``Client`` that users see, and the open ones that
        ``Server.connect`` made.
      crash: Ends the server with an error.
      all_gone: Set once the server drains and no client is left.
      of_host: The number of clients of each host, if ``Limits.clients_per_host`` is set.
    """

    limiter: RateLimiter | None
    on_error: Callable[[Any, Exception], object]
    makes_room: bool  # under "refuse" too: the handler keeps nothing between two requests
    crash: Callable[[Exception], None] = attrs.field(init=False)
    idle: IdleExpiry = attrs.field(factory=IdleExpiry, init=False)
    running: dict[Seat, Any] = attrs.field(factory=dict, init=False)
    of_host: dict[bytes, int] = attrs.field(factory=dict, init=False)
    in_transaction: set[Seat] = attrs.field(factory=set, init=False)
    all_gone: trio.Event = attrs.field(factory=trio.Event, init=False)
    crashing: bool = attrs.field(default=False, init=False)  # on_error has raised: the server ends
    started: int = attrs.field(default=0, init=False)
    expired: int = attrs.field(default=0, init=False)
    evicted: int = attrs.field(default=0, init=False)
    handler_errors: int = attrs.field(default=0, init=False)
    requests_timed_out: int = attrs.field(default=0, init=False)
    sends_withheld: int = attrs.field(default=0, init=False)
    layered: bool = attrs.field(default=False, init=False)  # some clients are shown as channels of a layer
    # Candidates for eviction, the next one first; empty if this server never evicts.
    _queue: OrderedDict[Seat, None] = attrs.field(factory=OrderedDict, init=False)
    evicts: bool = attrs.field(init=False)

    @evicts.default
    def _(self) -> bool:
        return self.makes_room or self.limits.when_full == "evict_idle"

    @property
    def overfull(self) -> bool:
        """Whether evicted handlers still run."""
        return len(self.running) > self.limits.max_clients

    def has_room_on_host(self, key: bytes) -> bool:
        """Whether a host may have one more client."""
        return self.of_host.get(key, 0) < (self.limits.clients_per_host or math.inf)

    def make_room(self) -> bool:
        """Whether there is room for one more client. Evicts another one for it if that is the policy."""
        if len(self.running) < self.limits.max_clients:
            return True
        if not self.evicts or len(self.running) >= self.limits.max_clients + BATCH:
            return False
        seat = self._longest_waiting()
        if seat is None:
            return False
        self.evicted += 1
        seat.finish(EVICTED)
        return True

    def add(self, seat: Seat, client: object) -> None:
        """Add a client that has been admitted."""
        self.running[seat] = client
        self.started += 1
        seat.place.known[seat.route] = seat
        if self.evicts and not seat.validated:
            self._queue[seat] = None
        if self.limits.clients_per_host is not None and seat.has_handler:
            seat.count_for_host()

    def unqueue(self, seat: Seat) -> None:
        """Take a client out of the queue for eviction, because it has ended or is validated.

        Many validated clients then do not lengthen the search for one to evict.
        """
        self._queue.pop(seat, None)

    def remove(self, seat: Seat) -> None:
        """Remove a client whose handler has ended, or that its owner has closed."""
        if self.running.pop(seat, None) is not None:
            if self.of_host:
                seat.leave_host()
            if self.in_transaction:  # inside a block of another task
                self.in_transaction.discard(seat)
            if not self.running and self.phase is DRAINING:
                self.all_gone.set()

    def begin_drain(self, places: list[Place]) -> None:
        """Forget all routes except those of transactions; from now on a channel ends when its inbox is empty."""
        self.phase = DRAINING
        for place in places:
            # Later datagrams then come from strangers and are refused: the receive loop needs no special case.
            place.known = {}
        for seat in self.in_transaction:
            if seat.end is OPEN and not seat.place.reader.shared:
                seat.place.known[seat.route] = seat
        if not self.running:
            self.all_gone.set()

    async def wake_all(self) -> None:
        """Wake the waiting handlers, a batch at a time, to find their channels ended."""
        # Release each seat at once: freeing 100,000 together would take 30 ms.
        left = deque(self.running)
        while left:
            seat = left.popleft()
            if not seat.transactions or seat.place.reader.shared:
                seat.wake()
            if len(left) % BATCH == 0:
                await trio.lowlevel.checkpoint()

    def lose(self, place: Place | None = None) -> None:
        """Close the clients of an endpoint that is closed, or all clients."""
        for seat in list(self.running):
            if place is None or seat.place is place:
                seat.finish(LOST)

    def _longest_waiting(self) -> Seat | None:
        """Find a client to evict: approximately the one that has waited the longest.

        This is a second-chance queue: waits do not update it. A seat at the head that has begun a new wait since it was
        queued goes to the end; one that has not is evicted. After ``MOST_LOOKS`` seats the one of them that has waited
        the longest is evicted.
        """
        if len(self._queue) <= MOST_LOOKS:
            waiting = (seat for seat in self._queue if seat.may_be_evicted)
            return min(waiting, key=lambda seat: seat.waiting_since, default=None)
        oldest: Seat | None = None
        for _ in range(MOST_LOOKS):
            seat = next(iter(self._queue))
            if seat.may_be_evicted:
                if seat.queued_since == seat.waiting_since:
                    return seat
                seat.queued_since = seat.waiting_since
                if oldest is None or seat.waiting_since < oldest.waiting_since:
                    oldest = seat
            self._queue.move_to_end(seat)
        return oldest
