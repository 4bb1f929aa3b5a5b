"""``request``: repeating a request until it is answered, on the simulated network and over real sockets."""

from __future__ import annotations

import itertools
import math
import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given, settings, strategies as st
from trio.testing import MockClock

import trio_udp
from trio_udp import backoff, request
from trio_udp.testing import SimulatedNetwork, deterministic_scheduling

from ..conftest import ALICE, SERVER, StartInMemory, free_port, steps_in


@trio_udp.request_handler
async def square(payload: bytes, client: trio_udp.Client) -> bytes:
    """Answer ``b"<id> <number>"`` with ``b"<id> <number> squared is <square>"``."""
    number = int(payload.split()[1])
    return b"%b squared is %d" % (payload, number * number)


def answers(question: bytes) -> Callable[[bytes], bool]:
    return lambda payload: payload.split()[:1] == question.split()[:1]


async def ask(channel: trio.abc.Channel[bytes], question: bytes, **options: Any) -> bytes:
    return await request(channel, question, answers(question), **options)


# The waits of protocols: seconds after each transmission.


def coap() -> Iterable[float]:
    """RFC 7252, 4.2: ACK_TIMEOUT 2 s, ACK_RANDOM_FACTOR 1.5, MAX_RETRANSMIT 4: 93 s at most."""
    return backoff(random.uniform(2, 3), attempts=5, jitter=0)


def radius() -> Iterator[float]:
    """RFC 5080, 2.2.1: IRT 2 s, MRT 16 s, MRC 5, MRD 30 s, RAND 10 %."""
    wait, left = 2 * random.uniform(0.9, 1.1), 30.0
    for _ in range(5):
        yield min(wait, left)
        left -= wait
        if left <= 0:
            return
        wait *= 2 + random.uniform(-0.1, 0.1)
        if wait > 16:
            wait = 16 * random.uniform(0.9, 1.1)


SCHEDULES: dict[str, Callable[[], Iterable[float]]] = {
    "dns": lambda: (5, 5),  # resolv.conf(5): timeout 5 s, 2 attempts
    "coap": coap,
    "snmp": lambda: [1] * 6,  # Net-SNMP, snmpcmd(1): 5 retries, 1 s each
    "radius": radius,
    "stun": lambda: (0.5, 1, 2, 4, 8, 16, 8),  # RFC 8489, 6.2.1: RTO 500 ms, Rc 7, Rm 16
    "backoff": backoff,
}


@attrs.define
class Outcome:
    right: int = 0
    wrong: int = 0
    unanswered: int = 0
    unmatched: int = 0


def bad_network() -> SimulatedNetwork:
    """30 % loss in each direction, duplicates, reordering, and delays longer than the first wait of some schedules."""
    return SimulatedNetwork(seed=1, loss=0.3, duplicate=0.2, reorder=0.2, latency=(0.01, 0.6))


def ask_many(
    network: SimulatedNetwork,
    waits: Callable[[], Iterable[float]],
    requests: int,
    matching: Callable[[bytes], Callable[[bytes], bool]] = answers,
) -> Outcome:
    """Make requests one after the other."""
    outcome = Outcome()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            endpoint = network.endpoint(*SERVER)
            await nursery.start(partial(trio_udp.serve_endpoints, square, [endpoint], idle_timeout=300))
            async with await network.connect(*SERVER) as connection:
                for number in range(requests):
                    question = b"%08x %d" % (random.getrandbits(32), number)
                    try:
                        answer = await request(connection, question, matching(question), waits=waits())
                    except trio_udp.NoAnswerError:
                        outcome.unanswered += 1
                    else:
                        right = answer == b"%b squared is %d" % (question, number * number)
                        outcome.right += right
                        outcome.wrong += not right
                outcome.unmatched = connection.statistics().delivered - outcome.right - outcome.wrong
            nursery.cancel_scope.cancel()

    random.seed(1)
    with deterministic_scheduling(1):
        trio.run(main, clock=MockClock(autojump_threshold=0))
    return outcome


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_of_protocols(schedule: str) -> None:
    """With 30 % loss, no request gets another one's answer, and the share of answered requests is as expected."""
    requests = 1_000
    outcome = ask_many(bad_network(), SCHEDULES[schedule], requests)
    assert outcome.wrong == 0
    assert outcome.right + outcome.unanswered == requests
    assert outcome.unmatched > 100
    attempts = len(list(SCHEDULES[schedule]()))
    assert outcome.unanswered <= requests * 0.51**attempts  # 0.51: lost in one of both directions. Duplicates only help


