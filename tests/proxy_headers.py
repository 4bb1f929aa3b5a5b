"""Headers of the PROXY protocol, version 2, as a proxy writes them. They follow the specification alone."""

from __future__ import annotations

import socket
import struct

from trio_udp import Address

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")

# Bytes of version and command.
LOCAL, PROXY = 0x20, 0x21

# Bytes of family and transport.
UNSPECIFIED, TCP4, UDP4, TCP6, UDP6, UNIX_STREAM, UNIX_DATAGRAM = 0x00, 0x11, 0x12, 0x21, 0x22, 0x31, 0x32


def raw_header(command: int, family: int, block: bytes) -> bytes:
    """Write a header of any command and family. ``block`` is everything after the length."""
    return SIGNATURE + bytes([command, family]) + struct.pack("!H", len(block)) + block


def header(source: Address, destination: Address, *, tlvs: bytes = b"", stream: bool = False) -> bytes:
    """Write the header of a datagram from a client at ``source``. Both addresses are of one family."""
    is_ipv6 = ":" in source[0]
    pack = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    hosts = socket.inet_pton(pack, source[0]) + socket.inet_pton(pack, destination[0])
    family = (TCP6 if stream else UDP6) if is_ipv6 else (TCP4 if stream else UDP4)
    return raw_header(PROXY, family, hosts + struct.pack("!HH", source[1], destination[1]) + tlvs)


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


OWN = raw_header(LOCAL, UNSPECIFIED, b"")  # from the proxy itself, such as a health check of dnsdist

VALID = header(("192.0.2.1", 1000), ("192.0.2.53", 53))

# Datagrams that no proxy may send, by their mistake.
MALFORMED = {
    "empty": b"",
    "no header": b"query",
    "part of the signature": SIGNATURE[:11],
    "signature only": SIGNATURE,
    "another signature": b"\n" + VALID[1:],
    "without its length": VALID[:15],
    "cut off in the addresses": VALID[:-1],
    "version 1": b"PROXY UDP4 192.0.2.1 192.0.2.53 1000 53\r\nquery",
    "version 3": raw_header(0x31, UDP4, VALID[16:]) + b"query",
    "unknown command": raw_header(0x22, UDP4, VALID[16:]) + b"query",
    "LOCAL longer than the datagram": raw_header(LOCAL, UNSPECIFIED, b"tlv")[:-1],
    "addresses shorter than IPv4 has": raw_header(PROXY, UDP4, VALID[16:-1]) + b"query",
    "addresses shorter than IPv6 has": raw_header(PROXY, UDP6, bytes(35)) + b"query",
    "stream with too short addresses": raw_header(PROXY, TCP4, bytes(11)) + b"query",
    "longer than the datagram": VALID[:14] + b"\xff\xff" + VALID[16:] + b"query",
    "unknown family": raw_header(PROXY, 0x42, bytes(40)) + b"query",
    "unknown transport": raw_header(PROXY, 0x13, VALID[16:]) + b"query",
    "IPv4 without a transport": raw_header(PROXY, 0x10, VALID[16:]) + b"query",
}
