"""Hands batches of datagrams to a ``datagram_handler``: no clients, no tasks, no inboxes."""

from __future__ import annotations

from itertools import repeat
from typing import Any

from ._admission import Admission
from ._endpoints import LONG_ROW, MAX_PAYLOAD_IPV4, Outgoing, Received, Route, Source, make_datagram
from ._handlers import DatagramHandler
from ._lifecycle import DRAINING
from ._seats import Place


def to_function(handler: DatagramHandler, admission: Admission, place: Place, batch: list[Received]) -> None:
    """Call a ``datagram_handler`` for each datagram of a batch, in order, and send the replies together.

    A long row of replies to one datagram leaves at once, unless earlier replies wait.
    """
    function, seats, outbox, limiter = handler.function, admission.seats, place.outbox, admission.seats.limiter
    amplification, own = place.amplification, outbox.own
    outbox.turn.begin_batch()
    time = outbox.turn.time
    if admission.echoes.expected:
        batch = admission.without_echoes(place, batch)
    known = place.known  # only clients of Server.connect
    is_draining = seats.phase is DRAINING  # a drain begins only when the whole batch has been handed out
    checks_sources = admission.has_doubtful_source(place, batch)
    is_answerable = True
    replies: list[Outgoing] = []
    place.rest = iter(batch)
    for payload, route, ancillary in place.rest:
        if known and (seat := known.get(route)) is not None:
            if limiter is None or limiter.take(seat.bucket, time):
                seat.put(payload)
            else:
                admission.refused_by_rate += 1
            continue
        if is_draining:
            admission.refused_stopping += 1
            continue
        if checks_sources:
            source = admission.check_source(place, route)
            if source is Source.REFUSED:
                continue
            is_answerable = source is not Source.UNANSWERABLE
        if limiter is not None and not limiter.take(limiter.bucket_of(place.network_of(route)), time):
            admission.refused_by_rate += 1
            continue
        seats.handed_over += 1
        datagram = make_datagram(payload, route, ancillary, place)
        try:
            reply = function(datagram)
            if (
                type(reply) is bytes
                and len(reply) <= MAX_PAYLOAD_IPV4
                and is_answerable
                and (amplification is None or len(reply) <= amplification * len(payload))
            ):
                replies.append((reply, route, own))  # the usual case: avoid a call
                continue
            if reply is None:
                continue
            row, sizes = _row_of(reply, payload, route, place, is_answerable)
        except Exception as error:
            seats.handler_errors += 1
            seats.on_error(datagram, error)
        else:
            if len(row) < LONG_ROW or replies or outbox.collecting:  # earlier replies may be to the same peer
                replies += zip(row, repeat(route), repeat(own))
            else:
                outbox.send_row_or_drop(row, sizes, route, own)
    if replies or outbox.collecting:
        outbox.collect(replies, more_follow=place.reader.may_have_more)


def _row_of(
    reply: object, payload: bytes, route: Route, place: Place, is_answerable: bool
) -> tuple[list[bytes], list[int]]:
    """Check a reply, one payload or several; return the payloads to send and their sizes, none if a limit forbids them.

    Raises:
      OSError: ``EMSGSIZE``: a payload is too long.
      TypeError: A payload is not bytes-like.
    """
    outbox, amplification = place.outbox, place.amplification
    several: Any = reply if isinstance(reply, (list, tuple)) else [reply]
    copies, sizes = outbox.copy_row(several, route)
    if not is_answerable:
        for _ in copies:
            outbox.count_unanswerable(outbox.own)
        return [], []
    if amplification is not None and sum(sizes) > amplification * len(payload):
        place.withheld += len(copies)
        return [], []
    return copies, sizes
