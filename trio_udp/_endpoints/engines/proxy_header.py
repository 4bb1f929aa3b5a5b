"""The header of the PROXY protocol, version 2: https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt

These are pure functions over bytes that anyone may have sent. ``read_header`` runs for every datagram, ``addresses`` on
demand.

The *ends* of a proxied datagram are the addresses in its header: the source and the destination that the proxy saw, in
network form, then the two ports. If the client's transport was a stream, one byte more follows, because port 53 of TCP
is not port 53 of UDP. (dnsdist passes queries that arrive over HTTPS on over UDP, and the header says "stream".)
"""

from __future__ import annotations

import socket
import struct

from .._address import Address, unmapped

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
SIZE = 16  # bytes before the addresses

# The byte of version and command: the addresses are the proxy's own, or those of a client.
LOCAL, PROXY = 0x20, 0x21

# The byte of family and transport, with the size of the addresses.
DATAGRAM = {0x12: 12, 0x22: 36}
STREAM = {0x11: 12, 0x21: 36}
# Unspecified, and Unix-domain sockets, which our addresses cannot represent: receivers fall back to unspecified for
# "the valid combinations above" that they do not support (section 2.2).
UNSPECIFIED = {0x00, 0x31, 0x32}

IPV4, IPV6 = struct.Struct("!4s4sHH"), struct.Struct("!16s16sHH")


def read_header(datagram: bytes) -> tuple[int, bytes] | None:
    """Return where the payload begins, and the ends: b"" if the proxy speaks for itself. ``None``: no valid header.

    The fields after the addresses (TLVs) are skipped, including the checksum: UDP has one over the whole datagram, and
    the specification requires it only where "the checksum functionality is supported".
    """
    if len(datagram) < SIZE or datagram[:12] != SIGNATURE:
        return None
    start = SIZE + (datagram[14] << 8 | datagram[15])
    if start > len(datagram):
        return None
    command, family = datagram[12], datagram[13]
    if command == PROXY:
        size = DATAGRAM.get(family)
        if size is not None:
            return (start, datagram[SIZE : SIZE + size]) if start >= SIZE + size else None
        size = STREAM.get(family)
        if size is not None:
            return (start, datagram[SIZE : SIZE + size] + b"s") if start >= SIZE + size else None
        return (start, b"") if family in UNSPECIFIED else None
    return (start, b"") if command == LOCAL else None


def addresses(ends: bytes) -> tuple[Address, Address]:
    """Return the source and the destination; a mapped IPv4 address as a plain one."""
    if len(ends) < IPV6.size:
        source, destination, source_port, destination_port = IPV4.unpack_from(ends)
        return (socket.inet_ntoa(source), source_port), (socket.inet_ntoa(destination), destination_port)
    source, destination, source_port, destination_port = IPV6.unpack_from(ends)
    return (
        unmapped((socket.inet_ntop(socket.AF_INET6, source), source_port, 0, 0)),
        unmapped((socket.inet_ntop(socket.AF_INET6, destination), destination_port, 0, 0)),
    )
