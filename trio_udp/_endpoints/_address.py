"""Addresses: what they look like, which of them can be sent to, and how much."""

from __future__ import annotations

import hashlib
import socket
import struct
from typing import Any, TypeAlias

Address: TypeAlias = "tuple[str, int] | tuple[str, int, int, int]"
"""An address as the ``socket`` module gives it, for IPv4 or IPv6."""

# Bytes in one UDP datagram: 65,535 less the headers of UDP (8) and IPv4 (20, RFC 791). IPv6 does not count its own
# (RFC 8200 section 3).
MAX_PAYLOAD_IPV4 = 65_507
MAX_PAYLOAD_IPV6 = 65_527


def is_ipv6(address: Address) -> bool:
    return ":" in address[0]


def is_mapped(address: Address) -> bool:
    """Whether it is an IPv4 address as an IPv6 socket has it, mapped into IPv6: RFC 4291 section 2.5.5.2."""
    return address[0].startswith("::ffff:") and "." in address[0]


def family_of(address: Address) -> socket.AddressFamily:
    return socket.AF_INET6 if is_ipv6(address) else socket.AF_INET


def max_payload(address: Address) -> int:
    """Length of the longest payload that one datagram to an address can carry."""
    over_ipv6 = is_ipv6(address) and not is_mapped(address)
    return MAX_PAYLOAD_IPV6 if over_ipv6 else MAX_PAYLOAD_IPV4


def source_prefix(address: Address, ipv4_bits: int, ipv6_bits: int) -> bytes:
    """The first bits of an address, which tell what part of the network it is in."""
    if not isinstance(address, tuple):
        # Of a Unix-domain socket: a part by itself. Hashed, since it may be long.
        return hashlib.blake2b(repr(address).encode(), digest_size=16).digest()
    if is_ipv6(address):
        raw, bits = socket.inet_pton(socket.AF_INET6, address[0]), ipv6_bits
        if is_mapped(address):
            raw, bits = raw[12:], ipv4_bits
    else:
        raw, bits = socket.inet_aton(address[0]), ipv4_bits
    prefix = int.from_bytes(raw, "big") >> (8 * len(raw) - bits)
    # Not the number itself: which numbers fall together in a dict is known, and strangers choose them.
    return prefix.to_bytes(len(raw), "big")


def numeric_address(address: Address) -> Address:
    """Check an address that a user wants to send to. To look up a name in it would keep all clients waiting.

    Raises:
      TypeError, ValueError: It is not a numeric host and a port, and for IPv6 perhaps flow information and scope.
    """
    try:
        host, port, *rest = address
    except (TypeError, ValueError):
        raise TypeError(f"not an address: {address!r}") from None
    if not isinstance(host, str) or not all(isinstance(number, int) for number in (port, *rest)):
        raise TypeError(f"not an address: {address!r}")
    numbers = (port, *rest)
    limits = (65_535, 0xFFFFF, 0xFFFFFFFF) if is_ipv6(address) else (65_535,)
    in_range = all(0 <= number <= limit for number, limit in zip(numbers, limits, strict=False))
    if len(numbers) not in (1, len(limits)) or not in_range or "\0" in host:  # C would take that for the end
        raise ValueError(f"not an address: {address!r}")
    try:
        # It knows scopes by name too, as in "fe80::1%eth0".
        found = socket.getaddrinfo(host, port, family_of(address), socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"not an address: {address!r}") from error
    numeric: Any = found[0][4]
    host, port, *scope = numeric
    if rest:
        scope = [rest[0], rest[1] or scope[1]]
    return (host.partition("%")[0], port, *scope)


def pack_address(address: Address, family: int) -> bytes:
    """Turn an address into a ``struct sockaddr_in`` or ``sockaddr_in6``, padded to 8 bytes, as Linux has it."""
    host, port, *scope = address
    raw = socket.inet_pton(family, host)
    if family == socket.AF_INET:
        return struct.pack("=H", family) + struct.pack("!H4s8x", port, raw)
    flow, scope_id = scope or (0, 0)
    return struct.pack("=H", family) + struct.pack("!HI16s", port, flow, raw) + struct.pack("=I4x", scope_id)


def unpack_address(raw: bytes) -> Address:
    """The address that such a structure holds."""
    (family,) = struct.unpack_from("=H", raw)
    if family == socket.AF_INET:
        port, host = struct.unpack_from("!H4s", raw, 2)
        return socket.inet_ntop(family, host), port
    port, flow, host = struct.unpack_from("!HI16s", raw, 2)
    (scope_id,) = struct.unpack_from("=I", raw, 24)
    return socket.inet_ntop(family, host), port, flow, scope_id
