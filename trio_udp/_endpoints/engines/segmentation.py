"""Segmentation offload (GSO, ``UDP_SEGMENT``): which neighbours in a batch can leave as one message.

The kernel takes consecutive datagrams of one size to one peer as the *segments* of a single message; the last one may
be smaller. See udp(7). The pure functions here choose the messages; linux.py makes the system calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import and_, eq, ge
from typing import NamedTuple

from .._address import MAX_PAYLOAD_IPV4
from ._engine import Outgoing, Route

# Kernels before 6.9 cut a message into at most this many segments.
MAX_SEGMENTS = 64


class Messages(NamedTuple):
    """Messages, as one list for each of their properties.

    Attributes:
      datagrams: The number of datagrams in each message.
      routes, sizes: The route and the bytes of each message.
      segment_sizes: The bytes of one datagram in each message; 0 for a message of one datagram.
    """

    datagrams: list[int]
    routes: list[Route]
    sizes: list[int]
    segment_sizes: list[int]


def merge(routes: Sequence[Route], sizes: list[int], most: int) -> Messages:
    """Merge neighbours into messages, at most ``most`` of them; later datagrams are left out."""
    messages = Messages([], [], [], [])
    start = 0
    for run in runs_alike(routes, sizes)[:most]:
        end = start + run
        while start < end:
            size = sizes[start]
            if end - start == 1:
                count, segment_size = 1, 0
            else:
                count = segments_in(sizes, start, end)
                segment_size = size if count > 1 else 0
                size = size * (count - 1) + sizes[start + count - 1]
            messages.datagrams.append(count)
            messages.routes.append(routes[start])
            messages.sizes.append(size)
            messages.segment_sizes.append(segment_size)
            start += count
    for column in messages:
        del column[most:]
    return messages


def runs_alike(routes: Sequence[Route], sizes: list[int]) -> list[int]:
    """Return the lengths of runs of datagrams with equal routes in which no datagram is longer than the one before."""
    # This compares neighbours in C; a Python loop would take twice as long. A 0 ends a run.
    alike = map(eq, routes, routes[1:])
    if sizes.count(sizes[0]) < len(sizes):
        alike = map(and_, alike, map(ge, sizes, sizes[1:]))
    return [len(run) + 1 for run in bytes(alike).split(b"\0")]


def segments_in(sizes: list[int], start: int, end: int) -> int:
    """Return how many datagrams of a run fit into one message: all of one size but the last, which may be smaller."""
    size, count = sizes[start], end - start
    if size == sizes[end - 2] and sizes[end - 1] and count <= MAX_SEGMENTS and size * count <= MAX_PAYLOAD_IPV4:
        return count
    if not size:
        return 1
    most = min(end, start + MAX_SEGMENTS, start + MAX_PAYLOAD_IPV4 // size)
    position = start + 1
    while position < most and sizes[position] == size:
        position += 1
    if position < most and sizes[position]:  # smaller, since sizes do not grow
        position += 1
    return position - start


def by_peer(outgoing: list[Outgoing]) -> list[Outgoing]:
    """Put datagrams to one peer side by side, in order, if there are peers with several."""
    of_peer: dict[Route, list[Outgoing]] = {route: [] for _, route, _ in outgoing}
    if 2 * len(of_peer) > len(outgoing):
        return outgoing
    for datagram in outgoing:
        of_peer[datagram[1]].append(datagram)
    return list(chain.from_iterable(of_peer.values()))
