"""The control messages that tell which of our addresses a datagram was sent to."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest

from trio_udp._endpoints import _pktinfo
from trio_udp._endpoints._pktinfo import local_host, reply_control

IP_PKTINFO = _pktinfo.IP_PKTINFO
IPV6_PKTINFO = _pktinfo.IPV6_PKTINFO

pytestmark = pytest.mark.skipif(IP_PKTINFO is None or IPV6_PKTINFO is None, reason="platform has no IP_PKTINFO")


def in_pktinfo(interface: int, local: str, destination: str) -> Any:
    data = struct.pack("=I4s4s", interface, socket.inet_aton(local), socket.inet_aton(destination))
    return (socket.IPPROTO_IP, IP_PKTINFO, data)


def in6_pktinfo(address: str, interface: int) -> Any:
    return (
        socket.IPPROTO_IPV6,
        IPV6_PKTINFO,
        socket.inet_pton(socket.AF_INET6, address) + struct.pack("=I", interface),
    )


def test_ipv4_replies_leave_from_our_address_by_any_interface() -> None:
    """The local address is kept, also for a broadcast; the interface is left to routing."""
    reply = reply_control([in_pktinfo(3, "192.0.2.5", "192.0.2.255")])
    assert reply == (in_pktinfo(0, "192.0.2.5", "0.0.0.0"),)
    assert local_host(reply) == ("192.0.2.5", 0)


@pytest.mark.parametrize(
    ("address", "interface", "scope"), [("2001:db8::5", 3, 0), ("fe80::5", 3, 3), ("::ffff:192.0.2.5", 3, 0)]
)
def test_ipv6_replies_name_the_interface_only_where_it_is_needed(address: str, interface: int, scope: int) -> None:
    """A link-local address means nothing without its interface; any other does without."""
    reply = reply_control([in6_pktinfo(address, interface)])
    assert reply == (in6_pktinfo(address, scope),)
    assert local_host(reply) == (address, scope)


def test_multicast_is_no_address_to_send_from() -> None:
    """The reply to a datagram that was sent to a multicast group leaves from where the kernel chooses."""
    assert reply_control([in6_pktinfo("ff02::1", 3)]) == ()


def test_replies_to_ipv4_multicast_leave_it_to_the_kernel() -> None:
    """Also on an IPv6 socket, where the kernel accepts no local address of IPv6 for an IPv4 peer."""
    reply = reply_control([in6_pktinfo("::ffff:224.0.0.1", 2)])
    assert reply == (in6_pktinfo("::ffff:0.0.0.0", 0),)
    assert local_host(reply) is None
