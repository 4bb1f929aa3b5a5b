"""Admission: the checks on a stranger's datagram, in this order, each with its own counter:

============ =============================================================== ==================================
question     a stranger that fails it                                        counted as
============ =============================================================== ==================================
source       claims to be ourselves, a group or a broadcast address          ``refused_source``
rate         its part of the network has sent too many datagrams              ``refused_by_rate``
``accept``   the user's function returned false, or raised                   ``refused_by_accept``
``accept``   the user's function returned bytes, which are sent back         ``answered_by_accept``
phase        the server drains                                               ``refused_stopping``
memory       its datagram would not fit into an inbox                        ``dropped_inbox_full``
host         its host has reached ``clients_per_host``                       ``refused_full``
room         the table of clients is full                                    ``refused_full``
============ =============================================================== ==================================

A client's datagram is checked for its rate only. A refused datagram leaves nothing behind.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import attrs
import trio

from ._client import Client, make_client
from ._endpoints import Ancillary, Datagram, Echoes, Received, Route, Source, Sources, host_key, make_datagram, route_of
from ._handlers import Accept
from ._lifecycle import DRAINING, LOST
from ._log import ErrorLog, WarningLog
from ._rate import NO_BUCKET
from ._seats import Place, Seat, Seats

# Also as globals; see the end of _lifecycle.py.
FINE, REFUSED, UNANSWERABLE = Source

# The most bytes of a reply from accept, as a multiple of the datagram's: RFC 9000 section 8.1.
MOST_AMPLIFICATION = 3


@trio.lowlevel.disable_ki_protection
def _interruptible(accept: Accept, datagram: Datagram) -> object:
    """Call ``accept``. Ctrl-C interrupts it, although it runs in Trio's scheduler, which Ctrl-C does not interrupt."""
    return accept(datagram)


