"""The groups and multicast options of a real socket: RFC 3678, ip(7), ipv6(7).

Linux takes one pair of structures for both families and for source-specific joins. Other systems get what the
``socket`` module offers: joining for all sources.
"""

from __future__ import annotations

import socket
import struct
import sys

from .._address import Address, family_of, pack_address
from . import probes

# From linux/in.h and linux/in6.h; most of them are not in the socket module.
MCAST_JOIN_GROUP, MCAST_LEAVE_GROUP, MCAST_JOIN_SOURCE_GROUP, MCAST_LEAVE_SOURCE_GROUP = 42, 45, 46, 47
IP_MULTICAST_ALL, IPV6_MULTICAST_ALL = 49, 29

# Whether the system has these options. Without them a socket can join for all sources only.
HAS_SOURCES = sys.platform == "linux"

SOCKADDR_STORAGE_SIZE = 128  # a sockaddr_in or sockaddr_in6, padded

# By family: the level of its options, and the options for hops, loop and interface.
LEVELS = {socket.AF_INET: socket.IPPROTO_IP, socket.AF_INET6: socket.IPPROTO_IPV6}
HOPS = {socket.AF_INET: socket.IP_MULTICAST_TTL, socket.AF_INET6: socket.IPV6_MULTICAST_HOPS}
LOOP = {socket.AF_INET: socket.IP_MULTICAST_LOOP, socket.AF_INET6: socket.IPV6_MULTICAST_LOOP}
INTERFACE = {socket.AF_INET: socket.IP_MULTICAST_IF, socket.AF_INET6: socket.IPV6_MULTICAST_IF}


class SocketMulticast:
    """See :class:`~._engine.Multicast`. On a socket for both families, options for sending are set for both."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._chosen = 0  # the interface for sending over IPv4, which the kernel does not report

    @property
    def families(self) -> list[socket.AddressFamily]:
        family = socket.AddressFamily(self._socket.family)
        if family == socket.AF_INET6 and not self._socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            return [family, socket.AF_INET]
        return [family] if family in LEVELS else []

    # Groups.

    def join(self, group: Address, source: Address | None, interface: int) -> None:
        family = family_of(group)
        if HAS_SOURCES:
            self._set_filter(MCAST_JOIN_SOURCE_GROUP if source else MCAST_JOIN_GROUP, group, source, interface)
        else:
            option = socket.IP_ADD_MEMBERSHIP if family == socket.AF_INET else socket.IPV6_JOIN_GROUP
            self._socket.setsockopt(LEVELS[family], option, _any_source(group, source, interface))
        if sys.platform == "linux":
            # Otherwise the socket would also receive the groups that other sockets of this machine have joined.
            option = IP_MULTICAST_ALL if family == socket.AF_INET else IPV6_MULTICAST_ALL
            self._socket.setsockopt(LEVELS[family], option, 0)

    def leave(self, group: Address, source: Address | None, interface: int) -> None:
        family = family_of(group)
        if HAS_SOURCES:
            self._set_filter(MCAST_LEAVE_SOURCE_GROUP if source else MCAST_LEAVE_GROUP, group, source, interface)
        else:
            option = socket.IP_DROP_MEMBERSHIP if family == socket.AF_INET else socket.IPV6_LEAVE_GROUP
            self._socket.setsockopt(LEVELS[family], option, _any_source(group, source, interface))

    def _set_filter(self, option: int, group: Address, source: Address | None, interface: int) -> None:
        # struct group_source_req {uint32_t interface; struct sockaddr_storage group, source;}; without a source
        # struct group_req.
        family = family_of(group)
        value = struct.pack("@I4x", interface)
        for address in (group, source):
            if address is not None:
                value += pack_address(address, family).ljust(SOCKADDR_STORAGE_SIZE, b"\0")
        self._socket.setsockopt(LEVELS[family], option, value)

    # Sending.

    @property
    def hops(self) -> int:
        family = self.families[0]
        return self._socket.getsockopt(LEVELS[family], HOPS[family])

    @hops.setter
    def hops(self, hops: int) -> None:
        for family in self.families:
            self._socket.setsockopt(LEVELS[family], HOPS[family], hops)

    @property
    def loop(self) -> bool:
        family = self.families[0]
        return bool(self._socket.getsockopt(LEVELS[family], LOOP[family]))

    @loop.setter
    def loop(self, loop: bool) -> None:
        for family in self.families:
            self._socket.setsockopt(LEVELS[family], LOOP[family], loop)

    @property
    def interface(self) -> int:
        if self.families[0] == socket.AF_INET6:
            return self._socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF)
        # The kernel reports only an address, and only if the interface was chosen by address, for example by configure.
        chosen = self._socket.getsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, 4)
        return (any(chosen) and probes.interface_of(self._socket, chosen)) or self._chosen

    def set_interface(self, index: int, own: Address | None) -> None:
        for family in self.families:
            value = struct.pack("@I", index)
            if family == socket.AF_INET:
                source = bytes(4)
                if own is not None and family_of(own) == family:
                    source = probes.raw_host(family, own[0])
                elif index and (raw := probes.ipv4_address_on(self._socket, index))[:1] == b"\x7f":
                    source = raw  # the kernel would take the address of another interface
                # struct ip_mreqn: a group, an address, an index. On Windows the index takes the place of an address.
                value = struct.pack("!I", index) if sys.platform == "win32" else bytes(4) + source + value
            self._socket.setsockopt(LEVELS[family], INTERFACE[family], value)
        self._chosen = index

    # Interfaces.

    def index_of(self, interface: str) -> int:
        return probes.index_of(self._socket, interface)

    def interfaces_with(self, address: Address) -> list[int]:
        if sys.platform != "linux":
            raise NotImplementedError("an interface can be named by its address on Linux only: use its name or index")
        return probes.interfaces_with(self._socket, probes.raw_host(family_of(address), address[0]))


def _any_source(group: Address, source: Address | None, interface: int) -> bytes:
    """Return the value for the options that every system has, to join and leave for all sources."""
    if source is not None:
        raise NotImplementedError("joining for a single source works on Linux only")
    family = family_of(group)
    raw = probes.raw_host(family, group[0])
    if family == socket.AF_INET:  # struct ip_mreqn; Windows has struct ip_mreq, with the index as its address
        return raw + (struct.pack("!I", interface) if sys.platform == "win32" else struct.pack("@4xI", interface))
    return raw + struct.pack("@I", interface)
