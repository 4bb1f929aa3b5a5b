"""SimulatedNetwork: open endpoints and connections on it, join groups, inject datagrams, partition it."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any, cast
from weakref import WeakKeyDictionary

import attrs
import trio

from .._connection import Connection, make_connection
from .._endpoints import (
    Address,
    Endpoint,
    Network,
    Networks,
    Payload,
    check_max_datagram_size,
    make_endpoint,
    numeric_address,
)
from .._endpoints._address import family_of, is_ipv6, is_limited_broadcast, is_multicast, is_unspecified, max_payload
from .._endpoints.engines import INNER_SIZE, ProxyEngine
from ._addresses import check_families, is_beyond, normal, reachable, reaches_many
from ._conditions import Conditions, check_number
from ._engine import SimulatedEngine
from ._sockets import SimulatedSocket, SocketTable
from ._timeline import DatagramEvent
from ._wire import Partition, Wire

# Default local addresses of connections: hosts reserved for documentation, and the dynamic ports of RFC 6335.
DEFAULT_HOST, DEFAULT_HOST_IPV6 = "198.51.100.1", "2001:db8::1"
FREE_PORTS = range(49_152, 65_536)


@attrs.define(eq=False, kw_only=True)
class SimulatedNetwork(Conditions):
    """A network in memory, on Trio's clock, with random network conditions that a seed determines.

    Endpoints and connections on it have the same types as on a real network. By default no datagram is lost, and all
    arrive at once. Assign to an attribute to change a condition at any time, for the datagrams sent from then on. Use
    it inside Trio, best with ``trio.testing.MockClock(autojump_threshold=0)`` (in pytest: ``autojump_clock``); nothing
    needs to be closed. Under :func:`deterministic_scheduling` the same seed gives the same run, byte for byte.

    Attributes:
      seed: Seed of the network's random numbers. Read-only.
      loss: Probability that a packet is lost.
      duplicate: Probability that a datagram arrives twice.
      reorder: Probability that a datagram is held back, for up to a tenth of a second, so that later datagrams overtake
        it. All others between the same two addresses arrive in the order of sending.
      latency: Seconds from sending to arrival, ``(least, most)``. Because datagrams between two addresses do not
        overtake one another, dense traffic waits for its slowest datagram, and its latency is close to the most.
      mtu: Bytes in one packet, including the IP header. A longer datagram travels in fragments, as a kernel sends it by
        default, and is lost if any fragment is.
      bandwidth: Payload bytes per second that leave each sending address. Datagrams that wait to leave fill its send
        buffer; when that is full, ``send_nowait`` raises ``trio.WouldBlock`` and ``send`` waits. ``None``: no limit.
    """

    _sockets: SocketTable = attrs.field(factory=SocketTable, init=False, repr=False)
    _wire: Wire = attrs.field(
        default=attrs.Factory(lambda self: Wire(self, self._sockets), takes_self=True), init=False, repr=False
    )
    _engines: WeakKeyDictionary[Endpoint, SimulatedEngine] = attrs.field(
        factory=WeakKeyDictionary, init=False, repr=False
    )
    _free_ports: Iterator[int] = attrs.field(factory=lambda: itertools.cycle(FREE_PORTS), init=False, repr=False)

    @property
    def events(self) -> list[DatagramEvent]:
        """All events so far, in order. The list grows until you ``clear()`` it."""
        return self._wire.events

    def timeline(self) -> str:
        """Return all events so far as text, one line for each."""
        return "\n".join(map(str, self.events))

    def endpoint(
        self,
        host: str,
        port: int,
        *,
        max_datagram_size: int = 65_535,
        receive_buffer: int | None = None,
        send_buffer: int | None = None,
        own_hosts: Iterable[str] = (),
        allow_broadcast: bool = False,
        shared: bool = False,
        proxies: Iterable[Network] = (),
    ) -> Endpoint:
        """Open an endpoint at any address, for :func:`~trio_udp.serve_endpoints`.

        It has no ``socket``: reading that attribute raises ``io.UnsupportedOperation``, an ``OSError``.

        Args:
          host: Numeric. ``"0.0.0.0"`` or ``"::"`` stands for all ``own_hosts``, or without them for all addresses of
            the family that no other endpoint has. The address of a group stands for that group, once :meth:`join` is
            called.
          port: UDP port; 0 lets the network choose.
          max_datagram_size: Longest payload to accept, in bytes; longer datagrams are counted as truncated.
          receive_buffer: Bytes of memory for datagrams not yet read, each of which takes 768 besides its payload.
            Datagrams that arrive when it is full are dropped, and counted as ``kernel_dropped``. 212,992 by default,
            as on Linux.
          send_buffer: The same for datagrams that have not yet left; see ``bandwidth``.
          own_hosts: The numeric addresses of the machine that the endpoint is on, so that several machines can have an
            endpoint bound to all addresses at the same port. By default it sends from the first of them. Without
            ``own_hosts`` an endpoint bound to all addresses sends from the loopback address.
          allow_broadcast: Allow sending to 255.255.255.255, as ``SO_BROADCAST`` does.
          shared: Open the endpoint over a socket that a supervisor holds. When the endpoint is closed, the socket stays
            open, and datagrams wait in its buffer for the next endpoint that is opened there with ``shared=True`` (and
            the same ``own_hosts``). Buffer sizes and ``allow_broadcast`` stay as the first endpoint set them.
          proxies: As for :func:`~trio_udp.open_endpoints`.

        Raises:
          OSError: ``EADDRINUSE``: the address is taken.
          TypeError, ValueError: An argument is invalid.
        """
        check_max_datagram_size(max_datagram_size)
        for name, size in (("receive_buffer", receive_buffer), ("send_buffer", send_buffer)):
            if size is not None:
                check_number(size, name, 1, 2**63, kind=int)
        address = numeric_address((host, port))
        networks = Networks.parse("proxies", proxies)
        if isinstance(own_hosts, str):
            raise TypeError(f"own_hosts must be a list of addresses, not {own_hosts!r}")
        hosts = tuple(_unicast((own, port), like=address)[0] for own in own_hosts)
        options = {"own_hosts": hosts, "allow_broadcast": allow_broadcast, "shared": shared}
        sizes = {"receive_buffer": receive_buffer, "send_buffer": send_buffer}
        options |= {name: size for name, size in sizes.items() if size is not None}
        return self._open(address, max_datagram_size, receive_buffer or 0, networks, **options)

    async def connect(
        self,
        host: str,
        port: int,
        flowinfo: int = 0,
        scope_id: int = 0,
        *,
        local_address: Address | None = None,
        receive_buffer: int | None = None,
    ) -> Connection:
        """Open a connection to an address, in place of :func:`trio_udp.connect`. A checkpoint.

        Args:
          host: Numeric.
          port: UDP port.
          flowinfo, scope_id: The rest of an IPv6 address, so that ``connect(*client.peer_address)`` works.
          local_address: Any numeric host and port to send from; port 0 lets the network choose. By default it chooses
            both.
          receive_buffer: Bytes of memory for datagrams not yet read, as for :meth:`endpoint`.

        Raises:
          OSError: ``EADDRINUSE``: ``local_address`` is taken. ``EACCES``: ``host`` is the broadcast address.
          TypeError, ValueError: An address is invalid or cannot be sent to, or the addresses are of two families.
        """
        peer = _destination((host, port, flowinfo, scope_id) if flowinfo or scope_id else (host, port))
        local = reachable(numeric_address(local_address or (DEFAULT_HOST_IPV6 if is_ipv6(peer) else DEFAULT_HOST, 0)))
        check_families(local, peer)
        options: dict[str, Any] = {"peer": peer}
        if receive_buffer is not None:
            check_number(receive_buffer, "receive_buffer", 1, 2**63, kind=int)
            options["receive_buffer"] = receive_buffer
        await trio.lowlevel.checkpoint()
        if is_limited_broadcast(peer):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return make_connection(self._open(local, 65_535, receive_buffer or 0, **options), peer)

    def join(self, endpoint: Endpoint, group: str) -> None:
        """Let an endpoint of this network receive the datagrams to a group address, at its port.

        As on Linux, the endpoint must be bound to ``"0.0.0.0"``, ``"::"`` or the group, and also receives the datagrams
        that it sends to the group itself. Each machine with members gets its own copy of a datagram, which can be lost,
        late or duplicated by itself. See ``own_hosts`` in :meth:`endpoint`.

        Raises:
          OSError: ``EADDRINUSE``: the endpoint is in the group already.
          ValueError: It is not a group of the endpoint's family, or not an open endpoint of this network.
        """
        socket, host = self._group(endpoint, group)
        self._wire.catch_up_if_any()
        self._sockets.join(socket, host)

    def leave(self, endpoint: Endpoint, group: str) -> None:
        """Let an endpoint leave a group that it has joined. Closing the endpoint does so too.

        Raises:
          OSError: ``EADDRNOTAVAIL``: the endpoint is not in the group.
          ValueError: As for :meth:`join`.
        """
        socket, host = self._group(endpoint, group)
        self._wire.catch_up_if_any()
        self._sockets.leave(socket, host)

    def inject(self, payload: Payload, source: Address, destination: Address) -> None:
        """Send a datagram from any address, also a forged one, under the same network conditions as any other.

        Raises:
          OSError: ``EMSGSIZE``: longer than a UDP datagram can be.
          TypeError, ValueError: The payload is not bytes-like, an address is invalid, or they are of two families.
        """
        source, destination = normal(numeric_address(source)), _destination(destination)
        check_families(source, destination)
        copy = bytes(memoryview(payload))
        if len(copy) > max_payload(destination):
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        now = self._wire.catch_up()
        self._wire.send(copy, source, destination, now, now)

    def partition(
        self, some: Iterable[Address], others: Iterable[Address] | None = None, *, error: int | None = None
    ) -> Partition:
        """Cut some addresses off from others: no datagram leaves or arrives between them, in either direction.

        The partition begins at once and lasts until :meth:`Partition.heal`, or until the end of a ``with`` block::

            with network.partition([connection.local_address]):
                await trio.sleep(120)

        Args:
          some: Addresses, with their ports.
          others: Addresses to cut them off from; by default all others.
          error: An errno (such as ``errno.EHOSTUNREACH`` or ``errno.EPERM``) for sending across the cut, as if the
            sender's own router or firewall caused it. By default the sender gets no error.
        """
        if error is not None:
            check_number(error, "error", 1, 2**31, kind=int)
        return self._wire.cut(
            frozenset(map(_one_address, some)), None if others is None else frozenset(map(_one_address, others)), error
        )

    def fail_next_receive(self, address: Address, error: int) -> None:
        """Make one read fail with an errno, at the endpoint or connection at an address.

        Datagrams that arrived before are read first. ``errno.EAGAIN`` simulates a datagram that polls as readable and
        is then dropped, for example for a wrong checksum.

        Raises:
          ValueError: There is no endpoint at this address.
        """
        check_number(error, "error", 1, 2**31, kind=int)
        socket = self._sockets.bound_to(normal(numeric_address(address)))
        if socket is None:
            raise ValueError(f"there is no endpoint at {address!r}")
        socket.put_error(OSError(error, os.strerror(error)))

    def _open(
        self,
        address: Address,
        max_datagram_size: int,
        requested: int,
        proxies: Networks | None = None,
        **options: Any,
    ) -> Endpoint:
        address = normal(address)
        if is_beyond(address):
            raise OSError(errno.ENODEV, f"{os.strerror(errno.ENODEV)}: {address!r}")
        self._wire.catch_up_if_any()
        host, port, *rest = address
        for candidate in [port] if port else itertools.islice(self._free_ports, len(FREE_PORTS)):
            bound = cast("Address", (host, candidate, *rest))
            new = SimulatedSocket(bound, **options)
            socket = self._sockets.add(new)
            if socket is new or (socket is not None and port):
                size = INNER_SIZE if proxies else max_datagram_size
                inner = SimulatedEngine(socket, self._sockets, self._wire, size)
                engine = ProxyEngine(inner, proxies, max_datagram_size) if proxies else inner
                endpoint = make_endpoint(engine, shared=socket.shared, receive_buffer_requested=requested)
                self._engines[endpoint] = inner
                return endpoint
        raise OSError(errno.EADDRINUSE, f"{os.strerror(errno.EADDRINUSE)}: {address!r}")

    def _group(self, endpoint: Endpoint, group: str) -> tuple[SimulatedSocket, str]:
        engine = self._engines.get(endpoint)
        if engine is None or engine.closed:
            raise ValueError(f"not an open endpoint of this network: {endpoint!r}")
        address = numeric_address((group, 0))
        if not is_multicast(address) or family_of(address) != engine.family:
            raise ValueError(f"not a group address of the endpoint's family: {group!r}")
        return engine.simulated_socket, address[0]


def _one_address(address: Address) -> Address:
    """Check an address that names one end of a path."""
    address = numeric_address(address)
    if is_unspecified(address):
        raise ValueError(f"{address!r} stands for many addresses: name each address")
    return normal(address)


def _unicast(address: Address, like: Address) -> Address:
    """Check an address that a machine can have."""
    address = _one_address(address)
    check_families(address, like)
    if reaches_many(address):
        raise ValueError(f"not the address of one machine: {address[0]!r}")
    return address


def _destination(address: Address) -> Address:
    """Check an address to send to."""
    address = reachable(numeric_address(address))
    if not address[1]:
        raise ValueError(f"no datagram can be sent to port 0: {address!r}")
    return address
