"""What an error of a datagram socket means, by its errno: a table to read.

Whatever recvmsg(2) and sendmsg(2) give on such a socket is here, on Linux, BSD, macOS and Windows, with what becomes of
it. What is not here is treated as the machine's. Sources: recv(2), send(2), udp(7), ip(7), ipv6(7) and unix(7) of
Linux, and its table of ICMP errors (``icmp_err_convert``); recv(2) and send(2) of FreeBSD and macOS; ``WSARecvFrom``
and ``WSASendTo`` of Windows, where Python gives the errors of Winsock the same names.
"""

from __future__ import annotations

import errno
from enum import Enum, auto


class Fault(Enum):
    """Whose fault it is. ``ANSWER``, ``PEER`` and ``MACHINE`` are counted by name, and whatever is next goes on."""

    WAIT = auto()
    """Nobody's: there is nothing yet, or no room."""

    ANSWER = auto()
    """Not this call's: nearly always the network answers something sent earlier. The call is repeated, to send only
    once. Not logged, and no reason to pause: strangers bring it about at will."""

    PEER = auto()
    """This datagram's, or its peer's: counted for that client. Not logged: strangers can bring it about. If reading
    gives nothing else it is treated like the next."""

    MACHINE = auto()
    """This machine's, or this program's: logged, at most once a minute."""

    CLOSED = auto()
    """Somebody has closed the file descriptor itself, and perhaps it already belongs to something that is not a socket:
    logged, and the endpoint ends."""


TABLE: dict[Fault, dict[str, str]] = {
    Fault.WAIT: {
        "EAGAIN": "Nothing has arrived, or the send buffer is full.",
        "EWOULDBLOCK": "Another name for EAGAIN, and on Windows another number.",
    },
    Fault.ANSWER: {
        "ECONNREFUSED": "Nobody listens at the peer's port (ICMP), on a connected socket or one with IP_RECVERR.",
        "ECONNRESET": "The same on Windows (10054), where unconnected sockets are told too.",
        "ENETRESET": "Something sent earlier has exceeded its time to live, on Windows (10052).",
        "ENONET": "The peer's host is isolated, says a router (ICMP), on a connected socket.",
        "ENOPROTOOPT": "The peer's host does not speak UDP (ICMP), on a connected socket.",
        "EPROTO": "The peer or a router did not like a header (ICMP), on a connected socket.",
        "ETIMEDOUT": "Something sent earlier was not answered by the network in time, on Windows (10060).",
        "EINTR": "A signal came in between; Python repeats the call itself, but other callers do not.",
    },
    Fault.PEER: {
        "EACCES": "A prohibit route, or a broadcast address without SO_BROADCAST.",
        "EADDRNOTAVAIL": "The peer wrote to an address that is not ours now, or its own cannot be sent to.",
        "EAFNOSUPPORT": "The peer's address is of another family than the socket.",
        "EDESTADDRREQ": "The peer has no address, as a Unix-domain socket that was never bound.",
        "EHOSTDOWN": "The peer's host does not answer on its own network.",
        "EHOSTUNREACH": "There is no way to the peer's host: an unreachable route, or a router says so (ICMP).",
        "EINVAL": "The peer has port 0, a blackhole route, or (over IPv6) wrote to an address that is not ours now.",
        "EMSGSIZE": "The datagram is longer than the way to the peer allows, and is not to be cut into fragments.",
        "ENETUNREACH": "There is no route to the peer, or (over IPv4) it wrote to an address that is not ours now.",
        "ENODEV": "The interface that the peer's address belongs to is gone.",
        "ENOENT": "The peer is a Unix-domain socket that is gone.",
        "ENXIO": "The interface that the peer's address belongs to is gone, on BSD and macOS.",
        "EPERM": "A packet filter has dropped it.",
    },
    Fault.MACHINE: {
        "ECONNABORTED": "The system has taken the socket out of service, as macOS does with an app that sleeps.",
        "EFAULT": "The kernel was given an address that is not in memory: a mistake in this package.",
        "EIO": "The network device or its driver has failed.",
        "EISCONN": "Somebody has connected the socket to a peer.",
        "ENETDOWN": "The network interface is down.",
        "ENOBUFS": "The queue of the network interface is full, or the kernel is short of memory for buffers.",
        "ENOMEM": "The kernel is short of memory.",
        "ENOTCONN": "The socket was connected to a peer and is not any more.",
        "EOPNOTSUPP": "The socket does not do what it was asked for.",
        "EPIPE": "Somebody has shut the socket down for sending.",
        "ESHUTDOWN": "Somebody has shut the socket down, on Windows (10058).",
    },
    Fault.CLOSED: {
        "EBADF": "The file descriptor is closed.",
        "ENOTSOCK": "The file descriptor is not that of a socket.",
    },
}

UNKNOWN = Fault.MACHINE, "Not an error that a datagram socket is known to give."

# Names that this platform does not have are left out.
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
