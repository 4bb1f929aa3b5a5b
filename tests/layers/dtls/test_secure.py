"""secure() under a server: handlers of all kinds, strangers, limits, and the ends of conversations."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable
from contextlib import suppress
from functools import partial

import pytest
import trio
import trio.testing
from OpenSSL import SSL

import trio_udp
from trio_udp.dtls import DTLSChannel, secure
from trio_udp.layers.dtls._cookies import Cookies

from ...conftest import SERVER, check_adds_up
from .conftest import NAME, Start, echo
from .test_records import hello

ALICE = ("192.0.2.1", 1000)


class Shouter:
    async def handle(self, channel: DTLSChannel) -> None:
        async for payload in channel:
            await channel.send(payload.upper())

    async def __call__(self, channel: DTLSChannel) -> None:
        await self.handle(channel)


async def shout(prefix: bytes, channel: DTLSChannel) -> None:
    async for payload in channel:
        await channel.send(prefix + payload.upper())


@trio_udp.request_handler
async def request(payload: bytes, client: trio_udp.Client) -> bytes:
    return payload.upper()


@trio_udp.request_handler(timeout=5, concurrency=3)
async def requests(payload: bytes, client: trio_udp.Client) -> bytes:
    await trio.sleep(0.1)
    return payload.upper()


def plain(channel: DTLSChannel) -> Awaitable[None]:
    return shout(b"", channel)


@pytest.mark.parametrize(
    "handler", [Shouter().handle, Shouter(), partial(shout, b""), request, requests, plain, lambda c: shout(b"", c)]
)
async def test_handlers_of_all_shapes(start: Start, autojump_clock: trio.testing.MockClock, handler: object) -> None:
    """Every kind of handler can be secured: functions, methods, objects, partials, request handlers."""
    secured = await start(handler)
    async with secured.connected() as channel:
        for payload in (b"a", b"b", b"c"):
            await channel.send(payload)
        assert sorted([await channel.receive() for _ in range(3)]) == [b"A", b"B", b"C"]


async def test_objects_that_cannot_be_secured(server_context: SSL.Context) -> None:
    """Datagram handlers, classes, generators, wrong signatures and secured handlers are refused with one clear line."""
    with pytest.raises(TypeError, match="a datagram_handler cannot be secured, because DTLS needs clients"):
        secure(trio_udp.datagram_handler(lambda datagram: None), server_context)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="handler is a class"):
        secure(Shouter, server_context)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="one argument"):
        secure(shout, server_context)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="secured already"):
        secure(secure(echo, server_context), server_context)


async def test_other_layers_on_top(start: Start) -> None:
    """Typed payloads and requests work over DTLS; payloads that do not decode are skipped."""

    async def add(channel: trio_udp.TypedChannel[list[int], int, DTLSChannel]) -> None:
        async for numbers in channel:
            await channel.send(sum(numbers))

    handler = trio_udp.typed(add, decode=json.loads, encode=lambda number: b"%d" % number)
    secured = await start(handler)
    async with secured.connected() as channel:
        await channel.send(b"no JSON")
        assert await trio_udp.request(channel, b"[1, 2, 3]", matches=bytes.isdigit) == b"6"


async def test_a_timeout_of_a_request_is_counted(start: Start, autojump_clock: trio.testing.MockClock) -> None:
    """A request that takes too long is counted over DTLS, as over plain UDP."""

    @trio_udp.request_handler(timeout=1)
    async def slow(payload: bytes, client: trio_udp.Client) -> bytes:
        await trio.sleep(float(payload))
        return payload

    secured = await start(slow)
    async with secured.connected() as channel:
        await channel.send(b"3600")
        await channel.send(b"0")
        assert await channel.receive() == b"0"
    assert secured.server.statistics().requests_timed_out == 1


async def test_a_handler_is_called_again_for_waiting_payloads(start: Start) -> None:
    """A handler that returns or raises while payloads wait is called again with the same channel, and loses nothing."""
    channels: set[DTLSChannel] = set()
    errors: list[str] = []

    async def one_at_a_time(channel: DTLSChannel) -> None:
        channels.add(channel)
        payload = await channel.receive()
        if payload == b"bad":
            raise ValueError("bad")
        await channel.send(payload)

    secured = await start(
        one_at_a_time, on_error=lambda client, error: errors.append(f"{type(client).__name__} {error}")
    )
    async with secured.connected() as channel:
        await channel.send_many([b"1", b"bad", b"2"])
        assert [payload async for payload in channel] == [b"1", b"2"]
    assert (len(channels), errors) == (1, ["DTLSChannel bad"])


async def test_an_error_ends_one_client(start: Start) -> None:
    """A handler that raises ends its own association, with a close_notify, and no other."""
    errors: list[object] = []

    async def fail(channel: DTLSChannel) -> None:
        async for payload in channel:
            if payload == b"bad":
                raise ValueError("bad")
            await channel.send(payload)

    secured = await start(fail, on_error=lambda client, error: errors.append(error))
    async with secured.connected() as one, secured.connected() as other:
        await one.send(b"bad")
        with pytest.raises(trio.EndOfChannel):
            await one.receive()
        await other.send(b"fine")
        assert await other.receive() == b"fine"
    assert secured.server.statistics().handler_errors == len(errors) == 1


async def test_an_error_beside_a_cancellation_is_reported_with_the_channel(
    start: Start, autojump_clock: trio.testing.MockClock
) -> None:
    """on_error gets the channel, never the client below it, however the handler raises."""
    errors: list[tuple[object, list[str]]] = []

    async def clean_up() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("while cleaning up")

    async def handler(channel: DTLSChannel) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(clean_up)
            await channel.send(await channel.receive())
            await trio.sleep_forever()

    def fail(channel: DTLSChannel) -> Awaitable[None]:
        raise ValueError("at the call")

    def on_error(client: object, error: Exception) -> None:
        errors.append((type(client), [str(inner) for inner in getattr(error, "exceptions", [error])]))

    for raises in (handler, fail):
        secured = await start(raises, on_error=on_error, drain_timeout=1)
        async with secured.connected() as channel:
            with suppress(trio.EndOfChannel, trio.BrokenResourceError):
                await channel.send(b"x")
                await channel.receive()
            secured.server.stop()
            await trio.sleep(2)
    assert errors == [(DTLSChannel, ["while cleaning up"]), (DTLSChannel, ["at the call"])]


async def test_a_handler_that_returns_no_awaitable_ends_the_server(
    simulated_network: trio_udp.testing.SimulatedNetwork, server_context: SSL.Context, client_context: SSL.Context
) -> None:
    """A handler whose result cannot be awaited ends the server with a TypeError."""
    endpoint = simulated_network.endpoint(*SERVER)
    handler = secure(lambda channel: 1, server_context)  # type: ignore[arg-type]
    connection = await simulated_network.connect(*SERVER)
    channel = DTLSChannel(connection, client_context, server_hostname=NAME)
    async with channel, trio.open_nursery() as nursery:
        nursery.start_soon(channel.do_handshake)
        with pytest.raises(TypeError, match="not an awaitable"):
            await trio_udp.serve_endpoints(handler, [endpoint])


async def test_strangers_leave_nothing_behind(start: Start) -> None:
    """ClientHellos from any number of forged addresses are answered, all else is refused, and nothing is kept."""
    secured = await start()
    tasks = trio.lowlevel.current_statistics().tasks_living
    for number in range(300):
        source = (f"203.0.113.{number % 250}", 1000 + number)
        secured.network.inject(hello(random=number.to_bytes(32, "big")), source, SERVER)
        for junk in (b"", b"hello", hello()[:50], hello(message_number=1, cookie=bytes(20)), b"\x17" + hello()[1:]):
            secured.network.inject(junk, source, SERVER)
        if number % 20 == 0:
            await trio.testing.wait_all_tasks_blocked()  # before the receive buffer is full
    await trio.testing.wait_all_tasks_blocked()
    statistics = secured.server.statistics()
    assert (statistics.answered_by_accept, statistics.refused_by_accept) == (300, 1500)
    assert (statistics.clients_started, secured.handler.handshakes_failed) == (0, 0)
    assert trio.lowlevel.current_statistics().tasks_living == tasks


async def test_the_users_accept_is_asked_first(start: Start) -> None:
    """The user's accept is called before the DTLS gate: it refuses, answers, or passes the stranger on."""
    asked: list[trio_udp.Address] = []

    def accept(datagram: trio_udp.Datagram) -> bool | bytes:
        asked.append(datagram.peer_address)
        answers: dict[str, bool | bytes] = {"198.51.100.2": False, "198.51.100.3": b"no"}
        return answers.get(datagram.peer_address[0], True)

    secured = await start(accept=accept)
    async with secured.connected(host="198.51.100.1") as channel:
        await channel.send(b"x")
        assert await channel.receive() == b"x"
    for host in ("198.51.100.2", "198.51.100.3"):
        secured.network.inject(hello(), (host, 1), SERVER)
    await trio.testing.wait_all_tasks_blocked()
    statistics = secured.server.statistics()
    assert (statistics.refused_by_accept, statistics.answered_by_accept) == (1, 2)
    assert [address[0][-1] for address in asked] == ["1", "1", "2", "3"]


