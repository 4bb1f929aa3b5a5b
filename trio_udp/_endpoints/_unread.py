"""The datagrams that the peers of a Unix-domain socket have not read yet.

A datagram stays in the *sender's* send buffer until its receiver reads it. So a peer that does not read could fill the
buffer of an endpoint, and then no peer could be answered. (If that peer is connected to us, nothing else limits it: the
kernel checks the length of a receiver's queue only for other senders.) Therefore, once an eighth of the buffer is in
use, each peer may hold only a part of it, which shrinks as the square of the free space. So k silent peers, one after
the other, leave 64/(64 + k) to the others, until a part is smaller than a datagram.

The kernel does not tell the sender which peers have read. It tells how much of the buffer is in use (SIOCOUTQ), which
is enough while that is little. For a peer that may hold too much, it tells whether its queue is empty (sock_diag).
Where it does not, only the kernel's own limits apply.
"""

from __future__ import annotations

import math
import os
import socket
import struct
import sys
import time
from contextlib import suppress

import attrs

from . import _sock_diag
from .engines import Engine, Route

if sys.platform == "linux":
    import fcntl

SIOCOUTQ = 0x5411  # from linux/sockios.h
INT = struct.Struct("@i")

# The approximate kernel memory of a datagram besides its payload, in bytes.
OVERHEAD = 768

# The part of the send buffer that may be in use before any peer is limited, and each peer's part of an empty buffer.
UNLIMITED, SHARE = 1 / 8, 1 / 64

# After a search through all sockets of the system, none begins for this many times as long.
SEARCH_REST = 20

# The number of remembered peers from which on a search removes those that are gone.
MANY = 4_096


@attrs.define(eq=False)
class Unread:
    """How much of one socket's send buffer its peers hold, estimated from above.

    Attributes:
      limit: Bytes that one peer may hold.
    """

    engine: Engine
    limit: float = attrs.field(default=0.0, init=False)
    _held: dict[Route, int] = attrs.field(factory=dict, init=False)  # bytes sent and not known to be read
    _sent: int = attrs.field(default=0, init=False)  # bytes since the last measurement
    _opaque: set[Route] = attrs.field(factory=set, init=False)  # peers that may not have read an empty datagram
    _inodes: dict[bytes, list[int]] = attrs.field(factory=dict, init=False)  # of all named sockets
    _next_search: float = attrs.field(default=-math.inf, init=False)

    def has_room(self, route: Route, payload: bytes) -> bool:
        """Whether a peer may be sent one more datagram. One that holds nothing always may."""
        if self._may_hold(route, payload):
            return True
        self._measure()
        if self._may_hold(route, payload):
            return True
        if self._has_read_all(route):
            self.forget(route)
        return self._may_hold(route, payload)

    def sent(self, route: Route, payload: bytes) -> None:
        """Note a datagram that the kernel has taken."""
        size = len(payload) + OVERHEAD
        self._held[route] = self._held.get(route, 0) + size
        if not payload:
            self._opaque.add(route)
        self._sent += size
        if self._sent > self.limit / 4:
            self._measure()
            if len(self._held) + len(self._opaque) > MANY:
                with suppress(OSError):
                    self._search()

    def forget(self, route: Route) -> None:
        """Note that a peer holds nothing: it has read everything, or is gone."""
        self._held.pop(route, None)
        self._opaque.discard(route)

    def _may_hold(self, route: Route, payload: bytes) -> bool:
        held = self._held.get(route)
        return held is None or held + len(payload) + OVERHEAD <= self.limit

    def _measure(self) -> None:
        """Compute the limit again. While little of the buffer is in use, no peer holds too much."""
        self._sent = 0
        if sys.platform != "linux":
            self.limit = math.inf  # the receiver's own buffer counts there
            self._held.clear()
            return
        sock = self.engine.socket
        (used,) = INT.unpack(fcntl.ioctl(sock.fileno(), SIOCOUTQ, bytes(INT.size)))
        size = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self.limit = max(0, size - used) ** 2 / size * SHARE
        if used <= size * UNLIMITED:
            self.limit = size * UNLIMITED
            self._held.clear()
        if not used:
            self._opaque.clear()

    def _has_read_all(self, route: Route) -> bool:
        # The kernel reports the same length, 0, for an empty datagram and for an empty queue.
        if route in self._opaque:
            return False
        name = _raw_name(self.engine, route)
        try:
            answer = self._is_queue_empty(name)
            if answer is None and self._search():
                answer = self._is_queue_empty(name)
        except OSError:
            return True  # as far as we know
        return answer is True

    def _is_queue_empty(self, name: bytes) -> bool | None:
        """Whether no socket with a name has anything to read; None if no such socket is known."""
        found = [_sock_diag.queue_of(inode) for inode in self._inodes.get(name, ())]
        queues = [queue for queue in found if queue is not None and queue.name == name]
        return not any(queue.unread for queue in queues) if queues else None

    def _search(self) -> bool:
        """Search all sockets, and forget the peers that are gone; return False if the last search was too recent."""
        start = time.perf_counter()
        if start < self._next_search:
            return False
        self._inodes.clear()
        for queue in _sock_diag.all_queues():
            if queue.name and queue.kind == socket.SOCK_DGRAM:
                self._inodes.setdefault(queue.name, []).append(queue.inode)
        for route in [*self._held, *self._opaque]:
            if _raw_name(self.engine, route) not in self._inodes:
                self.forget(route)
        end = time.perf_counter()
        self._next_search = end + SEARCH_REST * (end - start)
        return True


def _raw_name(engine: Engine, route: Route) -> bytes:
    name: object = engine.peer_address(route)
    return name if isinstance(name, bytes) else os.fsencode(str(name))
