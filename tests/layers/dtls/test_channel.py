"""DTLSChannel over the simulated network: conversations, their ends, and attacks by strangers."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable
from functools import partial

import pytest
import trio
import trio.testing
from OpenSSL import SSL

import trio_udp
from trio_udp.dtls import DTLSChannel, Session

from ...conftest import SERVER
from .conftest import NAME, Authority, Identity, Start, echo
from .test_records import hello, record

HANDSHAKE, CHANGE_CIPHER_SPEC, ALERT = 22, 20, 21
CERTIFICATE = 11


def has_certificate(datagrams: list[bytes]) -> bool:
    """Whether there is an unprotected Certificate message in the records of these datagrams."""
    for datagram in datagrams:
        while datagram:
            if (datagram[0], datagram[3:5], datagram[13]) == (HANDSHAKE, b"\0\0", CERTIFICATE):
                return True
            datagram = datagram[13 + int.from_bytes(datagram[11:13], "big") :]
    return False


async def test_payloads_come_in_order_and_unchanged(start: Start) -> None:
    """Payloads of 1 to 16,384 bytes arrive unchanged, and none of them is readable on the network."""
    secured = await start()
    payloads = [b"hello", bytes(range(256)), b"x" * 1_195, b"secret" * 2_730]
    async with secured.connected() as channel:
        await channel.send_many(payloads)
        received: list[bytes] = []
        while len(received) < len(payloads):
            received += await channel.receive_many()
        await channel.send(memoryview(b"view"))
        assert [*received, await channel.receive()] == [*payloads, b"view"]
    assert not any(b"hello" in event.payload or b"secret" in event.payload for event in secured.network.events)
    assert (secured.handler.handshakes, secured.handler.handshakes_failed) == (1, 0)


async def test_payloads_that_cannot_be_a_record_are_refused(start: Start) -> None:
    """A payload that is empty, too long or not bytes raises at the call, and the channel stays usable."""
    secured = await start()
    async with secured.connected() as channel:
        with pytest.raises(ValueError, match="DTLS has no empty payloads"):
            await channel.send(b"")
        with pytest.raises(OSError, match="a DTLS record holds 16384 bytes") as caught:
            channel.send_nowait(bytes(16_385))
        assert caught.value.errno == errno.EMSGSIZE
        with pytest.raises(TypeError):
            await channel.send("text")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="empty"):
            await channel.send_many([b"fine", b""])
        channel.send_nowait(b"still here")
        assert await channel.receive() == b"still here"


async def test_the_channel_has_the_names_of_a_client(start: Start) -> None:
    """A handler's DTLSChannel has the attributes of a Client, with the same meaning."""
    seen: list[object] = []

    async def look(channel: DTLSChannel) -> None:
        client = channel.transport_channel
        assert isinstance(client, trio_udp.Client)
        channel.idle_timeout = 7
        for name in (
            "peer_address",
            "local_address",
            "destination",
            "interface",
            "endpoint",
            "server",
            "ended",
            "credentials",
        ):
            assert getattr(channel, name) == getattr(client, name), name
        seen.append((client.idle_timeout, channel.idle_timeout, channel.validated, channel.session))
        with channel.transaction():
            assert await channel.receive() == b"hello"
        with pytest.raises(trio.WouldBlock):
            channel.receive_nowait()
        channel.validate()
        await channel.send_many([b"1", b"2"])
        seen.append(channel.statistics().received)

    secured = await start(look)
    async with secured.connected() as channel:
        assert channel.peer_address == SERVER
        await channel.send(b"hello")
        assert [await channel.receive(), await channel.receive()] == [b"1", b"2"]
    await trio.testing.wait_all_tasks_blocked()
    assert seen[0] == (7, 7, True, None)


