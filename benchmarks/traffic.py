"""The traffic of the benchmark: what a server does, and the sizes that all servers and the load share.

A server does one of these things:

    echo      answers every datagram with itself
    proxied   the same, and takes the sender's address from a PROXY header
    unix      the same over a Unix-domain socket
    once      echoes; a server that keeps something for each client forgets it after one datagram
    out       answers every datagram with a burst of OUT_BURST long ones
    flight    answers every datagram with FLIGHT long ones, as a sans-IO protocol does (QUIC, for example)
    in        acknowledges every IN_BURST-th datagram with its first bytes
    fan       echoes a client's first datagram if it begins with JOIN, and counts the client as a member; sends every
              other datagram to all members

This module imports only what every server needs, because the memory of servers is measured too.
"""

from __future__ import annotations

import os
import socket

STREAM_SIZE = 1_200  # bytes
OUT_BURST = 64
FLIGHT = 17
IN_BURST = 32
ACKNOWLEDGEMENT = 8  # bytes
JOIN = b"j"

# Every server gets the same receive buffer. The default is slightly too small for 256 datagrams in flight.
RECEIVE_BUFFER = 1 << 20

# Seconds after which a server ends by itself.
LONGEST_LIFE = 900


def burst(what: str) -> list[bytes]:
    """Return the datagrams of a burst, each with its number first; none if the server sends no bursts."""
    length = {"out": OUT_BURST, "flight": FLIGHT}.get(what, 0)
    return [bytes([number]) + bytes(STREAM_SIZE - 1) for number in range(length)]


def enlarge(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)


def unix_name() -> str:
    """An abstract name for a server's Unix-domain socket: there is no file to remove."""
    return f"\0trio-udp-benchmark-{os.getpid()}"


def ready(address: int | str) -> None:
    """Tell the benchmark the server's port or abstract name."""
    print(str(address).replace("\0", "@"), flush=True)
