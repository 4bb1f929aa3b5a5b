"""An endpoint without a server: a datagram socket by itself, over both engines and on a simulated network."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from trio_udp import Datagram, Endpoint, Server, datagram_handler, open_endpoints, serve_endpoints
from trio_udp.testing import SimulatedNetwork

from ..conftest import ALICE, BOB, SERVER, InMemory, check_adds_up, echo, in_memory, narrow

over_both_engines = pytest.mark.usefixtures("engine")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="option numbers and loopback addresses of Linux")

# From asm-generic/socket.h and linux/in.h.
SO_TIMESTAMPNS, IP_RECVTTL, IP_TTL = 35, 12, 2


@asynccontextmanager
async def opened(host: str = "127.0.0.1", **options: Any) -> AsyncIterator[Endpoint]:
    (endpoint,) = await open_endpoints(0, host=host, **options)
    async with endpoint:
        with trio.fail_after(5):
            yield endpoint


@contextmanager
def peer_of(endpoint: Endpoint, host: str = "127.0.0.1") -> Iterator[socket.socket]:
    """Open a plain socket on loopback that talks to an endpoint."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((host, 0))
        sock.connect((host, endpoint.local_address[1]))
        sock.settimeout(5)
        yield sock


# Over real sockets


@over_both_engines
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_receive_and_reply(host: str) -> None:
    """receive returns a Datagram with payload, addresses and endpoint, and reply answers it."""
    async with opened(host) as endpoint:
        with peer_of(endpoint, host) as peer:
            peer.send(b"hello")
            datagram = await endpoint.receive()
            assert datagram.payload == b"hello"
            assert datagram.peer_address == peer.getsockname()
            assert datagram.local_address == datagram.destination == endpoint.local_address
            assert datagram.interface is None
            assert datagram.endpoint is endpoint
            assert datagram.server is None
            assert datagram.ancillary == ()
            await datagram.reply(b"hello to you")
            datagram.reply_nowait(memoryview(b""))
            assert [peer.recv(100), peer.recv(100)] == [b"hello to you", b""]
    s = endpoint.statistics()
    assert (s.received, s.bytes_received, s.sent, s.bytes_sent) == (1, 5, 2, 12)


@over_both_engines
async def test_datagrams_of_all_senders_in_arrival_order() -> None:
    """async for yields the datagrams of all senders in arrival order, including empty ones."""
    async with opened() as endpoint:
        with peer_of(endpoint) as one, peer_of(endpoint) as other:
            payloads = [b"%d" % number for number in range(199)] + [b""]
            for number, payload in enumerate(payloads):
                (one, other)[number * number % 3 % 2].send(payload)
            seen: list[bytes] = []
            async for datagram in endpoint:
                seen.append(datagram.payload)
                if not datagram.payload:
                    break
            assert seen == payloads
            with pytest.raises(trio.WouldBlock):
                endpoint.receive_nowait()


@over_both_engines
async def test_receive_nowait_reads_past_truncated_datagrams() -> None:
    """receive_nowait returns the datagram behind a whole batch of truncated ones."""
    async with opened(max_datagram_size=1) as endpoint:
        with peer_of(endpoint) as peer:
            for _ in range(64):
                peer.send(b"long")
            peer.send(b"1")
            assert endpoint.receive_nowait().payload == b"1"
    assert endpoint.statistics().truncated == 64


@over_both_engines
async def test_receive_nowait() -> None:
    """receive_nowait returns the next datagram, and raises WouldBlock if none has arrived."""
    async with opened() as endpoint:
        with peer_of(endpoint) as peer:
            with pytest.raises(trio.WouldBlock):
                endpoint.receive_nowait()
            for payload in (b"1", b"2", b"3"):
                peer.send(payload)
            assert endpoint.receive_nowait().payload == b"1"
            assert (await endpoint.receive()).payload == b"2"
            assert endpoint.receive_nowait().payload == b"3"
            with pytest.raises(trio.WouldBlock):
                endpoint.receive_nowait()


@over_both_engines
async def test_send_to() -> None:
    """send_to and send_to_nowait of an endpoint send to any address, even one that has never sent anything."""
    async with opened() as endpoint, opened() as other:
        await endpoint.send_to(b"1", other.local_address)
        endpoint.send_to_nowait(bytearray(b"2"), other.local_address, local_address=endpoint.local_address)
        for payload in (b"1", b"2"):
            datagram = await other.receive()
            assert (datagram.payload, datagram.peer_address) == (payload, endpoint.local_address)