async def test_closing_tells_the_peer(start: Start) -> None:
    """A client that closes ends the handler's channel, and ``ended`` says so; later sends have no effect."""
    ends: list[object] = []

    async def handler(channel: DTLSChannel) -> None:
        async for payload in channel:
            await channel.send(payload)
        ends.append(channel.ended)
        await channel.send(b"goodbye")
        channel.send_nowait(b"goodbye")
        with pytest.raises(trio.EndOfChannel):
            await channel.receive()

    secured = await start(handler)
    async with secured.connected() as channel:
        await channel.send(b"x")
        await channel.receive()
    await trio.testing.wait_all_tasks_blocked()
    assert (ends, list(secured.server.clients)) == (["closed"], [])
    with pytest.raises(trio.ClosedResourceError):
        await channel.send(b"x")
    with pytest.raises(trio.ClosedResourceError):
        await channel.receive()
    with pytest.raises(trio.ClosedResourceError):
        channel.send_nowait(b"x")
    with pytest.raises(trio.ClosedResourceError):
        await channel.do_handshake()


async def test_a_handler_that_returns_closes_the_clients_channel(start: Start) -> None:
    """When the handler returns, the client's channel ends, and sending raises BrokenResourceError."""

    async def once(channel: DTLSChannel) -> None:
        await channel.send(await channel.receive())

    secured = await start(once)
    async with secured.connected() as channel:
        await channel.send(b"x")
        assert [payload async for payload in channel] == [b"x"]
        with pytest.raises(trio.BrokenResourceError, match="the peer has closed the association"):
            await channel.send(b"x")
        with pytest.raises(trio.EndOfChannel):
            channel.receive_nowait()


async def test_the_handshake_is_done_when_it_is_first_needed(start: Start) -> None:
    """Sending or receiving does the handshake, once, also in two tasks; before that *_nowait raises WouldBlock."""
    secured = await start()
    channel = await secured.open()
    for attempt in (channel.receive_nowait, partial(channel.send_nowait, b"x")):
        with pytest.raises(trio.WouldBlock):
            attempt()
    received: list[bytes] = []
    async with channel, trio.open_nursery() as nursery:

        async def receive() -> None:
            received.append(await channel.receive())
            nursery.cancel_scope.cancel()

        nursery.start_soon(receive)
        nursery.start_soon(channel.send, b"x")
    assert (received, secured.handler.handshakes) == ([b"x"], 1)


async def test_a_handshake_can_be_cancelled_and_continued(start: Start, autojump_clock: trio.testing.MockClock) -> None:
    """A handshake that is cancelled several times goes on where it stopped."""
    secured = await start()
    secured.network.latency = (0.1, 0.1)
    channel = await secured.open()
    attempts = 0
    while True:
        attempts += 1
        with trio.move_on_after(0.15) as scope:
            await channel.do_handshake()
        if not scope.cancelled_caught:
            break
    assert attempts > 2
    async with channel:
        await channel.send(b"x")
        assert await channel.receive() == b"x"
    assert secured.handler.handshakes == 1


async def test_cancelling_a_receive_loses_nothing(start: Start, autojump_clock: trio.testing.MockClock) -> None:
    """Payloads that arrive around the cancellation of a receive are returned by later ones."""

    async def count(channel: DTLSChannel) -> None:
        for number in range(50):
            await channel.send(b"%d" % number)
            await trio.sleep(0.01)

    secured = await start(count)
    received: list[bytes] = []
    async with secured.connected() as channel:
        while len(received) < 50:
            with trio.move_on_after(0.003):
                received.append(await channel.receive())
    assert received == [b"%d" % number for number in range(50)]


async def test_a_sender_takes_no_payload_from_a_receiver(start: Start, autojump_clock: trio.testing.MockClock) -> None:
    """While one task waits to receive, the sends of another task do not keep payloads from it."""
    secured = await start()
    secured.network.latency = (0.1, 0.1)
    received: list[tuple[float, bytes]] = []
    async with secured.connected() as channel, trio.open_nursery() as nursery:

        async def receive() -> None:
            began = trio.current_time()
            for _ in range(3):
                payload = await channel.receive()
                received.append((round(trio.current_time() - began, 3), payload))
            nursery.cancel_scope.cancel()

        nursery.start_soon(receive)
        for number in range(3):
            await channel.send(b"%d" % number)
            await trio.sleep(0.2)
    assert received == [(0.2, b"0"), (0.4, b"1"), (0.6, b"2")]


