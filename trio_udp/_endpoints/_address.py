"""Addresses: parsing, packing, and the kinds that matter to a server. Pure functions that make no system call.

The functions take the address of any datagram socket. The address of a Unix-domain socket is not a tuple but a path, an
abstract name or ``None``, and is none of the kinds here. Only ``numeric_address`` and ``pack_address`` fail on it.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
from typing import Any, TypeAlias

Address: TypeAlias = tuple[str, int] | tuple[str, int, int, int]
"""An address as the ``socket`` module gives it, for IPv4 or IPv6."""

# The most payload bytes in one UDP datagram: 65,535 less the headers of UDP (8) and IPv4 (20, RFC 791). IPv6 does not
# count its own header (RFC 8200 section 3).
MAX_PAYLOAD_IPV4 = 65_507
MAX_PAYLOAD_IPV6 = 65_527

# How an IPv6 socket shows an IPv4 address (RFC 4291 section 2.5.5.2), as text and as the first 12 of 16 bytes.
MAPPED_TEXT = "::ffff:"
MAPPED_BYTES = bytes(10) + b"\xff\xff"


NO_ADDRESS = "an address is a tuple of numeric host and port"


def is_internet(address: Address) -> bool:
    """Whether an address is of IPv4 or IPv6, not of a Unix-domain socket."""
    return isinstance(address, tuple)


def is_ipv6(address: Address) -> bool:
    """Whether an address belongs to an IPv6 socket; a mapped IPv4 address does."""
    return isinstance(address, tuple) and ":" in address[0]


def is_mapped(address: Address) -> bool:
    """Whether an address is an IPv4 address as an IPv6 socket shows it: ``::ffff:192.0.2.1``."""
    return isinstance(address, tuple) and address[0].startswith(MAPPED_TEXT) and "." in address[0]


def unmapped(address: Address) -> Address:
    """Turn a mapped IPv4 address into a plain one; leave any other address as it is."""
    return (address[0][len(MAPPED_TEXT) :], address[1]) if is_mapped(address) else address


def mapped(address: Address) -> Address:
    """Turn an IPv4 address into its mapped form, for an IPv6 socket; leave any other address as it is."""
    if isinstance(address, tuple) and ":" not in address[0]:
        return (MAPPED_TEXT + address[0], address[1], 0, 0)
    return address


def family_of(address: Address) -> socket.AddressFamily:
    """Return the address family of the socket that an address belongs to."""
    if not isinstance(address, tuple):
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


def max_payload(address: Address) -> int:
    """Return the length of the longest payload that one datagram to an address can carry."""
    over_ipv6 = is_ipv6(address) and not is_mapped(address)
    return MAX_PAYLOAD_IPV6 if over_ipv6 else MAX_PAYLOAD_IPV4


def _raw_host(address: Address) -> bytes:
    """Return the 4 bytes of an IPv4 host, mapped or not, the 16 of an IPv6 host, or none for a Unix-domain socket."""
    if not isinstance(address, tuple):
        return b""
    host = address[0]
    if ":" not in host:
        return socket.inet_aton(host)
    raw = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    return raw[12:] if raw.startswith(MAPPED_BYTES) else raw


def is_multicast(address: Address) -> bool:
    """Whether an address is a group: 224.0.0.0/4 (RFC 5771) or ff00::/8 (RFC 4291 section 2.7)."""
    raw = _raw_host(address)
    return raw[0] & 0xF0 == 0xE0 if len(raw) == 4 else raw[:1] == b"\xff"


def is_unspecified(address: Address) -> bool:
    """Whether an address is 0.0.0.0 or ``::``, which a machine uses before it has an address of its own."""
    raw = _raw_host(address)
    return bool(raw) and not any(raw)


def is_answerable(address: Address) -> bool:
    """Whether a source can be answered.

    No datagram can go to port 0, the unspecified address means this machine, and a Unix-domain socket may have no name.
    """
    if not isinstance(address, tuple):
        return address is not None
    return address[1] != 0 and not is_unspecified(address)


def is_limited_broadcast(address: Address) -> bool:
    """Whether an address is 255.255.255.255, the broadcast address of every network (RFC 919)."""
    return _raw_host(address) == b"\xff\xff\xff\xff"


def is_link_local(address: Address) -> bool:
    """Whether an address means something on one link only: fe80::/10 or 169.254.0.0/16 (RFC 3927)."""
    raw = _raw_host(address)
    return raw[:2] == b"\xa9\xfe" if len(raw) == 4 else raw[:1] == b"\xfe" and raw[1] & 0xC0 == 0x80


def host_bytes(address: Address) -> bytes:
    """Return the host of an address in network form: 4 bytes for IPv4, mapped or not, and 16 for IPv6.

    A Unix-domain socket counts as a host by itself, represented by a hash of its name.
    """
    return _raw_host(address) or _hashed(address)


def network_of(host: bytes, ipv4_bits: int, ipv6_bits: int) -> bytes:
    """Return a key for the part of the network that a host is in: the first bits of its address."""
    is_ipv4 = len(host) == 4
    bits = ipv4_bits if is_ipv4 else ipv6_bits
    # Bytes, not a number: strangers choose the key, and could compute numbers that collide in a dict.
    network = host[: bits >> 3]
    if bits & 7:
        network += bytes([host[bits >> 3] & 0xFF00 >> (bits & 7) & 0xFF])
    return network if is_ipv4 else network + b"IPv6"  # longer than any key for IPv4


def host_key(host: bytes) -> bytes:
    """Return the key under which a host counts: its IPv4 address, or its IPv6 /64 (RFC 7934 section 6)."""
    return host[:8]


def _hashed(address: object) -> bytes:
    """Return a key of fixed length for the address of a Unix-domain socket, which counts as a host by itself."""
    return hashlib.blake2b(repr(address).encode(), digest_size=16).digest()


def describe(address: Address) -> str:
    """Format an address for people: ``192.0.2.1 port 53``, ``fe80::1%2 port 53``."""
    if not isinstance(address, tuple):  # an abstract name as ss(8) writes it
        return "@" + os.fsdecode(address[1:]) if isinstance(address, bytes) else str(address or "no name")
    scope = address[3] if len(address) == 4 else 0
    return f"{address[0]}%{scope} port {address[1]}" if scope else f"{address[0]} port {address[1]}"


def numeric_address(address: Address) -> Address:
    """Check an address from the user, and return it in the kernel's form. Looks up no name, because that can block.

    Raises:
      TypeError, ValueError: It is not a numeric host and a port, with flow information and scope allowed for IPv6.
    """
    try:
        host, port, *rest = address
    except (TypeError, ValueError):
        raise TypeError(f"{NO_ADDRESS}, not {address!r}") from None
    if not isinstance(host, str) or not all(isinstance(number, int) for number in (port, *rest)):
        raise TypeError(f"{NO_ADDRESS}, not {address!r}")
    numbers = (port, *rest)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    limits = (65_535, 0xFFFFF, 0xFFFFFFFF) if family == socket.AF_INET6 else (65_535,)
    in_range = all(0 <= number <= limit for number, limit in zip(numbers, limits, strict=False))
    if len(numbers) not in (1, len(limits)) or not in_range or "\0" in host:  # a C string ends at a zero byte
        raise ValueError(f"{NO_ADDRESS}, not {address!r}")
    try:
        # It also knows scopes by name, as in "fe80::1%eth0".
        found = socket.getaddrinfo(host, port, family, socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError) as error:
        advice = "; trio.socket.getaddrinfo() looks up names" if isinstance(error, socket.gaierror) else ""
        raise ValueError(f"{NO_ADDRESS}, not {address!r}{advice}") from error
    numeric: Any = found[0][4]
    host, port, *scope = numeric
    if rest:
        scope = [rest[0], rest[1] or scope[1]]
    return (host.partition("%")[0], port, *scope)


# The structures that pack_address and unpack_address use. They are precompiled because a server unpacks an address for
# each stranger: 0.41 µs instead of 0.48 with the functions of the struct module.
_FAMILY = struct.Struct("=H")
_IPV4_REST = struct.Struct("!H4s")
_IPV6_REST = struct.Struct("!HI16s")
_IPV6_SCOPE = struct.Struct("=I")
_IPV4_FAMILY = _FAMILY.pack(socket.AF_INET)
_IPV6_NUMBER = int(socket.AF_INET6)


def pack_address(address: Address, family: int) -> bytes:
    """Turn an address into Linux's ``struct sockaddr_in`` or ``sockaddr_in6``, padded to a multiple of 8 bytes."""
    host, port, *scope = address
    raw = socket.inet_pton(family, host)
    if family == socket.AF_INET:
        return _FAMILY.pack(family) + _IPV4_REST.pack(port, raw) + bytes(8)
    flow, scope_id = scope or (0, 0)
    return _FAMILY.pack(family) + _IPV6_REST.pack(port, flow, raw) + _IPV6_SCOPE.pack(scope_id) + bytes(4)


def unpack_address(raw: bytes) -> Address:
    """Turn a ``sockaddr_in`` or ``sockaddr_in6`` into an address; further bytes may follow the structure."""
    if raw[:2] == _IPV4_FAMILY:
        port, host = _IPV4_REST.unpack_from(raw, 2)
        return socket.inet_ntoa(host), port
    port, flow, host = _IPV6_REST.unpack_from(raw, 2)
    return socket.inet_ntop(_IPV6_NUMBER, host), port, flow, _IPV6_SCOPE.unpack_from(raw, 24)[0]
