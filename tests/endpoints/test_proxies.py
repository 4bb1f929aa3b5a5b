"""Endpoints with ``proxies``: headers are removed, addresses are read, and only trusted headers count. Both engines."""

from __future__ import annotations

import ipaddress
import logging
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any

import pytest
import trio
from hypothesis import given, strategies as st

import trio_udp
from trio_udp import Address, Datagram, Endpoint
from trio_udp._endpoints import Networks, host_bytes, reader_of
from trio_udp._endpoints.engines.proxy import MAX_ROUTES
from trio_udp.testing import SimulatedNetwork

from ..conftest import StartServer, check_adds_up, plain_socket
from ..proxy_headers import (
    LOCAL,
    MALFORMED,
    OWN,
    PROXY,
    TCP4,
    UDP4,
    UNIX_DATAGRAM,
    UNIX_STREAM,
    UNSPECIFIED,
    header,
    raw_header,
)

PROXY_HOST, STRANGER_HOST = "127.0.0.9", "127.0.8.8"  # the host of plain_socket(), and one that no test trusts

CLIENT, FRONT = ("192.0.2.1", 1000), ("192.0.2.53", 53)  # the addresses that a proxy saw
CLIENT6, FRONT6 = ("2001:db8::1", 1000, 0, 0), ("2001:db8::53", 53, 0, 0)
HEADER, HEADER6 = header(CLIENT, FRONT), header(CLIENT6, FRONT6)

Open = Callable[..., Awaitable[Endpoint]]


@pytest.fixture
def open_one(engine: str, nursery: trio.Nursery) -> Open:
    """Open an endpoint on loopback with each engine, behind a proxy at ``PROXY_HOST``."""

    async def open_one(host: str = "127.0.0.1", proxies: Iterable[Any] = (PROXY_HOST,), **options: Any) -> Endpoint:
        (endpoint,) = await trio_udp.open_endpoints(0, host=host, proxies=proxies, **options)
        nursery.start_soon(close_at_end, endpoint)
        return endpoint

    return open_one


async def close_at_end(endpoint: Endpoint) -> None:
    try:
        await trio.sleep_forever()
    finally:
        endpoint.close()


async def receive(endpoint: Endpoint, sock: socket.socket, *payloads: bytes) -> list[Datagram]:
    """Send datagrams to an endpoint; return the same number of received ones."""
    for payload in payloads:
        sock.sendto(payload, endpoint.local_address)
    with trio.fail_after(5):
        return [await endpoint.receive() for _ in payloads]


def summary(datagram: Datagram) -> tuple[bytes, Address, Address]:
    return datagram.payload, datagram.peer_address, datagram.local_address


async def test_addresses_in_the_header_count(open_one: Open) -> None:
    """A datagram from a proxy has the addresses in its header, and its payload does not include the header."""
    endpoint = await open_one()
    with plain_socket() as proxy:
        (datagram,) = await receive(endpoint, proxy, HEADER + b"query")
    assert summary(datagram) == (b"query", CLIENT, FRONT)
    assert (datagram.destination, datagram.interface) == (FRONT, None)


async def test_replies_go_back_through_the_proxy(open_one: Open) -> None:
    """A reply goes to the proxy's socket, from the address that the proxy sent to, and has no header."""
    endpoint = await open_one()
    with plain_socket() as proxy:
        (datagram,) = await receive(endpoint, proxy, HEADER + b"query")
        await datagram.reply(b"answer")
        datagram.reply_nowait(b"more")
        answers = [proxy.recvfrom(100) for _ in range(2)]
    assert answers == [(b"answer", endpoint.local_address), (b"more", endpoint.local_address)]


async def test_replies_of_a_wildcard_endpoint(open_one: Open) -> None:
    """On a socket bound to all addresses, a reply leaves from the address that the proxy sent to."""
    endpoint = await open_one("0.0.0.0")
    port = endpoint.local_address[1]
    with plain_socket() as proxy:
        proxy.sendto(HEADER + b"query", ("127.0.0.77", port))
        with trio.fail_after(5):
            datagram = await endpoint.receive()
        await datagram.reply(b"answer")
        assert proxy.recvfrom(100) == (b"answer", ("127.0.0.77", port))
    assert summary(datagram) == (b"query", CLIENT, FRONT)


