"""Typed payloads: objects over a channel of bytes, in handlers and at the other end."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

import trio_udp
from trio_udp import Client, Connection, TypedChannel, connect, datagram_handler, request_handler, typed
from trio_udp.testing import SimulatedNetwork

from ..conftest import ALICE, BOB, StartInMemory, check_adds_up, in_memory, plain_socket, port_of


@attrs.frozen
class Add:
    amount: int


@attrs.frozen
class Total:
    total: int


def decode_add(payload: bytes) -> Add:
    return Add(int(payload))


def encode_total(total: Total) -> bytes:
    return b"%d" % total.total


async def add_up(adds: TypedChannel[Add, Total]) -> None:
    total = 0
    async for add in adds:
        total += add.amount
        await adds.send(Total(total))


adder = typed(add_up, decode=decode_add, encode=encode_total)


async def test_objects_both_ways(udp_server: Callable[..., Awaitable[Connection]]) -> None:
    """Handler and client exchange objects, with one type for each direction."""
    connection = await udp_server(adder)
    totals: TypedChannel[Total, Add, Connection] = TypedChannel(
        connection, decode=lambda payload: Total(int(payload)), encode=lambda add: b"%d" % add.amount
    )
    await totals.send(Add(3))
    assert await totals.receive() == Total(3)
    await totals.send(Add(4))
    assert [total async for total in first(totals)] == [Total(7)]
    port: int = totals.channel.peer_address[1]  # known to type checkers as a connection
    assert port == connection.peer_address[1]
    assert isinstance(totals, trio.abc.Channel)
    assert repr(totals) == f"<trio_udp.TypedChannel over {connection!r}>"
    async with totals:
        pass
    with pytest.raises(trio.ClosedResourceError):
        await connection.receive()


async def first(channel: trio.abc.Channel[Total]) -> AsyncIterator[Total]:
    """Iterate over a channel until the first object."""
    async for total in channel:
        yield total
        return


async def test_over_real_sockets(start_on_loopback: Callable[..., Awaitable[trio_udp.Server]]) -> None:
    """A typed handler can be served over both engines."""
    with trio.fail_after(10), plain_socket() as sock:
        server = await start_on_loopback(adder)
        for payload, answer in [(b"3", b"3"), (b"x4", None), (b"5", b"8")]:
            sock.sendto(payload, ("127.0.0.1", port_of(server)))
            if answer is not None:
                assert await trio.to_thread.run_sync(sock.recv, 100) == answer
        server.stop()


async def test_undecodable_payloads_are_skipped_and_counted(
    start_in_memory: StartInMemory, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The conversation goes on after any payload that does not decode, and the server's counters add up."""
    channels = []

    async def handler(adds: TypedChannel[Add, Total]) -> None:
        channels.append(adds)
        await add_up(adds)

    on = await start_in_memory(typed(handler, decode=decode_add, encode=encode_total))
    for payload in (b"1", b"one", b"", b"\xff" * 60_000, b"2"):
        on.put(payload)
    await on.settle()
    assert on.sent_to(ALICE) == [b"1", b"3"]
    assert [channel.decode_errors for channel in channels] == [3]
    assert on.server.statistics().delivered == 5
    assert on.server.statistics().handler_errors == 0
    check_adds_up(on.server)
    [line] = caplog.messages
    assert line == (
        f"skipped a payload of 3 bytes from {ALICE}: "
        """"ValueError: invalid literal for int() with base 10: b'one'\""""
    )