@over_both_engines
async def test_send_to_raises_the_kernels_error() -> None:
    """send_to raises and counts the kernel's error about its datagram, and the endpoint stays open."""
    async with opened() as endpoint:
        for address, error in ((("127.0.0.1", 0), errno.EINVAL), (("255.255.255.255", 9), errno.EACCES)):
            with pytest.raises(OSError, match=r".") as caught:
                await endpoint.send_to(b"x", address)
            assert caught.value.errno in (error, errno.ENETUNREACH)
        with pytest.raises(OSError, match="too long") as caught:
            await endpoint.send_to(bytes(65_508), endpoint.local_address)
        assert caught.value.errno == errno.EMSGSIZE
        with pytest.raises(ValueError, match="no endpoint here can send"):
            await endpoint.send_to(b"x", ("::1", 9))
        with pytest.raises(TypeError):
            await endpoint.send_to("x", endpoint.local_address)  # type: ignore[arg-type]
        await endpoint.send_to(b"me", endpoint.local_address)
        assert (await endpoint.receive()).payload == b"me"
        assert endpoint.statistics().sent == 1


@linux_only
@over_both_engines
async def test_a_reply_leaves_from_where_the_datagram_was_sent_to() -> None:
    """On a socket bound to all addresses, a reply, even a late one, leaves from the address the peer sent to."""
    async with opened("0.0.0.0") as endpoint:
        kept: list[Datagram] = []
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            peer.bind(("127.0.0.1", 0))
            peer.settimeout(5)
            addresses = [(host, endpoint.local_address[1]) for host in ("127.0.0.2", "127.0.0.1", "127.0.0.3")]
            for address in addresses:
                peer.sendto(b"x", address)
                kept.append(await endpoint.receive())
            assert [datagram.local_address for datagram in kept] == addresses
            for datagram in reversed(kept):
                await datagram.reply(b"y")
            assert [peer.recvfrom(10)[1] for _ in kept] == addresses[::-1]


@linux_only
@over_both_engines
async def test_a_broadcast_has_an_interface() -> None:
    """A datagram to a broadcast address has that destination and an interface; a reply leaves from our own address."""
    async with opened("0.0.0.0") as endpoint:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            peer.bind(("127.0.0.1", 0))
            peer.settimeout(5)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            port = endpoint.local_address[1]
            peer.sendto(b"anybody?", ("127.255.255.255", port))
            datagram = await endpoint.receive()
            assert datagram.destination == ("127.255.255.255", port)
            assert datagram.interface == socket.if_nametoindex("lo")
            assert datagram.local_address == ("127.0.0.1", port)
            await datagram.reply(b"me")
            assert peer.recvfrom(10) == (b"me", ("127.0.0.1", port))


@linux_only
@over_both_engines
async def test_ancillary_messages_that_configure_asked_for() -> None:
    """Control messages that configure has enabled, such as time stamps, come with the datagram, undecoded."""

    def configure(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)

    async with opened(configure=configure) as endpoint:
        with peer_of(endpoint) as peer:
            peer.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 7)
            peer.send(b"x")
            datagram = await endpoint.receive()
            messages = {(level, kind): data for level, kind, data in datagram.ancillary}
            assert messages.keys() == {(socket.SOL_SOCKET, SO_TIMESTAMPNS), (socket.IPPROTO_IP, IP_TTL)}
            assert len(messages[socket.SOL_SOCKET, SO_TIMESTAMPNS]) == 16
            assert int.from_bytes(messages[socket.IPPROTO_IP, IP_TTL], sys.byteorder) == 7
            await datagram.reply(b"y")
            assert peer.recv(10) == b"y"