@pytest.mark.parametrize(
    "own",
    [
        OWN,
        raw_header(LOCAL, UDP4, HEADER[16:]),
        raw_header(PROXY, UNSPECIFIED, b""),
        raw_header(PROXY, UNSPECIFIED, b"ignored"),
        raw_header(PROXY, UNIX_STREAM, bytes(216)),
        raw_header(PROXY, UNIX_DATAGRAM, bytes(216)),
    ],
    ids=["LOCAL", "LOCAL with addresses", "AF_UNSPEC", "AF_UNSPEC with bytes", "Unix stream", "Unix datagram"],
)
async def test_the_proxy_itself(open_one: Open, own: bytes) -> None:
    """LOCAL, AF_UNSPEC and Unix-domain headers mean the proxy itself, at its own address."""
    endpoint = await open_one()
    with plain_socket() as proxy:
        (datagram,) = await receive(endpoint, proxy, own + b"are you there?")
        assert summary(datagram) == (b"are you there?", proxy.getsockname(), endpoint.local_address)
        await datagram.reply(b"yes")
        assert proxy.recv(100) == b"yes"


async def test_client_over_a_stream(open_one: Open) -> None:
    """A header may name a client that reached the proxy over TCP, as dnsdist does for DNS over HTTPS."""
    endpoint = await open_one()
    with plain_socket() as proxy:
        (datagram,) = await receive(endpoint, proxy, raw_header(PROXY, TCP4, HEADER[16:]) + b"query")
    assert summary(datagram) == (b"query", CLIENT, FRONT)


async def test_header_alone_is_an_empty_datagram(open_one: Open) -> None:
    """A header without payload is an empty datagram."""
    endpoint = await open_one()
    with plain_socket() as proxy:
        datagrams = await receive(endpoint, proxy, HEADER, OWN, HEADER + b"x")
    assert [datagram.payload for datagram in datagrams] == [b"", b"", b"x"]


async def test_header_of_a_stranger_is_payload(open_one: Open) -> None:
    """A sender outside ``proxies`` keeps its own address, and its payload may look like a header."""
    endpoint = await open_one()
    with plain_socket(STRANGER_HOST) as stranger, plain_socket() as proxy:
        payloads = [HEADER + b"query", OWN, b"", b"query"]
        datagrams = await receive(endpoint, stranger, *payloads)
        assert [summary(d) for d in datagrams] == [
            (payload, stranger.getsockname(), endpoint.local_address) for payload in payloads
        ]
        await datagrams[0].reply(b"answer")
        assert stranger.recv(100) == b"answer"
        # The sender is trusted, not the socket: the proxy's header still counts.
        assert summary((await receive(endpoint, proxy, HEADER))[0]) == (b"", CLIENT, FRONT)
    assert endpoint.statistics().refused_malformed == 0


async def test_malformed_headers_are_counted(open_one: Open) -> None:
    """A proxy's datagram without a valid header is refused and counted; other datagrams arrive in order."""
    endpoint = await open_one()
    with plain_socket() as proxy:
        for i, malformed in enumerate(MALFORMED.values()):
            proxy.sendto(HEADER + b"%d" % i, endpoint.local_address)
            proxy.sendto(malformed, endpoint.local_address)
        datagrams = await receive(endpoint, proxy, HEADER + b"last")
        with trio.fail_after(5):
            datagrams += [await endpoint.receive() for _ in MALFORMED]
    assert [datagram.payload for datagram in datagrams] == [*(b"%d" % i for i in range(len(MALFORMED))), b"last"]
    s = endpoint.statistics()
    assert (s.received, s.refused_malformed, s.truncated) == (2 * len(MALFORMED) + 1, len(MALFORMED), 0)
    assert s.bytes_received == sum(len(payload) for payload in [*MALFORMED.values(), *(d.payload for d in datagrams)])


async def test_nothing_but_malformed(open_one: Open) -> None:
    """Malformed datagrams alone wake no receiver."""
    endpoint = await open_one()
    with plain_socket() as proxy:
        for _ in range(100):
            proxy.sendto(b"query", endpoint.local_address)
        with pytest.raises(trio.WouldBlock):
            endpoint.receive_nowait()
        assert [d.payload for d in await receive(endpoint, proxy, HEADER + b"query")] == [b"query"]
    s = endpoint.statistics()
    assert (s.received, s.refused_malformed) == (101, 100)


async def test_malformed_headers_are_logged(open_one: Open, caplog: pytest.LogCaptureFixture) -> None:
    """The log names a proxy that sends no header, but only once, so that strangers cannot fill the log."""
    endpoint = await open_one()
    with plain_socket() as proxy:
        proxy.sendto(b"query", endpoint.local_address)
        proxy.sendto(b"query", endpoint.local_address)
        await receive(endpoint, proxy, HEADER)
        port = proxy.getsockname()[1]
    assert caplog.record_tuples == [
        (
            "trio_udp",
            logging.WARNING,
            f"refused a datagram without a valid PROXY header from proxy {PROXY_HOST} port {port}",
        )
    ]