async def test_closing_drops_waiting_payloads(start: Start) -> None:
    """Payloads that have arrived and were not received are dropped when the channel is closed."""
    secured = await start()
    channel = await secured.open()
    await channel.do_handshake()
    await channel.send_many([b"1", b"2"])
    await trio.testing.wait_all_tasks_blocked()
    assert channel.receive_nowait() == b"1"
    channel.close()
    with pytest.raises(trio.ClosedResourceError):
        await channel.receive()
    with pytest.raises(trio.ClosedResourceError):
        channel.receive_nowait()


async def test_two_records_in_one_datagram_are_two_payloads(start: Start) -> None:
    """Records that a peer packs into one datagram are received one by one."""
    secured = await start()
    async with secured.connected() as channel:
        connection = channel.ssl_connection
        assert connection is not None
        for payload in (b"one", b"two", b"three"):
            connection.send(payload)
        await channel.transport_channel.send(connection.bio_read(2000))
        assert [await channel.receive() for _ in range(3)] == [b"one", b"two", b"three"]


async def test_junk_at_a_live_association_changes_nothing(start: Start) -> None:
    """Forged records of every kind, replays, truncations and noise neither end a conversation nor appear in it."""
    secured = await start()
    async with secured.connected() as channel:
        await channel.send(b"before")
        assert await channel.receive() == b"before"
        mine: trio_udp.Address = channel.local_address
        replay = [event.payload for event in secured.network.events if event.source == mine]
        fatal = b"\x02\x28"  # an alert
        junk = [b"", b"x", b"\x16", bytes(13), bytes(2000), hello()[:40], hello(message_number=1, cookie=bytes(20))]
        junk += [record(9, fatal, kind=kind, epoch=epoch) for kind in range(19, 26) for epoch in (0, 1, 2)]
        junk += [record(2**47, bytes(60), kind=23, epoch=1), record(3, b"", epoch=1), hello()[:-1]]
        for datagram in [*junk, *replay, *[one[:-1] for one in replay], *[one + b"junk" for one in replay]]:
            secured.network.inject(datagram, mine, SERVER)
            secured.network.inject(datagram, SERVER, mine)
        await channel.send(b"after")
        assert await channel.receive() == b"after"
    assert (secured.handler.handshakes, secured.handler.handshakes_failed) == (1, 0)


async def test_a_client_that_restarts_on_its_port(start: Start, autojump_clock: trio.testing.MockClock) -> None:
    """If a client loses its state and starts again from its old port, the old handler ends and a new one starts."""
    ends: list[object] = []

    async def handler(channel: DTLSChannel) -> None:
        number = len(ends)
        ends.append(None)
        async for payload in channel:
            await channel.send(payload)
        ends[number] = channel.ended

    secured = await start(handler)
    first = await secured.open(port=4000)
    await first.do_handshake()
    first.transport_channel.close()  # type: ignore[attr-defined]  # a crash, without a close_notify
    async with secured.connected(port=4000) as second:
        await second.send(b"again")
        assert await second.receive() == b"again"
        assert ends == ["closed", None]
        assert len(secured.server.clients) == 1
    assert trio.current_time() < 2
    assert (secured.handler.handshakes, secured.handler.handshakes_failed) == (2, 0)


async def test_a_client_that_restarts_in_its_handshake(start: Start, autojump_clock: trio.testing.MockClock) -> None:
    """A client that crashes during its handshake can start another one from the same port."""
    secured = await start()
    first = await secured.open(port=4000)
    secured.network.latency = (0.1, 0.1)
    with trio.move_on_after(0.35):
        await first.do_handshake()
    first.transport_channel.close()  # type: ignore[attr-defined]
    await trio.sleep(0.2)  # datagrams to the first one must not reach the second one
    async with secured.connected(port=4000) as second:
        await second.send(b"x")
        assert await second.receive() == b"x"
    assert isinstance(secured.handler.last_error, trio.BrokenResourceError)
    assert "the peer began another handshake" in str(secured.handler.last_error)


