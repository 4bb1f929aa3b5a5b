"""The engine of an endpoint on a simulated network; see :class:`trio_udp._endpoints.engines._engine.Engine`.

It has no system calls: it moves datagrams between a :class:`SimulatedSocket` and the wire.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Sequence
from typing import cast

import attrs
import trio

from .._endpoints import BATCH, Address, Received, Route
from .._endpoints._address import family_of, host_bytes, is_limited_broadcast, is_unspecified, max_payload
from .._statistics import KernelFigures, ReceiveCounts
from ._addresses import interface_of, reachable, reaches_many
from ._multicast import SimulatedMulticast
from ._packets import SimulatedRoute
from ._sockets import SimulatedSocket, SocketTable
from ._wire import Wire


@attrs.define(eq=False)
class SimulatedEngine:
    """The engine of one endpoint. Several engines can use one shared socket."""

    simulated_socket: SimulatedSocket
    _sockets: SocketTable
    _wire: Wire
    _max_datagram_size: int = 65_535

    family: int = attrs.field(init=False)
    bound_address: Address = attrs.field(init=False)
    connected: bool = attrs.field(init=False)
    wakes_tasks: bool = attrs.field(default=True, init=False)
    counts: ReceiveCounts = attrs.field(factory=ReceiveCounts, init=False)
    closed: bool = attrs.field(default=False, init=False)
    read_ahead: int = attrs.field(default=0, init=False)  # stays 0
    _watched_ports: frozenset[int] = attrs.field(default=frozenset(), init=False)
    _last_figures: KernelFigures | None = attrs.field(default=None, init=False)  # as they were at closing

    @property
    def socket(self) -> trio.socket.SocketType:
        # An OSError, as for an option that a real socket does not have.
        raise io.UnsupportedOperation("an endpoint of a SimulatedNetwork has no socket")

    @family.default
    def _(self) -> int:
        return family_of(self.simulated_socket.bound_address)

    @bound_address.default
    def _(self) -> Address:
        return self.simulated_socket.bound_address

    @connected.default
    def _(self) -> bool:
        return self.simulated_socket.peer is not None

    @property
    def multicast(self) -> SimulatedMulticast:
        self._wire.catch_up_if_any()
        return SimulatedMulticast(self.simulated_socket, self._sockets)

    # Moving datagrams.

    def receive(self, batch: list[Received]) -> bool:
        self._wire.catch_up()
        if (error := self._pending_error()) is not None:
            self.simulated_socket.refused = False
            raise error
        source, counts = self.simulated_socket, self.counts
        while source.has_arrivals() and len(batch) < BATCH:
            arrived = source.take()
            if isinstance(arrived, BlockingIOError):
                return True
            if isinstance(arrived, OSError):
                raise arrived
            payload, route = arrived
            counts.messages += 1
            counts.received += 1
            if len(payload) <= self._max_datagram_size:
                counts.bytes_received += len(payload)
                batch.append((payload, route, ()))
            else:
                counts.bytes_received += self._max_datagram_size + 1
                counts.truncated += 1
        return not source.has_arrivals()

    def send(self, payloads: Sequence[bytes], sizes: Sequence[int], routes: Sequence[Route]) -> int:
        now = self._wire.catch_up()
        for taken, (payload, size, route) in enumerate(zip(payloads, sizes, routes, strict=True)):
            peer, local, _, _ = cast("SimulatedRoute", route)
            destination = reachable(peer)
            try:
                self._check_can_send(local, destination, now)
            except OSError:
                if taken:
                    return taken
                self.simulated_socket.refused = False  # raised once, and before any other error
                raise
            departure = self.simulated_socket.queue(now, size, self._wire.conditions.bandwidth)
            self._wire.send(payload, local, destination, now, departure, self.simulated_socket)
        return len(payloads)

    def _check_can_send(self, local: Address, destination: Address, now: float) -> None:
        """Raise the error that a kernel would give instead of sending."""
        if (error := self._pending_error()) is not None:
            raise error
        if not destination[1] or not self.simulated_socket.can_send_from(local):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if is_limited_broadcast(destination) and not self.simulated_socket.allow_broadcast:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        self._wire.check_path(local, destination)
        if not self.simulated_socket.has_room(now):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _pending_error(self) -> OSError | None:
        if self.closed:
            return OSError(errno.EBADF, os.strerror(errno.EBADF))
        if self.simulated_socket.refused:
            return ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        return None

    # Routes.

    def route(self, address: Address, local_address: Address | None = None) -> Route:
        peer = reachable(address)
        if local_address is None:
            local = self.simulated_socket.source_for(peer)
        else:
            local = self.simulated_socket.at_host(reachable(local_address)[0])
        return SimulatedRoute(peer, local, local, interface_of(local))

    def source_for(self, address: Address) -> Address:
        peer = reachable(address)
        local = self.simulated_socket.source_for(peer)
        self._wire.check_path(local, peer)
        return local

    def max_payload(self, route: Route) -> int:
        return max_payload(self.peer_address(route))

    def peer_address(self, route: Route) -> Address:
        return cast("SimulatedRoute", route).peer

    def local_address(self, route: Route) -> Address:
        return cast("SimulatedRoute", route).local

    def destination(self, route: Route) -> Address:
        return cast("SimulatedRoute", route).destination

    def interface(self, route: Route) -> int | None:
        return cast("SimulatedRoute", route).interface

    # Untrusted sources.

    def watch_ports(self, ports: frozenset[int]) -> None:
        self._watched_ports = ports

    def host(self, route: Route) -> bytes:
        return host_bytes(self.peer_address(route))

    def doubtful_source(self, route: Route) -> bool:
        peer = cast("SimulatedRoute", route).peer
        return peer[1] in self._watched_ports or reaches_many(peer) or is_unspecified(peer)

    def doubtful_sources(self, routes: Sequence[Route]) -> bool:
        return any(map(self.doubtful_source, routes))

    def is_own_host(self, address: Address) -> bool:
        own = self.simulated_socket
        here = own.at_host(reachable(address)[0])
        return here in own.own_addresses or here[0] in own.own_hosts or self._sockets.unicast(here) is own

    def is_broadcast(self, address: Address) -> bool:
        return is_limited_broadcast(address)

    def allows_broadcast(self) -> bool:
        return self.simulated_socket.allow_broadcast

    # Waiting and closing.

    def kernel_figures(self) -> KernelFigures:
        own = self.simulated_socket
        return self._last_figures or KernelFigures(
            dropped=own.dropped, queued=own.arrived_bytes, receive_buffer=own.receive_buffer
        )

    def is_readable(self) -> bool:
        return self.simulated_socket.has_arrivals() or self.simulated_socket.refused

    async def wait_readable(self) -> None:
        # Sleeps once, as on a real socket: the reader may read before this task runs, see Reader.read_early().
        if self.closed or self.is_readable():
            await trio.lowlevel.checkpoint()
        else:
            await self.simulated_socket.waiting.park()
        self._check_open()

    async def wait_writable(self) -> None:
        await trio.lowlevel.checkpoint()
        while not self.closed and not self.simulated_socket.has_room(trio.current_time()):
            with trio.move_on_at(self.simulated_socket.next_departure()):
                await self.simulated_socket.waiting.park()
        self._check_open()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._wire.catch_up_if_any()
        self._last_figures = self.kernel_figures()
        if not self.simulated_socket.shared:
            self._sockets.remove(self.simulated_socket)
        self.simulated_socket.waiting.unpark_all()

    def abandon(self) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.closed:
            raise trio.ClosedResourceError("this endpoint is closed")