async def test_the_gate_may_be_hidden(start: Start) -> None:
    """A secured handler inside another callable, which hides its gate from the server, sends cookies itself."""
    secured = await start()
    wrapped = partial(secured.handler)
    endpoint = secured.network.endpoint("192.0.2.54", 54)
    async with trio.open_nursery() as nursery:
        server = await nursery.start(trio_udp.serve_endpoints, wrapped, [endpoint])
        connection = await secured.network.connect("192.0.2.54", 54)
        channel = DTLSChannel(connection, secured.client_context, server_hostname=NAME)
        async with channel:
            await channel.send(b"x")
            assert await channel.receive() == b"x"
        statistics = server.statistics()
        assert (statistics.answered_by_accept, statistics.clients_started) == (0, 1)
        server.stop()


async def test_limits_hold(start: Start, autojump_clock: trio.testing.MockClock) -> None:
    """max_clients and clients_per_host apply to DTLS clients; a refused one gets no answer to its second hello."""
    limits = trio_udp.Limits(max_clients=2, clients_per_host=1, when_full="evict_idle")
    secured = await start(limits=limits)
    async with secured.connected(host="198.51.100.1"), secured.connected(host="198.51.100.2") as second:
        for host in ("198.51.100.1", "198.51.100.3"):
            channel = await secured.open(host=host)
            with trio.move_on_after(0.01) as scope:
                await channel.do_handshake()
            assert scope.cancelled_caught
            channel.close()
        assert secured.server.statistics().refused_full == 2
        await second.send(b"x")  # a verified client is not evicted
        assert await second.receive() == b"x"