def test_any_answer_is_mostly_the_wrong_one() -> None:
    """On the same network, most requests get a wrong answer if the first payload to arrive counts as the answer."""
    outcome = ask_many(bad_network(), SCHEDULES["snmp"], 1_000, lambda question: lambda payload: True)
    assert outcome.wrong > 500


probabilities = st.floats(0, 0.6)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1_000),
    loss=probabilities,
    duplicate=probabilities,
    reorder=probabilities,
    slowest=st.floats(0.01, 20),
    waits=st.lists(st.floats(0.01, 5), min_size=1, max_size=5),
)
def test_no_wrong_answer_on_any_network(
    seed: int, loss: float, duplicate: float, reorder: float, slowest: float, waits: list[float]
) -> None:
    """Under any network conditions, and however long answers take, a request gets its own answer or none."""
    network = SimulatedNetwork(seed=seed, loss=loss, duplicate=duplicate, reorder=reorder, latency=(0.01, slowest))
    outcome = ask_many(network, lambda: waits, 20)
    assert (outcome.wrong, outcome.right + outcome.unanswered) == (0, 20)


# One request.


async def test_late_and_doubled_answers_are_dropped_and_counted(
    simulated_network: SimulatedNetwork, udp_server: Any, autojump_clock: MockClock
) -> None:
    """Answers to an earlier request do not count as this one's; all delivered payloads are the answer or unmatched."""
    simulated_network.latency = (0.4, 0.4)
    connection = await udp_server(square)
    with pytest.raises(trio_udp.NoAnswerError):
        await ask(connection, b"a 3", waits=(0.1, 0.1))  # both answers come after 0.8 s
    await trio.sleep(5)
    simulated_network.duplicate = 1
    assert await ask(connection, b"b 4", waits=[1]) == b"b 4 squared is 16"
    await trio.sleep(5)
    assert await ask(connection, b"c 5", waits=[1]) == b"c 5 squared is 25"
    await trio.sleep(5)
    # Two answers to a, one to b (duplicated in both directions, it has four). The others of c are not received yet.
    statistics = connection.statistics()
    assert statistics.delivered == 2 + 2 + (4 - 1)
    assert [await connection.receive() for _ in range(3)] == [b"c 5 squared is 25"] * 3


async def test_no_answer(
    simulated_network: SimulatedNetwork, udp_server: Any, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """After the last wait, ``NoAnswerError`` has the number of attempts, and of payloads that were not the answer."""

    async def chatter(client: trio_udp.Client) -> None:
        async for _ in client:
            await client.send_many([b"x", b"y"])

    connection = await udp_server(chatter)
    with pytest.raises(trio.TooSlowError) as caught:
        await ask(connection, b"a", waits=backoff(jitter=0))
    assert trio.current_time() == 15
    error = caught.value
    assert isinstance(error, trio_udp.NoAnswerError)
    assert (error.attempts, error.unmatched, error.refused) == (4, 8, 0)
    assert str(error) == "no answer; asked 4 times, 0 refused; 8 payloads did not match"
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)


