"""The meaning of each error of a datagram socket, by its errno: a table to read.

The table has every error that recvmsg(2) and sendmsg(2) give on such a socket on Linux, BSD, macOS and Windows, and how
the package treats it. Any other errno is treated as the machine's fault. Sources: recv(2), send(2), udp(7), ip(7),
ipv6(7) and unix(7) of Linux, and its table of ICMP errors (``icmp_err_convert``); recv(2) and send(2) of FreeBSD and
macOS; ``WSARecvFrom`` and ``WSASendTo`` of Windows, where Python gives the errors of Winsock the same names.
"""

from __future__ import annotations

import errno
from enum import Enum, auto


class Fault(Enum):
    """Whose fault an error is. ``ANSWER``, ``PEER`` and ``MACHINE`` are counted by errno name and end nothing."""

    WAIT = auto()
    """No fault: nothing has arrived yet, or the send buffer is full."""

    ANSWER = auto()
    """Not this call's fault: nearly always the network's answer to an earlier datagram. Sending repeats the call once.
    Neither logged nor a reason to pause, because strangers can cause it at will."""

    PEER = auto()
    """The fault of this datagram or its peer: counted for that client. Not logged, because strangers can cause it. If
    reading gives nothing but such errors, they are treated as ``MACHINE``."""

    MACHINE = auto()
    """The fault of this machine or this program: logged at most once a minute."""

    CLOSED = auto()
    """The file descriptor was closed behind our back, and another file may have its number already: logged, and the
    endpoint ends."""


TABLE: dict[Fault, dict[str, str]] = {
    Fault.WAIT: {
        "EAGAIN": "Nothing has arrived, or the send buffer is full.",
        "EWOULDBLOCK": "Another name for EAGAIN, and on Windows another number.",
    },
    Fault.ANSWER: {
        "ECONNREFUSED": "The peer's port is closed (ICMP), on a connected socket or one with IP_RECVERR.",
        "ECONNRESET": "The same on Windows (10054), where unconnected sockets are told too.",
        "ENETRESET": "An earlier datagram has exceeded its time to live, on Windows (10052).",
        "ENONET": "A router reports the peer's host as isolated (ICMP), on a connected socket.",
        "ENOPROTOOPT": "The peer's host does not speak UDP (ICMP), on a connected socket.",
        "EPROTO": "The peer or a router has rejected a header (ICMP), on a connected socket.",
        "ETIMEDOUT": "The network did not answer an earlier datagram in time, on Windows (10060).",
        "EINTR": "A signal interrupted the call. Python repeats its own calls; ours through ctypes are not repeated.",
    },
    Fault.PEER: {
        "EACCES": "A prohibit route, a broadcast address without SO_BROADCAST, or a Unix-domain path that is not ours.",
        "EADDRNOTAVAIL": "The peer wrote to an address that is no longer ours, or its own address cannot be sent to.",
        "EAFNOSUPPORT": "The peer's address is of another family than the socket.",
        "EDESTADDRREQ": "The peer has no address, as a Unix-domain socket that was never bound.",
        "EHOSTDOWN": "The peer's host does not answer on its own network.",
        "EHOSTUNREACH": "The peer's host cannot be reached: an unreachable route, or a router reports it (ICMP).",
        "EINVAL": "The peer has port 0, a blackhole route, or (over IPv6) wrote to an address that is no longer ours.",
        "ELOOP": "The path of the peer's Unix-domain socket has too many symbolic links.",
        "EMSGSIZE": "The datagram is longer than the path MTU, and may not be fragmented.",
        "ENAMETOOLONG": "The path of the peer's Unix-domain socket is longer than Python can write.",
        "ENETUNREACH": "There is no route to the peer, or (over IPv4) it wrote to an address that is no longer ours.",
        "ENODEV": "The interface that the peer's address belongs to is gone.",
        "ENOENT": "The peer is a Unix-domain socket that is gone.",
        "ENOTDIR": "A part of the path of the peer's Unix-domain socket is a file, not a folder.",
        "ENXIO": "The interface that the peer's address belongs to is gone, on BSD and macOS.",
        "EPERM": "A packet filter has dropped it, or the peer's Unix-domain socket is connected to another one.",
        "EPROTOTYPE": "The path of the peer's Unix-domain socket belongs to a stream socket now.",
    },
    Fault.MACHINE: {
        "ECONNABORTED": "The system has taken the socket out of service, as macOS does with an app that sleeps.",
        "EFAULT": "The kernel was given an invalid pointer: a bug in this package.",
        "EIO": "The network device or its driver has failed.",
        "EISCONN": "The socket was connected to a peer after we opened it.",
        "ENETDOWN": "The network interface is down.",
        "ENOBUFS": "The queue of the network interface is full, or the kernel is short of memory for buffers.",
        "ENOMEM": "The kernel is short of memory.",
        "ENOTCONN": "The socket is no longer connected to its peer.",
        "EOPNOTSUPP": "The socket does not support the operation.",
        "EPIPE": "The socket was shut down for sending.",
        "ESHUTDOWN": "The socket was shut down, on Windows (10058).",
    },
    Fault.CLOSED: {
        "EBADF": "The file descriptor is closed.",
        "ENOTSOCK": "The file descriptor is not a socket.",
    },
}

UNKNOWN = Fault.MACHINE, "Not a known error of a datagram socket."

# Without the names that this platform lacks.
_BY_NUMBER = {
    getattr(errno, name): (fault, reason)
    for fault, reasons in TABLE.items()
    for name, reason in reasons.items()
    if hasattr(errno, name)
}


def fault_of(error: OSError) -> Fault:
    return _BY_NUMBER.get(error.errno or 0, UNKNOWN)[0]


def reason_for(error: OSError) -> str:
    return _BY_NUMBER.get(error.errno or 0, UNKNOWN)[1]