async def test_amplification_does_not_withhold_the_handshake(start: Start) -> None:
    """A valid cookie verifies the address, so Limits.amplification does not withhold the server's longer flights."""
    secured = await start(limits=trio_udp.Limits(amplification=1))
    async with secured.connected() as channel:
        await channel.send(b"x")
        assert await channel.receive() == b"x"
    assert secured.server.statistics().sends_withheld == 0


async def test_a_rate_limit_counts_hellos(start: Start) -> None:
    """A ClientHello beyond Limits.rate_limit is refused before a cookie is made."""
    secured = await start(limits=trio_udp.Limits(rate_limit=trio_udp.RateLimit(1, burst=10)))
    for _ in range(30):
        secured.network.inject(hello(), ALICE, SERVER)
    await trio.testing.wait_all_tasks_blocked()
    statistics = secured.server.statistics()
    assert (statistics.answered_by_accept, statistics.refused_by_rate) == (10, 20)


async def test_hellos_with_valid_cookies_are_bounded(start: Start, autojump_clock: trio.testing.MockClock) -> None:
    """Peers that never finish their handshakes take a place each, up to max_clients, until their idle timeout."""
    secured = await start(limits=trio_udp.Limits(max_clients=20), idle_timeout=10)
    channels = []
    for number in range(40):
        channel = await secured.open(port=2000 + number)
        channels.append(channel)
    secured.network.latency = (0.1, 0.1)
    with trio.move_on_after(0.35):
        async with trio.open_nursery() as nursery:
            for channel in channels:
                nursery.start_soon(channel.do_handshake)
    for channel in channels:
        channel.transport_channel.close()  # type: ignore[attr-defined]
    assert len(secured.server.clients) == 20
    assert secured.server.statistics().refused_full == 20
    await trio.sleep(13)
    assert (list(secured.server.clients), secured.handler.handshakes_failed) == ([], 20)
    assert "the conversation ended" in str(secured.handler.last_error)


