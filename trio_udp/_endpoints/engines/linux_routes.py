"""Routes of the engine for Linux: bytes that the kernel wrote, and that a reply gives back to it unchanged.

:class:`RawRoutes` makes and decodes them; the engine itself, in linux.py, only moves them.

A route is a socket address. Where the kernel tells destinations, a route also has an *end*: one control message with
our own address. The end also holds the group that a datagram was sent to. Over IPv4 that is in ``ipi_addr``, which the
kernel ignores on sending. Over IPv6 a number for the group is in the padding between the address and the control
message, and :class:`Ends` maps numbers to groups.
"""

from __future__ import annotations

import socket
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, cast

import attrs
import trio

from .._address import Address, host_bytes, network_of, pack_address, unpack_address
from ._engine import Ancillary, Engine, Route
from ._socket import SocketEngine, tells_destination
from .pktinfo import (
    IP_PKTINFO,
    IPV6_PKTINFO,
    MAPPED,
    IsOn,
    ReplyControl,
    anywhere,
    is_doubtful_host,
    pack_control,
    understand,
    unpack_control,
)

# Size of the cache of decoded control messages. Decoding the same bytes each time would take a tenth of an echo, and
# most machines have few addresses. But a server may answer for a whole IPv6 prefix, and strangers could write to every
# address in it.
MAX_ENDS = 1_000

# The most IPv6 groups that one socket distinguishes. Datagrams arrive only for groups that a program of this machine
# has joined. Beyond this number the interface is known, but not the group.
MAX_GROUPS = 1_000

# First bytes that clear an address, as nearly all do. Of others, such as ::1, fe80::1 and groups, is_doubtful_host()
# needs all bytes.
FINE_FIRST_BYTES = bytes(range(1, 0xE0))

# The fewest sources that are checked together. Checking many so takes 60 ns for each, and one by one 190.
MANY = 4


@attrs.frozen(eq=False)
class Layout:
    """The offsets and sizes of the parts of a socket's routes.

    Attributes:
      family: The address family.
      name_size: Bytes of the address.
      control_offset: Where the control messages begin, after the address and its padding.
      default_control: The control message that leaves our own address to the kernel; empty for routes without an end.
    """

    family: int
    name_size: int
    control_offset: int
    default_control: bytes = b""

    @property
    def route_size(self) -> int:
        return self.control_offset + len(self.default_control)

    @property
    def end_offset(self) -> int:
        """Where the end of a route begins. The padding before the control message is part of the end."""
        return self.name_size if self.default_control else self.control_offset


CONNECTED = Layout(socket.AF_UNSPEC, 0, 0)
IPV4 = Layout(socket.AF_INET, 16, 16)
IPV6 = Layout(socket.AF_INET6, 28, 32)
IPV4_WILDCARD = Layout(socket.AF_INET, 16, 16, pack_control(socket.IPPROTO_IP, IP_PKTINFO or 0, bytes(12)))
IPV6_WILDCARD = Layout(socket.AF_INET6, 28, 32, pack_control(socket.IPPROTO_IPV6, IPV6_PKTINFO or 0, bytes(20)))


class Ends(dict[bytes, bytes]):
    """The ends of one socket's routes, by the control messages that datagrams arrive with.

    A lookup of a missing key makes the end. Use it for messages with only the usual control message; use
    :meth:`understand` for all others.
    """

    def __init__(self, layout: Layout, is_on: IsOn = anywhere) -> None:
        self._layout = layout
        self._is_on = is_on
        self._groups = [b""]  # by number; 0 means no group
        self.understand = lru_cache(MAX_ENDS)(self._understand)

    def __missing__(self, control: bytes) -> bytes:
        if len(self) >= MAX_ENDS:
            self.clear()
        self[control], _, _ = self._understand(control)
        return self[control]

    def _understand(self, control: bytes) -> tuple[bytes, int, Ancillary]:
        """Return the end of a route, the size of segments or 0, and other control messages."""
        reply, group, segment_size, ancillary = understand(unpack_control(control), self._is_on)
        return self.pack(reply, group), segment_size, ancillary

    def pack(self, reply: ReplyControl, group: bytes = b"") -> bytes:
        """Make the end of a route; see :class:`Arrival`."""
        default = self._layout.default_control
        if not default:
            return b""
        control = pack_control(*reply[0]) if reply else default
        if len(control) != len(default):  # another family: all records of an array have one size
            control, group = default, b""
        if self._layout.family == socket.AF_INET:
            return control[:-8] + group.ljust(4, b"\0") + control[-4:]
        return self._number_of(group).to_bytes(4, "big") + control

    def _number_of(self, group: bytes) -> int:
        if group not in self._groups:
            if len(self._groups) > MAX_GROUPS:
                return 0
            self._groups.append(group)
        return self._groups.index(group)

    def take_apart(self, route: bytes) -> tuple[ReplyControl, bytes]:
        """Split the end of a route into the control message of a reply and the group."""
        layout = self._layout
        if not layout.default_control:
            return (), b""
        ((level, kind, data),) = unpack_control(route[layout.control_offset :])
        if layout.family == socket.AF_INET:
            return ((level, kind, data[:8] + bytes(4)),), data[8:].strip(b"\0") and data[8:]
        number = int.from_bytes(route[layout.name_size : layout.control_offset], "big")
        return ((level, kind, data),), self._groups[number]


