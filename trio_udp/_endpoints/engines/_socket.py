"""The common part of all engines on a real socket: routes, waiting, closing, and the kernel's figures."""

from __future__ import annotations

import socket
import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

import trio

from ..._statistics import KernelFigures, ReceiveCounts
from ..._trio import stdlib_socket
from .._address import Address, family_of, is_mapped, max_payload
from . import probes
from ._engine import Ancillary, Received, Route
from .multicast import SocketMulticast
from .pktinfo import (
    MAPPED,
    NO_MAPPED_ADDRESS,
    IsOn,
    ReplyControl,
    control_from,
    is_doubtful_host,
    is_group,
    is_link_local,
    is_unspecified,
    own_end,
    switch_on_pktinfo,
)

INTERNET = (socket.AF_INET, socket.AF_INET6)

# From linux/sock_diag.h: an array of unsigned integers. We use two of them.
SO_MEMINFO = 55
MEMINFO = struct.Struct("@9I")
RMEM_ALLOC, DROPS = 0, 8

# The most cached answers to whether an address of ours is on an interface.
MAX_LOOKED_UP = 256


def is_connected(sock: socket.socket | trio.socket.SocketType) -> bool:
    try:
        sock.getpeername()
    except OSError:  # ENOTCONN
        return False
    return True


def own_host_of(sock: socket.socket | trio.socket.SocketType) -> bytes:
    """Return the raw address that a socket is bound to, if it is one of our own.

    b"" for a socket bound to all addresses, a group or a broadcast address, and for Unix-domain sockets.
    """
    if sock.family not in INTERNET:
        return b""
    address: Address = sock.getsockname()
    raw = probes.raw_host(sock.family, address[0])
    if is_unspecified(raw) or is_group(raw) or probes.is_broadcast(sock.family, address):
        return b""
    return raw


def tells_destination(sock: trio.socket.SocketType) -> bool:
    """Let the kernel tell each datagram's destination, unless only one is possible; return whether it does."""
    if sock.family not in INTERNET or is_connected(sock):
        return False
    own = own_host_of(sock)
    # An address in 169.254/16 does not determine the interface. One in fe80::/10 is bound together with its scope.
    if own and (own[0] == 0xFE or not is_link_local(own)):
        return False
    return switch_on_pktinfo(sock)