async def test_ipv6_client_behind_an_ipv4_proxy(open_one: Open) -> None:
    """Addresses in a header may be of another family than the endpoint's socket."""
    endpoint = await open_one()
    with plain_socket() as proxy:
        datagram, mapped = await receive(
            endpoint,
            proxy,
            HEADER6 + b"query",
            header(("::ffff:192.0.2.1", 1000), ("::ffff:192.0.2.53", 53)) + b"query",
        )
        for received in (datagram, mapped):
            await received.reply(b"answer")
            assert proxy.recv(100) == b"answer"
    assert summary(datagram) == (b"query", CLIENT6, FRONT6)
    assert summary(mapped) == (b"query", CLIENT, FRONT)


async def test_ipv4_client_behind_an_ipv6_proxy(open_one: Open) -> None:
    """An IPv4 client behind a proxy that sends over IPv6 has its IPv4 address."""
    endpoint = await open_one("::1", ["::1"])
    with plain_socket("::1") as proxy:
        datagrams = await receive(endpoint, proxy, HEADER + b"a", HEADER6 + b"b")
        for datagram in datagrams:
            await datagram.reply(datagram.payload)
        assert [proxy.recv(100) for _ in range(2)] == [b"a", b"b"]
    assert [summary(d) for d in datagrams] == [(b"a", CLIENT, FRONT), (b"b", CLIENT6, FRONT6)]


async def test_ipv4_proxy_on_a_dual_stack_socket(engine: str) -> None:
    """IPv4 networks in ``proxies`` also match mapped addresses on a dual-stack socket."""
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", 0))
    async with Endpoint.from_socket(sock, proxies=["127.0.0.9/32"]) as endpoint:
        to = ("127.0.0.1", endpoint.local_address[1])
        with plain_socket() as proxy, plain_socket(STRANGER_HOST) as stranger, trio.fail_after(5):
            proxy.sendto(HEADER + b"query", to)
            datagram = await endpoint.receive()
            assert summary(datagram) == (b"query", CLIENT, FRONT)
            await datagram.reply(b"answer")
            assert proxy.recvfrom(100) == (b"answer", to)
            stranger.sendto(HEADER, to)
            datagram = await endpoint.receive()
            assert (datagram.payload, datagram.peer_address[1]) == (HEADER, stranger.getsockname()[1])


async def test_max_datagram_size_is_of_the_payload(open_one: Open) -> None:
    """``max_datagram_size`` and byte counts apply to the payload, without the header."""
    endpoint = await open_one(max_datagram_size=5)
    long = header(CLIENT, FRONT, tlvs=bytes(300))
    with plain_socket() as proxy, plain_socket(STRANGER_HOST) as stranger:
        for sock, head in ((proxy, HEADER), (stranger, b""), (proxy, long)):
            sock.sendto(head + b"123456", endpoint.local_address)
            assert [d.payload for d in await receive(endpoint, sock, head + b"12345")] == [b"12345"]
    s = endpoint.statistics()
    assert (s.received, s.truncated, s.refused_malformed, s.bytes_received) == (6, 3, 0, 33)


async def test_longest_datagram(open_one: Open) -> None:
    """Header and payload together may fill a UDP datagram to the last byte."""
    endpoint = await open_one()
    payload = bytes(65_507 - len(HEADER))
    with plain_socket() as proxy:
        proxy.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
        assert summary((await receive(endpoint, proxy, HEADER + payload))[0]) == (payload, CLIENT, FRONT)


@pytest.mark.skipif(sys.platform != "linux", reason="GSO is Linux's")
async def test_coalesced_datagrams(start_on_loopback: StartServer) -> None:
    """Each coalesced datagram (GRO) has its own header, and each client gets its reply."""
    seen: list[tuple[Address, bytes]] = []
    all_seen = trio.Event()

    async def echo(client: trio_udp.Client) -> None:
        async for payload in client:
            seen.append((client.peer_address, payload))
            if len(seen) == len(clients):
                all_seen.set()
            await client.send(payload)

    server = await start_on_loopback(echo, proxies=[PROXY_HOST])
    clients: list[Address] = [("192.0.2.1", 1000 + i) for i in range(40)]
    with plain_socket() as proxy:
        datagrams = [header(client, FRONT) + b"%02d" % i for i, client in enumerate(clients)]
        size = len(datagrams[0])
        proxy.sendmsg(
            [b"".join(datagrams)],
            [(socket.IPPROTO_UDP, 103, struct.pack("@H", size))],
            0,
            server.endpoints[0].local_address,
        )
        with trio.fail_after(5):
            await all_seen.wait()
            answers = [await trio.to_thread.run_sync(proxy.recv, 100) for _ in clients]
    assert sorted(seen) == [(client, b"%02d" % i) for i, client in enumerate(clients)]
    assert sorted(answers) == [b"%02d" % i for i in range(40)]
    check_adds_up(server)