class RawRoutes(SocketEngine):
    """The part of the engine for Linux that makes and decodes routes."""

    def __init__(self, sock: trio.socket.SocketType, max_datagram_size: int) -> None:
        super().__init__(sock, max_datagram_size)
        self._tells_destination = tells_destination(sock)
        if self.connected:
            self._layout = CONNECTED
            self._peer_address: Address = sock.getpeername()
        elif self.family == socket.AF_INET:
            self._layout = IPV4_WILDCARD if self._tells_destination else IPV4
        else:
            self._layout = IPV6_WILDCARD if self._tells_destination else IPV6
        self._ends = Ends(self._layout, self._is_on)
        self._ports: frozenset[bytes] = frozenset()
        self._raw_ports: frozenset[int] = frozenset()
        self._host = slice(4, 8) if self.family == socket.AF_INET else slice(8, 24)  # in a socket address
        self._first_byte = self._host.start
        self._peer_is_doubtful = False  # of a connected socket

    def route(self, address: Address, local_address: Address | None = None) -> Route:
        reply = self._control_from(address, local_address)
        if self.connected:
            return b""
        name = pack_address(address, self.family)[: self._layout.end_offset]
        return name + self._ends.pack(reply) if self._tells_destination else name

    def peer_address(self, route: Route) -> Address:
        return self._peer_address if self.connected else unpack_address(cast("bytes", route))

    def host(self, route: Route) -> bytes:
        if self.connected:
            return host_bytes(self._peer_address)
        name: Any = route
        host: bytes = name[self._host]
        return host[12:] if host.startswith(MAPPED) else host

    def _end_of(self, route: Route) -> tuple[ReplyControl, bytes]:
        return self._ends.take_apart(cast("bytes", route))

    # Untrusted sources.

    def watch_ports(self, ports: frozenset[int]) -> None:
        self._ports = frozenset(port.to_bytes(2, "big") for port in ports)
        self._raw_ports = frozenset(map(socket.htons, ports))  # as array("H") reads them
        if self.connected:
            self._peer_is_doubtful = self._is_doubtful(self._peer_address, ports)

    def doubtful_source(self, route: Route) -> bool:
        if self.connected:
            return self._peer_is_doubtful
        name: Any = route
        if name[2:4] in self._ports:
            return True
        return name[self._first_byte] not in FINE_FIRST_BYTES and is_doubtful_host(name[self._host])

    def doubtful_sources(self, routes: Sequence[Route]) -> bool:
        if not self.connected and len(routes) >= MANY:
            together, size = b"".join(cast("Sequence[bytes]", routes)), self._layout.route_size
            ports = array("H", together)[1 :: size // 2]  # bytes 2 and 3 of each route
            first_bytes = together[self._first_byte :: size]
            if self._raw_ports.isdisjoint(ports) and not first_bytes.translate(None, FINE_FIRST_BYTES):
                return False
        return any(map(self.doubtful_source, routes))


def network_getter(engine: Engine, ipv4_bits: int, ipv6_bits: int) -> Callable[[Route], bytes]:
    """Return a function that gives the key of the network at the other end of a route; see ``network_of``."""
    if (
        isinstance(engine, RawRoutes)
        and engine.family == socket.AF_INET
        and not engine.connected
        and ipv4_bits % 8 == 0
    ):
        # The same in C: a datagram_handler with a rate limit runs 15 % fewer instructions of ours.
        return itemgetter(slice(4, 4 + ipv4_bits // 8))  # type: ignore[return-value]
    return lambda route: network_of(engine.host(route), ipv4_bits, ipv6_bits)
