"""Servers behind proxies: every limit counts the client's address, and answers go back through the proxy."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from hypothesis import given, settings, strategies as st
from trio.testing import MockClock

import trio_udp
from trio_udp import Address, Client, Datagram, Handler, Limits, RateLimit, Server, serve_endpoints
from trio_udp.testing import SimulatedNetwork

from ..conftest import ALICE, BOB, CAROL, PLENTY, SERVER, StartServer, check_adds_up, echo, plain_socket, port_of
from ..proxy_headers import MALFORMED, OWN, VALID, header

FRONT = ("203.0.113.53", 53)  # the address that clients send to, an address of the proxies
PROXY, OTHER_PROXY = ("10.0.0.1", 40_000), ("10.0.0.2", 40_000)
STRANGER = ("198.51.100.7", 4000)


@attrs.define
class Behind:
    """A server at ``SERVER`` behind proxies in 10.0.0.0/8."""

    network: SimulatedNetwork
    server: Server

    async def put(self, payload: bytes, client: Address = ALICE, proxy: Address = PROXY) -> list[tuple[Address, bytes]]:
        """Let a client's datagram arrive through a proxy; return the datagrams that the server sends, and where to."""
        return await self.put_raw(header(client, FRONT) + payload, proxy)

    async def put_raw(self, payload: bytes, source: Address = PROXY) -> list[tuple[Address, bytes]]:
        self.network.events.clear()
        self.network.inject(payload, source, SERVER)
        await trio.testing.wait_all_tasks_blocked()
        check_adds_up(self.server)
        return [
            (event.destination, event.payload)
            for event in self.network.events
            if (event.fate, event.source) == ("sent", SERVER)
        ]


Start = Callable[..., Awaitable[Behind]]


@pytest.fixture
def start(nursery: trio.Nursery) -> Start:
    async def start(handler: Handler = echo, **options: Any) -> Behind:
        network = SimulatedNetwork()
        endpoint = network.endpoint(*SERVER, receive_buffer=PLENTY, proxies=["10.0.0.0/8"])
        return Behind(network, await nursery.start(partial(serve_endpoints, handler, [endpoint], **options)))

    return start


@trio_udp.datagram_handler
def repeat(datagram: Datagram) -> bytes:
    return datagram.payload


@trio_udp.datagram_handler
def tell_ends(datagram: Datagram) -> bytes:
    return repr((datagram.peer_address, datagram.local_address)).encode()


async def test_one_client_for_each_address_in_the_headers(start: Start) -> None:
    """Peers behind one proxy are separate clients, and all answers go to the proxy's socket without headers."""
    behind = await start()
    assert await behind.put(b"1") == [(PROXY, b"1")]
    assert await behind.put(b"2", BOB) == [(PROXY, b"2")]
    assert await behind.put(b"3") == [(PROXY, b"3")]
    clients = [(c.peer_address, c.local_address, c.destination) for c in behind.server.clients]
    assert clients == [(ALICE, FRONT, FRONT), (BOB, FRONT, FRONT)]


async def test_answers_go_to_the_socket_that_asked(start: Start) -> None:
    """A peer that sends through two proxies is two clients, and each proxy gets the answers to its own datagrams."""
    behind = await start()
    for proxy in (PROXY, OTHER_PROXY, (PROXY[0], 40_001), PROXY):
        assert await behind.put(b"x", proxy=proxy) == [(proxy, b"x")]
    assert [client.peer_address for client in behind.server.clients] == [ALICE] * 3


async def test_the_proxy_itself_is_a_client(start: Start) -> None:
    """A proxy that sends a LOCAL header is a client with the proxy's own address."""
    behind = await start()
    assert await behind.put_raw(OWN + b"up?") == [(PROXY, b"up?")]
    assert [(c.peer_address, c.local_address) for c in behind.server.clients] == [(PROXY, SERVER)]