async def test_connected_socket(engine: str) -> None:
    """A socket connected to a proxy serves the clients behind it."""
    with plain_socket() as proxy:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect(proxy.getsockname())
        async with Endpoint.from_socket(sock, proxies=["127.0.0.0/8"]) as endpoint:
            datagrams = await receive(endpoint, proxy, HEADER + b"a", OWN + b"b")
            assert [(d.payload, d.peer_address) for d in datagrams] == [(b"a", CLIENT), (b"b", proxy.getsockname())]
            await datagrams[0].reply(b"answer")
            assert proxy.recv(100) == b"answer"
            assert [d.payload for d in await receive(endpoint, proxy, OWN + b"c")] == [b"c"]
            proxy.sendto(b"malformed", endpoint.local_address)
            with pytest.raises(trio.WouldBlock):
                endpoint.receive_nowait()
            assert endpoint.statistics().refused_malformed == 1


async def test_proxy_with_a_reserved_address() -> None:
    """A proxy may have an address in 240.0.0.0/4, which is reserved, but used in private networks."""
    network = SimulatedNetwork()
    endpoint = network.endpoint("192.0.2.53", 53, proxies=["240.0.0.0/4"])
    network.inject(HEADER, ("240.0.0.1", 1000), ("192.0.2.53", 53))
    assert (await endpoint.receive()).peer_address == CLIENT


async def test_send_to_is_direct(open_one: Open) -> None:
    """``send_to`` sends to the address itself, not through a proxy."""
    endpoint = await open_one()
    with plain_socket(STRANGER_HOST) as stranger, plain_socket() as proxy:
        (datagram,) = await receive(endpoint, proxy, header(stranger.getsockname(), FRONT))
        assert datagram.peer_address == stranger.getsockname()
        await endpoint.send_to(b"hello", datagram.peer_address)
        assert stranger.recvfrom(100) == (b"hello", endpoint.local_address)
        with pytest.raises(
            ValueError, match=r"^no endpoint here can send to \('.*'\, \d+\) from \('192.0.2.53', 53\)$"
        ):
            await endpoint.send_to(b"hello", datagram.peer_address, local_address=datagram.local_address)


