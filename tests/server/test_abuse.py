"""Limits for strangers who send too much, or who make us send too much to a victim: rates and amplification."""

from __future__ import annotations

import ipaddress
import itertools
import socket
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from hypothesis import example, given, strategies as st
from trio.testing import MockClock

import trio_udp
import trio_udp.testing
from trio_udp import Client, Datagram, Limits, RateLimit
from trio_udp._endpoints import host_bytes, network_of
from trio_udp._rate import Bucket, RateLimiter

from ..conftest import ALICE, SERVER, StartInMemory, check_adds_up, echo, in_memory, narrow

NEIGHBOUR = ("192.0.2.250", 7)  # of ALICE: the same /24
ELSEWHERE = ("192.0.3.1", 7)


def limits(per_second: float, burst: int, **options: Any) -> Limits:
    return Limits(rate_limit=RateLimit(per_second, burst, **options))


def bucket_of(limiter: RateLimiter, address: Any) -> Bucket:
    default = RateLimit(1)  # for its prefixes
    return limiter.bucket_of(network_of(host_bytes(address), default.ipv4_prefix, default.ipv6_prefix))


# Rates


async def test_a_source_may_send_its_burst_and_then_its_rate(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """A rate-limited source gets no more than its burst, then ``per_second`` a second; silence refills the bucket."""
    run = await start_in_memory(echo, limits=limits(2, 5))
    answered = []
    for seconds in (0, 0.5, 1, 10, 0):
        await trio.sleep(seconds)
        before = len(run.sent)
        for _ in range(8):
            run.put(b"x")
        await run.settle()
        answered.append(len(run.sent) - before)
    assert answered == [5, 1, 2, 5, 0]
    s = run.server.statistics()
    assert (s.received, s.delivered, s.refused_by_rate, s.clients) == (40, 13, 27, 1)
    check_adds_up(run.server)


async def test_neighbours_share_a_bucket(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """All addresses of a /24 share one bucket, whether or not they are clients; other networks have their own."""
    run = await start_in_memory(echo, limits=limits(1, 3))
    for source in (ALICE, NEIGHBOUR, ALICE, NEIGHBOUR, ALICE, ("192.0.2.9", 9), ELSEWHERE):
        run.put(b"x", source)
    await run.settle()
    assert sorted(destination for destination, _ in run.sent) == [ALICE, ALICE, NEIGHBOUR, ELSEWHERE]
    assert run.server.statistics().refused_by_rate == 3


async def test_a_validated_client_counts_by_itself(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """Neighbours, and those who forge their addresses, cannot use up a validated client's share of the rate limit."""

    async def handler(client: Client) -> None:
        async for payload in client:
            if payload == b"token":
                client.validate()
            await client.send(payload)

    run = await start_in_memory(handler, limits=limits(1, 4))
    run.put(b"token")
    await run.settle()
    for port in range(1_000):
        run.put(b"flood", ("192.0.2.99", port + 1))
    for _ in range(6):
        run.put(b"mine")
    await run.settle()
    assert run.sent_to(ALICE) == [b"token", *[b"mine"] * 4]
    assert run.server.statistics().refused_by_rate == 1_000 - 3 + 2
    await trio.sleep(1)
    run.put(b"mine")
    await run.settle()
    assert run.sent_to(ALICE)[-1] == b"mine"
    check_adds_up(run.server)


async def test_a_client_stays_validated_when_its_handler_is_called_again(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """A client stays validated, and keeps its bucket, when its handler is called again."""
    seen = []

    async def handler(client: Client) -> None:
        seen.append(client.validated)
        client.validate()
        payload = await client.receive()
        while payload != b"return":
            payload = await client.receive()

    run = await start_in_memory(handler, limits=limits(1, 5))
    run.put(b"")
    await run.settle()
    for payload in (b"return", b"", b"return", b"", b"refused"):  # five of its own bucket, and not one more
        run.put(payload)
    await run.settle()
    assert seen == [False, True, True]
    for _ in range(3):
        run.put(b"refused")
    await run.settle()
    assert run.server.statistics().refused_by_rate == 3


async def test_accept_is_not_called_beyond_the_rate_limit(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """A stranger's datagram beyond the rate limit is refused before accept is asked, so that a flood costs little."""
    asked = []

    def accept(datagram: Datagram) -> bool:
        asked.append(datagram.payload)
        return False

    run = await start_in_memory(echo, limits=limits(1, 3), accept=accept)
    for i in range(10):
        run.put(b"%d" % i)
    await run.settle()
    assert asked == [b"0", b"1", b"2"]
    assert (run.server.statistics().refused_by_accept, run.server.statistics().refused_by_rate) == (3, 7)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.255", True),
        ("192.0.2.1", "192.0.3.1", False),
        ("2001:db8:0:1::1", "2001:db8:0:ff::1", True),
        ("2001:db8:0:1::1", "2001:db8:0:100::1", False),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.3.1", False),
    ],
)
def test_prefixes(one: str, other: str, same: bool) -> None:
    """By default an IPv4 /24, mapped into IPv6 or not, and an IPv6 /56 are one source each."""
    limiter = RateLimiter(RateLimit(1))
    assert (bucket_of(limiter, (one, 1)) is bucket_of(limiter, (other, 2))) == same


@example(ipaddress.ip_address("0.0.0.0"), ipaddress.ip_address("::ffff:0.0.0.0"), 1, 1)
@given(st.ip_addresses(), st.ip_addresses(), st.integers(1, 32), st.integers(1, 128))
def test_prefixes_are_the_first_bits(one: Any, other: Any, ipv4_bits: int, ipv6_bits: int) -> None:
    """Addresses share a prefix if and only if their first bits are equal; IPv4 and IPv6 never share one."""
    # As a socket gives them; Python's own text of mapped addresses differs from version to version.
    texts = [socket.inet_ntop({4: socket.AF_INET, 6: socket.AF_INET6}[it.version], it.packed) for it in (one, other)]
    prefixes = [network_of(host_bytes((text, 1)), ipv4_bits, ipv6_bits) for text in texts]
    one, other = (getattr(address, "ipv4_mapped", None) or address for address in (one, other))
    bits = ipv4_bits if one.version == 4 else ipv6_bits
    shift = one.max_prefixlen - bits
    assert (prefixes[0] == prefixes[1]) == (one.version == other.version and int(one) >> shift == int(other) >> shift)


@pytest.mark.no_cover  # heavy
def test_a_million_sources_do_not_make_the_table_grow() -> None:
    """Many sources make the table forget quiet ones; a source that is always busy stays limited."""
    limiter = RateLimiter(RateLimit(10, 5, buckets=1_000))
    admitted = 0
    for number in range(1_000_000):
        time = number / 100_000
        address = (f"{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}.1", 1)
        limiter.take(bucket_of(limiter, address), time)
        if number % 100 == 0:
            admitted += limiter.take(bucket_of(limiter, ("255.255.255.1", 1)), time)
        if number % 1_000 == 0:
            assert len(limiter._young) + len(limiter._old) <= 1_000
    assert 10 * 10 <= admitted <= 10 * 10 + 5


RATES = st.floats(0.1, 1_000)
BURSTS = st.integers(1, 20)
STARTS = st.floats(0, 2**31)  # of Trio's clock, which may count from anywhere


@given(RATES, BURSTS, STARTS, st.lists(st.floats(0, 10), max_size=200))
def test_no_source_gets_more_than_its_rate(rate: float, burst: int, start: float, waits: list[float]) -> None:
    """A source gets at most its burst plus ``per_second`` datagrams a second, in any stretch of time."""
    now = start
    limiter = RateLimiter(RateLimit(rate, burst))
    taken = []
    for wait in waits:  # as multiples of the time that one datagram takes at that rate
        now += wait / rate
        if limiter.take(bucket_of(limiter, ALICE), now):
            taken.append(now)
    for first, last in itertools.combinations(range(len(taken)), 2):
        assert last - first + 1 <= burst + (taken[last] - taken[first]) * rate + 0.01


@given(RATES, BURSTS, STARTS, st.lists(st.floats(1, 10), max_size=50))
def test_a_source_within_the_rate_is_never_refused(rate: float, burst: int, start: float, waits: list[float]) -> None:
    """A source that sends a burst and then keeps to its rate is never refused."""
    now = start
    limiter = RateLimiter(RateLimit(rate, burst))
    for wait in [*[0.0] * burst, *waits]:
        now += wait * 1.001 / rate
        assert limiter.take(bucket_of(limiter, ALICE), now)


async def test_repeated_validation_gives_no_extra_rate(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """Successive validated conversations from any ports of a host share one bucket."""

    async def handler(client: Client) -> None:
        await client.receive()
        client.validate()
        while await client.receive() != b"bye":
            pass

    run = await start_in_memory(handler, limits=limits(10, 50))
    for second in range(30):
        for _ in range(4):
            port = 1 + second % 5
            for payload in (b"hello", *[b"x"] * 20, b"bye"):
                run.put(payload, ("192.0.2.1", port))
                await run.settle()
        await trio.sleep(1)
    # Twice, because what comes before validation counts for the /24.
    assert run.server.statistics().delivered <= 2 * (50 + 10 * 30)
    check_adds_up(run.server)


async def test_a_busy_network_has_one_bucket_however_many_come_after(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """The table of buckets forgets sources, but not the bucket of a network that has clients."""
    run = await start_in_memory(echo, limits=limits(10, 10, buckets=100), idle_timeout=1_000)
    for second in range(60):
        if second % 10 == 0:
            run.put(b"x", ("192.0.2.1", 1 + second))  # another client of the same /24
        for source in range(60):
            run.put(b"x", (f"10.{second}.{source}.1", 1))
        for client in range(0, second, 10):
            for _ in range(20):
                run.put(b"x", ("192.0.2.1", 1 + client))
        await trio.sleep(1)
    answered = sum(destination[0] == "192.0.2.1" for destination, _ in run.sent)
    assert answered <= 10 + 10 * 60


# Amplification


async def test_sends_beyond_the_amplification_limit_are_withheld(start_in_memory: StartInMemory) -> None:
    """Sends beyond ``amplification`` are withheld and counted until the client is validated, and raise nothing."""

    async def handler(client: Client) -> None:
        async for payload in client:
            if payload == b"validate":
                client.validate()
            for size in (100, 150, 200, 50):
                await client.send(bytes(size))

    run = await start_in_memory(handler, limits=Limits(amplification=3.0))
    run.put(bytes(100))
    await run.settle()
    assert [len(payload) for payload in run.sent_to(ALICE)] == [100, 150, 50]
    (client,) = run.server.clients
    assert not client.validated
    assert (client.statistics().sends_withheld, run.server.statistics().sends_withheld) == (1, 1)
    run.put(b"validate")
    await run.settle()
    assert [len(payload) for payload in run.sent_to(ALICE)[3:]] == [100, 150, 200, 50]
    assert client.validated
    assert run.server.statistics().sent == 7


@pytest.mark.parametrize("validates", [True, False])
async def test_amplification_after_the_end_of_the_channel(start_in_memory: StartInMemory, validates: bool) -> None:
    """The goodbye to a client whose channel has ended is limited as before: not if the client is validated."""

    async def handler(client: Client) -> None:
        if validates:
            client.validate()
        async for _ in client:
            pass
        await client.send(bytes(100))

    run = await start_in_memory(handler, limits=Limits(amplification=3))
    run.put(b"x")
    await run.settle()
    run.server.stop()
    await run.settle()
    assert run.sent_to(ALICE) == [bytes(100)] * validates


@pytest.mark.parametrize("many", [1, 10])
async def test_withheld_sends_let_others_run(start_in_memory: StartInMemory, many: int) -> None:
    """A handler whose sends are all withheld lets other tasks run as often as one that sends."""

    async def handler(client: Client) -> None:
        await client.receive()
        while True:
            if many == 1:
                await client.send(b"flood")
            else:
                await client.send_many([b"flood"] * many)

    run = await start_in_memory(handler, limits=Limits(amplification=3))
    run.put(b"xx")
    for _ in range(20):
        await trio.lowlevel.checkpoint()
    withheld = run.server.statistics().sends_withheld
    assert 64 < withheld <= 20 * (64 + many)
    assert run.sent_to(ALICE) == [b"flood"]


async def test_sent_datagrams_of_a_cancelled_send_many_count(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """When send_many is cancelled halfway, the datagrams that have left count towards the amplification limit."""

    async def handler(client: Client) -> None:
        await client.receive()
        for _ in range(5):
            with trio.move_on_after(1.5):
                await client.send_many([bytes(10)] * 20)

    run = await start_in_memory(handler, on=in_memory(send_buffer=2_000, bandwidth=10), limits=Limits(amplification=3))
    run.put(bytes(30))
    await trio.sleep(1_000)
    assert len(run.sent_to(ALICE)) == 9


async def test_every_way_to_send_is_limited(start_in_memory: StartInMemory) -> None:
    """The amplification limit applies to send, send_nowait and send_many alike."""

    async def handler(client: Client) -> None:
        await client.receive()
        client.send_nowait(bytes(20))
        client.send_nowait(bytes(20))
        await client.send_many([bytes(5), bytes(6), bytes(5), b""])
        await client.send(bytes(1))

    run = await start_in_memory(handler, limits=Limits(amplification=3))
    run.put(bytes(10))
    await run.settle()
    assert [len(payload) for payload in run.sent_to(ALICE)] == [20, 5, 5, 0]
    assert run.server.statistics().sends_withheld == 3


async def test_unsent_bytes_do_not_count(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """Unsent bytes (full send buffer, cancelled send) do not count towards the amplification limit."""
    blocked = []

    async def handler(client: Client) -> None:
        await client.receive()
        client.send_nowait(bytes(10))
        for send in (client.send, lambda payload: client.send_many([payload] * 3)):
            with pytest.raises(trio.WouldBlock):
                client.send_nowait(bytes(10))
            with trio.move_on_after(0.1) as scope:
                await send(bytes(10))
            blocked.append(scope.cancelled_caught)
        await client.send_many([bytes(10)] * 9)

    run = await start_in_memory(handler, on=narrow(), limits=Limits(amplification=3))
    run.put(bytes(20))
    await trio.sleep(1_000)
    assert blocked == [True, True]
    assert [len(payload) for payload in run.sent_to(ALICE)] == [10] * 6


async def test_calling_a_handler_again_gives_no_more_to_send(start_in_memory: StartInMemory) -> None:
    """The amplification limit applies to all calls of a client's handler together."""

    async def handler(client: Client) -> None:
        await client.receive()
        for _ in range(10):
            await client.send(bytes(10))

    run = await start_in_memory(handler, limits=Limits(amplification=2))
    for _ in range(6):
        run.put(bytes(10))
    await run.settle()
    assert run.server.statistics().clients_started == 1
    assert len(run.sent_to(ALICE)) == 12


@given(st.lists(st.tuples(st.integers(0, 300), st.lists(st.integers(0, 500), max_size=4)), max_size=20), st.data())
def test_the_multiple_is_never_exceeded(turns: list[tuple[int, list[int]]], data: st.DataObject) -> None:
    """The server never sends an unvalidated client more than ``amplification`` times the bytes received from it."""
    amplification = data.draw(st.sampled_from([0.5, 1, 3]))
    replies = iter([sizes for _, sizes in turns])
    keep = iter(data.draw(st.lists(st.booleans(), min_size=20, max_size=20)))

    async def handler(client: Client) -> None:
        async for _ in client:
            for size in next(replies, []):
                await client.send(bytes(size))
            if not next(keep, True):
                return

    async def main() -> None:
        network = trio_udp.testing.SimulatedNetwork()
        endpoint = network.endpoint(*SERVER)
        async with trio.open_nursery() as nursery:
            server = await nursery.start(
                lambda task_status: trio_udp.serve_endpoints(
                    handler, [endpoint], limits=Limits(amplification=amplification), task_status=task_status
                )
            )
            for size, _ in turns:
                network.inject(bytes(size), ALICE, SERVER)
                if data.draw(st.booleans()):
                    await trio.testing.wait_all_tasks_blocked()
                s = server.statistics()
                assert s.bytes_sent <= amplification * s.bytes_received
            await trio.testing.wait_all_tasks_blocked()
            s = server.statistics()
            assert s.bytes_sent <= amplification * s.bytes_received
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_without_limits_nothing_is_withheld(start_in_memory: StartInMemory) -> None:
    """Rate and amplification limits are off by default; validate() then only sets a flag."""

    async def handler(client: Client) -> None:
        await client.receive()
        await client.send(bytes(60_000))
        client.validate()
        await client.send(bytes(60_000))

    run = await start_in_memory(handler)
    run.put(b"")
    await run.settle()
    assert len(run.sent) == 2
    assert (run.server.statistics().sends_withheld, run.server.statistics().refused_by_rate) == (0, 0)


# Arguments


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"per_second": 0}, ValueError),
        ({"per_second": float("inf")}, ValueError),
        ({"per_second": float("nan")}, ValueError),
        ({"per_second": "1"}, TypeError),
        ({"per_second": 10**400}, ValueError),
        ({"burst": 10**400}, ValueError),
        ({"burst": 0}, ValueError),
        ({"burst": 1.5}, TypeError),
        ({"ipv4_prefix": 33}, ValueError),
        ({"ipv6_prefix": 0}, ValueError),
        ({"buckets": 0}, ValueError),
    ],
)
def test_invalid_rate_limits(options: dict[str, Any], error: type[Exception]) -> None:
    """A RateLimit that makes no sense raises when it is made, naming the value."""
    name = next(iter(options))
    with pytest.raises(error, match=name):
        RateLimit(**{"per_second": 1, **options})


@pytest.mark.parametrize(
    ("options", "error"),
    [({"rate_limit": 5}, TypeError), ({"amplification": 0}, ValueError), ({"amplification": "3"}, TypeError)],
)
def test_invalid_limits(options: dict[str, Any], error: type[Exception]) -> None:
    """A wrong rate_limit or amplification raises when the Limits are made, naming the value."""
    with pytest.raises(error, match=next(iter(options))):
        Limits(**options)


def test_worst_case_memory() -> None:
    """worst_case_memory counts evicted handlers, buckets and requests."""
    small = Limits(max_clients=100, inbox_datagrams=10, total_bytes=1_000_000)
    clients = 100 + 64
    assert small.worst_case_memory() == clients * (5_500 + 10 * 64) + 1_000_000
    with_buckets = attrs.evolve(small, rate_limit=RateLimit(1, buckets=50))
    assert with_buckets.worst_case_memory() - small.worst_case_memory() == 50 * 250
    assert small.worst_case_memory(concurrency=1) == small.worst_case_memory()
    assert small.worst_case_memory(concurrency=8) - small.worst_case_memory() == clients * 8 * 3_500
