"""The kernel's part of a simulated network: each socket's buffers, and the table of addresses and groups.

A socket is separate from its engine because it can outlive the engine: a shared socket waits, with its buffer, for the
next endpoint. This file uses neither the clock nor the network; callers pass the time in.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Iterable, Iterator
from typing import cast

import attrs
import trio

from .._endpoints import Address
from .._endpoints._address import is_link_local, is_multicast, is_unspecified
from ._addresses import normal, reachable, reaches_many, unspecified
from ._packets import SimulatedRoute

# Bytes of kernel memory that a datagram takes besides its payload, and the default size of a buffer. Both are as on
# Linux, so a socket holds 277 small datagrams.
OVERHEAD = 768
DEFAULT_BUFFER = 212_992


@attrs.define(eq=False)
class SimulatedSocket:
    """A bound socket: its two buffers, its options, its groups.

    Attributes:
      own_hosts: The numeric addresses of its machine; empty if unknown. A socket bound to all addresses then has every
        address that no other socket has.
      shared: The socket stays open when its engine is closed.
      peer: The address that the socket is connected to.
      own_addresses: The addresses that the socket can send from, with its port. The first is the default, and receives
        groups and broadcasts.
      groups: The groups that the socket has joined, each with the sources it receives from, or ``None`` for all.
      hops, loop, interface: Options for sending to groups, as ``Endpoint.multicast_hops`` and so on.
      waiting: Tasks that wait to read or write.
    """

    bound_address: Address
    own_hosts: tuple[str, ...] = ()
    shared: bool = False
    peer: Address | None = None
    allow_broadcast: bool = False
    receive_buffer: int = DEFAULT_BUFFER
    send_buffer: int = DEFAULT_BUFFER

    own_addresses: tuple[Address, ...] = attrs.field(init=False)
    groups: dict[str, set[str] | None] = attrs.field(factory=dict, init=False)
    hops: int = attrs.field(default=1, init=False)
    loop: bool = attrs.field(default=True, init=False)
    interface: int = attrs.field(default=0, init=False)
    refused: bool = attrs.field(default=False, init=False)  # by the peer, and not yet raised
    dropped: int = attrs.field(default=0, init=False)
    arrived_bytes: int = attrs.field(default=0, init=False)
    waiting: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, init=False)
    _arrived: deque[tuple[bytes, SimulatedRoute] | OSError] = attrs.field(factory=deque, init=False)  # but not yet read
    _unsent: deque[tuple[float, int]] = attrs.field(
        factory=deque, init=False
    )  # when each datagram has left, and its bytes
    _unsent_bytes: int = attrs.field(default=0, init=False)
    _line_free_at: float = attrs.field(default=0.0, init=False)

    # Receiving.

    def put(self, payload: bytes, route: SimulatedRoute) -> bool:
        """Add a datagram; return False if the receive buffer is full. As on Linux, the last one may overflow it."""
        if self.arrived_bytes >= self.receive_buffer:
            self.dropped += 1
            return False
        self._arrived.append((payload, route))
        self.arrived_bytes += OVERHEAD + len(payload)
        self.waiting.unpark_all()
        return True

    def put_error(self, error: OSError) -> None:
        """Make a read fail, after the datagrams that have already arrived."""
        self._arrived.append(error)
        self.waiting.unpark_all()

    def refuse(self) -> None:
        """Make the next read or write fail: the peer's port is closed."""
        self.refused = True
        self.waiting.unpark_all()

    def has_arrivals(self) -> bool:
        return bool(self._arrived)

    def take(self) -> tuple[bytes, SimulatedRoute] | OSError:
        """Remove the first datagram, or error, from the receive buffer."""
        arrived = self._arrived.popleft()
        if not isinstance(arrived, OSError):
            self.arrived_bytes -= OVERHEAD + len(arrived[0])
        return arrived

    # Sending.

    def has_room(self, now: float) -> bool:
        """Whether the send buffer takes another datagram. As on Linux, the last datagram may overflow it."""
        while self._unsent and self._unsent[0][0] <= now:
            self._unsent_bytes -= self._unsent.popleft()[1]
        return self._unsent_bytes < self.send_buffer

    def next_departure(self) -> float:
        """When the first datagram in the send buffer will have left."""
        return self._unsent[0][0]

    def queue(self, now: float, length: int, bandwidth: float | None) -> float:
        """Put a datagram into the send buffer; return when its last byte will have left."""
        self._line_free_at = max(now, self._line_free_at) + (length / bandwidth if bandwidth else 0)
        if self._line_free_at > now:
            self._unsent.append((self._line_free_at, OVERHEAD + length))
            self._unsent_bytes += OVERHEAD + length
        return self._line_free_at

    def forget_times(self) -> None:
        """Empty the send buffer, because its times are those of another clock."""
        self._unsent.clear()
        self._unsent_bytes = 0
        self._line_free_at = 0.0

    # Addresses.

    @own_addresses.default
    def _(self) -> tuple[Address, ...]:
        if not self.is_of_machine:
            return (self.bound_address,)
        return tuple(map(self.at_host, self.own_hosts)) or (reachable(unspecified(self.bound_address)),)

    @property
    def is_of_machine(self) -> bool:
        """Whether the socket is bound to all addresses of its machine or to a group, not to one address."""
        return is_unspecified(self.bound_address) or reaches_many(self.bound_address)

    def at_host(self, host: str) -> Address:
        """The address of a host, at the port that this socket is bound to."""
        return normal(cast("Address", (host, *self.bound_address[1:])))

    def source_for(self, peer: Address) -> Address:
        """The source address for a peer: a link-local one for a link-local peer, if there is one."""
        first, *others = self.own_addresses
        return next(filter(is_link_local, self.own_addresses), first) if others and is_link_local(peer) else first

    def is_on_machine_of(self, other: SimulatedSocket) -> bool:
        return self.own_addresses[0][0] in [own[0] for own in other.own_addresses]

    def can_send_from(self, local: Address) -> bool:
        """Whether the socket can send from a local address. It can from any, if its own addresses are unknown."""
        return local in self.own_addresses or (self.is_of_machine and not self.own_hosts)