@attrs.define(eq=False)
class Admission:
    """Decides about strangers for one server, and counts those it turns away."""

    seats: Seats
    sources: Sources
    accept: Accept | None
    idle_timeout: float
    errors: ErrorLog
    warnings: WarningLog
    start_handler: Callable[[Seat, Client], None]
    echoes: Echoes = attrs.field(factory=Echoes, init=False)
    refused_source: int = attrs.field(default=0, init=False)
    refused_by_rate: int = attrs.field(default=0, init=False)
    refused_by_accept: int = attrs.field(default=0, init=False)
    answered_by_accept: int = attrs.field(default=0, init=False)
    refused_full: int = attrs.field(default=0, init=False)
    refused_stopping: int = attrs.field(default=0, init=False)

    def ask(self, place: Place, checks_source: bool, payload: bytes, route: Route, ancillary: Ancillary) -> None:
        """Make a stranger a client, or answer it, or refuse and count its datagram.

        Args:
          checks_source: False if :meth:`has_doubtful_source` has ruled out that the source needs a check.
        """
        seats, engine = self.seats, place.outbox.engine
        source = FINE
        if checks_source:
            source = self.check_source(place, route)
            if source is REFUSED:
                return
        bucket = NO_BUCKET
        if seats.limiter is not None:
            bucket = seats.limiter.bucket_of(place.network_of(route))
            if not seats.limiter.take(bucket, place.outbox.turn.now()):
                self.refused_by_rate += 1
                return
        if self.accept is not None:
            if not self._is_accepted(self.accept, place, make_datagram(payload, route, ancillary, place), source):
                return
            if (seat := place.known.get(route)) is not None:
                return seat.put(payload)  # accept has called Server.connect for this peer
        if seats.phase is DRAINING:  # after accept, which may answer even during a drain
            self.refused_stopping += 1
            return
        limits, size = seats.limits, len(payload)
        if size > limits.inbox_bytes or seats.waiting_bytes + size > limits.total_bytes:
            seats.dropped_inbox_full += 1
            return
        if limits.clients_per_host is not None and not seats.has_room_on_host(host_key(engine.host(route))):
            self.refused_full += 1
            return
        if len(seats.running) >= limits.max_clients and not seats.make_room():  # in the usual case avoid a call
            self.refused_full += 1
            self.warnings.warn(
                "full", "strangers are refused: the table of clients is full (max_clients=%d)", limits.max_clients
            )
            return
        seat = Seat(place.outbox, route, self.idle_timeout, seats, place)
        if place.amplification is not None:
            seat.limited = True
        if source is UNANSWERABLE:
            seat.answerable = False
            seat.limited = True
        if seats.limiter is not None:
            seat.bucket = seats.limiter.keep(bucket)
        client = make_client(seat)
        seats.add(seat, client)
        try:
            self.start_handler(seat, client)
        except BaseException:  # the caller's nursery is closed
            self.refused_stopping += 1
            seat.finish(LOST)
            seats.remove(seat)
            raise
        seat.put_first(payload)

    def has_doubtful_source(self, place: Place, batch: list[Received]) -> bool:
        """Whether the sources of a batch need :meth:`check_source`: one of them is doubtful, or all need it."""
        engine = place.outbox.engine
        checks_all = self.sources.refresh(engine, place.outbox.turn.time)
        return checks_all or engine.doubtful_sources([route for _, route, _ in batch])

    def check_source(self, place: Place, route: Route) -> Source:
        """Decide about a source, and count the datagram if it is refused."""
        source = self.sources.verdict(place.outbox.engine, route)
        if source is REFUSED:
            self.refused_source += 1
        return source

    def without_echoes(self, place: Place, batch: list[Received]) -> list[Received]:
        """Refuse datagrams that this server has sent to a group or a broadcast address and receives back."""
        self.sources.refresh(place.outbox.engine, place.outbox.turn.time)  # which discards old cached results
        self.echoes.forget(place.outbox.turn.now())
        engine, sources, echoes = place.outbox.engine, self.sources, self.echoes
        others = [
            (payload, route, ancillary)
            for payload, route, ancillary in batch
            if not (sources.is_from_here_to_many(engine, route) and echoes.take(payload, engine))
        ]
        self.refused_source += len(batch) - len(others)
        return others

    def _is_accepted(self, accept: Accept, place: Place, datagram: Datagram, source: Source) -> bool:
        route = route_of(datagram)
        place.in_accept = True
        try:
            answer: object = _interruptible(accept, datagram)
            if inspect.iscoroutine(answer):
                answer.close()  # or Python warns that nothing awaited it
            if answer is not True and answer is not False and not isinstance(answer, bytes):
                raise TypeError(f"accept must return True, False or bytes, not {answer!r}")
            reply = place.outbox.copy(answer, route) if isinstance(answer, bytes) else None
        except Exception as error:
            self.errors.write(error, "accept failed on a datagram from %r", datagram.peer_address)
            answer, reply = False, None
        except BaseException:  # such as KeyboardInterrupt: the server ends
            self.refused_stopping += 1
            raise
        finally:
            place.in_accept = False
        if reply is not None:
            self.answered_by_accept += 1
            self._send_back(place, datagram, route, reply, source)
        elif answer is True:
            return True
        elif self.seats.phase is DRAINING:
            self.refused_stopping += 1
        else:
            self.refused_by_accept += 1
        return False

    def _send_back(self, place: Place, datagram: Datagram, route: Route, reply: bytes, source: Source) -> None:
        """Send the reply of accept, unless a limit withholds it or the send buffer is full."""
        limit = self.seats.limits.amplification
        if source is UNANSWERABLE:
            place.outbox.count_unanswerable(place.outbox.own)
        elif len(reply) > (MOST_AMPLIFICATION if limit is None else limit) * len(datagram.payload):
            place.withheld += 1
        else:
            place.outbox.send_or_drop([(reply, route, place.outbox.own)])