@pytest.mark.parametrize("resumed", [False, True], ids=["full", "resumed"])
@pytest.mark.parametrize("handler_sends_first", [False, True], ids=["client first", "server first"])
async def test_a_lost_last_flight_is_repeated(
    start: Start, autojump_clock: trio.testing.MockClock, resumed: bool, handler_sends_first: bool
) -> None:
    """If the last flight of a handshake is lost, its sender repeats it when the other end repeats its own.

    That flight is the server's in a full handshake and the client's in a resumed one. It also works for an end that
    only sends.
    """

    async def tick(channel: DTLSChannel) -> None:
        while channel.ended is None:
            await channel.send(b"tick")
            await trio.sleep(0.5)

    secured = await start(tick if handler_sends_first else echo)
    session: Session | None = None
    if resumed:
        async with secured.connected() as channel:
            session = channel.session
    channel = await secured.open(session=session)
    secured.network.latency = (0.1, 0.1)
    async with channel, trio.open_nursery() as nursery:
        nursery.start_soon(channel.do_handshake)
        # Flights leave at 0 (hello), 0.1, 0.2 (hello with cookie), 0.3, 0.4 and 0.5 seconds.
        await trio.sleep(0.35 if resumed else 0.45)
        with secured.network.partition([channel.local_address]):
            await trio.sleep(0.3)
        if not handler_sends_first:
            await channel.send(b"x")
        assert await channel.receive() in (b"x", b"tick")
        assert trio.current_time() < 5
    assert secured.handler.handshakes_failed == 0
    with trio.move_on_after(1):
        await trio.sleep_forever()
    secured.server.stop()


async def test_repetitions_end(start: Start, autojump_clock: trio.testing.MockClock) -> None:
    """After both ends are established, neither repeats anything, however the handshake went."""
    secured = await start(idle_timeout=math.inf)
    secured.network.loss, secured.network.duplicate, secured.network.reorder = 0.3, 0.3, 0.3
    channels = [await secured.open() for _ in range(20)]
    async with trio.open_nursery() as nursery:
        for channel in channels:
            nursery.start_soon(channel.do_handshake)
    secured.network.loss = 0
    with trio.move_on_after(130):  # the longest wait between two repetitions is a minute
        async with trio.open_nursery() as nursery:
            for channel in channels:
                nursery.start_soon(channel.receive)
    before = len(secured.network.events)
    with trio.move_on_after(3600):
        async with trio.open_nursery() as nursery:
            for channel in channels:
                nursery.start_soon(channel.receive)
    assert len(secured.network.events) == before
    for channel in channels:
        channel.close()


@pytest.mark.parametrize(("loss", "least"), [(0.1, 100), (0.3, 99)])
async def test_handshakes_through_loss(
    start: Start, autojump_clock: trio.testing.MockClock, loss: float, least: int
) -> None:
    """With 10 % loss all of 100 handshakes succeed, and with 30 % all but at most one, within 150 seconds."""
    secured = await start()
    network = secured.network
    network.loss, network.latency = loss, (0.01, 0.05)
    done = 0

    async def shake_hands() -> None:
        nonlocal done
        channel = await secured.open()
        with trio.move_on_after(150):
            await channel.do_handshake()
            done += 1
        channel.close()

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(shake_hands)
    assert done >= least