@linux_only
@over_both_engines
async def test_time_stamps_for_a_datagram_handler_and_accept(nursery: trio.Nursery) -> None:
    """A datagram_handler and accept see the control messages too."""
    seen: list[Any] = []

    def note(datagram: Datagram) -> bytes:
        seen.append([(level, kind, len(data)) for level, kind, data in datagram.ancillary])
        return b"ok"

    for handler, options in ((datagram_handler(note), {}), (echo, {"accept": note})):
        (endpoint,) = await open_endpoints(
            0, host="127.0.0.1", configure=lambda sock: sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        )
        await nursery.start(
            lambda task_status, handler=handler, endpoint=endpoint, options=options: serve_endpoints(
                handler, [endpoint], task_status=task_status, **options
            )
        )
        with peer_of(endpoint) as peer:
            peer.send(b"x")
            assert await trio.to_thread.run_sync(peer.recv, 10) == b"ok"
    assert seen == [[(socket.SOL_SOCKET, SO_TIMESTAMPNS, 16)]] * 2


# Receiving is exclusive


@over_both_engines
async def test_a_server_runs_on_it(nursery: trio.Nursery) -> None:
    """While a server runs on the endpoint, receive raises BusyResourceError, and sending is allowed."""
    async with opened() as endpoint, opened() as other:
        server: Server = await nursery.start(serve_endpoints, echo, [endpoint])
        for _ in range(2):
            with pytest.raises(trio.BusyResourceError):
                await endpoint.receive()
            with pytest.raises(trio.BusyResourceError):
                endpoint.receive_nowait()
            with pytest.raises(trio.BusyResourceError):
                async for _ in endpoint:
                    pass
        await endpoint.send_to(b"hello", other.local_address)
        assert (await other.receive()).payload == b"hello"
        await other.send_to(b"echo", endpoint.local_address)
        assert (await other.receive()).payload == b"echo"
        assert not endpoint.closed
        server.stop()


@over_both_engines
async def test_a_task_receives_from_it(nursery: trio.Nursery) -> None:
    """While a task receives from the endpoint, serve_endpoints raises BusyResourceError and leaves it open."""
    async with opened() as endpoint, opened() as other:
        received: list[bytes] = []

        async def receive() -> None:
            received.append((await endpoint.receive()).payload)

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await serve_endpoints(echo, [endpoint])
        assert not endpoint.closed
        with pytest.raises(trio.BusyResourceError):
            await endpoint.receive()
        with pytest.raises(trio.WouldBlock):
            endpoint.receive_nowait()
        server: Server = await nursery.start(serve_endpoints, echo, await open_endpoints(0, host="127.0.0.1"))
        with pytest.raises(trio.BusyResourceError):
            server.add_endpoint(endpoint)
        assert not endpoint.closed
        await other.send_to(b"x", endpoint.local_address)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert received == [b"x"]
        # No task receives any more, so a server can take it.
        server.add_endpoint(endpoint)
        await other.send_to(b"y", endpoint.local_address)
        assert (await other.receive()).payload == b"y"


async def test_the_others_are_closed_when_one_is_busy(nursery: trio.Nursery) -> None:
    """If one of several endpoints has another server, it stays open and served; the others are closed."""
    network = SimulatedNetwork()
    one, other = network.endpoint(*SERVER), network.endpoint("192.0.2.54", 53)
    await nursery.start(serve_endpoints, echo, [one])
    with pytest.raises(trio.BusyResourceError):
        await serve_endpoints(echo, [other, one])
    assert (one.closed, other.closed) == (False, True)
    network.inject(b"x", ALICE, SERVER)
    await trio.testing.wait_all_tasks_blocked()
    assert [event.payload for event in network.events if event.destination == ALICE] == [b"x", b"x"]


async def test_a_server_counts_from_the_moment_it_takes_the_endpoint(nursery: trio.Nursery) -> None:
    """A server's statistics begin at 0, even if the endpoint has received and truncated datagrams before."""
    network = SimulatedNetwork()
    on = InMemory(network, network.endpoint(*SERVER, max_datagram_size=5))
    for payload in (b"one", b"too long", b"two"):
        on.put(payload)
    assert (await on.endpoint.receive()).payload == b"one"
    assert (await on.endpoint.receive()).payload == b"two"
    server: Server = await nursery.start(serve_endpoints, echo, [on.endpoint])
    s = server.statistics()
    assert (s.received, s.bytes_received, s.truncated, s.delivered) == (0, 0, 0, 0)
    check_adds_up(server)
    on.put(b"three")
    await on.settle()
    s = server.statistics()
    assert (s.received, s.bytes_received, s.truncated, s.delivered) == (1, 5, 0, 1)
    assert on.endpoint.statistics().received == 4
    check_adds_up(server)


