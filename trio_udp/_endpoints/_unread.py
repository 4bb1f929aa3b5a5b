"""What the peers of a Unix-domain socket have not read yet.

A datagram stays in the *sender's* send buffer until its receiver reads it. So a peer that does not read could fill the
buffer of an endpoint, and then nobody could be answered. (If it is connected to us, nothing else limits it: the kernel
checks the length of a receiver's queue only for others.) Therefore each peer may hold a part of what is free: a
sixteenth, so that k silent peers together leave 16/(16 + k) of the buffer to the others.

The kernel does not tell the sender who has read. It tells how much of the buffer is in use (SIOCOUTQ), which is enough
while that is little; and, for all sockets at once, whether something is in their queues (sock_diag(7)).
"""

from __future__ import annotations

import math
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator

import attrs

from .engines import Engine, Route

if sys.platform == "linux":
    import fcntl

# From linux/sockios.h, linux/netlink.h, linux/sock_diag.h and linux/unix_diag.h.
SIOCOUTQ = 0x5411
NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY = 4, 20
NLM_F_REQUEST_DUMP, NLMSG_DONE, NLMSG_ERROR = 0x301, 3, 2
UDIAG_SHOW_NAME, UDIAG_SHOW_RQLEN = 0x01, 0x10
UNIX_DIAG_NAME, UNIX_DIAG_RQLEN = 0, 4
ALL_STATES = 0xFFFFFFFF
HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, sender
REQUEST = struct.Struct("=BBHIIIII")  # family, protocol, 0, states, inode, show, cookie
SOCKET = struct.Struct("=BBBBIII")  # family, type, state, 0, inode, cookie
ATTRIBUTE = struct.Struct("=HH")  # length, type
QUEUE = struct.Struct("=II")  # bytes to read, bytes sent

# Kernel memory of a datagram besides its payload, about.
OVERHEAD = 768

# The part of the free send buffer that one peer may hold.
SHARE = 1 / 16

# A dump takes a millisecond for a thousand sockets. The next one waits for this many times as long as the last took.
DUMP_REST = 10


def names_with_unread() -> set[bytes] | None:
    """Return the names of all Unix-domain datagram sockets here that have something to read; None if we cannot know."""
    found = set()
    try:
        for kind, name, unread in _dump():
            if kind == socket.SOCK_DGRAM and name and unread:
                found.add(name)
    except OSError:  # a kernel without sock_diag, or a sandbox that forbids it
        return None
    return found


def _dump() -> Iterator[tuple[int, bytes, int]]:
    """Ask the kernel for all Unix-domain sockets: type, name, bytes of the first datagram to be read."""
    show = UDIAG_SHOW_NAME | UDIAG_SHOW_RQLEN
    body = REQUEST.pack(socket.AF_UNIX, 0, 0, ALL_STATES, 0, show, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as sock:
        sock.setblocking(False)  # the kernel answers within the calls
        sock.send(HEADER.pack(HEADER.size + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST_DUMP, 1, 0) + body)
        while True:
            data = sock.recv(65_536)
            position = 0
            while position < len(data):
                length, message, _, _, _ = HEADER.unpack_from(data, position)
                if message == NLMSG_DONE:
                    return
                if message == NLMSG_ERROR:
                    raise OSError(-struct.unpack_from("=i", data, position + HEADER.size)[0], "sock_diag")
                end, start = position + length, position + HEADER.size + SOCKET.size
                kind, name, unread = data[position + HEADER.size + 1], b"", 0
                while start < end:
                    size, attribute = ATTRIBUTE.unpack_from(data, start)
                    if attribute == UNIX_DIAG_NAME:
                        name = data[start + ATTRIBUTE.size : start + size]
                    elif attribute == UNIX_DIAG_RQLEN:
                        unread, _ = QUEUE.unpack_from(data, start + ATTRIBUTE.size)
                    start += _aligned(size)
                yield kind, name if name[:1] == b"\0" else name.rstrip(b"\0"), unread
                position += _aligned(length)


def _aligned(size: int) -> int:
    return (size + 3) & ~3


@attrs.define(eq=False)
class Unread:
    """How much of one socket's send buffer its peers may hold, estimated from above.

    Attributes:
      limit: Bytes that one peer may hold.
    """

    engine: Engine
    limit: float = attrs.field(default=0.0, init=False)
    _held: dict[Route, int] = attrs.field(factory=dict, init=False)  # sent, and not known to be read
    _sent: int = attrs.field(default=0, init=False)  # since the last look
    _opaque: set[Route] = attrs.field(factory=set, init=False)  # those that were sent an empty datagram
    _next_dump: float = attrs.field(default=-math.inf, init=False)

    def has_room(self, route: Route, payload: bytes) -> bool:
        """Whether a peer may be sent one more datagram. One that holds nothing always may."""
        held = self._held.get(route, 0)
        if not held or held + len(payload) + OVERHEAD <= self.limit:
            return True
        self._look()
        if self._may_hold(route, payload):
            return True
        self._ask_the_kernel()
        return self._may_hold(route, payload)

    def sent(self, route: Route, payload: bytes) -> None:
        """Note a datagram that the kernel has taken."""
        size = len(payload) + OVERHEAD
        self._held[route] = self._held.get(route, 0) + size
        if not payload:
            self._opaque.add(route)
        self._sent += size
        if self._sent > self.limit:
            self._look()

    def forget(self, route: Route) -> None:
        """Forget a peer that is gone."""
        self._held.pop(route, None)
        self._opaque.discard(route)

    def _may_hold(self, route: Route, payload: bytes) -> bool:
        held = self._held.get(route, 0)
        return not held or held + len(payload) + OVERHEAD <= self.limit

    def _look(self) -> None:
        """Compute the limit anew. While all peers together hold no more than that, nobody holds too much."""
        self._sent = 0
        if sys.platform != "linux":
            self.limit = math.inf  # there the receiver's buffer counts
            return
        sock = self.engine.socket
        (used,) = struct.unpack("@i", fcntl.ioctl(sock.fileno(), SIOCOUTQ, bytes(4)))
        self.limit = (sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - used) * SHARE
        if used <= self.limit:
            self._held.clear()
            self._opaque.clear()

    def _ask_the_kernel(self) -> None:
        """Forget what peers hold whose queues are empty.

        The length of an empty datagram is 0, as that of an empty queue. So this tells nothing of peers that were sent
        one.
        """
        now = time.perf_counter()
        if now < self._next_dump:
            return
        names = names_with_unread()
        self._next_dump = time.perf_counter() + DUMP_REST * (time.perf_counter() - now)
        if names is None:
            self._held.clear()  # as far as we know
            return
        for route in list(self._held):
            name = self.engine.peer_address(route)
            raw = name if isinstance(name, bytes) else os.fsencode(str(name))
            if raw not in names and route not in self._opaque:
                self.forget(route)