async def test_strangers_are_served_directly(start: Start) -> None:
    """A sender outside the proxies' networks is served as usual, and its headers are ignored."""
    behind = await start(tell_ends)
    assert await behind.put_raw(VALID, STRANGER) == [(STRANGER, repr((STRANGER, SERVER)).encode())]
    assert await behind.put(b"", BOB) == [(PROXY, repr((BOB, FRONT)).encode())]


@pytest.mark.parametrize("handler", [echo, repeat], ids=["clients", "datagram_handler"])
async def test_malformed_datagrams(start: Start, handler: Handler) -> None:
    """A proxy's datagram without a valid header is refused_malformed, and has no other effect."""
    behind = await start(handler)
    for malformed in MALFORMED.values():
        assert await behind.put_raw(malformed) == []
    s = behind.server.statistics()
    assert (s.received, s.refused_malformed, s.clients_started, s.delivered) == (len(MALFORMED), len(MALFORMED), 0, 0)
    assert await behind.put(b"x") == [(PROXY, b"x")]


@pytest.mark.parametrize("handler", [echo, repeat], ids=["clients", "datagram_handler"])
async def test_rate_limit_counts_the_client(start: Start, handler: Handler, autojump_clock: MockClock) -> None:
    """A client that exceeds the rate limit does not affect others behind the same proxy."""
    behind = await start(handler, limits=Limits(rate_limit=RateLimit(1, burst=3)))
    greedy = [await behind.put(b"x", ("192.0.2.1", port)) for port in range(1000, 1010)]
    assert greedy == [[(PROXY, b"x")]] * 3 + [[]] * 7
    assert await behind.put(b"x", ("198.51.100.1", 1000)) == [(PROXY, b"x")]
    assert behind.server.statistics().refused_by_rate == 7


async def test_rate_limit_of_ipv6_clients(start: Start, autojump_clock: MockClock) -> None:
    """Behind an IPv4 proxy, IPv6 clients are limited by their /56, and mapped IPv4 clients as IPv4 clients."""
    behind = await start(limits=Limits(rate_limit=RateLimit(1, burst=2)))
    to = ("2001:db8::53", 53, 0, 0)
    answers = [
        len(await behind.put_raw(header((host, 1000), to) + b"x"))
        for host in ("2001:db8:0:1::1", "2001:db8:0:2::1", "2001:db8:0:3::1", "2001:db8:1::1")
    ]
    assert answers == [1, 1, 0, 1]
    mapped = [("::ffff:192.0.2.1", 1), ("::ffff:192.0.2.2", 1), ("::ffff:192.0.2.3", 1), ("::ffff:198.51.100.1", 1)]
    assert [len(await behind.put_raw(header(client, to) + b"x")) for client in mapped] == [1, 1, 0, 1]


async def test_clients_per_host_counts_the_client(start: Start) -> None:
    """``clients_per_host`` counts clients of the host in the header, not of the proxy."""
    behind = await start(limits=Limits(clients_per_host=2))
    same = [len(await behind.put(b"x", ("192.0.2.1", port))) for port in (1, 2, 3)]
    others = [len(await behind.put(b"x", (f"192.0.2.{i}", 1))) for i in range(2, 9)]
    assert (same, others) == ([1, 1, 0], [1] * 7)
    assert behind.server.statistics().refused_full == 1


async def test_accept_sees_the_client(start: Start) -> None:
    """``accept`` sees the client's addresses and payload; its bytes go back through the proxy."""
    asked = []

    def accept(datagram: Datagram) -> bool | bytes:
        asked.append((datagram.peer_address, datagram.local_address, datagram.payload))
        return b"token?" if datagram.payload == b"hello" else datagram.payload == b"token"

    behind = await start(accept=accept)
    assert await behind.put(b"hello") == [(PROXY, b"token?")]
    assert await behind.put(b"junk", BOB) == []
    assert await behind.put(b"token", CAROL) == [(PROXY, b"token")]
    assert asked == [(ALICE, FRONT, b"hello"), (BOB, FRONT, b"junk"), (CAROL, FRONT, b"token")]
    s = behind.server.statistics()
    assert (s.answered_by_accept, s.refused_by_accept, s.clients_started) == (1, 1, 1)