async def test_takes_over_an_inherited_socket(engine: str) -> None:
    """``from_socket`` takes ``proxies`` too, here as objects of the module ``ipaddress``, and closes the socket."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    networks = [ipaddress.IPv6Network("2001:db8::/32"), ipaddress.ip_network("127.0.0.8/30")]
    async with Endpoint.from_socket(sock, proxies=iter(networks)) as endpoint:
        assert endpoint.socket.getsockname() == endpoint.local_address
        with plain_socket() as proxy:
            assert summary((await receive(endpoint, proxy, HEADER))[0]) == (b"", CLIENT, FRONT)
            assert not endpoint.closed
    assert endpoint.closed
    assert sock.fileno() == -1


async def test_without_proxies_there_is_no_other_engine(engine: str) -> None:
    """An endpoint without ``proxies``, or with an empty list, has the plain engine."""
    empty: list[dict[str, Any]] = [{}, {"proxies": []}]
    for options in empty:
        (endpoint,) = await trio_udp.open_endpoints(0, host="127.0.0.1", **options)
        assert type(reader_of(endpoint).engine).__name__ in ("LinuxEngine", "PortableEngine")
        endpoint.close()


async def test_senders_without_number(autojump_clock: trio.testing.MockClock) -> None:
    """The cache of senders stays bounded for any number of addresses, and its answers stay right."""
    network = SimulatedNetwork()
    endpoint = network.endpoint("192.0.2.53", 53, proxies=["10.0.0.0/8"])
    reader = reader_of(endpoint)
    for i in range(3 * MAX_ROUTES):
        network.inject(HEADER, (f"{10 + i % 2}.0.0.1", 1 + i), ("192.0.2.53", 53))
        datagram = await endpoint.receive()
        assert (datagram.payload, datagram.peer_address == CLIENT) == ((HEADER, False) if i % 2 else (b"", True))
        assert len(reader.engine._is_proxy) <= MAX_ROUTES  # type: ignore[attr-defined]


async def test_a_group_is_not_a_proxy() -> None:
    """A group address is never trusted, even inside a network in ``proxies``, because no answer may go there."""
    network = SimulatedNetwork()
    endpoint = network.endpoint("192.0.2.53", 53, proxies=["0.0.0.0/0"])
    for source in (("224.0.0.251", 5353), ("255.255.255.255", 1000), ("0.0.0.0", 68)):
        network.inject(HEADER, source, ("192.0.2.53", 53))
        datagram = await endpoint.receive()
        assert (datagram.payload, datagram.peer_address) == (HEADER, source)


# The argument.


@pytest.mark.parametrize(
    ("proxies", "error", "message"),
    [
        ("10.0.0.0/8", TypeError, "proxies must be a list of networks, not '10.0.0.0/8'"),
        (
            ipaddress.ip_network("10.0.0.0/31"),
            TypeError,
            "proxies must be a list of networks, not IPv4Network('10.0.0.0/31')",
        ),
        (True, TypeError, "proxies must be a list of networks, not True"),
        (None, TypeError, "proxies must be a list of networks, not None"),
        ([10], TypeError, "proxies must be networks as str or of the module ipaddress, not 10"),
        ([b"10.0.0.1"], TypeError, "proxies must be networks as str or of the module ipaddress, not b'10.0.0.1'"),
        (["10.0.0.1/8"], ValueError, "proxies: 10.0.0.1/8 has host bits set"),
        (["::1", "lb.example"], ValueError, "proxies: 'lb.example' does not appear to be an IPv4 or IPv6 network"),
        (["10.0.0.0/33"], ValueError, "proxies: '10.0.0.0/33' does not appear to be an IPv4 or IPv6 network"),
        ([""], ValueError, "proxies: '' does not appear to be an IPv4 or IPv6 network"),
        (["fe80::%eth0/64"], ValueError, "proxies: a network has no scope: 'fe80::%eth0/64'"),
    ],
)
async def test_bad_networks(proxies: Any, error: type[Exception], message: str) -> None:
    """A wrong ``proxies`` raises at the call, with one line that names it, and opens nothing."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))

    async def handler(client: trio_udp.Client) -> None: ...

    calls: list[Callable[[], Any]] = [
        partial(trio_udp.serve, handler, 0, host="127.0.0.1", proxies=proxies),
        partial(trio_udp.open_endpoints, 0, host="127.0.0.1", proxies=proxies),
        partial(Endpoint.from_socket, sock, proxies=proxies),
        partial(SimulatedNetwork().endpoint, "192.0.2.1", 1, proxies=proxies),
    ]
    for call in calls:
        with pytest.raises(error) as raised:
            await call()
        assert str(raised.value) == message
    assert sock.fileno() != -1  # still owned by the caller
    sock.close()


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="needs Unix-domain sockets")
def test_not_for_unix_domain_sockets(tmp_path: Any) -> None:
    """``proxies`` raises for a Unix-domain socket, whose senders have no IP addresses."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "socket"))
        with pytest.raises(ValueError, match=r"^proxies are for sockets of IPv4 and IPv6, not "):
            Endpoint.from_socket(sock, proxies=["10.0.0.0/8"])


hosts = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))


@given(hosts, st.lists(st.tuples(hosts, st.integers(0, 128)), max_size=4), st.integers(0, 128))
def test_networks(host: Any, others: list[tuple[Any, int]], bits: int) -> None:
    """A host is in the networks if and only if the module ``ipaddress`` says so of one of them."""
    chosen = [
        ipaddress.ip_network((address, min(size, address.max_prefixlen)), strict=False)
        for address, size in [*others, (host, bits)]
    ]
    for networks in (chosen, chosen[:-1]):
        plain = map(_unmapped, networks)
        expected = any(host in network for network in plain if network.version == host.version)
        parsed = Networks.parse("proxies", networks)
        if ":" not in str(host) or host.ipv4_mapped is None:
            assert (host_bytes((str(host), 1)) in parsed) == expected
        assert bool(parsed) == bool(networks)


def _unmapped(network: Any) -> Any:
    """Return the IPv4 network that a network of mapped addresses means; return any other as it is."""
    mapped = network.network_address.ipv4_mapped if network.version == 6 and network.prefixlen >= 96 else None
    return network if mapped is None else ipaddress.ip_network((mapped, network.prefixlen - 96))


def test_mapped_networks() -> None:
    """A network of mapped addresses means the IPv4 network, because both are the same hosts."""
    networks = Networks.parse("proxies", ["::ffff:192.0.2.0/120"])
    assert host_bytes(("192.0.2.1", 1)) in networks
    assert host_bytes(("::ffff:192.0.2.1", 1, 0, 0)) in networks
    assert host_bytes(("192.0.3.1", 1)) not in networks
