"""Control messages: the destination of a datagram, and the source of its reply (IP_PKTINFO, IPV6_PKTINFO).

On a socket bound to all interfaces the kernel would choose a reply's source by its routing table, and a client with a
connected socket might not receive the reply. See ip(7), ipv6(7) and RFC 3542 section 6.

Apart from :func:`switch_on_pktinfo`, this file has pure functions over bytes. The caller looks up which addresses an
interface has; see :data:`IsOn`.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple, TypeAlias

import trio

from ._engine import Ancillary

ControlMessage: TypeAlias = tuple[int, int, bytes]  # level, type, data

ReplyControl: TypeAlias = "tuple[()] | tuple[ControlMessage]"
"""Ancillary data for ``sendmsg``: the address to send from, or nothing if the kernel may choose."""

IsOn: TypeAlias = "Callable[[bytes, bytes], bool]"
"""Whether one of our raw IPv4 addresses is on an interface, whose index is in the form of the structures."""

# The socket module has had IP_PKTINFO only since Python 3.12.
IP_PKTINFO: int | None = getattr(socket, "IP_PKTINFO", {"linux": 8, "darwin": 26}.get(sys.platform))
IPV6_PKTINFO: int | None = getattr(socket, "IPV6_PKTINFO", None)
IPV6_RECVPKTINFO: int | None = getattr(socket, "IPV6_RECVPKTINFO", None)

# From linux/udp.h, and not in the socket module: the kernel cuts one message into datagrams, and coalesces datagrams
# into one message. See udp(7).
UDP_SEGMENT = 103
UDP_GRO = 104

# The prefix of an IPv4 address on an IPv6 socket (RFC 4291 section 2.5.5.2). To an IPv4 peer the kernel sends only from
# such an address; the mapped form of 0.0.0.0 leaves the choice to the kernel.
MAPPED = bytes(10) + b"\xff\xff"
NO_MAPPED_ADDRESS: ReplyControl = ((socket.IPPROTO_IPV6, IPV6_PKTINFO or 0, MAPPED + bytes(8)),)

# Room for the control messages of one datagram: either structure, and those that the user has configured. The kernel
# truncates the rest.
CONTROL_SIZE = 512


class Arrival(NamedTuple):
    """The meaning of the control messages of one message.

    Attributes:
      reply: The control messages of a reply.
      group: Raw address of the group or the broadcast address that the message was sent to; empty if it was our own.
      segment_size: Bytes in each of the datagrams that the message was coalesced from; 0 for a single datagram.
      ancillary: All other control messages.
    """

    reply: ReplyControl
    group: bytes
    segment_size: int
    ancillary: Ancillary


NOTHING_SAID = Arrival((), b"", 0, ())


def anywhere(own: bytes, interface: bytes) -> bool:
    """An :data:`IsOn` that always says yes."""
    return True


def understand(control: Iterable[ControlMessage], is_on: IsOn = anywhere) -> Arrival:
    """Read the control messages of one message. A truncated structure is ignored."""
    ipv4 = ipv6 = b""
    segment_size = 0
    ancillary: list[ControlMessage] = []
    for message in control:
        level, kind, data = message
        if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
            ipv4 = data if len(data) == 12 else ipv4
        elif (level, kind) == (socket.IPPROTO_IPV6, IPV6_PKTINFO):
            ipv6 = data if len(data) == 20 else ipv6
        elif (level, kind) == (socket.IPPROTO_UDP, UDP_GRO):
            segment_size = int.from_bytes(data[:4], sys.byteorder)
        else:
            ancillary.append(message)
    reply, group = _answer_ipv6(ipv6, ipv4, is_on) if ipv6 else _answer_ipv4(ipv4, is_on) if ipv4 else ((), b"")
    return Arrival(reply, group, segment_size, tuple(ancillary))


def _answer_ipv4(info: bytes, is_on: IsOn) -> tuple[ReplyControl, bytes]:
    interface, own, group = _take_apart(info, is_on)
    if not own and not group:
        return (), b""
    return ((socket.IPPROTO_IP, IP_PKTINFO or 0, interface + own.ljust(4, b"\0") + bytes(4)),), group


def _answer_ipv6(info: bytes, ipv4: bytes, is_on: IsOn) -> tuple[ReplyControl, bytes]:
    # struct in6_pktinfo {struct in6_addr ipi6_addr; unsigned int ipi6_ifindex;}
    address, interface, group = info[:16], info[16:20], b""
    if address[:12] == MAPPED:
        # On a socket for both families a datagram over IPv4 has both structures. Only the IPv4 structure tells our own
        # address beside the destination, and only the IPv6 structure fits into a route.
        interface, own, group = _take_apart(ipv4 or interface + bytes(4) + address[12:], is_on)
        address, group = MAPPED + own.ljust(4, b"\0"), group and MAPPED + group
    elif address[0] == 0xFF:
        # A datagram cannot be sent from a group. The unspecified address leaves the choice to the kernel.
        address, group = bytes(16), address
    elif not is_link_local(address):
        interface = bytes(4)
    return ((socket.IPPROTO_IPV6, IPV6_PKTINFO or 0, address + interface),), group


def _take_apart(info: bytes, is_on: IsOn) -> tuple[bytes, bytes, bytes]:
    """Split the IPv4 structure into the interface for replies, our own address or b"", and the group or b""."""
    # struct in_pktinfo {int ipi_ifindex; struct in_addr ipi_spec_dst, ipi_addr;}: addr is where the datagram was sent
    # to, and spec_dst our own address on that network. It is zero if the interface has no address, or if the datagram
    # arrived before the kernel was asked.
    interface, own, destination = info[:4], info[4:8], info[8:12]
    if not any(destination):
        destination = own
    if destination[0] >= 0xE0 or (own != destination and any(own)):  # a group or a broadcast address
        # spec_dst is the address that the kernel would send from to the peer. If the peer's network is on several
        # interfaces, as 169.254/16 can be, it may be the address of another one. Then let the kernel choose when the
        # reply is sent.
        usable = any(own) and own[0] < 0xE0 and is_on(own, interface)
        return interface, own if usable else b"", destination
    # One of our own. Routing finds the interface, except for link-local addresses, which are the same on each network.
    return interface if is_link_local(destination) else bytes(4), destination if any(destination) else b"", b""


def is_link_local(raw: bytes) -> bool:
    """Whether a raw address means something only together with an interface: 169.254/16, fe80::/10."""
    if len(raw) == 16 and raw[:12] != MAPPED:
        return raw[0] == 0xFE and raw[1] & 0xC0 == 0x80
    return raw[-4:-2] == b"\xa9\xfe"


def is_group(raw: bytes) -> bool:
    """Whether a raw address, mapped or not, is a multicast address or 255.255.255.255."""
    if len(raw) == 16 and raw[:12] != MAPPED:
        return raw[0] == 0xFF
    return 0xE0 <= raw[-4] < 0xF0 or raw[-4:] == b"\xff\xff\xff\xff"


def is_unspecified(raw: bytes) -> bool:
    """Whether a raw address is 0.0.0.0 or ::, or 0.0.0.0 mapped into IPv6."""
    return not any(raw) or raw == MAPPED + bytes(4)


def is_doubtful_host(raw: bytes) -> bool:
    """Whether a raw address cannot be the source of one machine: unspecified, a group or reserved; see Engine."""
    if len(raw) == 16:
        if raw[:12] != MAPPED:
            return raw[0] == 0xFF or not any(raw)
        raw = raw[12:]
    return not 0 < raw[0] < 0xE0


def own_end(reply: ReplyControl) -> tuple[bytes, int]:
    """Our own raw address in a reply's control messages, b"" if the kernel chooses it; and the interface, or 0."""
    for level, _, data in reply:
        if level == socket.IPPROTO_IP:
            own, interface = data[4:8], data[:4]
        else:
            own, interface = data[:16], data[16:20]
        return b"" if is_unspecified(own) else own, int.from_bytes(interface, sys.byteorder)
    return b"", 0


