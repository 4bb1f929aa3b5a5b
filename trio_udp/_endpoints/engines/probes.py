"""Probes: questions to the kernel about addresses, most of them asked with a temporary socket.

A probe is in the network namespace of the calling thread. A socket inherited from another namespace therefore gets
answers about the thread's namespace.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .._address import Address
from .pktinfo import MAPPED, is_group, is_unspecified

SO_BINDTODEVICE = 25  # from asm-generic/socket.h; the socket module has it only on some platforms

# From linux/sockios.h: all IPv4 addresses with the names of their interfaces, and the index of a name.
SIOCGIFCONF, SIOCGIFINDEX = 0x8912, 0x8933
NAME_SIZE = 16
IFREQ_SIZE = NAME_SIZE + struct.calcsize(
    "@2LH6B"
)  # struct ifreq: a name, and a union whose largest member is struct ifmap

# Addresses that no machine has: one reserved (RFC 1112 section 4), one for discarding (RFC 6666).
UNUSED_ADDRESSES = {socket.AF_INET: "240.0.0.1", socket.AF_INET6: "100::1"}


@contextmanager
def probe(family: int) -> Iterator[socket.socket]:
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        if family == socket.AF_INET6:
            with suppress(OSError):
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # for mapped addresses
        yield sock


def raw_host(family: int, host: str) -> bytes:
    return socket.inet_pton(family, host.partition("%")[0])


def is_own_host(family: int, address: Address) -> bool:
    """Whether a host is this machine: a socket can be bound only to its addresses and to groups."""
    host, _, *scope = address
    raw = raw_host(family, host)
    if is_unspecified(raw) or is_group(raw):
        return False
    if not _can_bind(family, (host, 0, *scope)):
        return False
    if not _can_bind(family, (UNUSED_ADDRESSES[socket.AddressFamily(family)], 0)):
        return True
    # With the setting ip_nonlocal_bind, common on load balancers, a socket can be bound to any address. Then compare
    # the source: the kernel sends to a local address from that same address, except to secondary addresses of an
    # interface.
    with suppress(OSError):
        return source(None, family, address)[0] == host
    return False


def _can_bind(family: int, address: object) -> bool:
    try:
        with probe(family) as sock:
            sock.bind(address)  # type: ignore[arg-type]
    except OSError:
        return False
    return True


def is_broadcast(family: int, address: Address) -> bool:
    """Whether an IPv4 host is a broadcast address: connecting to one needs SO_BROADCAST."""
    if len(raw := raw_host(family, address[0])) == 16 and raw[:12] != MAPPED:
        return False
    try:
        with probe(family) as sock:
            try:
                sock.connect(_with_port(address))
                return False
            except OSError as error:
                if error.errno != errno.EACCES:
                    return False
            # A route of type "prohibit" gives the same error, even with the option.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sock.connect(_with_port(address))
    except OSError:
        return False
    return True


def source(like: socket.socket | None, family: int, address: Address) -> Address:
    """The address that the kernel sends from to ``address``, for a socket bound to the same interface as ``like``."""
    with probe(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        if like is not None and sys.platform == "linux":
            device = like.getsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, 16)
            if device.strip(b"\0"):
                sock.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, device)
        sock.connect(_with_port(address))
        own: Address = sock.getsockname()
        return own


def _with_port(address: Address) -> Address:
    host, port, *scope = address
    return (host, port or 1, *scope)  # type: ignore[return-value]  # some systems do not connect to port 0


def index_of(sock: socket.socket, interface: str) -> int:
    """Index of the interface with a name, in the socket's own namespace. ``OSError`` if there is none."""
    if sys.platform != "linux":
        return socket.if_nametoindex(interface)
    import fcntl

    name = os.fsencode(interface)
    if not 0 < len(name) < NAME_SIZE or b"\0" in name:  # the kernel would cut the name off
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
    answer = fcntl.ioctl(sock, SIOCGIFINDEX, name.ljust(IFREQ_SIZE, b"\0"))
    return int.from_bytes(answer[16:20], sys.byteorder)


def interface_of(sock: socket.socket, own: bytes) -> int:
    """Index of the interface that has a raw address, the first one if several have it, or 0; Linux only."""
    return next(iter(interfaces_with(sock, own)), 0)


def interfaces_with(sock: socket.socket, own: bytes) -> list[int]:
    """Indexes of all interfaces that have a raw address. Linux only: elsewhere none is found."""
    if sys.platform != "linux":
        return []
    if len(own) == 16 and own[:12] != MAPPED:
        return [index for index, raw in _ipv6_addresses() if raw == own]
    return [index for index, raw in ipv4_addresses(sock) if raw == own[-4:]]


def is_on(sock: socket.socket, own: bytes, interface: bytes) -> bool:
    """Whether an interface has a raw IPv4 address; also true if it has none at all, or if it is not known."""
    index = int.from_bytes(interface, sys.byteorder)
    with suppress(OSError):  # closed
        there = [raw for where, raw in ipv4_addresses(sock) if where == index]
        return own in there or not there
    return True


def ipv4_address_on(sock: socket.socket, interface: int) -> bytes:
    """The first raw IPv4 address of an interface, or b""."""
    with suppress(OSError):  # closed
        return next((raw for index, raw in ipv4_addresses(sock) if index == interface), b"")
    return b""


def ipv4_addresses(sock: socket.socket) -> list[tuple[int, bytes]]:
    """All IPv4 addresses of this machine, each with the index of its interface; Linux only."""
    if sys.platform != "linux":
        return []
    import fcntl

    found = array("B", bytes(IFREQ_SIZE * 1_024))
    asked = struct.pack("@iP", len(found), found.buffer_info()[0])
    (size,) = struct.unpack_from("@i", fcntl.ioctl(sock, SIOCGIFCONF, asked))
    indexes: dict[str, int] = {}
    addresses = []
    for start in range(0, size, IFREQ_SIZE):
        entry = found[start : start + IFREQ_SIZE].tobytes()
        # eth0:1 is an alias of eth0.
        name = os.fsdecode(entry[:NAME_SIZE].partition(b"\0")[0].partition(b":")[0])
        if name not in indexes:
            with suppress(OSError):  # it has just been removed
                indexes[name] = index_of(sock, name)
        if name in indexes:
            addresses.append((indexes[name], entry[20:24]))  # after the family and port of a sockaddr_in
    return addresses


def _ipv6_addresses() -> Iterator[tuple[int, bytes]]:
    """All IPv6 addresses of this machine, each with the index of its interface; Linux only."""
    # No ioctl gives these. The file shows the calling thread's namespace, like other probes. A line has the address,
    # and the index in hexadecimal.
    with suppress(OSError), open("/proc/thread-self/net/if_inet6") as lines:  # no such file if IPv6 is turned off
        for line in lines:
            address, index, *_ = line.split()
            yield int(index, 16), bytes.fromhex(address)