async def test_a_session_is_resumed(
    start: Start, authority: Authority, client_identity: Identity, records_of: Callable[[str], list[bytes]]
) -> None:
    """A resumed handshake sends no certificates, even if clients have some; both ends know them."""
    subjects: list[str] = []

    async def handler(channel: DTLSChannel) -> None:
        certificate = channel.peer_certificate
        assert certificate is not None
        subjects.append(certificate.subject.rfc4514_string())
        await echo(channel)  # type: ignore[arg-type]

    secured = await start(handler, authority.context(authority.issue(NAME), verify=True))
    context = authority.context(client_identity)
    async with secured.connected(context=context, host="198.51.100.7") as channel:
        session = channel.session
    async with secured.connected(context=context, host="198.51.100.8", session=session) as channel:
        await channel.send(b"x")
        assert await channel.receive() == b"x"
        assert channel.peer_certificate is not None
    assert has_certificate(records_of("198.51.100.7"))
    assert not has_certificate(records_of("198.51.100.8"))
    assert subjects == ["CN=client.test"] * 2
    assert repr(session) == f"Session(server_hostname='{NAME}')"


async def test_a_session_is_for_one_name(start: Start) -> None:
    """A session cannot be resumed for another name, because no certificate would prove that it is the same server."""
    secured = await start()
    async with secured.connected() as channel:
        session = channel.session
    for name in ("other.test", None):
        with pytest.raises(ValueError, match=f"the session is for '{NAME}', not for"):
            await secured.open(server_hostname=name, session=session)
    with pytest.raises(TypeError, match=r"session must be a trio_udp\.dtls\.Session"):
        await secured.open(session=b"session")


async def test_a_session_that_is_too_long_is_left_out(
    start: Start, authority: Authority, records_of: Callable[[str], list[bytes]]
) -> None:
    """A session is not resumed if its ticket, with a long certificate, would divide the first flight."""
    long = authority.issue(*(f"{letter * 55}.test" for letter in "abcdefghij"))
    secured = await start(context=authority.context(authority.issue(NAME), verify=True))
    context = authority.context(long)
    session: Session | None = None
    for host in ("198.51.100.7", "198.51.100.8"):
        async with secured.connected(context=context, host=host, session=session) as channel:
            session = channel.session
        assert has_certificate(records_of(host))
    assert (secured.handler.handshakes, secured.handler.handshakes_failed) == (2, 0)


async def test_a_forgotten_session_is_not_an_error(
    start: Start, server_context: SSL.Context, authority: Authority
) -> None:
    """A server that does not know a session, for example after a restart, does a full handshake."""
    secured = await start()
    async with secured.connected() as channel:
        session = channel.session
    secured.server.stop()
    await trio.testing.wait_all_tasks_blocked()
    again = await start(context=authority.context(authority.issue(NAME)))
    async with again.connected(session=session) as channel:
        await channel.send(b"x")
        assert await channel.receive() == b"x"


async def test_over_any_channel(authority: Authority, identity: Identity) -> None:
    """Two ends can do a handshake over any channel of bytes, such as two memory channels, and close it properly."""
    to_server, at_server = trio.open_memory_channel[bytes](100)
    to_client, at_client = trio.open_memory_channel[bytes](100)
    client = DTLSChannel(Stapled(to_server, at_client), authority.context(), server_hostname=NAME)
    server = DTLSChannel(Stapled(to_client, at_server), authority.context(identity), server_side=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.do_handshake)
        nursery.start_soon(client.do_handshake)
    await client.send(b"ping")
    assert await server.receive() == b"ping"
    await client.aclose()
    with pytest.raises(trio.EndOfChannel):
        await server.receive()
    assert (server.ended, client.peer_certificate is not None) == ("closed", True)
    await server.aclose()


class Stapled(trio.abc.Channel[bytes]):
    """The smallest possible channel."""

    def __init__(self, there: trio.MemorySendChannel[bytes], here: trio.MemoryReceiveChannel[bytes]) -> None:
        self._there, self._here = there, here

    async def send(self, value: bytes) -> None:
        await self._there.send(value)

    async def receive(self) -> bytes:
        return await self._here.receive()

    async def aclose(self) -> None:
        self._there.close()
        self._here.close()
        await trio.lowlevel.checkpoint()
