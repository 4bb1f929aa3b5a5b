"""Control messages: the destination of a datagram, and the source of its reply."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest

from trio_udp._endpoints.engines import pktinfo
from trio_udp._endpoints.engines.pktinfo import Arrival, own_end, understand

IP_PKTINFO = pktinfo.IP_PKTINFO
IPV6_PKTINFO = pktinfo.IPV6_PKTINFO

pytestmark = pytest.mark.skipif(IP_PKTINFO is None or IPV6_PKTINFO is None, reason="platform has no IP_PKTINFO")


def raw(host: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)


def in_pktinfo(interface: int, local: str, destination: str) -> Any:
    return (socket.IPPROTO_IP, IP_PKTINFO, struct.pack("=I4s4s", interface, raw(local), raw(destination)))


def in6_pktinfo(address: str, interface: int) -> Any:
    return (socket.IPPROTO_IPV6, IPV6_PKTINFO, raw(address) + struct.pack("=I", interface))


def test_ipv4_replies_leave_from_our_address_by_any_interface() -> None:
    """A reply to a datagram to our own address leaves from that address; routing chooses the interface."""
    arrival = understand([in_pktinfo(3, "192.0.2.5", "192.0.2.5")])
    assert arrival == Arrival((in_pktinfo(0, "192.0.2.5", "0.0.0.0"),), b"", 0, ())
    assert own_end(arrival.reply) == (raw("192.0.2.5"), 0)


@pytest.mark.parametrize("group", ["192.0.2.255", "255.255.255.255", "239.1.2.3"])
def test_ipv4_replies_to_a_group_leave_on_its_interface(group: str) -> None:
    """The reply to a broadcast or group datagram leaves from our own address, on the interface of arrival."""
    arrival = understand([in_pktinfo(3, "192.0.2.5", group)])
    assert arrival == Arrival((in_pktinfo(3, "192.0.2.5", "0.0.0.0"),), raw(group), 0, ())
    assert own_end(arrival.reply) == (raw("192.0.2.5"), 3)


@pytest.mark.parametrize(
    ("address", "interface", "scope"), [("2001:db8::5", 3, 0), ("fe80::5", 3, 3), ("::ffff:192.0.2.5", 3, 0)]
)
def test_ipv6_replies_name_the_interface_only_where_it_is_needed(address: str, interface: int, scope: int) -> None:
    """A reply from a link-local address names the interface; a reply from any other address does not."""
    arrival = understand([in6_pktinfo(address, interface)])
    assert arrival == Arrival((in6_pktinfo(address, scope),), b"", 0, ())
    assert own_end(arrival.reply) == (raw(address), scope)


def test_a_group_is_not_a_source_address() -> None:
    """The reply to a datagram to an IPv6 group leaves on its interface, from an address that the kernel chooses."""
    arrival = understand([in6_pktinfo("ff02::1", 3)])
    assert arrival == Arrival((in6_pktinfo("::", 3),), raw("ff02::1"), 0, ())
    assert own_end(arrival.reply) == (b"", 3)


def test_ipv4_groups_on_a_socket_for_both_families() -> None:
    """A reply on a dual-stack socket takes our address from the IPv4 structure, mapped into the IPv6 one."""
    messages = [in6_pktinfo("::ffff:224.0.0.1", 2), in_pktinfo(2, "192.0.2.5", "224.0.0.1")]
    for control in (messages, messages[::-1]):
        arrival = understand(control)
        assert arrival == Arrival((in6_pktinfo("::ffff:192.0.2.5", 2),), raw("::ffff:224.0.0.1"), 0, ())
        assert own_end(arrival.reply) == (raw("::ffff:192.0.2.5"), 2)


def test_replies_to_ipv4_groups_whose_network_is_unknown() -> None:
    """Without the IPv4 structure, an IPv6 socket leaves the source to the kernel: a mapped address, or an error."""
    arrival = understand([in6_pktinfo("::ffff:224.0.0.1", 2)])
    assert arrival == Arrival((in6_pktinfo("::ffff:0.0.0.0", 2),), raw("::ffff:224.0.0.1"), 0, ())
    assert own_end(arrival.reply) == (b"", 2)


def test_other_control_messages_are_ancillary() -> None:
    """The engine reads the segment size of a coalesced message, and passes other control messages on."""
    time_stamp = (socket.SOL_SOCKET, 35, bytes(16))
    gro = (socket.IPPROTO_UDP, pktinfo.UDP_GRO, struct.pack("=i", 1_200))
    assert understand([time_stamp, gro]) == ((), b"", 1_200, (time_stamp,))