async def test_amplification_counts_payloads(start: Start) -> None:
    """``Limits.amplification`` counts the bytes of the client's payload, not those of the header."""

    @trio_udp.datagram_handler
    def longer(datagram: Datagram) -> bytes:
        return bytes(13 if datagram.payload == b"more" else 12)

    async def longer_client(client: Client) -> None:
        async for payload in client:
            await client.send(bytes(13 if payload == b"more" else 12))

    for handler in (longer, longer_client):
        behind = await start(handler, limits=Limits(amplification=3))
        assert [len(await behind.put(payload, BOB)) for payload in (b"more", b"same")] == [0, 1]
        assert behind.server.statistics().sends_withheld == 1


@pytest.mark.parametrize("handler", [echo, repeat], ids=["clients", "datagram_handler"])
async def test_sources_in_headers(start: Start, handler: Handler) -> None:
    """A header with the address of the server, a group or a broadcast address is refused_source.

    Otherwise the proxy would send the answer there: to the server itself, perhaps for ever.
    """
    behind = await start(handler)
    refused: list[Address] = [SERVER, ("224.0.0.251", 5353), ("255.255.255.255", 1000), ("ff02::fb", 5353, 0, 0)]
    for source in refused:
        assert await behind.put_raw(header(source, ("::", 53) if ":" in source[0] else FRONT) + b"x") == []
    unanswerable: list[Address] = [("192.0.2.1", 0), ("0.0.0.0", 68), ("::", 546, 0, 0)]
    for source in unanswerable:
        assert await behind.put_raw(header(source, ("::", 53) if ":" in source[0] else FRONT) + b"x") == []
    assert await behind.put(b"x", (SERVER[0], 1000)) == [(PROXY, b"x")]  # another program on the server's machine
    assert await behind.put_raw(header(("2001:db8::1", SERVER[1]), ("::", 53)) + b"x") == [(PROXY, b"x")]
    s = behind.server.statistics()
    assert (s.refused_source, s.delivered, s.send_errors) == (4, 5, 3)


async def test_own_addresses_of_the_other_family(start_on_loopback: StartServer) -> None:
    """A header with the server's IPv6 address is refused on its IPv4 endpoint too, and vice versa."""
    server = await start_on_loopback(repeat, host=None, proxies=["127.0.0.9", "::1"])
    port = port_of(server)
    with plain_socket() as proxy, plain_socket("::1") as proxy6:
        for sock, host in ((proxy, "127.0.0.1"), (proxy6, "::1")):
            for claim, to in ((("::1", port), ("::2", 53)), (("127.0.0.1", port), FRONT), (("127.0.0.1", 1), FRONT)):
                sock.sendto(header(claim, to) + b"x", (host, port))
            # Other programs may have that port.
            sock.sendto(header(("2001:db8::1", port), ("::2", 53)) + b"y", (host, port))
            with trio.fail_after(5):
                assert [await trio.to_thread.run_sync(sock.recv, 100) for _ in range(2)] == [b"x", b"y"]
    assert server.statistics().refused_source == 4
    check_adds_up(server)


async def test_flood_of_headers(start: Start, autojump_clock: MockClock) -> None:
    """A flood of headers with new client addresses gets no more clients, buckets or answers than the limits allow."""
    behind = await start(limits=Limits(max_clients=10, rate_limit=RateLimit(1, burst=1, buckets=100)))
    for i in range(3_000):
        client = (f"198.18.{i // 250}.{i % 250}", 1 + i)
        behind.network.inject(header(client, FRONT) + b"x", PROXY, SERVER)
    await trio.testing.wait_all_tasks_blocked()
    s = behind.server.statistics()
    assert (s.received, s.clients, s.clients_started, s.delivered) == (3_000, 10, 10, 10)
    check_adds_up(behind.server)
    known = [place.known for place in behind.server._state.places]
    assert [len(routes) for routes in known] == [10]


