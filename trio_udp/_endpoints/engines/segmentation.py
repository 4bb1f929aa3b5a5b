"""Segmentation offload (GSO, ``UDP_SEGMENT``): which neighbours in a batch can leave as one message.

The kernel takes consecutive datagrams of one size to one peer as the *segments* of a single message; the last one may
be smaller. See udp(7). The pure functions here choose the messages; linux.py makes the system calls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from operator import and_, eq, ge, itemgetter
from typing import TypeAlias

from .._address import MAX_PAYLOAD_IPV4
from ._engine import Outgoing, Route

# Kernels before 6.9 cut a message into at most this many segments.
MAX_SEGMENTS = 64


# One list for each property of a message: the number of its datagrams, its route, its bytes, and the bytes of one
# datagram, which are 0 if it has only one.
Messages: TypeAlias = tuple[list[int], list[Route], list[int], list[int]]


def merge(routes: Sequence[Route], sizes: Sequence[int], most: int) -> Messages:
    """Merge neighbours into messages, at most ``most`` of them; later datagrams are left out."""
    total, route, size, last = len(sizes), routes[0], sizes[0], sizes[-1]
    # One run, as from send_many(): list.count() takes a twentieth of the time of runs_alike().
    if sizes.count(size) + (last < size) == total and routes[-1] == route and routes.count(route) == total:
        if last and 1 < total <= MAX_SEGMENTS and size * total <= MAX_PAYLOAD_IPV4:
            return [total], [route], [size * (total - 1) + last], [size]
        runs = [total]
    else:
        runs = runs_alike(routes, sizes)
    messages: Messages = ([], [], [], [])
    datagrams, to, message_sizes, segment_sizes = messages
    start = 0
    for run in runs[:most]:
        end = start + run
        while start < end:
            size = sizes[start]
            count = 1 if end - start == 1 else segments_in(sizes, start, end)
            datagrams.append(count)
            to.append(routes[start])
            message_sizes.append(size * (count - 1) + sizes[start + count - 1])
            segment_sizes.append(size if count > 1 else 0)
            start += count
    if len(datagrams) > most:
        for column in messages:
            del column[most:]
    return messages


def runs_alike(routes: Sequence[Route], sizes: Sequence[int]) -> list[int]:
    """Return the lengths of runs of datagrams with equal routes in which no datagram is longer than the one before."""
    # This compares neighbours in C; a Python loop would take twice as long. A 0 ends a run.
    alike = map(eq, routes, routes[1:])
    if sizes.count(sizes[0]) < len(sizes):
        alike = map(and_, alike, map(ge, sizes, sizes[1:]))
    return [len(run) + 1 for run in bytes(alike).split(b"\0")]


def segments_in(sizes: Sequence[int], start: int, end: int) -> int:
    """Return how many datagrams of a run fit into one message: all of one size but the last, which may be smaller."""
    size, count = sizes[start], end - start
    if size == sizes[end - 2] and sizes[end - 1] and count <= MAX_SEGMENTS and size * count <= MAX_PAYLOAD_IPV4:
        return count
    if not size:
        return 1
    most = max(1, min(count, MAX_SEGMENTS, MAX_PAYLOAD_IPV4 // size))
    equal = sizes[start : start + most].count(size)  # the first ones, since sizes do not grow
    return equal + 1 if equal < most and sizes[start + equal] else equal


def by_peer(outgoing: list[Outgoing]) -> list[Outgoing]:
    """Put datagrams to one peer side by side, in order, unless peers have fewer than two on average."""
    peers = len(set(map(itemgetter(1), outgoing)))
    if peers == 1 or 2 * peers > len(outgoing):
        return outgoing
    of_peer: defaultdict[Route, list[Outgoing]] = defaultdict(list)
    for datagram in outgoing:
        of_peer[datagram[1]].append(datagram)
    return list(chain.from_iterable(of_peer.values()))
