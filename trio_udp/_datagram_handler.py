"""Hands batches of datagrams to a ``datagram_handler``: no clients, no tasks, no inboxes."""

from __future__ import annotations

from ._admission import Admission
from ._endpoints import MAX_PAYLOAD_IPV4, Outgoing, Received, Source, make_datagram
from ._handlers import DatagramHandler
from ._lifecycle import DRAINING
from ._seats import Place


def to_function(handler: DatagramHandler, admission: Admission, place: Place, batch: list[Received]) -> None:
    """Call a ``datagram_handler`` for each datagram of a batch, in order, and send the replies together."""
    function, seats, outbox, limiter = handler.function, admission.seats, place.outbox, admission.seats.limiter
    amplification, own = place.amplification, outbox.own
    outbox.turn.begin_batch()
    if admission.echoes.expected:
        batch = admission.without_echoes(place, batch)
    known = place.known  # only clients of Server.connect
    if seats.phase is DRAINING and not known:
        admission.refused_stopping += len(batch)
        return
    checks_all, is_doubtful = admission.checks_all_sources(place), place.reader.engine.doubtful_source
    replies: list[Outgoing] = []
    place.rest = iter(batch)
    for payload, route, ancillary in place.rest:
        if known and (seat := known.get(route)) is not None:
            if limiter is None or limiter.take(seat.bucket, outbox.turn.time):
                seat.put(payload)
            else:
                admission.refused_by_rate += 1
            continue
        if seats.phase is DRAINING:
            admission.refused_stopping += 1
            continue
        is_answerable = True
        if checks_all or is_doubtful(route):
            source = admission.check_source(place, route)
            if source is Source.REFUSED:
                continue
            is_answerable = source is not Source.UNANSWERABLE
        if limiter is not None and not admission.has_rate(limiter, place, route):
            continue
        seats.handed_over += 1
        datagram = make_datagram(payload, route, ancillary, place)
        try:
            reply = function(datagram)
            if reply is None:
                continue
            if type(reply) is bytes and len(reply) <= MAX_PAYLOAD_IPV4:
                size, outgoing = len(reply), [(reply, route, own)]
            else:
                several = reply if isinstance(reply, (list, tuple)) else [reply]
                outgoing = [(outbox.copy(each, route), route, own) for each in several]
                size = sum(len(each) for each, _, _ in outgoing)
        except Exception as error:
            seats.handler_errors += 1
            seats.on_error(datagram, error)
            continue
        if not is_answerable:
            for _ in outgoing:
                outbox.count_unanswerable(own)
        elif amplification is not None and size > amplification * len(payload):
            place.withheld += len(outgoing)
        else:
            replies += outgoing
    if replies or outbox.collecting:
        outbox.collect(replies, more_follow=place.reader.has_more())