async def test_eviction_makes_room(start: Start) -> None:
    """With evict_idle, a flood of headers evicts waiting clients, but not a validated one behind the proxy."""

    async def validate(client: Client) -> None:
        async for payload in client:
            if payload == b"validate":
                client.validate()
            await client.send(payload)

    behind = await start(validate, limits=Limits(max_clients=5, when_full="evict_idle"))
    assert await behind.put(b"validate") == [(PROXY, b"validate")]
    for i in range(50):
        assert await behind.put(b"x", ("198.18.0.1", 1 + i)) == [(PROXY, b"x")]
    assert await behind.put(b"still here") == [(PROXY, b"still here")]
    s = behind.server.statistics()
    assert (s.clients, s.clients_started, s.clients_evicted) == (5, 51, 46)


async def test_connect_is_direct(start: Start) -> None:
    """``Server.connect`` sends to the address itself, and receives its direct datagrams without a header."""
    behind = await start()
    client = behind.server.connect(STRANGER)
    assert (client.peer_address, client.local_address) == (STRANGER, SERVER)
    await client.send(b"hello")
    assert await behind.put_raw(b"answer", STRANGER) == []
    assert client.receive_nowait() == b"answer"
    # The same address through the proxy is another client.
    assert await behind.put(b"x", STRANGER) == [(PROXY, b"x")]
    assert [c.local_address for c in behind.server.clients] == [SERVER, FRONT]
    await client.aclose()


async def test_connect_to_a_proxy(start: Start) -> None:
    """``Server.connect`` can reach a proxy itself, whose own datagrams have a LOCAL header."""
    behind = await start()
    client = behind.server.connect(PROXY)
    assert await behind.put(b"of Alice") == [(PROXY, b"of Alice")]
    await behind.put_raw(b"without header")
    await behind.put_raw(OWN + b"answer")
    assert client.receive_nowait() == b"answer"
    with pytest.raises(trio.WouldBlock):
        client.receive_nowait()
    await client.aclose()


async def test_connect_to_a_client_behind_a_proxy(start: Start) -> None:
    """``Server.connect`` reaches the address of a client behind a proxy directly, but not from the proxy's address."""
    behind = await start()
    await behind.put(b"x")
    client = behind.server.connect(ALICE)
    await client.send(b"hello")
    assert [(e.source, e.destination) for e in behind.network.events if e.payload == b"hello"][:1] == [(SERVER, ALICE)]
    with pytest.raises(ValueError, match=r"^no endpoint here can send to"):
        behind.server.connect(ALICE, local_address=FRONT)
    with pytest.raises(trio.BusyResourceError):
        behind.server.connect(ALICE)
    await client.aclose()


async def test_send_to_all_reaches_clients_behind_proxies(start: Start) -> None:
    """``send_to_all`` reaches every client the way its datagrams came, through a proxy or directly."""
    behind = await start()
    await behind.put(b"x")
    await behind.put(b"x", BOB, OTHER_PROXY)
    await behind.put_raw(b"x", STRANGER)
    behind.network.events.clear()
    await behind.server.send_to_all(b"tick")
    sent = [event.destination for event in behind.network.events if event.fate == "sent"]
    assert sorted(sent) == [PROXY, OTHER_PROXY, STRANGER]


async def test_long_answers(start: Start) -> None:
    """The longest possible answer depends on the family of the proxy's socket, not on that of the client."""

    async def answer(client: Client) -> None:
        async for _ in client:
            with pytest.raises(OSError, match=os.strerror(errno.EMSGSIZE)):
                await client.send(bytes(65_508))
            await client.send(bytes(65_507))

    behind = await start(answer)
    (answered,) = await behind.put_raw(header(("2001:db8::1", 1), ("2001:db8::53", 53)) + b"x")
    assert (answered[0], len(answered[1])) == (PROXY, 65_507)