async def test_a_handshake_that_never_ends_is_bounded(start: Start, autojump_clock: trio.testing.MockClock) -> None:
    """A peer that keeps its handshake going with junk is dropped after handshake_timeout."""
    secured = await start(handshake_timeout=20)
    secured.network.latency = (0.1, 0.1)
    channel = await secured.open(port=4000)
    with trio.move_on_after(0.35):
        await channel.do_handshake()
    for _ in range(19):
        secured.network.inject(b"\x16\xfe\xfd" + bytes(30), channel.local_address, SERVER)
        await trio.sleep(1)
    assert len(secured.server.clients) == 1
    await trio.sleep(2)
    assert (list(secured.server.clients), secured.handler.handshakes_failed) == ([], 1)
    assert str(secured.handler.last_error) == "the DTLS handshake took longer than 20 seconds"
    channel.close()


async def test_junk_does_not_put_off_repetition(start: Start, autojump_clock: trio.testing.MockClock) -> None:
    """Junk during a handshake neither breaks it nor delays the repetition of lost flights."""
    secured = await start()
    secured.network.latency = (0.1, 0.1)
    channel = await secured.open(port=4000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.do_handshake)
        await trio.sleep(0.25)
        with secured.network.partition([channel.local_address]):  # the server's flight, and later ones
            await trio.sleep(0.2)
        while channel.session is None:
            secured.network.inject(b"junk", channel.local_address, SERVER)
            secured.network.inject(b"junk", SERVER, channel.local_address)
            await trio.sleep(0.09)
            assert trio.current_time() < 5
    await channel.aclose()


async def test_silence_ends_a_client(start: Start, autojump_clock: trio.testing.MockClock) -> None:
    """A client that is silent for idle_timeout ends as over plain UDP, and its peer gets a close_notify."""
    ends: list[object] = []

    async def handler(channel: DTLSChannel) -> None:
        await echo(channel)  # type: ignore[arg-type]
        ends.append(channel.ended)
        await channel.send(b"goodbye")

    secured = await start(handler, idle_timeout=10)
    async with secured.connected() as channel:
        assert [payload async for payload in channel] == [b"goodbye"]
        assert ends == ["idle"]
        assert 10 <= trio.current_time() <= 12.5


async def test_a_drain_handles_arrived_payloads_and_closes_channels(start: Start) -> None:
    """A server that stops handles the payloads that have arrived, and closes its channels with a close_notify."""
    ends: list[object] = []

    async def handler(channel: DTLSChannel) -> None:
        await echo(channel)  # type: ignore[arg-type]
        ends.append(channel.ended)

    secured = await start(handler)
    async with secured.connected() as one, secured.connected() as other:
        await one.send_many([b"1", b"2"])
        secured.server.stop()
        assert [payload async for payload in one] == [b"1", b"2"]
        assert [payload async for payload in other] == []
    assert ends == ["stopping", "stopping"]


async def test_a_drain_in_a_transaction(start: Start) -> None:
    """In a transaction, payloads keep arriving while the server drains."""

    async def handler(channel: DTLSChannel) -> None:
        with channel.transaction():
            await channel.send(await channel.receive())
            await channel.send(await channel.receive())

    secured = await start(handler)
    async with secured.connected() as channel:
        await channel.send(b"1")
        assert await channel.receive() == b"1"
        secured.server.stop()
        await trio.testing.wait_all_tasks_blocked()
        await channel.send(b"2")
        assert [payload async for payload in channel] == [b"2"]


async def test_a_drain_in_a_handshake(start: Start, autojump_clock: trio.testing.MockClock) -> None:
    """A handshake in progress when the server stops ends at once, and is counted as failed."""
    secured = await start(drain_timeout=math.inf)
    secured.network.latency = (0.1, 0.1)
    channel = await secured.open()
    with trio.move_on_after(0.35):
        await channel.do_handshake()
    secured.server.stop()
    await trio.testing.wait_all_tasks_blocked()
    assert (list(secured.server.clients), secured.handler.handshakes_failed) == ([], 1)
    channel.close()


