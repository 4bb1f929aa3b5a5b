"""A running server: ServerState (its parts and phases) and Server (its public face)."""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from contextlib import suppress
from operator import length_hint
from typing import NoReturn, final

import attrs
import trio

from ._admission import Admission
from ._client import Client, make_client, seat_of
from ._construction import NoPublicConstructor
from ._endpoints import (
    BATCH,
    Address,
    Datagram,
    Endpoint,
    Engine,
    Outbox,
    Outgoing,
    Payload,
    Received,
    Route,
    ServerTurn,
    find_way,
    is_by_name,
    is_limited_broadcast,
    is_multicast,
    is_unspecified,
    network_getter,
    reader_of,
    route_to_name,
    send_on,
    send_on_nowait,
)
from ._lifecycle import CATCHING_UP, ENDED, OPEN, RUNNING
from ._log import LOGGER, ErrorLog
from ._seats import Place, Seat, Seats
from ._statistics import ServerStatistics


@attrs.define(eq=False)
class ServerState:
    """The parts of a server, and the one place that moves it from phase to phase.

    Attributes:
      places: Its endpoints, including those closed under it.
      nursery: Where its own tasks run.
      own_handlers: Handlers run in ``nursery``, not in the caller's ``handler_nursery``.
      receive_loop: Runs for each endpoint.
      stop_requested: Set by ``stop``.
      draining: Set once all receive loops have caught up.
      failure: The exception that ends the server, for example an invalid handler.
    """

    seats: Seats
    admission: Admission
    errors: ErrorLog
    nursery: trio.Nursery
    own_handlers: bool
    receive_loop: Callable[[ServerState, Place], Awaitable[None]]
    turn: ServerTurn = attrs.field(factory=ServerTurn, init=False)
    places: list[Place] = attrs.field(factory=list, init=False)
    stop_requested: trio.Event = attrs.field(factory=trio.Event, init=False)
    draining: trio.Event = attrs.field(factory=trio.Event, init=False)
    failure: Exception | None = attrs.field(default=None, init=False)
    handlers_cancelled: int = attrs.field(default=0, init=False)
    _behind: set[Place] = attrs.field(factory=set, init=False)  # whose loops have not caught up yet

    def add_place(self, server: Server, endpoint: Endpoint) -> None:
        """Serve on an endpoint that :meth:`Reader.take_over` has reserved."""
        reader = reader_of(endpoint)
        reader.outbox.turn = self.turn
        limits = self.seats.limits
        place = Place(endpoint, reader.outbox, server, limits.amplification, reader=reader)
        if limits.rate_limit is not None:
            rate = limits.rate_limit
            place.network_of = network_getter(reader.engine, rate.ipv4_prefix, rate.ipv6_prefix)
        self.places.append(place)
        self._behind.add(place)
        self.admission.sources.add(reader.engine)
        reader.outbox.echoes = self.admission.echoes
        if isinstance(endpoint.local_address, tuple):  # not of a Unix-domain socket
            self.admission.echoes.ports.add(endpoint.local_address[1])
        self.nursery.start_soon(reader.outbox.empty_when_stuck)
        self.nursery.start_soon(self.receive_loop, self, place)
        LOGGER.info("serving on %s", endpoint.local_address)

    def stop(self) -> None:
        if self.seats.phase is not RUNNING:
            return
        self.seats.phase = CATCHING_UP
        LOGGER.info("stopping: %d clients to drain", len(self.seats.running))
        for place in self.places:
            place.reader.finished = place.reader.shared
            place.until_stop.cancel()
        self.stop_requested.set()
        for place in self.places:
            if place.has_nothing_to_read:  # nearly always true: do not wait for its loop
                self._behind.discard(place)
        self._drain_if_caught_up()

    def caught_up(self, place: Place) -> None:
        """Note that a receive loop has read what had arrived when the stop began, or that its endpoint is closed."""
        self._behind.discard(place)
        self._drain_if_caught_up()

    def _drain_if_caught_up(self) -> None:
        if self.seats.phase is CATCHING_UP and not self._behind:
            self.seats.begin_drain(self.places)
            self.draining.set()

    async def drain(self, drain_timeout: float) -> None:
        """Wait until the server drains, end every channel, and wait for the handlers until the timeout."""
        await self.draining.wait()
        with trio.move_on_after(drain_timeout):
            await self.seats.wake_all()
            await self.seats.all_gone.wait()
            for place in self.places:
                await place.outbox.empty()
        self._take_stock()

    def _take_stock(self) -> None:
        """Count late datagrams and unfinished handlers, and log the result."""
        for place in self.places:
            with suppress(trio.ClosedResourceError):
                self._read_once_more(place)
        if self.own_handlers:
            self.handlers_cancelled = sum(seat.has_handler for seat in self.seats.running)
        refused = self.admission.refused_stopping
        LOGGER.info(
            "stopped: %d clients served, %d datagrams refused while stopping, %d handlers cancelled",
            self.seats.started,
            refused,
            self.handlers_cancelled,
        )

    def lose(self, place: Place) -> None:
        """Note that an endpoint was closed under the running server."""
        self.seats.lose(place)
        self.admission.sources.discard(place.reader.engine)
        self.caught_up(place)
        if self.has_lost_its_endpoints:
            self.nursery.cancel_scope.cancel()

    def end(self) -> None:
        """Close every client: using one after the server has ended raises ``trio.ClosedResourceError``."""
        if self.seats.phase is RUNNING:
            self.stop_requested.set()  # to wake wait_stopping()
        else:
            for place in self.places:  # datagrams may have arrived while cancelled handlers ended
                with suppress(trio.ClosedResourceError):
                    self._read_once_more(place)
        self.seats.phase = ENDED
        self.seats.lose()
        self.errors.write_suppressed()
        for place in self.places:  # including added ones
            place.endpoint.close()

    def crash(self, error: Exception) -> None:
        """End the server with an error that the program made."""
        self.failure = error
        self.nursery.cancel_scope.cancel()

    def fail(self, error: BaseException) -> None:
        """End the server with an error that was raised outside of its tasks."""

        async def raise_it() -> None:
            raise error

        self.nursery.start_soon(raise_it)

    @property
    def has_lost_its_endpoints(self) -> bool:
        """Whether every endpoint is closed although ``stop`` was not called."""
        return not self.stop_requested.is_set() and all(place.endpoint.closed for place in self.places)

    async def stop_at_signals(
        self,
        signals: Collection[signal.Signals],
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        with trio.open_signal_receiver(*signals) as arriving:
            task_status.started()
            await anext(arriving)
            self.stop()
            await anext(arriving)
            self._take_stock()
            self.nursery.cancel_scope.cancel()

    def _read_once_more(self, place: Place) -> None:
        """Count datagrams that arrived since the loop last read, so that ``refused_stopping`` is exact at closing."""
        if place.reader.shared or place.reader.engine.closed:
            return
        counts, may_have_more = place.reader.engine.counts, True
        is_left = backlog_of(place)
        while may_have_more and is_left():
            batch: list[Received] = []
            read_before = counts.received
            may_have_more = place.reader.read(batch) and counts.received > read_before
            self.admission.refused_stopping += len(batch)


# The least kernel memory that a message takes besides its payload, in bytes.
MESSAGE_OVERHEAD = 512


def backlog_of(place: Place) -> Callable[[], bool]:
    """Return a function that says whether messages that the kernel holds now may still be unread.

    Linux tells how much memory they take (``SO_MEMINFO``). Elsewhere, and for Unix-domain sockets, count the messages
    that a full buffer could hold.
    """
    counts, kernel = place.reader.engine.counts, place.reader.engine.kernel_figures()
    messages, size = counts.messages, counts.bytes_received
    most = (kernel.queued or kernel.receive_buffer) + MESSAGE_OVERHEAD

    def is_left() -> bool:
        read = MESSAGE_OVERHEAD * (counts.messages - messages)
        if kernel.queued:
            # Count payloads too: a message of 60 coalesced datagrams is long, and under a flood of such messages the
            # number alone would let us read for seconds.
            read += counts.bytes_received - size
        return read < most

    return is_left


@final
class Server(metaclass=NoPublicConstructor):
    """A running server, as ``await nursery.start(serve, ...)`` and ``Client.server`` return it."""

    __slots__ = ("__weakref__", "_state")

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def __repr__(self) -> str:
        addresses = ", ".join(str(endpoint.local_address) for endpoint in self.endpoints)
        return f"<trio_udp.Server on {addresses} with {len(self.clients)} clients>"

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The endpoints that the server serves on; ``server.endpoints[0].local_address[1]`` is the port."""
        return tuple(place.endpoint for place in self._state.places)

    @property
    def clients(self) -> Collection[Client]:
        """A live, read-only collection of the clients whose handlers run, and of those that :meth:`connect` made.

        Iteration covers the clients that are there when it begins.
        """
        return ClientsView(self._state.seats)

    @property
    def stopping(self) -> bool:
        """Whether the server is stopping or has ended."""
        return self._state.seats.phase is not RUNNING

    async def wait_stopping(self) -> None:
        """Wait until the server begins to stop, or ends for another reason. A checkpoint."""
        await self._state.stop_requested.wait()

    def stop(self) -> None:
        """Stop gracefully: handle what has arrived, end every conversation, then return from ``serve``.

        Callable from anywhere inside Trio, handlers included; returns at once. Idempotent. Three things follow:

        1. The server catches up. It reads the datagrams that have reached the machine by now, and strangers among their
           senders still become clients.
        2. It drains. The datagrams that wait in an inbox are handled, then the channel ends. Datagrams that still
           arrive count as ``refused_stopping``, except those of clients inside :meth:`Client.transaction`. Handlers
           have ``drain_timeout`` seconds in all; those that still run then are cancelled.
        3. It reads each socket once more, to count the datagrams that have arrived, and closes it.

        An endpoint that is ``shared`` is not read from now on, not even for transactions: datagrams that arrive wait in
        the kernel for the next reader of the socket.
        """
        self._state.stop()

    async def send_to(
        self, payload: Payload, address: Address | str | bytes, *, local_address: Address | None = None
    ) -> None:
        """Send one datagram to any address, also to one that has never written to us.

        It does not make the receiver a client. Waits while the send buffer is full, first come first served.

        Args:
          payload: Any bytes-like object, copied at the call.
          address: Numeric host and port, as a socket gives them. IPv4 addresses may be written as mapped into IPv6.
          local_address: One of our own addresses to send from; it chooses the endpoint too. By default the first
            endpoint of the address's family sends it, from the address of the kernel's choice.

        Raises:
          OSError: The kernel's error about this datagram: no route, a broadcast that the socket does not allow
            (``SO_BROADCAST``), port 0, a ``local_address`` that is not ours, or a payload that is too long.
          TypeError: The payload is not bytes-like, or ``address`` is not a numeric address.
          ValueError: ``address`` is not numeric, or no endpoint can send to it from ``local_address``.
          trio.ClosedResourceError: The server has ended.

        Cancellation:
          A checkpoint. If it raises ``Cancelled``, the datagram was not sent.
        """
        await send_on(find_way(self._outboxes(), address, local_address), payload)

    def send_to_nowait(
        self, payload: Payload, address: Address | str | bytes, *, local_address: Address | None = None
    ) -> None:
        """Like :meth:`send_to`, without waiting.

        Raises:
          trio.WouldBlock: The send buffer is full, or other senders wait for it; nothing was sent.
        """
        send_on_nowait(find_way(self._outboxes(), address, local_address), payload)

    async def send_to_all(self, payload: Payload, clients: Iterable[Client] | None = None) -> None:
        """Send one payload to many clients, in as few system calls as possible.

        It does not wait for room: if the send buffer is full, that client's datagram is dropped and counted among its
        ``send_errors`` (``EAGAIN``). Clients that have ended, for whatever reason, are skipped.
        ``Limits.amplification`` holds for each client.

        Args:
          payload: Any bytes-like object, copied at the call.
          clients: Clients of this server; by default all.

        Raises:
          ValueError: A client belongs to another server; nothing was sent.
          OSError: ``EMSGSIZE``: longer than a UDP datagram can be; nothing was sent.
          TypeError: Not a bytes-like object.

        Cancellation:
          A checkpoint before anything is sent, and one after every 64 clients. If a later one is cancelled, the clients
          before it have been sent the datagram.
        """
        seats = self._state.seats
        if seats.layered:
            return await self._send_through_layers(payload, list(self.clients if clients is None else clients))
        chosen = list(seats.running) if clients is None else [seat_of(client) for client in clients]
        if any(seat.shared is not seats for seat in chosen):
            raise ValueError("send_to_all was given a client of another server")
        outboxes = {seat.outbox: seat.route for seat in chosen}
        copies = {outbox: outbox.copy(payload, route) for outbox, route in outboxes.items()}
        await trio.lowlevel.checkpoint()
        for start in range(0, len(chosen), BATCH):
            if start:
                await trio.lowlevel.checkpoint()
            by_outbox: dict[Outbox, list[Outgoing]] = {}
            for seat in chosen[start : start + BATCH]:
                copy = copies[seat.outbox]
                if seat.end is OPEN and (not seat.limited or seat.reserve(len(copy))):
                    by_outbox.setdefault(seat.outbox, []).append((copy, seat.route, seat))
            for outbox, outgoing in by_outbox.items():
                for unsent, _, sender in outbox.send_or_drop(outgoing):
                    assert isinstance(sender, Seat)
                    sender.give_back(len(unsent))

    async def _send_through_layers(self, payload: Payload, clients: list[Client]) -> None:
        """Like :meth:`send_to_all`, where the channel of a layer makes different bytes for each client."""
        seats = [seat_of(client) for client in clients]
        if any(seat.shared is not self._state.seats for seat in seats):
            raise ValueError("send_to_all was given a client of another server")
        for number, (client, seat) in enumerate(zip(clients, seats, strict=True)):
            if number % BATCH == 0:
                await trio.lowlevel.checkpoint()
            with suppress(trio.ClosedResourceError):
                try:
                    if seat.end is OPEN:
                        client.send_nowait(payload)
                except trio.WouldBlock:
                    error = OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
                    seat.count_send_error(error)
                    seat.outbox.counts.count_send_error(error)

    def connect(self, address: Address | str | bytes, *, local_address: Address | None = None) -> Client:
        """Begin a conversation from our side, over the server's own socket, and return its client at once.

        No handler runs: the caller owns the client, receives from it and closes it. To run one, use
        ``nursery.start_soon(handler, server.connect(address))``. The client is validated. It counts in :attr:`clients`
        and ``max_clients``, but not in ``clients_per_host``. A drain waits at most ``drain_timeout`` for its owner to
        close it, then closes it.

        Args:
          address: Numeric host and port.
          local_address: One of our own addresses; by default the one that the kernel would send from now. It stays the
            same for the whole conversation.

        Raises:
          TypeError: It is not an address.
          ValueError: It is not numeric, or it is a group, a broadcast address, port 0 or our own address; or no
            endpoint can send to it.
          OSError: There is no route to it, or ``local_address`` is not ours.
          trio.BusyResourceError: That address is a client already.
          trio.WouldBlock: The table of clients is full, and no client in it may be evicted.
          trio.ClosedResourceError: The server is stopping or has ended.
        """
        state = self._state
        if state.seats.phase is not RUNNING:
            raise trio.ClosedResourceError("this server is stopping or has ended")
        outbox, route = find_way(self._outboxes(), address, local_address)
        outbox.check_open()
        addresses = [endpoint.local_address for endpoint in self.endpoints if not endpoint.closed]
        ports = {address[1] for address in addresses if isinstance(address, tuple)}  # not of Unix-domain sockets
        route = _route_to_peer(outbox.engine, route, address, local_address, ports)
        place = next(place for place in state.places if place.outbox is outbox)
        if route in place.known:
            raise trio.BusyResourceError(f"{address!r} is a client already")
        if not state.seats.make_room():
            raise trio.WouldBlock
        seat = Seat(outbox, route, state.admission.idle_timeout, state.seats, place, has_handler=False)
        seat.validate()
        client = make_client(seat)
        state.seats.add(seat, client)
        return client

    def add_endpoint(self, endpoint: Endpoint) -> None:
        """Serve on one more endpoint, which the server owns from now on.

        Raises:
          TypeError: It is not an endpoint.
          ValueError: The server serves on it already.
          trio.BusyResourceError: Another server runs on it, or a task is receiving from it.
          trio.ClosedResourceError: The server is stopping or has ended, or the endpoint is closed.
        """
        if not isinstance(endpoint, Endpoint):
            raise TypeError(f"expected an Endpoint, not {endpoint!r}")
        state = self._state
        if state.seats.phase is not RUNNING:
            raise trio.ClosedResourceError("this server is stopping or has ended")
        if endpoint in self.endpoints:
            raise ValueError("an endpoint cannot be served on twice")
        if endpoint.closed:
            raise trio.ClosedResourceError("this endpoint is closed")
        reader_of(endpoint).take_over()
        state.add_place(self, endpoint)

    def statistics(self) -> ServerStatistics:
        """Return the counts of all datagrams so far, also after the server has ended."""
        state, seats, admission = self._state, self._state.seats, self._state.admission
        sockets = [place.statistics() for place in state.places]
        return ServerStatistics(
            received=sum(s.received for s in sockets) - sum(map(_in_hand, state.places)),
            bytes_received=sum(s.bytes_received for s in sockets),
            sent=sum(s.sent for s in sockets),
            bytes_sent=sum(s.bytes_sent for s in sockets),
            delivered=seats.delivered,
            waiting=seats.waiting,
            dropped_inbox_full=seats.dropped_inbox_full,
            dropped_at_end=seats.dropped_at_end,
            truncated=sum(s.truncated for s in sockets),
            refused_malformed=sum(s.refused_malformed for s in sockets),
            refused_source=admission.refused_source,
            refused_by_rate=admission.refused_by_rate,
            refused_by_accept=admission.refused_by_accept,
            answered_by_accept=admission.answered_by_accept,
            refused_full=admission.refused_full,
            refused_stopping=admission.refused_stopping,
            clients=len(seats.running),
            clients_started=seats.started,
            clients_expired=seats.expired,
            clients_evicted=seats.evicted,
            handler_errors=seats.handler_errors,
            handlers_cancelled=state.handlers_cancelled,
            requests_timed_out=seats.requests_timed_out,
            sends_withheld=seats.sends_withheld + sum(place.withheld for place in state.places),
            receive_errors=sum(s.receive_errors for s in sockets),
            send_errors=sum(s.send_errors for s in sockets),
            errors=sum((Counter(s.errors) for s in sockets), Counter()),
            kernel_dropped=sum(s.kernel_dropped for s in sockets),
        )

    def _outboxes(self) -> list[Outbox]:
        return [place.outbox for place in self._state.places]


def _route_to_peer(
    engine: Engine, route: Route, address: Address | str | bytes, local_address: Address | None, ports: set[int]
) -> Route:
    """Return the route that a peer's datagrams will have; raise unless the address is one that a peer can have.

    Args:
      route: To the peer, from ``local_address`` if that is given.
      address, local_address: As the user wrote them.
      ports: The ports of the server itself.
    """
    if is_by_name(engine):
        return route_to_name(engine, route)
    target = engine.peer_address(route)
    if not target[1]:
        raise ValueError(f"cannot connect to port 0: {address!r}")
    if is_unspecified(target):
        raise ValueError(f"cannot connect to the unspecified address: {address!r}")
    if is_multicast(target) or is_limited_broadcast(target) or engine.is_broadcast(target):
        raise ValueError(f"cannot connect to a group or broadcast address: {address!r}")
    if target[1] in ports and engine.is_own_host(target):
        raise ValueError(f"cannot connect to this server itself: {address!r}")
    source = engine.source_for(target) if local_address is None else engine.local_address(route)
    if local_address is not None and not engine.is_own_host(source):
        raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    if len(target) == 4:
        target = (target[0], target[1], 0, target[3])  # flow information does not identify a peer
    return engine.route(target, source)


def _in_hand(place: Place) -> int:
    """Return how many datagrams were read and are not yet counted.

    Non-zero only during ``accept`` or a ``datagram_handler``, and right after the server took over an endpoint that had
    read ahead.
    """
    return length_hint(place.rest) + place.in_accept + len(place.reader.ahead)


class ClientsView(Collection[Client]):
    """A live, read-only view of a server's clients. Iteration covers the clients that are there when it begins."""

    def __init__(self, seats: Seats) -> None:
        self._seats = seats

    def __len__(self) -> int:
        return len(self._seats.running)

    def __contains__(self, client: object) -> bool:
        try:
            return self._seats.running.get(seat_of(client)) is client  # type: ignore[arg-type]
        except AttributeError:  # not a client
            return False

    def __iter__(self) -> Iterator[Client]:
        return iter(list(self._seats.running.values()))

    def __repr__(self) -> str:
        return f"<{len(self)} clients>"


def log_error(source: Client | Datagram, error: Exception) -> None:
    """Log an exception that left a handler, with its traceback, to the logger ``trio_udp``.

    The default ``on_error`` of a server. Writes at most 10 tracebacks a second, and then how many were suppressed.
    """
    server = source.server
    assert server is not None
    what = "a datagram from" if isinstance(source, Datagram) else "client"
    server._state.errors.write(error, "Handler of %s %r failed", what, source.peer_address)


def raise_error(source: Client | Datagram, error: Exception) -> NoReturn:
    """Let an error of a handler crash the server, as ``trio.serve_tcp`` would: an ``on_error`` for tests."""
    raise error
