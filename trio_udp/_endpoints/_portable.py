"""The engine for every platform: one system call for each datagram.

A socket is in one of three situations, each with its own cheapest calls: bound to one address, bound to all of
them, or connected to one peer.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import trio

from ._address import Address
from ._engine import BATCH, Datagram, Outgoing, Route
from ._pktinfo import CONTROL_SIZE, ReplyControl, needs_local_address, reply_control
from ._socket import UDP_GRO, UDP_SEGMENT, SocketEngine, is_connected

# Local addresses to remember control messages for. A server may answer for a whole IPv6 prefix: somebody could write to
# each address in it.
MAX_REPLY_CONTROLS = 1_000

# How Windows says that a datagram was longer than the buffer. It is gone then.
WSAEMSGSIZE = 10040


def portable_engine(sock: trio.socket.SocketType, max_datagram_size: int) -> PortableEngine:
    """Choose how to read and write a bound datagram socket."""
    if is_connected(sock):
        return ConnectedEngine(sock, max_datagram_size)
    if needs_local_address(sock):
        return WildcardEngine(sock, max_datagram_size)
    return PortableEngine(sock, max_datagram_size)


class PortableEngine(SocketEngine):
    """A socket bound to one address. A route is the peer address.

    (The address tuple of IPv6 includes flow information, which could differ within one conversation; but the kernel
    reports 0 unless asked.)
    """

    def __init__(self, sock: trio.socket.SocketType, max_datagram_size: int) -> None:
        super().__init__(sock)
        if sys.platform == "linux":
            # Somebody may have had the socket before who joined datagrams. (On sockets other than UDP it is an error.)
            self._can_set(UDP_SEGMENT, 0)
            self._can_set(UDP_GRO, 0)
        self._longest = max_datagram_size
        # One byte more than allowed: what fills it was too long. MSG_TRUNC says the same but needs a recvmsg.
        self._buffer_size = max_datagram_size + 1
        self._receive_one: Callable[[], Datagram] = partial(self._socket.recvfrom, self._buffer_size)
        self._send_one: Callable[[bytes, Any], object] = self._socket.sendto

    def receive(self, batch: list[Datagram]) -> bool:
        receive_one, longest, tally = self._receive_one, self._longest, self.tally
        size = 0
        try:
            for _ in range(BATCH):
                datagram = receive_one()
                length = len(datagram[0])
                size += length
                if length <= longest:
                    batch.append(datagram)
                else:
                    tally.truncated += 1
                    tally.received += 1
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno != WSAEMSGSIZE:
                raise
            tally.truncated += 1
            tally.received += 1
        finally:
            tally.received += len(batch)
            tally.bytes_received += size
        return False

    def send(self, outbox: deque[Outgoing]) -> None:
        send_one, total = self._send_one, self.tally
        sent = size = 0
        try:
            while outbox:
                payload, route, tally = outbox[0]
                send_one(payload, route)
                outbox.popleft()
                length = len(payload)
                sent += 1
                size += length
                tally.sent += 1
                tally.bytes_sent += length
        finally:
            total.sent += sent
            total.bytes_sent += size

    def route(self, address: Address) -> Route:
        return address

    def peer_address(self, route: Route) -> Address:
        return cast("Address", route)

    def local_address(self, route: Route) -> Address:
        return self.bound_address


class WildcardEngine(PortableEngine):
    """A socket bound to all addresses. A route is the peer address and the control messages for a reply."""

    def __init__(self, sock: trio.socket.SocketType, max_datagram_size: int) -> None:
        super().__init__(sock, max_datagram_size)
        self._receive_one = self._receive_with_local_address
        self._send_one = self._send_from_local_address
        # Taking the control message apart each time would be a tenth of an echo; most machines have few addresses.
        self._reply_controls: dict[Any, ReplyControl] = {}

    def _receive_with_local_address(self) -> Datagram:
        payload, control, _, address = self._socket.recvmsg(self._buffer_size, CONTROL_SIZE)
        if len(control) != 1:  # somebody has asked for time stamps or the like
            return payload, (address, reply_control(control))
        reply = self._reply_controls.get(control[0])
        if reply is None:
            if len(self._reply_controls) >= MAX_REPLY_CONTROLS:
                self._reply_controls.clear()
            reply = self._reply_controls[control[0]] = reply_control(control)
        return payload, (address, reply)

    def _send_from_local_address(self, payload: bytes, route: tuple[Address, ReplyControl]) -> None:
        address, reply = route
        self._socket.sendmsg((payload,), reply, 0, address)

    def route(self, address: Address) -> Route:
        return address, ()

    def peer_address(self, route: Route) -> Address:
        address, _ = cast("tuple[Address, ReplyControl]", route)
        return address

    def local_address(self, route: Route) -> Address:
        _, reply = cast("tuple[Address, ReplyControl]", route)
        return self._local_address(reply)


class ConnectedEngine(PortableEngine):
    """A socket connected to one peer: there is only one route."""

    def __init__(self, sock: trio.socket.SocketType, max_datagram_size: int) -> None:
        super().__init__(sock, max_datagram_size)
        self._peer_address: Address = sock.getpeername()
        self._receive_one = lambda: (self._socket.recv(self._buffer_size), None)
        self._send_one = lambda payload, _: self._socket.send(payload)

    def route(self, address: Address) -> Route:
        return None

    def peer_address(self, route: Route) -> Address:
        return self._peer_address
