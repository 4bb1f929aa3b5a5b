"""Ancillary data that the engines do not request themselves: the options that add it, and the files passed with it."""

from __future__ import annotations

import os
import socket
import sys
from array import array

from .pktinfo import ControlMessage

# Options that add ancillary data, by level. The numbers are from the Linux headers asm-generic/socket.h, linux/in.h and
# linux/in6.h. The socket module has few of them.
LINUX_OPTIONS = {
    # SO_PASSCRED, SO_TIMESTAMP, SO_PASSSEC, SO_TIMESTAMPNS, SO_TIMESTAMPING, SO_RXQ_OVFL, SO_WIFI_STATUS; the three
    # kinds of time stamps again, for times after 2038; SO_RCVMARK, SO_PASSPIDFD, SO_RCVPRIORITY
    socket.SOL_SOCKET: (16, 29, 34, 35, 37, 40, 41, 63, 64, 65, 75, 76, 82),
    # IP_RECVOPTS, IP_RETOPTS, IP_RECVTTL, IP_RECVTOS, IP_PASSSEC, IP_RECVORIGDSTADDR, IP_CHECKSUM, IP_RECVFRAGSIZE
    socket.IPPROTO_IP: (6, 7, 12, 13, 18, 20, 23, 25),
    # IPV6_2292HOPOPTS, _2292DSTOPTS, _2292RTHDR, _2292HOPLIMIT, _FLOWINFO, _RECVHOPLIMIT, _RECVHOPOPTS, _RECVRTHDR,
    # _RECVDSTOPTS, _RECVPATHMTU, _RECVTCLASS, _RECVORIGDSTADDR, _RECVFRAGSIZE
    getattr(socket, "IPPROTO_IPV6", 41): (3, 4, 5, 8, 11, 51, 53, 56, 58, 60, 66, 74, 77),
}
OTHER_OPTIONS = {
    socket.SOL_SOCKET: ("SO_TIMESTAMP", "SO_TIMESTAMP_MONOTONIC", "LOCAL_CREDS"),
    socket.IPPROTO_IP: ("IP_RECVTTL", "IP_RECVTOS", "IP_RECVOPTS"),
    getattr(socket, "IPPROTO_IPV6", 41): ("IPV6_RECVHOPLIMIT", "IPV6_RECVTCLASS"),
}


def brings_ancillary(sock: socket.socket, *, besides: int | None = None) -> bool:
    """Whether a socket has options that add control messages to datagrams, apart from ``besides`` of ``SOL_SOCKET``."""
    options: list[tuple[int, int]] = []
    if sys.platform == "linux":
        options += [(level, option) for level, numbers in LINUX_OPTIONS.items() for option in numbers]
    else:
        for level, names in OTHER_OPTIONS.items():
            options += [(level, getattr(socket, name)) for name in names if hasattr(socket, name)]
    return any(_is_set(sock, *option) for option in options if option != (socket.SOL_SOCKET, besides))


def _is_set(sock: socket.socket, level: int, option: int) -> bool:
    try:
        return bool(sock.getsockopt(level, option))
    except OSError:  # another family, or a kernel without it
        return False


def close_passed_files(control: list[ControlMessage]) -> list[ControlMessage]:
    """Close files passed over a Unix-domain socket, or strangers could use up our file descriptors."""
    kept = []
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, getattr(socket, "SCM_RIGHTS", None)):
            descriptors = array("i", data[: len(data) - len(data) % array("i").itemsize])
            for descriptor in descriptors:
                os.close(descriptor)
        else:
            kept.append((level, kind, data))
    return kept
