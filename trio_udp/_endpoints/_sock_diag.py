"""The queues of other processes' Unix-domain sockets, as the kernel reports them: sock_diag(7), Linux only.

A socket is looked up by its inode. To find inodes, list all Unix-domain sockets of this network namespace.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

# From linux/netlink.h, linux/sock_diag.h and linux/unix_diag.h.
NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY = 4, 20
NLM_F_REQUEST, NLM_F_DUMP, NLMSG_ERROR, NLMSG_DONE = 0x001, 0x300, 2, 3
UDIAG_SHOW_NAME, UDIAG_SHOW_RQLEN = 0x01, 0x10
UNIX_DIAG_NAME, UNIX_DIAG_RQLEN = 0, 4
ALL = 0xFFFFFFFF  # states; or any cookie, which would tell two sockets with one inode apart
HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, sender
REQUEST = struct.Struct("=BBHIIIII")  # family, protocol, 0, states, inode, show, cookie
SOCKET = struct.Struct("=BBBBIII")  # family, type, state, 0, inode, cookie
ATTRIBUTE = struct.Struct("=HH")  # length, type
NUMBER = struct.Struct("=i")


class Queue(NamedTuple):
    """A Unix-domain socket: its type, inode and name, and the length of the first datagram in its queue."""

    kind: int
    inode: int
    name: bytes
    unread: int


def all_queues() -> list[Queue]:
    """Return all Unix-domain sockets, without the state of their queues. Takes about a millisecond for a thousand.

    Raises:
      OSError: The kernel has no sock_diag, or a sandbox forbids it.
    """
    return list(_ask(0, UDIAG_SHOW_NAME, NLM_F_DUMP))


def queue_of(inode: int) -> Queue | None:
    """Return one socket, or None if it is gone. Takes about 20 µs.

    Raises:
      OSError: As for :func:`all_queues`.
    """
    try:
        return next(_ask(inode, UDIAG_SHOW_NAME | UDIAG_SHOW_RQLEN, 0))
    except FileNotFoundError:
        return None


def _ask(inode: int, show: int, flags: int) -> Iterator[Queue]:
    body = REQUEST.pack(socket.AF_UNIX, 0, 0, ALL, inode, show, ALL, ALL)
    header = HEADER.pack(HEADER.size + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | flags, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as sock:
        sock.setblocking(False)  # the kernel answers within the calls
        sock.send(header + body)
        while True:
            data, position = sock.recv(65_536), 0
            while position < len(data):
                length, message, _, _, _ = HEADER.unpack_from(data, position)
                if message == NLMSG_DONE:
                    return
                if message == NLMSG_ERROR:
                    (code,) = NUMBER.unpack_from(data, position + HEADER.size)
                    raise OSError(-code, errno.errorcode.get(-code, "sock_diag"))
                yield _read(data, position + HEADER.size, position + length)
                position += _aligned(length)


def _read(data: bytes, start: int, end: int) -> Queue:
    _, kind, _, _, inode, _, _ = SOCKET.unpack_from(data, start)
    name, unread = b"", 0
    start += SOCKET.size
    while start < end:
        size, attribute = ATTRIBUTE.unpack_from(data, start)
        value = data[start + ATTRIBUTE.size : start + size]
        if attribute == UNIX_DIAG_NAME:
            name = value if value[:1] == b"\0" else value.rstrip(b"\0")
        elif attribute == UNIX_DIAG_RQLEN:
            (unread,) = NUMBER.unpack_from(value)
        start += _aligned(size)
    return Queue(kind, inode, name, unread)


def _aligned(size: int) -> int:
    return (size + 3) & ~3
