"""UDP_GRO: the first engine of a socket turns it on, and the last one turns it off again.

With UDP_GRO the kernel delivers coalesced datagrams in one buffer, and a control message tells the size of each. The
kernel coalesces when a datagram arrives, and adds the control message when it is read (Linux 6.18). So if the option is
turned off in between, the reader gets the datagrams that were queued before as one long datagram.

Therefore an engine leaves the option on while another engine of this process, or a forked process, may have the same
socket. A process that reads the socket without an engine gets single datagrams again once the last engine is closed.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from contextlib import suppress

from .pktinfo import UDP_GRO

SO_COOKIE = 57  # from asm-generic/socket.h: one number for each socket, the same for all its file descriptors

# The number of open engines of each socket for which we turned the option on, by cookie. Cleared before a fork, so that
# neither process turns it off.
_engines: Counter[int] = Counter()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_engines.clear)


def switch_on(sock: socket.socket) -> int | None:
    """Turn UDP_GRO on; return the cookie for ``switch_off``, or None if there is nothing to undo."""
    try:
        found = sock.getsockopt(socket.IPPROTO_UDP, UDP_GRO)
        cookie = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), "big")
        if found and cookie not in _engines:
            return None  # another program turned it on
        sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    except OSError:  # before Linux 5.0
        return None
    _engines[cookie] += 1
    return cookie


def switch_off(sock: socket.socket, cookie: int) -> None:
    """Turn UDP_GRO off again, unless another engine still needs it."""
    if cookie not in _engines:
        return
    _engines[cookie] -= 1
    if not _engines[cookie]:
        del _engines[cookie]
        with suppress(OSError):  # closed already
            sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 0)
