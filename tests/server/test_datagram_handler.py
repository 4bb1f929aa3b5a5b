"""datagram_handler: a plain function that answers one datagram at a time."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

import trio_udp
from trio_udp import Datagram, Endpoint, Limits, RateLimit, Server, open_endpoints, serve_endpoints
from trio_udp._endpoints.engines.pktinfo import UDP_GRO
from trio_udp.testing import SimulatedNetwork

from ..conftest import ALICE, BOB, CAROL, SERVER, InMemory, StartInMemory, check_adds_up, in_memory, narrow


@trio_udp.datagram_handler
def repeat(datagram: Datagram) -> bytes:
    """Send every datagram back."""
    return datagram.payload


async def test_the_result_of_the_function_is_the_reply(start_in_memory: StartInMemory) -> None:
    """A datagram_handler's bytes go back to the datagram's source, even b""; None is no reply."""

    @trio_udp.datagram_handler
    def reply(datagram: Datagram) -> bytes | None:
        return None if datagram.payload == b"quiet" else datagram.payload * 2

    run = await start_in_memory(reply)
    for payload, source in ((b"a", ALICE), (b"quiet", BOB), (b"", BOB), (b"b", ALICE)):
        run.put(payload, source)
    await run.settle()
    assert run.sent == [(ALICE, b"aa"), (BOB, b""), (ALICE, b"bb")]
    s = run.server.statistics()
    assert (s.received, s.delivered, s.sent, s.clients_started, len(run.server.clients)) == (4, 4, 3, 0, 0)
    check_adds_up(run.server)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_any_bytes_like_object_is_a_reply(start_in_memory: StartInMemory, kind: Callable[[bytes], Any]) -> None:
    """A datagram_handler may return bytes, a bytearray or a memoryview, copied before its next call."""
    buffer = bytearray()

    @trio_udp.datagram_handler
    def reply(datagram: Datagram) -> Any:
        if kind is not bytearray:
            return kind(datagram.payload)
        buffer[:] = datagram.payload
        return buffer

    run = await start_in_memory(reply)
    for payload in (b"a", b"", b"bc"):
        run.put(payload)
    await run.settle()
    assert run.sent_to(ALICE) == [b"a", b"", b"bc"]


async def test_datagrams_come_in_arrival_order_over_all_senders(start_in_memory: StartInMemory) -> None:
    """A datagram_handler gets the datagrams of all senders in arrival order, over many batches."""
    seen: list[int] = []

    @trio_udp.datagram_handler
    def collect(datagram: Datagram) -> None:
        seen.append(int(datagram.payload))

    run = await start_in_memory(collect)
    for number in range(1_000):
        run.put(b"%d" % number, ("192.0.2.7", 1 + number * 7 % 50))
    await run.settle()
    assert seen == list(range(1_000))
    check_adds_up(run.server)


async def test_other_tasks_run_between_batches(start_in_memory: StartInMemory) -> None:
    """Other tasks run once in 64 datagrams of a datagram_handler, even if many more wait."""
    seen = most = before = 0

    @trio_udp.datagram_handler
    def collect(datagram: Datagram) -> None:
        nonlocal seen
        seen += 1

    run = await start_in_memory(collect)
    for _ in range(1_000):
        run.put(b"x")
    while seen < 1_000:
        most, before = max(most, seen - before), seen
        await trio.lowlevel.checkpoint()
    assert 0 < most <= 128  # 64 in each pass of the scheduler, whose tasks run in random order


async def test_a_datagram_has_payload_addresses_endpoint_and_server(start_in_memory: StartInMemory) -> None:
    """A datagram_handler is called with a Datagram that has payload, addresses, endpoint and server."""
    seen: list[Datagram] = []
    run = await start_in_memory(trio_udp.datagram_handler(seen.append))
    run.put(b"hello")
    await run.settle()
    (datagram,) = seen
    assert datagram.payload == b"hello"
    assert datagram.peer_address == ALICE
    assert datagram.local_address == datagram.destination == SERVER
    assert datagram.interface is None
    assert datagram.endpoint is run.endpoint
    assert datagram.server is run.server
    assert datagram.ancillary == ()
    assert repr(datagram) == f"<trio_udp.Datagram of 5 bytes from {ALICE} to {SERVER}>"


async def test_a_datagram_can_be_answered_after_the_function_has_returned(
    start_in_memory: StartInMemory, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """A kept Datagram can be answered later, with reply or reply_nowait, until its endpoint is closed."""
    kept: list[Datagram] = []
    run = await start_in_memory(trio_udp.datagram_handler(kept.append))
    run.put(b"x")
    await trio.sleep(5)
    (datagram,) = kept
    await datagram.reply(b"later")
    datagram.reply_nowait(bytearray(b"and again"))
    assert run.sent == [(ALICE, b"later"), (ALICE, b"and again")]
    run.server.stop()
    await run.settle()
    with pytest.raises(trio.ClosedResourceError):
        await datagram.reply(b"too late")
    with pytest.raises(trio.ClosedResourceError):
        datagram.reply_nowait(b"too late")
    assert run.server.statistics().sent == 2


async def test_the_function_may_reply_several_times(start_in_memory: StartInMemory) -> None:
    """A datagram_handler may call reply_nowait in addition to the reply that it returns."""

    @trio_udp.datagram_handler
    def reply(datagram: Datagram) -> bytes:
        datagram.reply_nowait(b"1")
        datagram.reply_nowait(b"2")
        return b"3"

    run = await start_in_memory(reply)
    run.put(b"x")
    await run.settle()
    assert sorted(run.sent_to(ALICE)) == [b"1", b"2", b"3"]


@pytest.mark.parametrize("kind", [list, tuple])
async def test_the_function_may_return_several_replies(start_in_memory: StartInMemory, kind: type) -> None:
    """Each payload of a list or a tuple is a datagram of its own, in order; an empty list is no reply."""

    @trio_udp.datagram_handler
    def count_down(datagram: Datagram) -> Any:
        return kind(b"%d" % number for number in range(int(datagram.payload), 0, -1))

    run = await start_in_memory(count_down)
    for payload, source in ((b"20", BOB), (b"3", ALICE), (b"0", ALICE), (b"2", BOB), (b"20", ALICE), (b"1", ALICE)):
        run.put(payload, source)
    await run.settle()
    twenty = [b"%d" % number for number in range(20, 0, -1)]
    assert run.sent_to(ALICE) == [b"3", b"2", b"1", *twenty, b"1"]
    assert run.sent_to(BOB) == [*twenty, b"2", b"1"]
    check_adds_up(run.server)


async def test_a_wrong_payload_among_several(start_in_memory: StartInMemory) -> None:
    """If one of several replies is not bytes-like, none is sent, and on_error gets the error."""
    errors: list[Exception] = []
    run = await start_in_memory(
        trio_udp.datagram_handler(lambda datagram: [b"fine", "text"]),  # type: ignore[list-item]
        on_error=lambda datagram, error: errors.append(error),
    )
    run.put(b"x")
    await run.settle()
    assert run.sent == []
    assert [str(error) for error in errors] == ["a payload is bytes, not str: use .encode()"]


@pytest.mark.parametrize("size", [3, 20])
async def test_several_replies_meet_a_full_buffer(
    start_in_memory: StartInMemory, autojump_clock: MockClock, size: int
) -> None:
    """Replies that find no room in the send buffer are dropped, and each counts under EAGAIN."""
    run = await start_in_memory(
        trio_udp.datagram_handler(lambda datagram: [bytes(1_000)] * size),
        on=in_memory(send_buffer=2_000, bandwidth=1_000),
    )
    run.put(b"x")
    await trio.sleep(100)
    statistics = run.server.statistics()
    assert (statistics.sent, statistics.errors) == (2, {"EAGAIN": size - 2})


async def test_amplification_holds_for_several_replies_together(start_in_memory: StartInMemory) -> None:
    """Several replies whose bytes together are too many are all withheld, and each is counted."""
    run = await start_in_memory(
        trio_udp.datagram_handler(lambda datagram: [bytes(15)] * len(datagram.payload)), limits=Limits(amplification=20)
    )
    run.put(b"x")
    await run.settle()
    assert len(run.sent) == 1
    run = await start_in_memory(
        trio_udp.datagram_handler(lambda datagram: [bytes(11)] * 2), on=in_memory(), limits=Limits(amplification=20)
    )
    run.put(b"x")
    await run.settle()
    assert run.sent == []
    assert run.server.statistics().sends_withheld == 2


async def test_the_rate_limit_applies(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """Datagrams beyond the rate limit do not reach a datagram_handler, and count as refused_by_rate."""
    run = await start_in_memory(repeat, limits=Limits(rate_limit=RateLimit(2, 5)))
    answered = []
    for seconds in (0, 1, 10):
        await trio.sleep(seconds)
        before = len(run.sent)
        for _ in range(8):
            run.put(b"x")
        run.put(b"y", ("192.0.3.1", 7))
        await run.settle()
        answered.append(len(run.sent) - before - 1)
    assert answered == [5, 2, 5]
    s = run.server.statistics()
    assert (s.delivered, s.refused_by_rate) == (15, 12)
    check_adds_up(run.server)


async def test_amplification_holds_for_each_reply_alone(start_in_memory: StartInMemory) -> None:
    """A reply longer than ``amplification`` times its datagram is withheld and counted; a shorter one is sent."""
    sizes = iter([30, 31, 30, 0, 1])

    @trio_udp.datagram_handler
    def reply(datagram: Datagram) -> bytes:
        return bytes(next(sizes))

    run = await start_in_memory(reply, limits=Limits(amplification=3))
    for size in (10, 10, 10, 0, 0):
        run.put(bytes(size))
    await run.settle()
    assert [len(payload) for payload in run.sent_to(ALICE)] == [30, 30, 0]
    s = run.server.statistics()
    assert (s.sends_withheld, s.delivered, s.send_errors) == (2, 5, 0)


async def test_all_replies_by_method_together_come_under_amplification(start_in_memory: StartInMemory) -> None:
    """All replies to one datagram together have at most ``amplification`` times its bytes."""
    kept: list[Datagram] = []
    run = await start_in_memory(trio_udp.datagram_handler(kept.append), limits=Limits(amplification=2.5))
    run.put(bytes(4))
    run.put(bytes(4))
    await run.settle()
    one, other = kept
    one.reply_nowait(bytes(6))
    await one.reply(bytes(5))  # 11 are more than 10
    await one.reply(bytes(4))
    one.reply_nowait(bytes(1))
    await other.reply(bytes(10))
    assert [len(payload) for payload in run.sent_to(ALICE)] == [6, 4, 10]
    assert run.server.statistics().sends_withheld == 2


async def test_a_reply_that_could_not_be_sent_does_not_count(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """A reply that meets a full send buffer or is cancelled does not count towards the amplification limit."""
    kept: list[Datagram] = []
    run = await start_in_memory(trio_udp.datagram_handler(kept.append), on=narrow(), limits=Limits(amplification=1))
    run.put(bytes(20))
    await run.settle()
    (datagram,) = kept
    datagram.reply_nowait(bytes(10))
    with pytest.raises(trio.WouldBlock):
        datagram.reply_nowait(bytes(10))
    with trio.move_on_after(1) as scope:
        await datagram.reply(bytes(10))
    assert scope.cancelled_caught
    await datagram.reply(bytes(10))
    assert trio.current_time() == 10
    await datagram.reply(bytes(1))
    assert [len(payload) for payload in run.sent_to(ALICE)] == [10, 10]
    assert run.server.statistics().sends_withheld == 1


async def test_replying_without_end_lets_others_run(start_in_memory: StartInMemory) -> None:
    """A task that only replies lets other tasks run once in 64 replies, whether they are sent or withheld."""
    kept: list[Datagram] = []
    run = await start_in_memory(trio_udp.datagram_handler(kept.append), limits=Limits(amplification=100))
    run.put(b"xx")
    await run.settle()
    calls = 0

    async def reply() -> None:
        nonlocal calls
        while True:
            calls += 1
            await kept[0].reply(b"x")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reply)
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert 64 < calls <= 20 * 64 + 1
    assert len(run.sent_to(ALICE)) == 200


async def test_errors_go_to_on_error(start_in_memory: StartInMemory) -> None:
    """An exception of a datagram_handler is counted and goes to on_error; the next datagram follows."""
    errors: list[tuple[Any, str]] = []

    @trio_udp.datagram_handler
    def double(datagram: Datagram) -> bytes:
        return b"%d" % (2 * int(datagram.payload))

    run = await start_in_memory(
        double, on_error=lambda datagram, error: errors.append((datagram.peer_address, str(error)))
    )
    for payload, source in ((b"1", ALICE), (b"one", BOB), (b"2", ALICE)):
        run.put(payload, source)
    await run.settle()
    assert run.sent == [(ALICE, b"2"), (ALICE, b"4")]
    assert errors == [(BOB, "invalid literal for int() with base 10: b'one'")]
    s = run.server.statistics()
    assert (s.delivered, s.handler_errors) == (3, 1)
    check_adds_up(run.server)


async def test_errors_are_logged_by_default(start_in_memory: StartInMemory, caplog: pytest.LogCaptureFixture) -> None:
    """By default an exception of a datagram_handler is logged with its traceback and the peer address."""

    @trio_udp.datagram_handler
    def fail(datagram: Datagram) -> bytes:
        raise ZeroDivisionError("oh")

    run = await start_in_memory(fail)
    run.put(b"x")
    await run.settle()
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.getMessage() == f"Handler of a datagram from {ALICE} failed"
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ZeroDivisionError)


async def test_raise_error_ends_the_server() -> None:
    """serve raises an exception of a datagram_handler with on_error=raise_error."""
    on = in_memory()
    on.put(b"x")

    @trio_udp.datagram_handler
    def fail(datagram: Datagram) -> bytes:
        raise ZeroDivisionError("oh")

    with pytest.RaisesGroup(ZeroDivisionError):
        await serve_endpoints(fail, [on.endpoint], on_error=trio_udp.raise_error)
    assert on.endpoint.closed


@pytest.mark.parametrize("wrong", ["text", 5, [1, 2], ALICE, True])
async def test_a_reply_that_is_not_bytes_like_is_an_error(start_in_memory: StartInMemory, wrong: Any) -> None:
    """A reply that is not bytes-like is a TypeError for on_error, and the next datagram follows."""
    errors: list[type] = []
    replies = iter([wrong, b"next"])
    run = await start_in_memory(
        trio_udp.datagram_handler(lambda datagram: next(replies)), on_error=lambda _, error: errors.append(type(error))
    )
    run.put(b"x")
    run.put(b"x")
    await run.settle()
    assert errors == [TypeError]
    assert run.sent == [(ALICE, b"next")]


@pytest.mark.parametrize("kind", [bytes, bytearray])
async def test_a_reply_that_is_too_long_is_an_error(
    start_in_memory: StartInMemory, kind: Callable[[int], bytes]
) -> None:
    """A reply that no datagram can carry is an OSError(EMSGSIZE) for on_error, whatever its type."""
    errors: list[Any] = []
    run = await start_in_memory(
        trio_udp.datagram_handler(lambda datagram: kind(65_508)), on_error=lambda _, error: errors.append(error)
    )
    run.put(b"x")
    await run.settle()
    assert [error.errno for error in errors] == [errno.EMSGSIZE]
    s = run.server.statistics()
    assert (s.handler_errors, s.sent, s.send_errors) == (1, 0, 0)


async def test_a_reply_at_a_full_send_buffer_is_dropped(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """A reply that finds the send buffer full is dropped and counted under EAGAIN; the next datagram follows."""
    run = await start_in_memory(repeat, on=narrow())
    run.put(b"1")
    run.put(b"2", BOB)
    await run.settle()
    run.put(b"3", CAROL)
    await run.settle()
    await trio.sleep(10)
    run.put(b"4", BOB)
    await trio.sleep(10)
    assert run.sent == [(ALICE, b"1"), (BOB, b"4")]
    s = run.server.statistics()
    assert (s.delivered, s.sent, s.send_errors, s.errors) == (4, 2, 2, {"EAGAIN": 2})
    assert s.handler_errors == 0


async def test_accept_beside_it_is_an_error() -> None:
    """serve refuses accept together with a datagram_handler."""
    on = in_memory()
    with pytest.raises(ValueError, match="accept"):
        await serve_endpoints(repeat, [on.endpoint], accept=lambda datagram: True)


@pytest.mark.parametrize("function", [None, 5, "f"])
def test_it_takes_a_function(function: Any) -> None:
    """datagram_handler refuses an object that is not callable."""
    with pytest.raises(TypeError, match=r"def f\(datagram\)"):
        trio_udp.datagram_handler(function)


def test_it_refuses_an_async_function() -> None:
    """datagram_handler refuses an async function and an async generator function."""

    async def function(datagram: Datagram) -> bytes:
        return b""

    async def generator(datagram: Datagram) -> Any:
        yield b""

    for wrong in (function, generator, partial(function)):
        with pytest.raises(TypeError, match=r"def f\(datagram\)"):
            trio_udp.datagram_handler(wrong)  # type: ignore[arg-type]


async def test_the_function_takes_one_argument() -> None:
    """datagram_handler, or at the latest serve, refuses a function that cannot be called with one argument."""

    def none() -> bytes:
        return b""

    def two(payload: bytes, address: object) -> bytes:
        return b""

    for function in (none, two):
        on = in_memory()
        with pytest.raises(TypeError, match="argument"):
            await _serve_briefly(trio_udp.datagram_handler(function), on)  # type: ignore[arg-type]


async def _serve_briefly(handler: Any, on: InMemory) -> None:
    async with trio.open_nursery() as nursery:
        server = await nursery.start(serve_endpoints, handler, [on.endpoint])
        server.stop()


def test_it_is_still_the_function() -> None:
    """A datagram_handler can be called like its function, and its repr names the function."""
    handler = trio_udp.datagram_handler(len)  # type: ignore[arg-type]
    assert handler(b"abc") == 3  # type: ignore[arg-type, comparison-overlap]
    assert repr(handler) == "<trio_udp.datagram_handler len>"


async def test_statistics_add_up_inside_the_function(start_in_memory: StartInMemory) -> None:
    """statistics() adds up inside a datagram_handler and on_error: the rest of the batch is not yet received."""
    seen: list[tuple[int, int]] = []
    server: Server

    def look() -> None:
        check_adds_up(server)
        s = server.statistics()
        seen.append((s.received, s.delivered))

    @trio_udp.datagram_handler
    def function(datagram: Datagram) -> None:
        look()
        if datagram.payload == b"1":
            raise ValueError

    run = await start_in_memory(function, on_error=lambda datagram, error: look())
    server = run.server
    for number in range(3):
        run.put(b"%d" % number)
    await run.settle()
    assert seen == [(1, 1), (2, 2), (2, 2), (3, 3)]


async def test_truncated_datagrams_do_not_reach_it(start_in_memory: StartInMemory) -> None:
    """A datagram longer than max_datagram_size counts as truncated, and does not reach a datagram_handler."""
    network = SimulatedNetwork()
    on = InMemory(network, network.endpoint(*SERVER, max_datagram_size=3))
    run = await start_in_memory(repeat, on=on)
    for payload in (b"abc", b"abcd", b"d"):
        run.put(payload)
    await run.settle()
    assert run.sent_to(ALICE) == [b"abc", b"d"]
    assert run.server.statistics().truncated == 1
    check_adds_up(run.server)


async def test_datagrams_before_the_stop_are_handled(start_in_memory: StartInMemory) -> None:
    """A datagram_handler may stop the server: every datagram that had arrived is answered, and serve returns."""

    @trio_udp.datagram_handler
    def reply(datagram: Datagram) -> bytes:
        if datagram.payload == b"0" and datagram.server is not None:
            datagram.server.stop()
        return datagram.payload

    run = await start_in_memory(reply)
    for number in range(300):
        run.put(b"%d" % number, ("192.0.2.7", 1 + number))
    await run.settle()
    assert run.endpoint.closed
    assert [payload for _, payload in run.sent] == [b"%d" % number for number in range(300)]
    s = run.server.statistics()
    assert (s.delivered, s.refused_stopping) == (300, 0)
    check_adds_up(run.server)


async def test_datagrams_during_a_drain_are_refused(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A datagram_handler is not called while the server drains, here because a Server.connect client is open."""
    seen: list[bytes] = []
    run = await start_in_memory(trio_udp.datagram_handler(lambda datagram: seen.append(datagram.payload)))
    client = run.server.connect(BOB)
    run.put(b"before")
    run.server.stop()
    await run.settle()
    run.put(b"after")
    await run.settle()
    run.put(b"after that")
    await run.settle()
    client.close()
    await run.settle()
    assert run.endpoint.closed
    assert seen == [b"before"]
    s = run.server.statistics()
    assert (s.delivered, s.refused_stopping) == (1, 2)
    check_adds_up(run.server)