async def test_a_server_handles_read_ahead_datagrams(nursery: trio.Nursery) -> None:
    """A server that takes over an endpoint handles the datagrams that the endpoint had read ahead."""
    on = in_memory()
    for number in range(100):
        on.put(b"%d" % number)
    assert (await on.endpoint.receive()).payload == b"0"
    server: Server = await nursery.start(serve_endpoints, echo, [on.endpoint])
    check_adds_up(server)
    await on.settle()
    assert on.sent_to(ALICE) == [b"%d" % number for number in range(1, 100)]
    s = server.statistics()
    assert (s.received, s.delivered) == (99, 99)
    check_adds_up(server)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("attempt", range(5))  # Trio's task order is random
async def test_read_ahead_datagrams_are_handled_by_a_server_that_stops(
    nursery: trio.Nursery, shared: bool, attempt: int
) -> None:
    """A server that stops at once still handles datagrams that its endpoint had read ahead."""
    network = SimulatedNetwork()
    on = InMemory(network, network.endpoint(*SERVER, shared=shared))
    for payload in (b"1", b"2", b"3"):
        on.put(payload)
    assert (await on.endpoint.receive()).payload == b"1"
    server: Server = await nursery.start(serve_endpoints, echo, [on.endpoint])
    server.stop()
    await on.settle()
    assert on.endpoint.closed
    s = server.statistics()
    assert (s.received, s.delivered, s.refused_stopping) == (2, 2, 0)
    assert on.sent_to(ALICE) == [b"2", b"3"]
    check_adds_up(server)


# Closing


@over_both_engines
async def test_closing_ends_async_for(nursery: trio.Nursery) -> None:
    """Closing the endpoint wakes the receiving task with ClosedResourceError, and later calls raise it too."""
    async with opened() as endpoint:
        ended: list[str] = []

        async def receive() -> None:
            try:
                async for _ in endpoint:
                    pass
            except trio.ClosedResourceError:
                ended.append("closed")

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        await endpoint.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert ended == ["closed"]
        with pytest.raises(trio.ClosedResourceError):
            await endpoint.receive()
        with pytest.raises(trio.ClosedResourceError):
            endpoint.receive_nowait()
        with pytest.raises(trio.ClosedResourceError):
            await endpoint.send_to(b"x", ("127.0.0.1", 9))
        with pytest.raises(trio.ClosedResourceError):
            endpoint.send_to_nowait(b"x", ("127.0.0.1", 9))


async def test_nothing_is_received_once_it_is_closed() -> None:
    """A closed endpoint returns no datagram, not even one that was read ahead."""
    on = in_memory()
    for payload in (b"1", b"2", b"3"):
        on.put(payload)
    await on.endpoint.receive()
    on.endpoint.close()
    with pytest.raises(trio.ClosedResourceError):
        on.endpoint.receive_nowait()
    with pytest.raises(trio.ClosedResourceError):
        await on.endpoint.receive()


async def test_once_a_server_has_ended_the_endpoint_is_closed(nursery: trio.Nursery) -> None:
    """An endpoint is closed, and no longer busy, after the server that owned it has ended."""
    on = in_memory()
    server: Server = await nursery.start(serve_endpoints, echo, [on.endpoint])
    server.stop()
    await on.settle()
    with pytest.raises(trio.ClosedResourceError):
        on.endpoint.receive_nowait()
    with pytest.raises(trio.ClosedResourceError):
        await on.endpoint.receive()


async def test_a_kept_datagram_can_be_answered_until_the_endpoint_closes(autojump_clock: MockClock) -> None:
    """Stored datagrams can be answered later and in any order, as long as their endpoint is open."""
    on = in_memory()
    on.put(b"1", ALICE)
    on.put(b"2", BOB)
    kept = [await on.endpoint.receive(), await on.endpoint.receive()]
    await trio.sleep(3_600)
    for datagram in reversed(kept):
        await datagram.reply(datagram.payload * 2)
    assert on.sent == [(BOB, b"22"), (ALICE, b"11")]
    on.endpoint.close()
    with pytest.raises(trio.ClosedResourceError):
        kept[0].reply_nowait(b"x")
    with pytest.raises(trio.ClosedResourceError):
        await kept[1].reply(b"x")
    assert kept[0].peer_address == ALICE
    assert kept[0].destination == SERVER