@pytest.fixture
async def far_apart(
    simulated_network: trio_udp.testing.SimulatedNetwork, client_context: SSL.Context
) -> tuple[trio_udp.Endpoint, DTLSChannel]:
    """A server's endpoint and a channel to it, 0.1 seconds away from each other."""
    simulated_network.latency = (0.1, 0.1)
    endpoint = simulated_network.endpoint(*SERVER)
    return endpoint, DTLSChannel(await simulated_network.connect(*SERVER), client_context, server_hostname=NAME)


@pytest.mark.parametrize("after", [0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75])
async def test_cancelling_the_server(
    far_apart: tuple[trio_udp.Endpoint, DTLSChannel],
    server_context: SSL.Context,
    autojump_clock: trio.testing.MockClock,
    after: float,
) -> None:
    """A server that is cancelled at any moment of a conversation ends at once, and its counters add up."""
    endpoint, channel = far_apart
    async with trio.open_nursery() as nursery:
        server = await nursery.start(trio_udp.serve_endpoints, secure(echo, server_context), [endpoint])

        async def talk() -> None:
            async with channel:
                while True:
                    await channel.send(b"x")
                    await channel.receive()

        nursery.start_soon(talk)
        await trio.sleep(after)
        nursery.cancel_scope.cancel()
    assert trio.current_time() == pytest.approx(after)
    assert endpoint.closed
    check_adds_up(server)


@pytest.mark.parametrize("after", [0.15, 0.35, 0.45, 0.65, 0.75])
async def test_closing_the_endpoint(
    far_apart: tuple[trio_udp.Endpoint, DTLSChannel],
    server_context: SSL.Context,
    autojump_clock: trio.testing.MockClock,
    after: float,
) -> None:
    """If the endpoint is closed at any moment of a conversation, the server ends as over plain UDP, without errors."""
    endpoint, channel = far_apart
    handler = secure(echo, server_context)

    async def talk() -> None:
        await channel.send(b"x")
        await channel.receive()
        await channel.receive()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(talk)
        nursery.start_soon(close_after, endpoint, after)
        with pytest.raises(trio.ClosedResourceError, match="every endpoint of this server has been closed"):
            await trio_udp.serve_endpoints(handler, [endpoint], on_error=trio_udp.raise_error)
        nursery.cancel_scope.cancel()
    assert trio.current_time() == pytest.approx(after)
    channel.close()


async def close_after(endpoint: trio_udp.Endpoint, seconds: float) -> None:
    await trio.sleep(seconds)
    endpoint.close()


async def test_a_client_can_be_connected_to_from_the_server(
    simulated_network: trio_udp.testing.SimulatedNetwork,
    nursery: trio.Nursery,
    server_context: SSL.Context,
    client_context: SSL.Context,
) -> None:
    """With Server.connect, a server can be the DTLS client of another server, from its own socket."""
    far = simulated_network.endpoint("192.0.2.54", 54)
    await nursery.start(trio_udp.serve_endpoints, secure(echo, server_context), [far])
    here = simulated_network.endpoint(*SERVER)
    server = await nursery.start(trio_udp.serve_endpoints, echo, [here])
    async with DTLSChannel(server.connect(("192.0.2.54", 54)), client_context, server_hostname=NAME) as channel:
        await channel.send(b"x")
        assert await channel.receive() == b"x"
        assert channel.local_address == SERVER
        assert list(server.clients) == [channel]
        await server.send_to_all(b"to everybody")  # also to this client, encrypted
        assert await channel.receive() == b"to everybody"
    assert list(server.clients) == []


def test_cookies_are_those_of_the_context(server_context: SSL.Context) -> None:
    """Two handlers with one context accept each other's cookies, as on two endpoints; other contexts do not."""
    one, other = secure(echo, server_context), secure(echo, server_context)
    assert isinstance(one._cookies, Cookies)
    assert one._cookies is other._cookies