@attrs.define(eq=False)
class SocketTable:
    """The sockets of a network, by address, and the members of each group."""

    # A key is the address that a socket is bound to, and None. A socket that is bound to a group or to all addresses
    # has one key for each of its own_hosts instead, if they are known.
    _sockets: dict[tuple[Address, str | None], SimulatedSocket] = attrs.field(factory=dict, init=False)
    _members: dict[str, list[SimulatedSocket]] = attrs.field(factory=dict, init=False)

    def __iter__(self) -> Iterator[SimulatedSocket]:
        return iter(dict.fromkeys(self._sockets.values()))  # each socket once

    def add(self, socket: SimulatedSocket) -> SimulatedSocket | None:
        """Bind a socket and return it; if its address has a socket already and both are shared, return that one.

        Returns ``None`` if the address is taken.
        """
        keys = self._keys(socket)
        others = {self._sockets.get(key) for key in keys}
        if others == {None}:
            self._sockets.update(dict.fromkeys(keys, socket))
            return socket
        other = others.pop()
        return other if other is not None and not others and other.shared and socket.shared else None

    def remove(self, socket: SimulatedSocket) -> None:
        for key in self._keys(socket):
            del self._sockets[key]
        for host in list(socket.groups):
            self.leave(socket, host)

    def bound_to(self, address: Address) -> SimulatedSocket | None:
        """The socket that is bound to exactly this address, or that receives the datagrams sent to it."""
        return self._sockets.get((address, None)) or self.unicast(address)

    def unicast(self, destination: Address, source: Address | None = None) -> SimulatedSocket | None:
        """The socket that receives a datagram. A connected socket receives only from its peer."""
        everywhere = unspecified(destination)
        for key in ((destination, None), (everywhere, destination[0]), (everywhere, None)):
            socket = self._sockets.get(key)
            if socket is not None and socket.peer in (None, source):
                return socket
        return None

    def connected(self, address: Address, peer: Address) -> SimulatedSocket | None:
        """The socket at an address if it is connected to ``peer``, so that it learns of refusals."""
        socket = self._sockets.get((address, None))
        return socket if socket is not None and socket.peer == peer else None

    def many(self, destination: Address, source: Address) -> list[SimulatedSocket]:
        """The sockets that receive a datagram to a group or broadcast address, in the order of joining or binding."""
        candidates: Iterable[SimulatedSocket] = self
        if is_multicast(destination):
            members = self._members.get(destination[0], ())
            candidates = [
                socket
                for socket in members
                if (sources := socket.groups[destination[0]]) is None or source[0] in sources
            ]
        return [
            socket
            for socket in candidates
            if socket.bound_address in (destination, unspecified(destination)) and socket.peer is None
        ]

    def join(self, socket: SimulatedSocket, host: str, source: str | None = None) -> None:
        """Add a member, for all sources or for one; the errors are those of Linux."""
        if host not in socket.groups:
            socket.groups[host] = None if source is None else set()
            self._members.setdefault(host, []).append(socket)
        elif source is None:
            raise OSError(errno.EADDRINUSE, f"{os.strerror(errno.EADDRINUSE)}: already in group {host}")
        if source is None:
            return
        sources = socket.groups[host]
        if sources is None:  # as on Linux, naming a source ends the membership for all
            sources = socket.groups[host] = set()
        if source in sources:
            raise OSError(errno.EADDRNOTAVAIL, f"{os.strerror(errno.EADDRNOTAVAIL)}: already in group {host}")
        sources.add(source)

    def leave(self, socket: SimulatedSocket, host: str, source: str | None = None) -> None:
        """Remove a member; without a source, for all of its sources."""
        sources = socket.groups.get(host, set())
        if host not in socket.groups or (source is not None and (sources is None or source not in sources)):
            raise OSError(errno.EADDRNOTAVAIL, f"{os.strerror(errno.EADDRNOTAVAIL)}: not in group {host}")
        if source is not None and sources is not None:
            sources.remove(source)
            if sources:
                return
        del socket.groups[host]
        self._members[host].remove(socket)

    def _keys(self, socket: SimulatedSocket) -> list[tuple[Address, str | None]]:
        hosts = socket.own_hosts if socket.is_of_machine and socket.own_hosts else (None,)
        return [(socket.bound_address, host) for host in hosts]