# Waiting, cancellation, and other tasks


async def test_cancelling_receive_loses_nothing(autojump_clock: MockClock) -> None:
    """Cancelling receive at any moment loses no datagram."""
    on = in_memory()
    seen: list[bytes] = []

    async def receive_in_bits() -> None:
        while len(seen) < 300:
            with trio.move_on_after(0.001):
                while True:
                    seen.append((await on.endpoint.receive()).payload)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive_in_bits)
        for number in range(300):
            on.put(b"%d" % number)
            if number % 7 == 0:
                await trio.sleep(0.001)
    assert seen == [b"%d" % number for number in range(300)]


async def test_receive_always_notices_cancellation() -> None:
    """receive raises Cancelled in a cancelled scope, with or without a waiting datagram, which stays."""
    on = in_memory()
    for put in (False, True, True):
        if put:
            on.put(b"x")
            on.put(b"x")
        with trio.CancelScope() as scope:
            scope.cancel()
            await on.endpoint.receive()
            pytest.fail("not reached")
        assert scope.cancelled_caught
        if put:
            await on.endpoint.receive()
    assert on.endpoint.receive_nowait().payload == b"x"
    assert on.endpoint.receive_nowait().payload == b"x"


async def test_receiving_lets_others_run() -> None:
    """A task that always finds a datagram lets other tasks run once in 64 datagrams."""
    on = in_memory()
    for _ in range(1_000):
        on.put(b"x")
    seen = most = before = 0

    async def receive() -> None:
        nonlocal seen
        while seen < 1_000:
            await on.endpoint.receive()
            seen += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        while seen < 1_000:
            most, before = max(most, seen - before), seen
            await trio.lowlevel.checkpoint()
    assert 0 < most <= 128


async def test_sending_waits_for_room(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """At a full send buffer, send_to and reply wait, first come first served; the others raise WouldBlock."""
    on = narrow()
    on.put(b"x")
    datagram = await on.endpoint.receive()
    await on.endpoint.send_to(b"first", BOB)
    with pytest.raises(trio.WouldBlock):
        on.endpoint.send_to_nowait(b"no", BOB)
    with pytest.raises(trio.WouldBlock):
        datagram.reply_nowait(b"no")
    nursery.start_soon(datagram.reply, b"second")
    await on.settle()
    nursery.start_soon(on.endpoint.send_to, b"third", BOB)
    await on.settle()
    assert on.sent == [(BOB, b"first")]
    with trio.move_on_after(1) as scope:
        await on.endpoint.send_to(b"never", BOB)
    assert scope.cancelled_caught
    await trio.sleep(30)
    assert on.sent == [(BOB, b"first"), (ALICE, b"second"), (BOB, b"third")]
    s = on.endpoint.statistics()
    assert (s.sent, s.send_errors) == (3, 0)


async def test_a_datagram_from_port_zero_is_delivered_and_not_answered() -> None:
    """A datagram from port 0 or the unspecified address is received; a reply to it is counted, not sent or raised."""
    on = in_memory()
    on.put(b"1", ("192.0.2.1", 0))
    on.put(b"2", ("0.0.0.0", 68))
    for payload in (b"1", b"2"):
        datagram = await on.endpoint.receive()
        assert datagram.payload == payload
        await datagram.reply(b"x")
        datagram.reply_nowait(b"x")
    s = on.endpoint.statistics()
    assert (s.sent, s.send_errors, s.errors) == (0, 4, {"EDESTADDRREQ": 4})


async def test_asking_a_group(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """An endpoint asks a group once, and receives the answers of many members."""
    network = SimulatedNetwork(latency=(0.01, 0.01))
    group = ("239.1.2.3", 1900)
    for number in range(1, 6):
        host = f"192.0.2.{number}"
        member = network.endpoint("0.0.0.0", 1900, own_hosts=[host])
        network.join(member, group[0])
        await nursery.start(serve_endpoints, datagram_handler(lambda datagram: b"here"), [member])
    asking = network.endpoint("192.0.2.100", 5000)
    await asking.send_to(b"who is there?", group)
    heard: set[str] = set()
    with trio.move_on_after(1):
        async for datagram in asking:
            heard.add(datagram.peer_address[0])
    assert sorted(heard) == [f"192.0.2.{number}" for number in range(1, 6)]
