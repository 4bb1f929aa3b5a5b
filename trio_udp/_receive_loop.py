"""The path of a datagram from the kernel to its handler and back. Read this first.

    kernel -> engine -> Reader -> receive_loop() -> known[route], or admission -> inbox -> handler task
    kernel <- engine <- Outbox <---------------------------------------------------------- client.send()

One receive loop for each endpoint puts every datagram into the inbox of the client it belongs to. When datagrams
arrive, a hook in Trio's scheduler (``EachPass`` in _reader.py) does this for the loop, just before the loop's task
would run. A *route* (peer address and local address) identifies the client. A stranger goes through admission, which
may start a handler task for it. The loop never waits for a client, and everything that grows is bounded by
:class:`Limits`.

The files on that path, each readable from top to bottom: _endpoints/engines/linux.py (or portable.py),
_endpoints/_reader.py, this one, _inbox.py, _channel.py, _endpoints/_outbox.py. For a ``datagram_handler`` the loop
hands its batches to _datagram_handler.py instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import trio

from ._admission import Admission
from ._endpoints import EachPass, Received
from ._seats import Place
from ._server import ServerState, backlog_of

NO_ROUTE = object()  # equal to no route


async def receive_loop(
    hand_out: Callable[[Place, list[Received]], None], early: bool, server: ServerState, place: Place
) -> None:
    """Read an endpoint and hand out datagrams, a batch at a time, until the endpoint or the server ends."""
    reader, seats = place.reader, server.seats
    reader.hand_out, reader.early, reader.fail = partial(hand_out, place), early, server.fail
    if early:
        EachPass.of_this_run().add(reader)
    try:
        with place.until_stop:
            while True:
                await reader.next_batch()
                if seats.overfull:
                    # Let evicted handlers end before the next batch. (next_batch lets tasks run too, but in random
                    # order, so one checkpoint may not be enough.)
                    await trio.lowlevel.checkpoint()
        # Read the datagrams that had arrived when the stop began. A flood cannot prolong this: see backlog_of().
        is_left = backlog_of(place)
        while reader.ahead or reader.engine.read_ahead or (not reader.shared and is_left()):
            if not await reader.next_batch(wait=False):
                break
        place.outbox.release()
        server.caught_up(place)
        await server.draining.wait()
        while not reader.shared:
            await reader.next_batch()
    except trio.ClosedResourceError:
        if not place.endpoint.closed:  # raised by a user's function, not by the endpoint
            raise
        server.lose(place)
    finally:
        if early:
            EachPass.of_this_run().discard(reader)
        # If a user's function has crashed the server, the rest of the batch counts as refused.
        server.admission.refused_stopping += len(list(place.rest)) + len(reader.take_ahead(len(reader.ahead)))
        # Cancelled handlers may still send; their datagrams must not wait for this loop, which has ended.
        place.outbox.release()
        place.outbox.turn.time = 0.0  # the last batch's time is no longer the current time


@trio.lowlevel.enable_ki_protection  # like reschedule(): Ctrl-C cannot interrupt it, except in accept
def to_clients(admission: Admission, place: Place, batch: list[Received]) -> None:
    """Put each datagram of a batch into the inbox of its client. A stranger becomes a client if admission allows it."""
    known, seats, turn = place.known, admission.seats, place.outbox.turn
    limiter, reschedule, started = seats.limiter, turn.context["runner"].reschedule, seats.started
    turn.begin_batch()
    if admission.echoes.expected:
        batch = admission.without_echoes(place, batch)
    if len(batch) > 1:
        place.outbox.hold()
    checks_sources: bool | None = None  # computed for the first stranger
    place.rest = iter(batch)
    # Neighbours from one client are a row: the first is put, and the others are kept together. This takes a third less
    # time than to put each.
    seat: Any = None  # the client of the current row
    last: object = NO_ROUTE  # its route
    row: list[bytes] = []  # without the first
    for payload, route, ancillary in place.rest:
        if route == last:
            if limiter is None or limiter.take(seat.bucket, turn.time):
                row.append(payload)
            else:
                admission.refused_by_rate += 1
            continue
        if row:
            seat.keep_row(row)
            row = []
        last = NO_ROUTE
        seat = known.get(route)
        if seat is None:
            if checks_sources is None:
                checks_sources = admission.has_doubtful_source(place, batch)
            admission.ask(place, checks_sources, payload, route, ancillary)
            continue
        if limiter is not None and not limiter.take(seat.bucket, turn.time):
            admission.refused_by_rate += 1
            continue
        last = route
        # Put it here, in arrival order, rather than in a task per datagram: Trio shuffles tasks that become runnable
        # together, so spawning would reorder the datagrams of a batch.
        receiver = seat.receiver
        if receiver is not None and receiver.custom_sleep_data is seat:  # put(), inlined for a task that waits
            seat.bytes_received += len(payload)
            seat.delivered += 1
            seats.handed_over += 1
            reschedule(receiver, payload)
        else:
            seat.put(payload)
    if row:
        seat.keep_row(row)
    if 2 * (seats.started - started) > len(batch):
        # Mostly new clients. They are unlikely to have written again already, and replies that are kept back keep the
        # clients in memory: each new one would cost 7 % more.
        place.outbox.may_keep_back = False
