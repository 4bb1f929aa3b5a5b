"""Engine: the interface between an endpoint and the code that makes the system calls.

An engine moves datagrams between one socket and Python, a batch at a time. ``receive`` and ``send`` are plain calls
that never block; the endpoint decides when to wait, with ``wait_readable`` and ``wait_writable``. An engine keeps no
send queue and no send counters, so one engine can wrap another.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol, TypeAlias

import trio

from ..._limits import BATCH as BATCH
from ..._statistics import KernelFigures, ReceiveCounts
from .._address import Address

Route: TypeAlias = Hashable
"""The source and destination of a datagram, in the form that is cheapest for the engine.

Equal routes mean the same client. For a unicast destination a route names the peer address and our own address. For a
group, a broadcast or a link-local destination it also names the destination and the interface. Only engines look
inside.
"""

Ancillary: TypeAlias = "tuple[tuple[int, int, bytes], ...]"
"""Control messages (level, type, data) other than those that the engine asks for itself; nearly always empty."""

Received: TypeAlias = tuple[bytes, Route, Ancillary]

# A payload, its route, and the Sender that counts it (see _statistics.py).
Outgoing: TypeAlias = tuple[bytes, Route, Any]


class Multicast(Protocol):
    """The groups and multicast options of one socket. Every call can raise the kernel's ``OSError``.

    An interface is an index; 0 leaves the choice to the kernel.

    Attributes:
      hops: Time to live of the datagrams that the socket sends to groups.
      loop: Members on this machine get a copy of the datagrams that the socket sends to groups.
    """

    hops: int
    loop: bool

    @property
    def interface(self) -> int:
        """The interface on which the socket sends to groups, unless a route says otherwise."""

    def set_interface(self, index: int, own: Address | None) -> None:
        """Choose the interface on which to send to groups, and the address to send from if there is no better one."""

    @property
    def families(self) -> Sequence[int]:
        """Address families of the groups that the socket can be in. Empty for Unix-domain sockets."""

    def join(self, group: Address, source: Address | None, interface: int) -> None:
        """Receive the datagrams to a group from one source, or from all."""

    def leave(self, group: Address, source: Address | None, interface: int) -> None:
        """Undo a ``join`` with the same arguments."""

    def index_of(self, interface: str) -> int:
        """Index of the interface with a name; ``OSError`` if there is none."""

    def interfaces_with(self, address: Address) -> list[int]:
        """Indexes of the interfaces that have an address."""


class Engine(Protocol):
    """One socket, and everything that an :class:`Endpoint` does with it.

    Attributes:
      family: The address family of the socket.
      bound_address: The address that the socket is bound to.
      connected: The socket is connected to one peer, and the kernel reports when that peer refuses a datagram.
      counts: Running counts of received datagrams; ``receive`` updates them.
      wakes_tasks: Sending may wake tasks of this process, as on a simulated network.
      multicast: The groups and multicast options of the socket.
    """

    family: int
    bound_address: Address
    connected: bool
    counts: ReceiveCounts
    wakes_tasks: bool

    @property
    def multicast(self) -> Multicast: ...

    @property
    def socket(self) -> trio.socket.SocketType:
        """The socket, for users; everything else goes through the engine."""

    # Moving datagrams.

    def receive(self, batch: list[Received]) -> bool:
        """Append datagrams that have arrived, at most ``BATCH``, to an empty batch. True if the kernel has no more.

        Raises:
          OSError: Reading failed; ``batch`` holds the datagrams that were read before.
        """

    @property
    def read_ahead(self) -> int:
        """Datagrams that were read from the kernel and not yet returned, because a batch was full."""

    def send(self, payloads: Sequence[bytes], sizes: Sequence[int], routes: Sequence[Route]) -> int:
        """Send datagrams in order, as many as one call allows; return how many the kernel has taken, at least one.

        Args:
          payloads: At least one.
          sizes: The length of each payload; the caller needs it too, for its counts.
          routes: One for each payload.

        Raises:
          BlockingIOError: The send buffer is full; none was sent.
          OSError: The first could not be sent; none was sent.
        """

    # Routes.

    def route(self, address: Address, local_address: Address | None = None) -> Route:
        """The route to an address, also to one that has never written to us.

        Args:
          address: Numeric, of the socket's family.
          local_address: Our own address to send from; by default the kernel's choice. With ``source_for(address)`` the
            result equals the route of the datagrams that the peer sends back.
        """

    def source_for(self, address: Address) -> Address:
        """Our own address that the kernel would send from to ``address``. ``OSError`` if there is no route."""

    def max_payload(self, route: Route) -> int:
        """Bytes of the longest payload that one datagram can carry on a route."""

    def peer_address(self, route: Route) -> Address:
        """The address at the other end of a route."""

    def local_address(self, route: Route) -> Address:
        """Our own address at this end of a route, from which replies leave."""

    def destination(self, route: Route) -> Address:
        """The address that a datagram on this route was sent to: our own, a group or a broadcast address."""

    def interface(self, route: Route) -> int | None:
        """Index of the arrival interface, if the destination is link-local, a group or a broadcast address."""

    def host(self, route: Route) -> bytes:
        """The host at the other end of a route, as ``host_bytes`` gives it. Cheap."""

    # Untrusted sources; see _sources.py.

    def watch_ports(self, ports: frozenset[int]) -> None:
        """Set the source ports for which ``doubtful_source`` is true."""

    def doubtful_source(self, route: Route) -> bool:
        """Whether a source needs further checks. Cheap, and sometimes true for a harmless source.

        Always true for a watched port, and for a group, broadcast (255.255.255.255) or unspecified address.
        """

    def doubtful_sources(self, routes: Sequence[Route]) -> bool:
        """Whether ``doubtful_source`` is true for one of several routes."""

    def is_own_host(self, address: Address) -> bool:
        """Whether the host of an address, of either family, is this machine. Costs a system call."""

    def is_broadcast(self, address: Address) -> bool:
        """Whether an address, of either family, is a broadcast address of this machine's networks. A system call."""

    def allows_broadcast(self) -> bool:
        """Whether SO_BROADCAST is set."""

    # Waiting and closing.

    def kernel_figures(self) -> KernelFigures:
        """The kernel's figures for the socket, also after it is closed."""

    def is_readable(self) -> bool:
        """Whether ``wait_readable`` would return at once."""

    async def wait_readable(self) -> None:
        """Sleep until ``receive`` is worth a try; ``trio.ClosedResourceError`` once the socket is closed."""

    async def wait_writable(self) -> None:
        """Sleep until ``send`` is worth a try; ``trio.ClosedResourceError`` once the socket is closed."""

    @property
    def closed(self) -> bool:
        """Whether the socket is closed, by the endpoint or otherwise."""

    def close(self) -> None:
        """Close the socket and wake the tasks that wait for it."""

    def abandon(self) -> None:
        """Forget the file descriptor, which is no longer ours, and wake the tasks that wait for it."""