class SocketEngine(ABC):
    """The part of an :class:`Engine` that does not read or write.

    Attributes:
      _own_host: See :func:`own_host_of`.
      _tells_destination: The kernel tells each datagram's destination, so routes contain it.
      _ahead: Datagrams that were read and not yet returned.
    """

    _tells_destination = False

    def __init__(self, sock: trio.socket.SocketType, max_datagram_size: int) -> None:
        self.socket = sock
        self.family: int = sock.family
        self.bound_address: Address = sock.getsockname()
        self.connected = is_connected(sock)
        self.wakes_tasks = False
        self.counts = ReceiveCounts()
        self._socket = stdlib_socket(sock)
        self._longest = max_datagram_size
        self._ahead: list[Received] = []
        self._is_inet = self.family in INTERNET
        self._own_host = own_host_of(self._socket)
        self._kernel_figures = KernelFigures()
        self.multicast = SocketMulticast(self._socket)
        self._is_on: IsOn = lru_cache(MAX_LOOKED_UP)(partial(probes.is_on, self._socket))

    # Routes. Each engine decodes its own routes.

    @abstractmethod
    def peer_address(self, route: Route) -> Address: ...

    @abstractmethod
    def _end_of(self, route: Route) -> tuple[ReplyControl, bytes]:
        """The control messages of a reply, and the raw group or broadcast address, or b"": see :class:`Arrival`."""

    def max_payload(self, route: Route) -> int:
        if not self._is_inet:
            return sys.maxsize  # the kernel's only limit is its send buffer
        return max_payload(self.peer_address(route))

    def local_address(self, route: Route) -> Address:
        reply, group = self._end_of(route)
        own, interface = own_end(reply)
        if not own and len(group.removeprefix(MAPPED)) == 4:  # the kernel chooses an address on this interface
            own = group[:-4] + raw if (raw := probes.ipv4_address_on(self._socket, interface)) else b""
        return self._address_of(own, interface) if own else self.bound_address

    def destination(self, route: Route) -> Address:
        reply, group = self._end_of(route)
        return self._address_of(group, own_end(reply)[1]) if group else self.local_address(route)

    def interface(self, route: Route) -> int | None:
        reply, _ = self._end_of(route)
        _, index = own_end(reply)
        if not index and self.family == socket.AF_INET6:
            index = self.bound_address[3]  # type: ignore[misc]  # 0 unless it is link-local
        return index or None

    def _address_of(self, raw: bytes, interface: int) -> Address:
        host, port = socket.inet_ntop(self.family, raw), self.bound_address[1]
        if self.family == socket.AF_INET:
            return host, port
        # The kernel gives a scope to the same addresses: link-local ones, and groups within one machine or link.
        scoped = raw[:12] != MAPPED and (is_link_local(raw) or (raw[0] == 0xFF and raw[1] & 0x0F in (1, 2)))
        return host, port, 0, interface if scoped else 0

    def _control_from(self, peer: Address, local_address: Address | None) -> ReplyControl:
        """The control messages that send from ``local_address``; ``ValueError`` if that cannot be ours.

        A route contains them only on sockets where the kernel tells destinations.
        """
        if local_address is not None and not self._is_inet:
            if local_address != self.bound_address:
                raise ValueError(f"bound to {self.bound_address!r}, cannot send from {local_address!r}")
        elif local_address is not None and local_address != self.bound_address:
            host, port, *scope = local_address
            raw, index = probes.raw_host(self.family, host), scope[1] if len(scope) == 2 else 0
            bound_raw = probes.raw_host(self.family, self.bound_address[0])
            if port != self.bound_address[1] or (raw != bound_raw and (self._own_host or is_group(raw))):
                raise ValueError(f"bound to {self.bound_address!r}, cannot send from {local_address!r}")
            if raw != bound_raw and not is_unspecified(raw):
                # A group has no route of its own: the interface is the one that has our address.
                to_many = is_group(probes.raw_host(self.family, peer[0]))
                return self._control_of(raw, index, needs_interface=to_many or is_link_local(raw))
        if self._tells_destination and self._own_host:  # bound in 169.254/16
            return self._control_of(self._own_host, 0, needs_interface=True)
        if self.family == socket.AF_INET6 and is_mapped(peer):
            return NO_MAPPED_ADDRESS
        return ()

    def _control_of(self, own: bytes, index: int, *, needs_interface: bool) -> ReplyControl:
        if not needs_interface:
            return control_from(own, 0)  # as in a reply
        if not index:
            with suppress(OSError):
                index = probes.interface_of(self._socket, own)
        return control_from(own, index)

    def source_for(self, address: Address) -> Address:
        if self._own_host or self.connected or not self._is_inet:
            return self.bound_address
        host, _, *scope = probes.source(self._socket, self.family, address)
        return (host, self.bound_address[1], *scope)  # type: ignore[return-value]

    # Untrusted sources.

    @abstractmethod
    def watch_ports(self, ports: frozenset[int]) -> None: ...

    @abstractmethod
    def doubtful_source(self, route: Route) -> bool: ...

    def doubtful_sources(self, routes: Sequence[Route]) -> bool:
        return any(map(self.doubtful_source, routes))

    def _is_doubtful(self, address: Address, ports: frozenset[int]) -> bool:
        """``doubtful_source`` for a decoded address."""
        if not self._is_inet:
            return False
        return address[1] in ports or is_doubtful_host(probes.raw_host(self.family, address[0]))

    def is_own_host(self, address: Address) -> bool:
        return self._is_inet and probes.is_own_host(family_of(address), address)

    def is_broadcast(self, address: Address) -> bool:
        return self._is_inet and probes.is_broadcast(family_of(address), address)

    def allows_broadcast(self) -> bool:
        try:
            return bool(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST))
        except OSError:  # closed
            return False

    # Datagrams that were read and not yet returned.

    @property
    def read_ahead(self) -> int:
        return len(self._ahead)

    def _put_ahead(self, payload: bytes, route: Route, segment_size: int, ancillary: Ancillary) -> None:
        """Split a message into the datagrams that it was coalesced from, and keep them for the next ``receive``."""
        step = segment_size or len(payload) or 1
        self._ahead += [(payload[at : at + step], route, ancillary) for at in range(0, len(payload) or 1, step)]

    # The kernel.

    def _can_set(self, option: int, value: int) -> bool:
        """Set a UDP option; return False if the kernel does not have it."""
        try:
            self._socket.setsockopt(socket.IPPROTO_UDP, option, value)
        except OSError:
            return False
        return True

    def _get(self, option: int) -> int | None:
        """Return a UDP option, or None if the kernel does not have it."""
        try:
            return self._socket.getsockopt(socket.IPPROTO_UDP, option)
        except OSError:
            return None

    def kernel_figures(self) -> KernelFigures:
        with suppress(OSError):  # closed: keep the last figures
            buffer = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
            if sys.platform == "linux":
                # SO_MEMINFO costs nothing until it is read, and counts since the socket was made. SO_RXQ_OVFL costs a
                # control message for each datagram, and counts only since it was set.
                figures = MEMINFO.unpack(self._socket.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, MEMINFO.size))
                self._kernel_figures = KernelFigures(
                    dropped=figures[DROPS], queued=figures[RMEM_ALLOC], receive_buffer=buffer // 2
                )
            else:
                self._kernel_figures = KernelFigures(receive_buffer=buffer)
        return self._kernel_figures

    # Waiting and closing.

    def is_readable(self) -> bool:
        return self.socket.is_readable()

    # Plain functions that return a coroutine, which saves one coroutine for each wait.
    def wait_readable(self) -> Coroutine[Any, Any, None]:
        return self._wait(trio.lowlevel.wait_readable)

    def wait_writable(self) -> Coroutine[Any, Any, None]:
        return self._wait(trio.lowlevel.wait_writable)

    async def _wait(self, wait: Callable[[socket.socket], Awaitable[None]]) -> None:
        if not self.closed:
            try:
                return await wait(self._socket)
            except OSError:  # the file descriptor has been closed, or belongs to another kind of file now
                self.abandon()
        raise trio.ClosedResourceError("this endpoint is closed")

    @property
    def closed(self) -> bool:
        return self._socket.fileno() == -1

    def close(self) -> None:
        self.kernel_figures()
        self.socket.close()

    def abandon(self) -> None:
        if not self.closed:
            trio.lowlevel.notify_closing(self._socket)  # otherwise a waiting task would wait for ever
            self.socket.detach()
