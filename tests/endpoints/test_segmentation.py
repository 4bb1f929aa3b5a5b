"""Which datagrams leave as one message (GSO): the pure functions, compared with plain ones."""

from __future__ import annotations

from hypothesis import example, given, strategies as st

from trio_udp._endpoints.engines import Outgoing, by_peer
from trio_udp._endpoints.engines.segmentation import MAX_SEGMENTS, merge

LONGEST_MESSAGE = 65_507  # bytes

SIZES = st.sampled_from([0, 1, 2, 100, 1_200, 9_000, 33_000, 65_507, 65_527])

# Routes and sizes, in runs of equal ones, as replies usually come.
ROUTES_AND_SIZES = st.lists(
    st.tuples(st.sampled_from([b"A", b"B"]), SIZES, st.integers(1, 80)).map(lambda run: [run[:2]] * run[2]), min_size=1
).map(lambda runs: [datagram for run in runs for datagram in run])


def merged_plainly(datagrams: list[tuple[bytes, int]]) -> list[tuple[int, bytes, int, int]]:
    """Append each datagram to the last message if the kernel would cut it off again; else begin a message."""
    messages: list[list[tuple[bytes, int]]] = []
    for route, size in datagrams:
        if messages:
            last = messages[-1]
            segment = last[0][1]
            if (
                route == last[0][0]
                and 0 < size <= segment == last[-1][1]
                and len(last) < MAX_SEGMENTS
                and segment * (len(last) + 1) <= LONGEST_MESSAGE
            ):
                last.append((route, size))
                continue
        messages.append([(route, size)])
    return [
        (len(message), message[0][0], sum(size for _, size in message), message[0][1] if len(message) > 1 else 0)
        for message in messages
    ]


@given(ROUTES_AND_SIZES, st.integers(1, 64))
@example([(b"A", 1_200)] * 64, 64)
@example([(b"A", 1_200)] * 16 + [(b"A", 300)], 64)
@example([(b"A", 1_200)] * 54 + [(b"A", 0)], 64)
@example([(b"A", 1)] * 65, 64)
@example([(b"A", 65_527)] * 2, 64)
def test_messages(datagrams: list[tuple[bytes, int]], most: int) -> None:
    """A message has as many neighbours of one route and size as fit, and perhaps a smaller one at the end."""
    routes, sizes = [route for route, _ in datagrams], [size for _, size in datagrams]
    assert [*zip(*merge(routes, sizes, most), strict=True)] == merged_plainly(datagrams)[:most]


@given(st.lists(st.tuples(st.binary(max_size=2), st.sampled_from([b"A", b"B", b"C", b"D"]), st.none())))
def test_by_peer(outgoing: list[Outgoing]) -> None:
    """Datagrams are grouped by route, in the order of each route's first, unless few routes have several."""
    routes = list(dict.fromkeys(route for _, route, _ in outgoing))
    grouped = [datagram for route in routes for datagram in outgoing if datagram[1] == route]
    assert by_peer(outgoing) == (grouped if 2 * len(routes) <= len(outgoing) else outgoing)
