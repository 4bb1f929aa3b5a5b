"""The engine for every platform: one system call for each datagram.

Each kind of socket has its own cheapest calls, which are chosen once, when the engine is made. So options that add
control messages, such as time stamps, must be set before, in ``configure`` of :func:`open_endpoints`. Set later, they
have no effect if the engine uses ``recvfrom``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import trio

from .._address import Address, host_bytes
from ._engine import BATCH, Received, Route
from ._socket import SocketEngine, is_connected, tells_destination
from .ancillary import brings_ancillary, close_passed_files
from .pktinfo import CONTROL_SIZE, UDP_GRO, UDP_SEGMENT, Arrival, ControlMessage, ReplyControl, understand

# Size of the cache of decoded control messages. A server may answer for a whole IPv6 prefix, and strangers could write
# to every address in it.
MAX_ARRIVALS = 1_000

# On Windows: the datagram was longer than the buffer, and is lost.
WSAEMSGSIZE = 10040


def portable_engine(sock: trio.socket.SocketType, max_datagram_size: int, *, shared: bool = False) -> PortableEngine:
    """Choose how to read and write a bound datagram socket."""
    if is_connected(sock):
        return ConnectedEngine(sock, max_datagram_size, shared=shared)
    if tells_destination(sock):
        return WildcardEngine(sock, max_datagram_size, shared=shared)
    return PortableEngine(sock, max_datagram_size, shared=shared)


class PortableEngine(SocketEngine):
    """A socket bound to one address. A route is the peer address.

    (The address tuple of IPv6 includes flow information, which could differ within one conversation; but the kernel
    reports 0 unless asked.)
    """

    def __init__(self, sock: trio.socket.SocketType, max_datagram_size: int, *, shared: bool = False) -> None:
        super().__init__(sock, max_datagram_size)
        coalesces = False
        if sys.platform == "linux" and self._is_inet:
            if not shared:
                self._can_set(UDP_SEGMENT, 0)  # a previous owner may have set it
            # Another holder may turn UDP_GRO on later, and queued datagrams stay coalesced after it is turned off (see
            # coalescing.py). So leave the option as it is, and split coalesced datagrams.
            coalesces = shared or bool(self._get(UDP_GRO))
        # One byte more than allowed: a datagram that fills it was too long. MSG_TRUNC would need recvmsg.
        self._buffer_size = 65_535 if coalesces else max_datagram_size + 1
        self._ports: frozenset[int] = frozenset()
        # Decoding the control messages each time would take a tenth of an echo. Most machines have few addresses.
        self._arrivals: dict[Any, Arrival] = {}
        self._send_one: Callable[[bytes, Any], object] = self._socket.sendto
        self._receive_one: Callable[[], Received] = self._receive_plain
        if coalesces or self._tells_destination or brings_ancillary(self._socket):
            self._receive_one = self._receive_with_control

    def receive(self, batch: list[Received]) -> bool:
        receive_one, longest, counts = self._receive_one, self._longest, self.counts
        size = 0
        try:
            for _ in range(BATCH):
                datagram = receive_one()
                length = len(datagram[0])
                size += length
                if length <= longest:
                    batch.append(datagram)
                else:
                    counts.truncated += 1
                    counts.received += 1
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno != WSAEMSGSIZE:
                raise
            counts.truncated += 1
            counts.received += 1
        finally:
            counts.received += len(batch)
            counts.bytes_received += size
            counts.messages = counts.received
        return False

    def _receive_plain(self) -> Received:
        payload, address = self._socket.recvfrom(self._buffer_size)
        return payload, address, ()

    def _receive_with_control(self) -> Received:
        if self._ahead and not self.closed:
            return self._ahead.pop(0)
        payload, control, _, address = self._socket.recvmsg(self._buffer_size, CONTROL_SIZE)
        arrival = self._understand(control)
        route = self._route_of(address, arrival)
        if not arrival.segment_size:
            return payload, route, arrival.ancillary
        self._put_ahead(payload, route, arrival.segment_size, arrival.ancillary)
        return self._ahead.pop(0)

    def _understand(self, control: list[ControlMessage]) -> Arrival:
        key = control[0] if len(control) == 1 else tuple(control)
        arrival = self._arrivals.get(key)
        if arrival is None:
            arrival = understand(control if self._is_inet else close_passed_files(control), self._is_on)
            if not arrival.ancillary:  # time stamps, for example, never repeat
                if len(self._arrivals) >= MAX_ARRIVALS:
                    self._arrivals.clear()
                self._arrivals[key] = arrival
        return arrival

    def _route_of(self, address: Address, arrival: Arrival) -> Route:
        return address

    def send(self, payloads: Sequence[bytes], sizes: Sequence[int], routes: Sequence[Route]) -> int:
        send_one, taken = self._send_one, 0
        try:
            for payload, route in zip(payloads, routes, strict=True):
                send_one(payload, route)
                taken += 1
        except OSError:
            if not taken:
                raise
        return taken

    def route(self, address: Address, local_address: Address | None = None) -> Route:
        self._control_from(address, local_address)
        return address

    def peer_address(self, route: Route) -> Address:
        return cast("Address", route)

    def _end_of(self, route: Route) -> tuple[ReplyControl, bytes]:
        return (), b""

    def watch_ports(self, ports: frozenset[int]) -> None:
        self._ports = ports

    def host(self, route: Route) -> bytes:
        return host_bytes(self.peer_address(route))

    def doubtful_source(self, route: Route) -> bool:
        return self._is_doubtful(self.peer_address(route), self._ports)


class WildcardEngine(PortableEngine):
    """A socket that receives datagrams to several addresses.

    A route is the peer address, the control messages for a reply, and the raw group that the datagram was sent to.
    """

    _tells_destination = True

    def __init__(self, sock: trio.socket.SocketType, max_datagram_size: int, *, shared: bool = False) -> None:
        super().__init__(sock, max_datagram_size, shared=shared)
        self._send_one = self._send_with_control

    def _route_of(self, address: Address, arrival: Arrival) -> Route:
        return address, arrival.reply, arrival.group

    def _send_with_control(self, payload: bytes, route: tuple[Address, ReplyControl, bytes]) -> None:
        address, reply, _ = route
        self._socket.sendmsg((payload,), reply, 0, address)

    def route(self, address: Address, local_address: Address | None = None) -> Route:
        return address, self._control_from(address, local_address), b""

    def peer_address(self, route: Route) -> Address:
        return cast("tuple[Address, ReplyControl, bytes]", route)[0]

    def _end_of(self, route: Route) -> tuple[ReplyControl, bytes]:
        _, reply, group = cast("tuple[Address, ReplyControl, bytes]", route)
        return reply, group


class ConnectedEngine(PortableEngine):
    """A socket connected to one peer: the only route is None."""

    def __init__(self, sock: trio.socket.SocketType, max_datagram_size: int, *, shared: bool = False) -> None:
        super().__init__(sock, max_datagram_size, shared=shared)
        self._peer_address: Address = sock.getpeername()

    def _receive_plain(self) -> Received:
        return self._socket.recv(self._buffer_size), None, ()

    def _route_of(self, address: Address, arrival: Arrival) -> Route:
        return None

    def send(self, payloads: Sequence[bytes], sizes: Sequence[int], routes: Sequence[Route]) -> int:
        # Send one datagram at each call. The kernel reports the refusal of an earlier datagram once, and this method
        # could not report an error after the first datagram.
        self._socket.send(payloads[0])
        return 1

    def route(self, address: Address, local_address: Address | None = None) -> Route:
        self._control_from(address, local_address)
        return None

    def peer_address(self, route: Route) -> Address:
        return self._peer_address