@pytest.mark.parametrize("error", [ValueError("bad\nINFO forged"), RecursionError(), KeyError("x" * 10_000)])
async def test_any_exception_of_decode(
    start_in_memory: StartInMemory,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    """Any ``Exception`` from ``decode`` skips the payload, and logs one short line."""

    def decode(payload: bytes) -> bytes:
        if payload == b"bad":
            raise error
        return payload

    async def echo(channel: TypedChannel[bytes]) -> None:
        async for payload in channel:
            await channel.send(payload)

    on = await start_in_memory(typed(echo, decode=decode, encode=bytes))
    on.put(b"bad")
    on.put(b"good")
    await on.settle()
    assert on.sent_to(ALICE) == [b"good"]
    [line] = caplog.messages
    assert "\n" not in line
    assert len(line) < 300


async def test_logged_once_a_minute_per_client(
    start_in_memory: StartInMemory, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A client's decode errors are logged at most once a minute, also if its handler is called again."""

    async def take_one(adds: TypedChannel[Add, Total]) -> None:
        await adds.receive()

    on = await start_in_memory(typed(take_one, decode=decode_add, encode=encode_total), idle_timeout=1_000)
    for second in range(125):
        for source in (ALICE, BOB):
            on.put(b"%d" % second, source)
            on.put(b"bad", source)
        await trio.sleep(1)
    assert sorted(line.partition(" from ")[2].partition(":")[0] for line in caplog.messages) == sorted(
        [str(ALICE), str(BOB)] * 3
    )
    assert on.server.statistics().delivered == 500


async def test_a_flood_of_addresses_cannot_fill_the_log(
    start_in_memory: StartInMemory, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """For any number of clients, decode errors fill at most ten lines of the log a second."""
    on = await start_in_memory(adder, limits=trio_udp.Limits(max_clients=2_000))
    for host in range(1_000):
        on.put(b"bad", (f"198.51.{host // 250}.{host % 250 + 1}", 1))
    await trio.sleep(1)
    assert len(caplog.messages) == 10
    on.put(b"bad", BOB)
    await on.settle()
    assert len(caplog.messages) == 11


async def test_on_decode_error_answers(start_in_memory: StartInMemory, caplog: pytest.LogCaptureFixture) -> None:
    """``on_decode_error`` gets the channel of bytes, the payload and the exception, instead of the log."""
    seen = []

    def complain(client: Client, payload: bytes, error: Exception) -> None:
        seen.append((client.peer_address, payload, type(error)))
        client.send_nowait(b"bad: " + payload)

    on = await start_in_memory(
        typed(add_up, decode=decode_add, encode=encode_total, on_decode_error=complain),
    )
    on.put(b"x")
    on.put(b"1")
    await on.settle()
    assert on.sent_to(ALICE) == [b"bad: x", b"1"]
    assert seen == [(ALICE, b"x", ValueError)]
    assert caplog.messages == []


async def test_on_decode_error_may_raise(start_in_memory: StartInMemory) -> None:
    """``receive`` raises what ``on_decode_error`` raises, so a protocol can end a conversation."""

    def refuse(client: Client, payload: bytes, error: Exception) -> None:
        raise error

    errors = []
    on = await start_in_memory(
        typed(add_up, decode=decode_add, encode=encode_total, on_decode_error=refuse),
        on_error=lambda client, error: errors.append(type(error)),
    )
    on.put(b"x")
    await on.settle()
    assert errors == [ValueError]
    assert list(on.server.clients) == []


async def test_payload_that_does_not_encode(udp_server: Callable[..., Awaitable[Connection]]) -> None:
    """``send`` raises what ``encode`` raises; nothing is sent, and the channel goes on."""
    connection = await udp_server(adder)
    channel: TypedChannel[Any, Any, Connection] = TypedChannel(
        connection, decode=json.loads, encode=lambda value: json.dumps(value).encode()
    )
    with pytest.raises(TypeError, match="not JSON serializable"):
        await channel.send(object())
    with pytest.raises(TypeError, match="a payload is bytes"):
        await TypedChannel(connection, decode=json.loads, encode=str).send(1)  # type: ignore[arg-type]
    assert connection.statistics().sent == 0
    await channel.send(5)
    assert await channel.receive() == 5


async def test_cancelled_receive_loses_nothing(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A ``receive`` that is cancelled among undecodable payloads loses no object."""
    received = []

    async def handler(adds: TypedChannel[Add, Total]) -> None:
        while True:
            with trio.move_on_after(0.5):
                received.append((await adds.receive()).amount)

    on = await start_in_memory(typed(handler, decode=decode_add, encode=encode_total), on=in_memory())
    for number in range(20):
        on.put(b"x")
        on.put(b"%d" % number)
        await trio.sleep(0.25)
    assert received == list(range(20))


async def test_flood_of_junk_lets_others_run(start_in_memory: StartInMemory) -> None:
    """A client that only sends payloads that do not decode delays no other client."""
    on = await start_in_memory(adder)
    for _ in range(10):
        for _ in range(250):
            on.put(b"x")
        on.put(b"1", BOB)
        await on.settle()
    assert on.sent_to(BOB) == [b"%d" % number for number in range(1, 11)]


async def test_inside_another_layer(start_in_memory: StartInMemory) -> None:
    """A typed handler takes any channel, such as one that another layer has made from the client."""

    @attrs.define(eq=False)
    class Reversed(trio.abc.Channel[bytes]):
        inner: Client

        async def receive(self) -> bytes:
            return (await self.inner.receive())[::-1]

        async def send(self, value: bytes) -> None:
            await self.inner.send(value[::-1])

        async def aclose(self) -> None:
            await self.inner.aclose()

    async def handler(adds: TypedChannel[Add, Total, Reversed]) -> None:
        async for add in adds:
            await adds.send(Total(add.amount + adds.channel.inner.peer_address[1]))

    layer = typed(handler, decode=decode_add, encode=encode_total)

    async def reverse(client: Client) -> None:
        await layer(Reversed(client))

    on = await start_in_memory(reverse)
    on.put(b"21")
    await on.settle()
    assert on.sent_to(ALICE) == [b"2101"]


def test_types_may_be_left_out() -> None:
    """``TypedChannel[Add]`` sends and receives one type, and works in annotations that are evaluated."""
    assert str(TypedChannel[Add]) == "trio_udp.TypedChannel[tests.layers.test_typed.Add]"

    async def both(channel: TypedChannel[Add]) -> None:
        async for add in channel:
            await channel.send(add)

    assert callable(typed(both, decode=decode_add, encode=lambda add: b"%d" % add.amount))


async def decode_later(payload: bytes) -> bytes:
    return payload


@pytest.mark.parametrize("name", ["decode", "encode", "on_decode_error"])
@pytest.mark.parametrize("function", [3, decode_later])
async def test_bad_arguments(udp_server: Callable[..., Awaitable[Connection]], name: str, function: object) -> None:
    """An argument that is not a plain function raises at the call, with the argument's name."""
    functions: dict[str, Any] = {"decode": decode_add, "encode": encode_total, name: function}
    for call in (partial(typed, add_up), partial(TypedChannel, await udp_server(adder))):
        with pytest.raises(TypeError, match=f"{name} must be a plain function, not "):
            call(**functions)


async def yields(channel: TypedChannel[Add, Total]) -> AsyncIterator[int]:
    yield 1


async def takes_two(payload: bytes, client: Client) -> None:
    pass


@pytest.mark.parametrize(
    "handler",
    [3, TypedChannel, yields, takes_two, request_handler(takes_two), datagram_handler(lambda datagram: None)],
    ids=["number", "class", "generator", "two arguments", "request_handler", "datagram_handler"],
)
def test_bad_handler(handler: Any) -> None:
    """An invalid handler raises at the call, also one for clients or datagrams."""
    with pytest.raises(TypeError, match="a typed handler is an async function with one argument"):
        typed(handler, decode=decode_add, encode=encode_total)


async def test_bad_channel(udp_server: Callable[..., Awaitable[Connection]]) -> None:
    """An object that is not a channel raises at the call, such as ``connect(...)`` without ``await``."""
    with pytest.raises(TypeError, match=r"channel must be a trio.abc.Channel, not <coroutine object connect"):
        TypedChannel(connecting := connect("127.0.0.1", 9), decode=decode_add, encode=encode_total)  # type: ignore[type-var]
    connecting.close()


async def test_handler_that_is_not_async(simulated_network: SimulatedNetwork) -> None:
    """A typed handler without ``async`` ends the server with an error that names the function."""

    def handler(adds: TypedChannel[Add, Total]) -> None:
        pass

    endpoint = simulated_network.endpoint(*ALICE)
    simulated_network.inject(b"1", BOB, ALICE)
    with pytest.raises(TypeError, match=r"test_handler_that_is_not_async.<locals>.handler at .* returned None"):
        await trio_udp.serve_endpoints(typed(handler, decode=decode_add, encode=encode_total), [endpoint])  # type: ignore[arg-type]