def control_from(own: bytes, interface: int) -> ReplyControl:
    """The control messages that send from one of our own raw addresses, on an interface unless that is 0."""
    index = interface.to_bytes(4, sys.byteorder)
    if len(own) == 4:
        return ((socket.IPPROTO_IP, IP_PKTINFO or 0, index + own + bytes(4)),)
    return ((socket.IPPROTO_IPV6, IPV6_PKTINFO or 0, own + index),)


def switch_on_pktinfo(sock: socket.socket | trio.socket.SocketType) -> bool:
    """Make the kernel tell each datagram's destination from now on; return False if it cannot."""
    if not hasattr(socket.socket, "recvmsg"):
        return False
    if sock.family == socket.AF_INET and IP_PKTINFO is not None:
        level, option = socket.IPPROTO_IP, IP_PKTINFO
    elif sock.family == socket.AF_INET6 and IPV6_RECVPKTINFO is not None:
        level, option = socket.IPPROTO_IPV6, IPV6_RECVPKTINFO
    else:
        return False
    try:
        sock.setsockopt(level, option, 1)
    except OSError:
        return False
    if sys.platform == "linux" and sock.family == socket.AF_INET6 and IP_PKTINFO is not None:
        with suppress(OSError):  # for datagrams over IPv4, if the socket takes any
            if not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
                sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
    return True


# struct cmsghdr: length, this header included; level; type. See cmsg(3).
CMSG_HEADER = struct.Struct("@Nii")


def pack_control(level: int, kind: int, data: bytes) -> bytes:
    """Return one control message in the kernel's form, padded so that another may follow."""
    size = CMSG_HEADER.size + len(data)
    return (CMSG_HEADER.pack(size, level, kind) + data).ljust(_aligned(size), b"\0")


def unpack_control(control: bytes) -> Iterator[ControlMessage]:
    """Decode control messages, as ``recvmsg`` gives them; incomplete ones are left out."""
    position = 0
    while position + CMSG_HEADER.size <= len(control):
        size, level, kind = CMSG_HEADER.unpack_from(control, position)
        if not CMSG_HEADER.size <= size <= len(control) - position:
            return
        yield level, kind, control[position + CMSG_HEADER.size : position + size]
        position += _aligned(size)


def _aligned(size: int) -> int:
    word = struct.calcsize("@N")
    return -(-size // word) * word