async def test_a_reply_that_waits_for_room_leaves_during_the_drain(
    start_in_memory: StartInMemory, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """A reply that waits for room when the server stops is still sent."""
    kept: list[Datagram] = []
    run = await start_in_memory(trio_udp.datagram_handler(kept.append), on=narrow())
    run.put(b"x")
    await run.settle()
    kept[0].reply_nowait(b"12")
    nursery.start_soon(kept[0].reply, b"3")
    await run.settle()
    run.server.stop()
    await trio.sleep(10)
    assert run.sent_to(ALICE) == [b"12", b"3"]
    assert run.endpoint.closed


async def test_a_client_of_ours_gets_its_datagrams(start_in_memory: StartInMemory) -> None:
    """A Server.connect client gets its peer's datagrams even if the server has a datagram_handler."""
    run = await start_in_memory(repeat)
    client = run.server.connect(BOB)
    run.put(b"for the client", BOB)
    run.put(b"for the function", ALICE)
    await run.settle()
    assert client.receive_nowait() == b"for the client"
    assert run.sent == [(ALICE, b"for the function")]
    check_adds_up(run.server)


async def test_a_datagram_from_port_zero_is_delivered_and_not_answered(start_in_memory: StartInMemory) -> None:
    """A datagram from port 0 or the unspecified address reaches a datagram_handler; the reply is a send error."""
    seen: list[Any] = []

    @trio_udp.datagram_handler
    def reply(datagram: Datagram) -> bytes:
        seen.append(datagram.peer_address)
        datagram.reply_nowait(b"no")
        return b"neither"

    run = await start_in_memory(reply)
    for source in (("192.0.2.1", 0), ("0.0.0.0", 68), ALICE):
        run.put(b"x", source)
    await run.settle()
    assert seen == [("192.0.2.1", 0), ("0.0.0.0", 68), ALICE]
    assert [destination for destination, _ in run.sent] == [ALICE, ALICE]
    s = run.server.statistics()
    assert (s.delivered, s.send_errors, s.errors) == (3, 4, {"EDESTADDRREQ": 4})


async def test_a_server_does_not_answer_itself(start_in_memory: StartInMemory) -> None:
    """A datagram with the server's own address as its source is refused, so that no reply becomes a request."""
    run = await start_in_memory(repeat)
    run.put(b"loop", SERVER)
    run.put(b"x", ALICE)
    await run.settle()
    assert run.sent_to(ALICE) == [b"x"]
    s = run.server.statistics()
    assert (s.refused_source, s.delivered, s.sent) == (1, 1, 1)
    check_adds_up(run.server)


@pytest.mark.parametrize("size", [1, 20])
async def test_the_function_may_close_the_endpoint(size: int) -> None:
    """If a datagram_handler closes the only endpoint, serve raises ClosedResourceError; the replies are counted."""
    on = in_memory()
    for number in range(3):
        on.put(b"%d" % number)
    servers: list[Server] = []

    @trio_udp.datagram_handler
    def reply(datagram: Datagram) -> bytes | list[bytes]:
        assert datagram.server is not None
        servers[:] = [datagram.server]
        datagram.endpoint.close()
        return datagram.payload if size == 1 else [datagram.payload] * size

    with pytest.raises(trio.ClosedResourceError):
        await serve_endpoints(reply, [on.endpoint])
    check_adds_up(servers[0])
    assert on.sent == []
    assert servers[0].statistics().errors == {"EAGAIN": 3 * size}


async def test_an_error_that_ends_the_program(start_in_memory: StartInMemory) -> None:
    """KeyboardInterrupt in a datagram_handler leaves serve bare; the rest of the batch counts as refused_stopping."""
    on = in_memory()
    for number in range(3):
        on.put(b"%d" % number)
    servers: list[Server] = []

    @trio_udp.datagram_handler
    def interrupt(datagram: Datagram) -> bytes:
        assert datagram.server is not None
        servers[:] = [datagram.server]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await serve_endpoints(interrupt, [on.endpoint])
    s = servers[0].statistics()
    assert (s.received, s.delivered, s.refused_stopping) == (3, 1, 2)
    check_adds_up(servers[0])


def test_datagram_has_no_public_constructor() -> None:
    """Datagram has no public constructor."""
    with pytest.raises(TypeError):
        Datagram(b"x", None, (), None)  # type: ignore[call-arg]


# Over real sockets


@pytest.mark.skipif(sys.platform != "linux", reason="needs all of 127.0.0.0/8")
@pytest.mark.usefixtures("engine")
async def test_replies_leave_from_where_the_datagram_was_sent_to(nursery: trio.Nursery) -> None:
    """On a socket bound to all addresses, each reply leaves from the address that its datagram was sent to."""
    (endpoint,) = await open_endpoints(0, host="0.0.0.0")
    port = endpoint.local_address[1]
    seen: list[tuple[Any, Any]] = []

    @trio_udp.datagram_handler
    def reply(datagram: Datagram) -> bytes:
        seen.append((datagram.local_address, datagram.destination))
        return datagram.payload

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(5)
        hosts = ["127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.2"]
        for number, host in enumerate(hosts):
            peer.sendto(b"%d" % number, (host, port))
        await nursery.start(serve_endpoints, reply, [endpoint])
        answers = [await trio.to_thread.run_sync(peer.recvfrom, 100) for _ in hosts]
    assert answers == [(b"%d" % number, (host, port)) for number, host in enumerate(hosts)]
    assert seen == [((host, port), (host, port)) for host in hosts]


@pytest.mark.usefixtures("engine")
async def test_order_over_real_sockets(nursery: trio.Nursery) -> None:
    """Datagrams of several sockets, more than one batch of them, are answered in the order in which they were sent."""
    (endpoint,) = await open_endpoints(0, host="127.0.0.1")
    seen: list[bytes] = []

    @trio_udp.datagram_handler
    def reply(datagram: Datagram) -> bytes:
        seen.append(datagram.payload)
        return datagram.payload

    peers = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(5)]
    try:
        for peer in peers:
            peer.connect(endpoint.local_address)
            peer.settimeout(5)
        for number in range(200):
            peers[number * number % 5].send(b"%d" % number)
        server: Server = await nursery.start(serve_endpoints, reply, [endpoint])
        with trio.fail_after(5):
            while len(seen) < 200:
                await trio.testing.wait_all_tasks_blocked()
        assert seen == [b"%d" % number for number in range(200)]
        for index, peer in enumerate(peers):
            wanted = [b"%d" % number for number in range(200) if number * number % 5 == index]
            assert [peer.recv(100) for _ in wanted] == wanted
        check_adds_up(server)
    finally:
        for peer in peers:
            peer.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs UDP_GRO")
