"""Property tests of all code that parses bytes from elsewhere: no bytes make it fail.

The kernel writes control messages and raw addresses, and users write addresses to send to. test_pktinfo.py has examples
of control messages.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any, TypeAlias

import pytest
import trio
from hypothesis import example, given, strategies as st

from trio_udp._endpoints._address import family_of, numeric_address, pack_address, unpack_address
from trio_udp._endpoints.engines.pktinfo import (
    IP_PKTINFO,
    IPV6_PKTINFO,
    UDP_GRO,
    own_end,
    pack_control,
    understand,
    unpack_control,
)
from trio_udp._endpoints.engines.portable import WildcardEngine

if sys.platform != "linux":
    pytest.skip("needs Linux", allow_module_level=True)

from trio_udp._endpoints.engines.linux import LinuxEngine
from trio_udp._endpoints.engines.linux_routes import IPV4_WILDCARD, IPV6_WILDCARD, Ends, Layout

Message: TypeAlias = "tuple[int, int, bytes]"

IP_INFO, IPV6_INFO = (socket.IPPROTO_IP, IP_PKTINFO or 0), (socket.IPPROTO_IPV6, IPV6_PKTINFO or 0)
GRO = (socket.IPPROTO_UDP, UDP_GRO)

# Hosts at the limits between kinds of addresses, so that all kinds occur.
BEGINNINGS = {
    4: [b"", bytes(4), b"\xe0", b"\x7f\0\0\x01"],
    16: [b"", bytes(16), b"\xff\x02", b"\xfe\x80", bytes(10) + b"\xff\xff", bytes(10) + b"\xff\xff\xe0"],
}


def addresses(size: int) -> st.SearchStrategy[bytes]:
    return st.builds(
        lambda beginning, rest: (beginning + rest)[:size],
        st.sampled_from(BEGINNINGS[size]),
        st.binary(min_size=size, max_size=size),
    )


interfaces = st.binary(min_size=4, max_size=4)
in_pktinfo = st.builds(lambda *parts: (*IP_INFO, b"".join(parts)), interfaces, addresses(4), addresses(4))
in6_pktinfo = st.builds(lambda *parts: (*IPV6_INFO, b"".join(parts)), addresses(16), interfaces)
gro = st.builds(lambda size: (*GRO, struct.pack("@i", size)), st.integers(1, 65_535))

# Time stamps, a time to live and the like, and messages that no kernel writes, some of the kinds that we know.
known_kinds = st.sampled_from([IP_INFO, IPV6_INFO, GRO])
other_kinds = st.tuples(st.integers(0, 300), st.integers(0, 300)).filter(lambda k: k not in (IP_INFO, IPV6_INFO, GRO))
other = st.builds(lambda kind, data: (*kind, data), other_kinds, st.binary(max_size=40))
nonsense = st.builds(lambda kind, data: (*kind, data), known_kinds | other_kinds, st.binary(max_size=40))
anything = nonsense | in_pktinfo | in6_pktinfo | gro


def raw(messages: list[Message]) -> bytes:
    return b"".join(pack_control(*message) for message in messages)


# Control messages


@given(st.lists(other | in_pktinfo))
def test_control_messages_are_taken_apart_as_they_were_made(messages: list[Message]) -> None:
    """Control messages of any number and length are unpacked as they were packed."""
    assert list(unpack_control(raw(messages))) == messages


@given(other | in_pktinfo, st.binary(max_size=200) | st.lists(anything).map(raw), st.integers(0, 40))
def test_malformed_control_bytes(whole: Message, control: bytes, cut_off: int) -> None:
    """Malformed control bytes raise nothing, and the whole messages in them are found."""
    control = control[: max(0, len(control) - cut_off)]
    first, *others = unpack_control(pack_control(*whole) + control)
    assert first == whole
    assert sum(len(data) for _, _, data in others) <= len(control)


@given(st.lists(anything))
@example([(*IP_INFO, b"")])
def test_a_structure_of_the_wrong_length_is_ignored(messages: list[Message]) -> None:
    """A structure of the wrong length is ignored, so the kernel chooses the source of a reply."""
    arrival = understand(messages)
    kinds = [(level, kind, len(data)) for level, kind, data in arrival.reply]
    assert kinds in ([], [(*IP_INFO, 12)], [(*IPV6_INFO, 20)])
    own, interface = own_end(arrival.reply)
    assert len(own) in (0, 4, 16)
    assert interface >= 0
    assert len(arrival.group) in (0, 4, 16)


@given(st.lists(other), in_pktinfo | in6_pktinfo)
def test_other_control_messages_are_passed_on(others: list[Message], message: Message) -> None:
    """Other control messages are passed on as ancillary, and our own address is found if it is among them."""
    assert understand(others) == ((), b"", 0, tuple(others))
    assert own_end(()) == (b"", 0)
    assert understand([*others, message]) == understand([message])._replace(ancillary=tuple(others))


@given(st.sampled_from([(IPV4_WILDCARD, IPV6_INFO), (IPV6_WILDCARD, IP_INFO)]), st.lists(anything))
def test_the_end_of_a_route_has_one_size(of_family: tuple[Layout, Any], messages: list[Message]) -> None:
    """The end of a route has one fixed length, because the Linux engine joins routes into an array of C structures."""
    layout, other_family = of_family
    control = raw([message for message in messages if message[:2] != other_family])
    end, segment_size, _ = Ends(layout).understand(control)
    assert layout.end_offset + len(end) == layout.route_size
    assert segment_size >= 0


# Both engines


@pytest.fixture(scope="module", params=["0.0.0.0", "::"])
def engines(request: pytest.FixtureRequest) -> Iterator[tuple[LinuxEngine, WildcardEngine]]:
    """Both engines on one socket, bound to all addresses."""
    family = socket.AF_INET if request.param == "0.0.0.0" else socket.AF_INET6
    with ExitStack() as cleanup:
        try:
            sock = cleanup.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            sock.bind((request.param, 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
        trio_socket = trio.socket.from_stdlib_socket(sock)
        yield LinuxEngine(trio_socket, 65_535), WildcardEngine(trio_socket, 65_535)


@given(data=st.data())
def test_both_engines_understand_the_same(engines: tuple[LinuxEngine, WildcardEngine], data: st.DataObject) -> None:
    """Both engines make routes with the same addresses and interface from the same control messages."""
    linux, portable = engines
    address, info = (
        (b"\xc0\0\x02\1", in_pktinfo) if linux.family == socket.AF_INET else (bytes(15) + b"\1", in6_pktinfo)
    )
    peer = unpack_address(pack_address((socket.inet_ntop(linux.family, address), 7), linux.family))
    messages = data.draw(st.lists(other | gro | info))
    end, segment_size, ancillary = linux._ends.understand(raw(messages))
    route = pack_address(peer, linux.family)[: linux._layout.end_offset] + end
    arrival = portable._understand(messages)
    other_route = portable._route_of(peer, arrival)
    assert (segment_size, ancillary) == (arrival.segment_size, arrival.ancillary)
    for of in ("peer_address", "local_address", "destination", "interface"):
        assert getattr(linux, of)(route) == getattr(portable, of)(other_route)
    assert linux.peer_address(route) == peer


# Addresses


@given(st.ip_addresses(), st.integers(0, 65_535), st.integers(0, 2**32 - 1), st.integers(0, 2**20 - 1))
def test_raw_addresses(host: Any, port: int, scope: int, flow: int) -> None:
    """An address survives conversion into a structure and back."""
    family = socket.AF_INET if host.version == 4 else socket.AF_INET6
    text = socket.inet_ntop(family, host.packed)
    address = (text, port) if host.version == 4 else (text, port, flow, scope)
    structure = pack_address(address, family)
    assert len(structure) == (16 if host.version == 4 else 32)
    assert unpack_address(structure) == address


@given(st.sampled_from([(socket.AF_INET, 14, 8), (socket.AF_INET6, 26, 0)]), st.data())
def test_structures_of_any_content(family: tuple[int, int, int], data: st.DataObject) -> None:
    """Every structure of a family decodes to an address, and encodes back to the same bytes, except its padding."""
    number, size, padding = family
    content = data.draw(st.binary(min_size=size, max_size=size))
    address = unpack_address(struct.pack("=H", number) + content)
    again = pack_address(address, number)
    assert again[: 2 + size - padding] == (struct.pack("=H", number) + content)[: 2 + size - padding]
    assert family_of(address) == number


hosts = st.text() | st.ip_addresses().map(str) | st.text("0123456789abcdefx.:%lo", max_size=20)
numbers = st.integers() | st.integers(0, 65_535)


@given(st.tuples(hosts, numbers) | st.tuples(hosts, numbers, numbers, numbers) | st.lists(hosts | numbers).map(tuple))
def test_addresses_of_users(address: Any) -> None:
    """An address from a user raises TypeError or ValueError, or becomes a numeric address for the kernel."""
    with suppress(TypeError, ValueError):
        numeric = numeric_address(address)
        assert numeric_address(numeric) == numeric
        assert unpack_address(pack_address(numeric, family_of(numeric)))[:2] == numeric[:2]