async def test_a_server_that_starts_late(
    simulated_network: SimulatedNetwork, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """A refusal does not end a request: a server that starts meanwhile answers the next attempt."""
    simulated_network.latency = (0.05, 0.05)
    connection = await simulated_network.connect(*SERVER)

    async def begin_later() -> None:
        await trio.sleep(2.5)
        await nursery.start(trio_udp.serve_endpoints, square, [simulated_network.endpoint(*SERVER)])

    nursery.start_soon(begin_later)
    assert await ask(connection, b"a 3", waits=itertools.repeat(1)) == b"a 3 squared is 9"
    assert trio.current_time() == pytest.approx(3.1)
    assert connection.statistics().errors == {"ECONNREFUSED": 3}
    nursery.cancel_scope.cancel()


async def test_refused_to_the_end(simulated_network: SimulatedNetwork, autojump_clock: MockClock) -> None:
    """If the port stays closed, ``request`` waits for every wait, and the error has the number of refusals."""
    connection = await simulated_network.connect(*SERVER)
    with pytest.raises(trio_udp.NoAnswerError, match="asked 6 times, 6 refused; 0 payloads"):
        await ask(connection, b"a 3", waits=[1] * 6)
    assert trio.current_time() == 6


async def test_refusal_of_an_earlier_datagram(engine: str, nursery: trio.Nursery) -> None:
    """If a pending refusal keeps the request from being sent, it is sent again at once, not after a wait."""
    with trio.fail_after(10):
        port = free_port()
        async with await trio_udp.connect("127.0.0.1", port) as connection:
            await connection.send(b"refused")
            await nursery.start(partial(trio_udp.serve, square, port, host="127.0.0.1"))
            assert await ask(connection, b"a 3", waits=[5]) == b"a 3 squared is 9"
    nursery.cancel_scope.cancel()


async def test_server_that_starts_late_over_real_sockets(engine: str, nursery: trio.Nursery) -> None:
    """Over real sockets too, a request to a closed port goes on until a server listens there."""
    with trio.fail_after(10):
        port = free_port()

        def waits() -> Iterator[float]:
            yield from (0.01, 0.01)
            nursery.start_soon(partial(trio_udp.serve, square, port, host="127.0.0.1"))
            yield from itertools.repeat(0.05)

        async with await trio_udp.connect("127.0.0.1", port) as connection:
            assert await ask(connection, b"a 3", waits=waits()) == b"a 3 squared is 9"
            assert connection.statistics().errors["ECONNREFUSED"] >= 2
    nursery.cancel_scope.cancel()


class Channel(trio.abc.Channel[bytes]):
    """A foreign channel: it stores sent payloads, and receives the results of a function."""

    def __init__(self, receive: Callable[[], bytes]) -> None:
        self.sent: list[bytes] = []
        self._receive = receive

    async def send(self, value: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.sent.append(value)

    async def receive(self) -> bytes:
        return self._receive()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_channel_that_always_refuses(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """With a channel that always refuses at once, ``request`` does not spin, and no wait gets shorter."""

    def refuse() -> bytes:
        raise ConnectionRefusedError

    channel = Channel(refuse)

    async def fail() -> None:
        with pytest.raises(trio_udp.NoAnswerError):
            await ask(channel, b"a", waits=(1, 2))
        assert trio.current_time() == 3

    nursery.start_soon(fail)
    assert await steps_in(5) < 1_000
    assert channel.sent == [b"a"] * 2


async def test_any_channel(nursery: trio.Nursery) -> None:
    """``request`` works over a channel of another library."""
    channel = Channel(iter([b"b", b"a 1"]).__next__)
    assert await ask(channel, b"a") == b"a 1"
    assert channel.sent == [b"a"]


async def test_handler_asks_its_client(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A handler can send requests to its client, and the end of the client ends the request."""
    ended: list[object] = []

    async def handler(client: trio_udp.Client) -> None:
        await client.receive()
        try:
            ended.append(await ask(client, b"a", waits=backoff(2, jitter=0)))
            await ask(client, b"b", waits=itertools.repeat(2))
        finally:
            ended.append(client.ended)

    on = await start_in_memory(handler, idle_timeout=10)
    on.put(b"hello")
    await trio.sleep(3)
    on.put(b"a 1")
    await trio.sleep(20)
    assert ended == [b"a 1", "idle"]
    assert on.sent_to(ALICE) == [b"a", b"a", *[b"b"] * 6]
    assert on.server.statistics().handler_errors == 0


async def test_server_asks_a_peer(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A server can send a request from its own socket."""
    on = await start_in_memory(square)
    peer = on.network.endpoint("192.0.2.9", 9)
    async with on.server.connect(("192.0.2.9", 9)) as client, trio.open_nursery() as nursery:

        async def answer() -> None:
            await (await peer.receive()).reply(b"a 5")

        nursery.start_soon(answer)
        assert await ask(client, b"a") == b"a 5"


async def test_typed_requests(udp_server: Any, autojump_clock: MockClock) -> None:
    """Over a typed channel, requests and answers are objects, and answers that do not decode are skipped."""

    async def answer(client: trio_udp.Client) -> None:
        async for payload in client:
            await client.send_many([b"\xff", payload + b" 0"])

    numbers = trio_udp.TypedChannel[list[int], list[int], trio_udp.Connection](
        await udp_server(answer),
        decode=lambda payload: list(map(int, payload.split())),
        encode=lambda numbers: b" ".join(b"%d" % number for number in numbers),
    )
    assert await request(numbers, [7, 1], lambda reply: reply[0] == 7) == [7, 1, 0]
    assert numbers.decode_errors == 1


async def test_one_request_at_a_time(
    simulated_network: SimulatedNetwork, udp_server: Any, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """A second request over a channel, or one beside another receiver, raises ``BusyResourceError``."""
    connection, other = await udp_server(square), await udp_server(square)
    with simulated_network.partition([connection.local_address]):
        with trio.move_on_after(1):
            async with trio.open_nursery() as asking:
                asking.start_soon(partial(ask, connection, b"a 1"))
                await trio.testing.wait_all_tasks_blocked()
                assert await ask(other, b"b 2") == b"b 2 squared is 4"  # another channel is free
                with pytest.raises(trio.BusyResourceError):
                    await ask(connection, b"c 3")
    assert connection.statistics().sent == 1
    async with trio.open_nursery() as receiving:
        receiving.start_soon(connection.receive)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await ask(connection, b"d 4")  # sent: only the channel knows who receives
    assert await ask(connection, b"e 5") == b"e 5 squared is 25"


async def test_cancellation_loses_nothing(
    simulated_network: SimulatedNetwork, udp_server: Any, autojump_clock: MockClock
) -> None:
    """The answer to a cancelled request is still received, and so is one that arrives at the moment of cancellation."""
    simulated_network.latency = (0.5, 0.5)
    connection = await udp_server(square)
    for number, moment in enumerate((0, 0.7, 1)):
        with trio.move_on_after(moment):
            await ask(connection, b"%d 2" % number)
            assert moment == 1
            continue
        if moment:
            assert await connection.receive() == b"%d 2 squared is 4" % number
    assert connection.statistics().delivered == 2


async def test_answer_beats_the_end_of_the_wait() -> None:
    """An answer that has already arrived is returned, even if the caller is cancelled meanwhile."""
    with trio.CancelScope() as scope:

        def receive() -> bytes:
            scope.cancel()
            return b"a"

        assert await ask(Channel(receive), b"a") == b"a"


async def test_errors_of_the_channel(udp_server: Any, autojump_clock: MockClock) -> None:
    """``request`` raises what the channel raises, and the channel is free afterwards."""
    connection = await udp_server(square)
    with pytest.raises(OSError, match="too long"):
        await ask(connection, bytes(65_508))
    with pytest.raises(ZeroDivisionError):
        await request(connection, b"a 1", lambda payload: 1 / 0)
    assert await ask(connection, b"b 2") == b"b 2 squared is 4"
    await connection.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await ask(connection, b"c 3")


async def wait_for_nothing(payload: bytes) -> bool:
    return True


class Waits:
    async def __call__(self, payload: bytes) -> bool:
        return True


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"channel": b"a"}, TypeError, "channel must be a trio.abc.Channel, not b'a'"),
        ({"matches": b"a"}, TypeError, "matches must be a plain function of a payload, not b'a'"),
        ({"matches": wait_for_nothing}, TypeError, "matches must be a plain function of a payload, not <function"),
        ({"matches": Waits()}, TypeError, "matches must be a plain function of a payload, not <"),
        ({"payload": "a"}, TypeError, "a payload is bytes"),
        ({"waits": 1}, TypeError, r"waits must be numbers of seconds, such as \(1, 2\) or backoff\(\), not 1"),
        ({"waits": ()}, ValueError, r"waits must have at least one number of seconds, and \(\) has none"),
        ({"waits": (0,)}, ValueError, "each of waits must be greater than 0, not 0"),
        ({"waits": (math.nan,)}, ValueError, "each of waits must be greater than 0, not nan"),
        ({"waits": ("1",)}, TypeError, "each of waits must be a number of seconds, not '1'"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
async def test_bad_arguments(udp_server: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    """``request`` raises for a wrong argument at the call, with one line that names it, and sends nothing."""
    connection = await udp_server(square)
    arguments = {"channel": connection, "payload": b"a 1", "matches": bool, "waits": (1,), **change}
    with pytest.raises(error, match=message) as caught:
        await request(**arguments)
    assert "\n" not in str(caught.value)
    assert connection.statistics().sent == 0


# backoff


def test_backoff_doubles() -> None:
    """Without jitter, waits are exact; they grow up to the longest, and can be iterated again."""
    waits = backoff(jitter=0)
    assert list(waits) == list(waits) == [1, 2, 4, 8]
    assert list(backoff(3, attempts=5, factor=3, jitter=0, most=50)) == [3, 9, 27, 50, 50]
    assert list(backoff(0.5, attempts=2, factor=1, jitter=0)) == [0.5, 0.5]
    assert list(backoff(60, attempts=2_000, factor=1e9, jitter=0)) == [60] * 2_000


def test_backoff_jitter() -> None:
    """Each wait is longer or shorter by up to the jitter, differently each time."""
    waits = list(backoff(10, attempts=1_000, factor=1, jitter=0.2))
    assert 8 <= min(waits) < 8.1
    assert 11.9 < max(waits) <= 12
    assert len(set(waits)) == 1_000


def test_backoff_is_repeatable() -> None:
    """A seed for Trio's task order also decides the jitter, but not the program's own random numbers."""
    before = random.getstate()
    runs = []
    for seed in (1, 1, 2):
        with deterministic_scheduling(seed):
            runs.append(list(backoff()))
    assert runs[0] == runs[1] != runs[2] != list(backoff())
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first": 0}, "first must be greater than 0, not 0"),
        ({"first": math.nan}, "first must be greater than 0, not nan"),
        ({"first": 61}, "most must be at least first, 61.0, not 60.0"),
        ({"attempts": 0}, "attempts must be at least 1, not 0"),
        ({"attempts": 1.5}, "attempts must be an int, not 1.5"),
        ({"factor": 0.5}, "factor must be at least 1, not 0.5"),
        ({"factor": math.inf}, "factor must be at least 1, not inf"),
        ({"jitter": 1}, "jitter must be at least 0 and less than 1, not 1"),
        ({"factor": "2"}, "factor must be a number, not '2'"),
        ({"jitter": None}, "jitter must be a number, not None"),
        ({"most": "60"}, "most must be a number of seconds, not '60'"),
    ],
)
def test_backoff_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    """``backoff`` raises for a wrong argument at the call, with one line that names it."""
    with pytest.raises((TypeError, ValueError), match=message):
        backoff(**arguments)