async def test_replies_to_one_client_are_merged(nursery: trio.Nursery) -> None:
    """On Linux the replies of one batch to one address leave as segments of one datagram."""
    (endpoint,) = await open_endpoints(0, host="127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(5)
        peer.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        for number in range(10):
            peer.sendto(b"%d" % number, endpoint.local_address)
        await nursery.start(serve_endpoints, repeat, [endpoint])
        merged = await trio.to_thread.run_sync(peer.recv, 65_535)
    assert merged == b"0123456789"


async def test_a_collector_of_all_that_a_real_socket_brings(nursery: trio.Nursery, engine: str) -> None:
    """A handler without answers sends nothing, and can serve several endpoints."""
    endpoints: list[Endpoint] = [
        *await open_endpoints(0, host="127.0.0.1"),
        *await open_endpoints(0, host="127.0.0.1"),
    ]
    seen: list[tuple[Endpoint, bytes]] = []

    @trio_udp.datagram_handler
    def collect(datagram: Datagram) -> None:
        seen.append((datagram.endpoint, datagram.payload))

    server: Server = await nursery.start(serve_endpoints, collect, endpoints)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        for number, endpoint in enumerate(endpoints * 2):
            peer.sendto(b"%d" % number, endpoint.local_address)
            with trio.fail_after(5):
                while len(seen) <= number:
                    await trio.testing.wait_all_tasks_blocked()
    assert seen == [(endpoint, b"%d" % number) for number, endpoint in enumerate(endpoints * 2)]
    s = server.statistics()
    assert (s.received, s.delivered, s.sent) == (4, 4, 0)


async def test_replies_to_many_batches_arrive_in_order(nursery: trio.Nursery, engine: str) -> None:
    """Three peers whose datagrams fill many batches each get all their replies in order, including the last ones."""
    endpoints = await trio_udp.open_endpoints(0, host="127.0.0.1")
    address = endpoints[0].local_address
    peers = [await trio_udp.connect(*address) for _ in range(3)]
    wanted = [b"%d" % number for number in range(301)]
    for payload in wanted:
        for peer in peers:
            peer.send_nowait(payload)
    await nursery.start(serve_endpoints, trio_udp.datagram_handler(lambda datagram: datagram.payload), endpoints)
    for peer in peers:
        with trio.fail_after(5):
            assert [await peer.receive() for _ in wanted] == wanted
        peer.close()
    nursery.cancel_scope.cancel()


async def test_replies_that_are_kept_back_leave_at_a_stop(nursery: trio.Nursery, engine: str) -> None:
    """A server that is stopped while datagrams fill many batches answers all of them before it closes."""
    endpoints = await trio_udp.open_endpoints(0, host="127.0.0.1")
    async with await trio_udp.connect(*endpoints[0].local_address) as peer:
        wanted = [b"%d" % number for number in range(200)]
        for payload in wanted:
            peer.send_nowait(payload)
        handler = trio_udp.datagram_handler(lambda datagram: datagram.payload)
        server = await nursery.start(serve_endpoints, handler, endpoints)
        server.stop()
        with trio.fail_after(5):
            assert [await peer.receive() for _ in wanted] == wanted
        assert server.statistics().sent == len(wanted)
