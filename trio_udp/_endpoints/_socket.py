"""What all engines on a real socket have in common: waiting for it, closing it, and what the kernel says about it."""

from __future__ import annotations

import socket
import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

import trio

from .._statistics import EndpointTally, KernelFigures
from ._address import Address, max_payload
from ._engine import Route
from ._pktinfo import ReplyControl, local_host

# From linux/udp.h, and not in the socket module. Divide what is sent, join what arrives; see udp(7).
UDP_SEGMENT = 103
UDP_GRO = 104

# From linux/sock_diag.h: an array of unsigned integers, two of which are of interest.
SO_MEMINFO = 55
MEMINFO = struct.Struct("@9I")
RMEM_ALLOC, DROPS = 0, 8


def is_connected(sock: socket.socket | trio.socket.SocketType) -> bool:
    try:
        sock.getpeername()
    except OSError:  # ENOTCONN
        return False
    return True


class SocketEngine(ABC):
    """The part of an :class:`Engine` that does not read or write."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.socket = sock
        self.family: int = sock.family
        self.bound_address: Address = sock.getsockname()
        self.connected = is_connected(sock)
        self.tally = EndpointTally()
        # Trio has no public name for the socket inside, and its own calls take several times as long as the kernel.
        self._socket: socket.socket = sock._sock  # type: ignore[attr-defined]
        self._kernel_figures = KernelFigures()

    @abstractmethod
    def peer_address(self, route: Route) -> Address: ...

    def max_payload(self, route: Route) -> int:
        if self.family not in (socket.AF_INET, socket.AF_INET6):
            return sys.maxsize  # the kernel's own limit is its send buffer
        return max_payload(self.peer_address(route))

    def _local_address(self, reply: ReplyControl) -> Address:
        """Our own address, from the control message that a reply goes out with."""
        local = local_host(reply)
        if local is None:
            return self.bound_address
        host, scope = local
        port = self.bound_address[1]
        return (host, port) if self.family == socket.AF_INET else (host, port, 0, scope)

    def _can_set(self, option: int, value: int) -> bool:
        """Set an option of UDP, if there is such a thing."""
        try:
            self.socket.setsockopt(socket.IPPROTO_UDP, option, value)
        except OSError:
            return False
        return True

    def kernel_figures(self) -> KernelFigures:
        with suppress(OSError):  # closed: what was known last
            buffer = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
            if sys.platform == "linux":
                # This costs nothing until asked, and counts from the socket's first moment. SO_RXQ_OVFL, which tells of
                # drops with each datagram, does neither.
                figures = MEMINFO.unpack(self._socket.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, MEMINFO.size))
                self._kernel_figures = KernelFigures(
                    dropped=figures[DROPS], queued=figures[RMEM_ALLOC], receive_buffer=buffer // 2
                )
            else:
                self._kernel_figures = KernelFigures(receive_buffer=buffer)
        return self._kernel_figures

    def is_readable(self) -> bool:
        return self.socket.is_readable()

    # Not async themselves, for the sake of one coroutine less.
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
            trio.lowlevel.notify_closing(self._socket)  # who waits for it already would do so for ever
            self.socket.detach()