async def test_draining(start: Start) -> None:
    """While a server drains, malformed datagrams are still refused_malformed, and others are refused_stopping."""
    release = trio.Event()

    async def slow(client: Client) -> None:
        await release.wait()
        async for payload in client:
            await client.send(payload)

    behind = await start(slow)
    assert await behind.put(b"x") == []
    behind.server.stop()
    await trio.testing.wait_all_tasks_blocked()
    await behind.put(b"late", BOB)
    await behind.put_raw(b"malformed")
    s = behind.server.statistics()
    assert (s.refused_stopping, s.refused_malformed, s.waiting) == (1, 1, 1)
    release.set()
    await trio.testing.wait_all_tasks_blocked()
    check_adds_up(behind.server)


async def test_counts_begin_when_a_server_takes_over(nursery: trio.Nursery) -> None:
    """On an endpoint that was received from before, a server's counts start at 0; read-ahead datagrams are handled."""
    network = SimulatedNetwork()
    endpoint = network.endpoint(*SERVER, proxies=["10.0.0.0/8"])
    for payload in (b"a", b"bb", b"ccc"):
        network.inject(header(ALICE, FRONT) + payload, PROXY, SERVER)
        network.inject(b"malformed", PROXY, SERVER)
    assert (await endpoint.receive()).payload == b"a"
    server: Server = await nursery.start(serve_endpoints, echo, [endpoint])
    await trio.testing.wait_all_tasks_blocked()
    s = server.statistics()
    assert (s.received, s.bytes_received, s.delivered, s.refused_malformed) == (2, 5, 2, 0)
    network.inject(b"malformed", PROXY, SERVER)
    await trio.testing.wait_all_tasks_blocked()
    s = server.statistics()
    assert (s.received, s.bytes_received, s.refused_malformed) == (3, 14, 1)
    assert endpoint.statistics().refused_malformed == 4
    check_adds_up(server)


arrivals = st.lists(
    st.tuples(
        st.sampled_from(["valid", "own", "malformed", "long", "stranger", "ourselves"]),
        st.integers(0, 3),  # client
        st.sampled_from([PROXY, OTHER_PROXY]),
        st.integers(0, 20),  # length of the payload
    ),
    max_size=150,
)


@settings(max_examples=40, deadline=None)
@given(arrivals, st.booleans())
def test_any_traffic_adds_up(traffic: list[tuple[str, int, Address, int]], with_clients: bool) -> None:
    """For any traffic of proxies and strangers, each datagram is in exactly one counter, and bytes are exact."""

    async def main() -> None:
        network = SimulatedNetwork()
        endpoint = network.endpoint(*SERVER, receive_buffer=PLENTY, proxies=["10.0.0.0/8"], max_datagram_size=30)
        expected = dict.fromkeys(["delivered", "refused_malformed", "truncated", "refused_source"], 0)
        size = 0
        async with trio.open_nursery() as nursery:
            handler = echo if with_clients else repeat
            server: Server = await nursery.start(serve_endpoints, handler, [endpoint])
            for kind, number, proxy, length in traffic:
                source: Address = proxy
                payload = bytes(length)
                client = (f"192.0.2.{number}", 1000)
                if kind == "valid":
                    head, fate = header(client, FRONT), "delivered"
                elif kind == "own":
                    head, fate = OWN, "delivered"
                elif kind == "malformed":
                    head, fate, payload = b"", "refused_malformed", bytes(length)
                elif kind == "long":
                    head, fate, payload = header(client, FRONT), "truncated", bytes(31 + length)
                elif kind == "stranger":
                    head, fate, source = b"", "delivered", client
                else:
                    head, fate = header(SERVER, FRONT), "refused_source"
                network.inject(head + payload, source, SERVER)
                expected[fate] += 1
                size += len(payload)
            await trio.testing.wait_all_tasks_blocked()
            s = server.statistics()
            assert {name: getattr(s, name) for name in expected} == expected
            assert (s.received, s.bytes_received, s.sent) == (len(traffic), size, s.delivered)
            check_adds_up(server)
            server.stop()

    trio.run(main)
