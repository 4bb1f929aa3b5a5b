"""Reading the header of the PROXY protocol: a pure function over bytes."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import pytest
from hypothesis import given, strategies as st
from proxyprotocol import ProxyProtocolIncompleteError
from proxyprotocol.result import (
    ProxyResult,
    ProxyResultIPv4,
    ProxyResultIPv6,
    ProxyResultLocal,
    ProxyResultUnix,
    ProxyResultUnknown,
)
from proxyprotocol.tlv import ProxyProtocolTLV
from proxyprotocol.v2 import ProxyProtocolV2

from trio_udp import Address
from trio_udp._endpoints.engines.proxy_header import addresses, read_header

from ..proxy_headers import (
    LOCAL,
    MALFORMED,
    OWN,
    PROXY,
    SIGNATURE,
    TCP4,
    TCP6,
    UDP4,
    UDP6,
    UNIX_DATAGRAM,
    UNIX_STREAM,
    UNSPECIFIED,
    VALID,
    header,
    raw_header,
    tlv,
)

KNOWN_FAMILIES = [UNSPECIFIED, TCP4, UDP4, TCP6, UDP6, UNIX_STREAM, UNIX_DATAGRAM]

ports = st.integers(0, 65_535)
ipv4_addresses = st.tuples(st.ip_addresses(v=4).map(str), ports)
ipv6_addresses = st.tuples(st.ip_addresses(v=6).map(str), ports)
pairs = st.one_of(st.tuples(ipv4_addresses, ipv4_addresses), st.tuples(ipv6_addresses, ipv6_addresses))
tlvs = st.lists(st.builds(tlv, st.integers(0xE0, 0xEF), st.binary(max_size=40)), max_size=4).map(b"".join)


def read(datagram: bytes) -> tuple[bytes, tuple[Address, Address] | None] | None:
    """Return the payload and the addresses in the header, or ``None`` for the proxy itself."""
    found = read_header(datagram)
    if found is None:
        return None
    start, ends = found
    return datagram[start:], addresses(ends) if ends else None


def shown(address: tuple[Any, int]) -> Address:
    """Return an address in the form of the ``socket`` module; a mapped IPv4 address as an IPv4 address."""
    host = ipaddress.ip_address(address[0])
    if isinstance(host, ipaddress.IPv6Address) and host.ipv4_mapped is None:
        return socket.inet_ntop(socket.AF_INET6, host.packed), address[1], 0, 0
    return str(host.ipv4_mapped if isinstance(host, ipaddress.IPv6Address) else host), address[1]


def test_header_of_dnsdist() -> None:
    """The header of a query from 127.0.0.1, as dnsdist 1.7 sends it, is read."""
    datagram = bytes.fromhex("0d0a0d0a000d0a515549540a 2112000c 7f000001 7f000001 e52e 1d6b 000001")
    assert read(datagram) == (b"\0\0\1", (("127.0.0.1", 58_670), ("127.0.0.1", 7531)))


@given(pairs, tlvs, st.booleans(), st.binary(max_size=40))
def test_every_valid_header(pair: Any, following: bytes, stream: bool, payload: bytes) -> None:
    """The addresses are those that the proxy wrote, with any TLVs after them, and the payload follows the TLVs."""
    written = header(*pair, tlvs=following, stream=stream)
    assert read(written + payload) == (payload, (shown(pair[0]), shown(pair[1])))


@given(st.sampled_from([LOCAL, PROXY]), st.sampled_from(KNOWN_FAMILIES), st.binary(max_size=300), st.binary(max_size=9))
def test_the_proxy_itself(command: int, family: int, block: bytes, payload: bytes) -> None:
    """LOCAL, and a family without IP addresses, mean the proxy itself; the rest of the header is skipped."""
    if command == LOCAL or family in (UNSPECIFIED, UNIX_STREAM, UNIX_DATAGRAM):
        assert read(raw_header(command, family, block) + payload) == (payload, None)


@pytest.mark.parametrize("reason", MALFORMED)
def test_malformed(reason: str) -> None:
    """A header with any mistake in it is rejected."""
    assert read_header(MALFORMED[reason]) is None


@given(pairs, tlvs)
def test_cut_off_anywhere(pair: Any, following: bytes) -> None:
    """A truncated header is rejected, wherever it is truncated."""
    written = header(*pair, tlvs=following)
    assert [size for size in range(len(written) + 1) if read_header(written[:size])] == [len(written)]


def test_stream_and_datagram_differ() -> None:
    """The same addresses and ports over TCP and over UDP are two clients."""
    pair = ("192.0.2.1", 1000), ("192.0.2.53", 53)
    stream, datagram = read_header(header(*pair, stream=True)), read_header(header(*pair))
    assert stream is not None
    assert datagram is not None
    assert stream[1] != datagram[1]
    assert addresses(stream[1]) == addresses(datagram[1])


def test_mapped_addresses_are_shown_as_ipv4() -> None:
    """A proxy on a dual-stack socket writes ::ffff:192.0.2.1; the client is shown as 192.0.2.1."""
    written = header(("::ffff:192.0.2.1", 1000), ("::ffff:192.0.2.53", 53))
    assert read(written) == (b"", (("192.0.2.1", 1000), ("192.0.2.53", 53)))


def test_checksum_is_not_verified() -> None:
    """A TLV with a CRC32c is skipped like any other, even if the checksum is wrong."""
    pair = ("192.0.2.1", 1000), ("192.0.2.53", 53)
    assert read(header(*pair, tlvs=tlv(3, b"oops")) + b"query") == (b"query", pair)


# A second opinion: the package proxy-protocol.


def second_opinion(head: bytes) -> tuple[Address, Address] | str | None:
    """The result of proxy-protocol for a header without payload (it takes a payload for TLVs)."""
    try:
        result = ProxyProtocolV2().unpack(head)
    except (ValueError, ProxyProtocolIncompleteError):
        return None
    if isinstance(result, ProxyResultIPv4 | ProxyResultIPv6):
        return shown(result.source), shown(result.dest)
    assert isinstance(result, ProxyResultLocal | ProxyResultUnknown | ProxyResultUnix)
    return "the proxy itself"


@given(
    st.sampled_from([LOCAL, PROXY, 0x22, 0x31, 0x11]),
    st.sampled_from(KNOWN_FAMILIES),
    st.binary(min_size=216, max_size=216),
    tlvs,
    st.integers(0, 20),
)
def test_agrees_with_a_second_reader(command: int, family: int, block: bytes, following: bytes, cut: int) -> None:
    """Headers of every command and family, whole or truncated, are read as the package proxy-protocol reads them."""
    if family in (UNIX_STREAM, UNIX_DATAGRAM):
        block = b"/run/client".ljust(216, b"\0")
    size = {UDP4: 12, TCP4: 12, UDP6: 36, TCP6: 36, UNSPECIFIED: 0}.get(family, 216)
    whole = raw_header(command, family, (block[:size] if command != LOCAL else b"") + following)
    head = whole[: len(whole) - cut]
    found = read(head)
    expected = second_opinion(head)
    assert (None if found is None else found[1] or "the proxy itself") == expected


@given(pairs, st.binary(max_size=40), st.text(max_size=10))
def test_reads_headers_of_a_second_writer(pair: Any, payload: bytes, authority: str) -> None:
    """Headers that the package proxy-protocol writes, with a TLV, are read."""
    (source, source_port), (destination, destination_port) = pair
    known = ProxyProtocolTLV(authority=authority)
    result: ProxyResult
    if ":" in source:
        ends6 = (ipaddress.IPv6Address(source), source_port), (ipaddress.IPv6Address(destination), destination_port)
        result = ProxyResultIPv6(*ends6, protocol=socket.SOCK_DGRAM, tlv=known)
    else:
        ends4 = (ipaddress.IPv4Address(source), source_port), (ipaddress.IPv4Address(destination), destination_port)
        result = ProxyResultIPv4(*ends4, protocol=socket.SOCK_DGRAM, tlv=known)
    written = ProxyProtocolV2().pack(result)
    assert read(written + payload) == (payload, (shown(pair[0]), shown(pair[1])))


# Fuzzing.


@given(st.one_of(st.binary(max_size=80), st.binary(max_size=80).map(SIGNATURE.__add__)))
def test_any_bytes(datagram: bytes) -> None:
    """No bytes make the parser raise, and the payload never begins beyond the end."""
    found = read_header(datagram)
    if found is not None:
        start, ends = found
        assert 16 <= start <= len(datagram)
        assert not ends or len(addresses(ends)) == 2


@given(st.sampled_from([VALID, OWN]), st.lists(st.tuples(st.integers(0, 27), st.integers(0, 255)), max_size=4))
def test_changed_bytes(written: bytes, changes: list[tuple[int, int]]) -> None:
    """A changed header is read by its new content or rejected; the payload follows its new length."""
    changed = bytearray(written + b"payload")
    for position, byte in changes:
        changed[position % len(written)] = byte
    found = read_header(bytes(changed))
    if changed[:12] != SIGNATURE or changed[12] not in (LOCAL, PROXY):
        assert found is None
    elif found is not None:
        assert found[0] == 16 + int.from_bytes(changed[14:16], "big")
