"""Which of our addresses a datagram was sent to, and how to answer from there: IP_PKTINFO, IPV6_PKTINFO.

On a socket bound to all interfaces the kernel would choose the source of a reply by its routing table, and a client
with a connected socket would not accept it. See ip(7), ipv6(7) and RFC 3542 section 6.
Apart from :func:`needs_local_address`, pure functions over the bytes of control messages.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import trio

ReplyControl: TypeAlias = "tuple[()] | tuple[tuple[int, int, bytes]]"
"""Ancillary data for ``sendmsg``: the address to send from, or nothing where the kernel may choose."""

# The socket module has had IP_PKTINFO only since Python 3.12.
IP_PKTINFO: int | None = getattr(socket, "IP_PKTINFO", {"linux": 8, "darwin": 26}.get(sys.platform))
IPV6_PKTINFO: int | None = getattr(socket, "IPV6_PKTINFO", None)
IPV6_RECVPKTINFO: int | None = getattr(socket, "IPV6_RECVPKTINFO", None)

# An IPv4 address as an IPv6 socket has it (RFC 4291 section 2.5.5.2), and the choice of one left to the kernel: with an
# IPv4 peer it takes no other IPv6 address, not even the unspecified one.
MAPPED = bytes(10) + b"\xff\xff"
NO_MAPPED_ADDRESS: ReplyControl = ((socket.IPPROTO_IPV6, IPV6_PKTINFO or 0, MAPPED + bytes(8)),)

# Bytes to make room for: either structure, and what else the user may have asked the socket for. What does not fit is
# cut off.
CONTROL_SIZE = 512


def needs_local_address(sock: trio.socket.SocketType) -> bool:
    """Whether a socket is bound to all addresses and the kernel tells, from now on, which each datagram was sent to."""
    if sock.getsockname()[:1] not in (("0.0.0.0",), ("::",)):
        return False
    if sock.family == socket.AF_INET and IP_PKTINFO is not None:
        level, option = socket.IPPROTO_IP, IP_PKTINFO
    elif sock.family == socket.AF_INET6 and IPV6_RECVPKTINFO is not None:
        level, option = socket.IPPROTO_IPV6, IPV6_RECVPKTINFO
    else:
        return False
    if not hasattr(socket.socket, "recvmsg"):
        return False
    try:
        sock.setsockopt(level, option, 1)
    except OSError:
        return False
    return True


def reply_control(control: Iterable[tuple[int, int, Any]]) -> ReplyControl:
    """Turn a datagram's control messages into those that make a reply leave from where it arrived.

    One that the kernel has cut off, for want of room, tells nothing.
    """
    for level, kind, data in control:
        if (level, kind, len(data)) == (socket.IPPROTO_IP, IP_PKTINFO, 12):
            # struct in_pktinfo {int ipi_ifindex; struct in_addr ipi_spec_dst, ipi_addr;}: addr is where the datagram
            # was sent to, spec_dst our own address even if that was a broadcast; but zero if the datagram arrived
            # before the kernel was asked for it. Interface 0: routing decides.
            local = data[4:8] if any(data[4:8]) else data[8:12]
            if local[0] & 0xF0 == 0xE0:
                return ()  # multicast: not an address to send from
            return ((level, kind, bytes(4) + local + bytes(4)),)
        if (level, kind, len(data)) == (socket.IPPROTO_IPV6, IPV6_PKTINFO, 20):
            # struct in6_pktinfo {struct in6_addr ipi6_addr; unsigned int ipi6_ifindex;}
            if data[0] == 0xFF:
                return ()  # multicast: not an address to send from
            if data[:12] == MAPPED and data[12] & 0xF0 == 0xE0:
                return NO_MAPPED_ADDRESS
            link_local = data[0] == 0xFE and data[1] & 0xC0 == 0x80
            return ((level, kind, data if link_local else data[:16] + bytes(4)),)
    return ()


def local_host(reply: ReplyControl) -> tuple[str, int] | None:
    """The host and the IPv6 scope that a result of :func:`reply_control` stands for."""
    for level, _, data in reply:
        if level == socket.IPPROTO_IP:
            return (socket.inet_ntop(socket.AF_INET, data[4:8]), 0) if any(data[4:8]) else None
        if data[:16] in (bytes(16), MAPPED + bytes(4)):
            return None
        return socket.inet_ntop(socket.AF_INET6, data[:16]), int.from_bytes(data[16:20], sys.byteorder)
    return None


# struct cmsghdr: length, this header included; level; type. See cmsg(3).
CMSG_HEADER = struct.Struct("@Nii")


def pack_control(level: int, kind: int, data: bytes) -> bytes:
    """One control message as the kernel has it, padded so that another may follow."""
    size = CMSG_HEADER.size + len(data)
    return (CMSG_HEADER.pack(size, level, kind) + data).ljust(_aligned(size), b"\0")


def unpack_control(control: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Take control messages apart, as ``recvmsg`` gives them; those that are not whole are left out."""
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
