"""Addresses of a simulated network: their normal form, and those that stand for several endpoints.

Addresses are tuples as the ``socket`` module gives them. This file makes two that mean the same equal, once, at the
edge of the network; all other files compare addresses with ``==``.
"""

from __future__ import annotations

from typing import cast

from .._endpoints import Address
from .._endpoints._address import is_ipv6, is_limited_broadcast, is_link_local, is_multicast, is_unspecified

# Index and name of the network's only interface.
INTERFACE, INTERFACE_NAME = 1, "eth0"

LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def normal(address: Address) -> Address:
    """Return an address as a kernel would report it: no flow information, and a scope only if it is link-local.

    A link-local address without a scope gets the index of the network's interface.
    """
    if len(address) == 2:
        return address
    host, port, _, scope = address
    # ff01 and ff02: multicast within the interface, within the link (RFC 4291 section 2.7).
    has_scope = is_link_local(address) or host[:4] in ("ff01", "ff02")
    return host, port, 0, (scope or INTERFACE) if has_scope else 0


def reachable(address: Address) -> Address:
    """Return where a datagram to an address goes: the unspecified address stands for the loopback address."""
    if not is_unspecified(address):
        return normal(address)
    return normal(cast("Address", (LOOPBACK[address[0]], *address[1:])))


def unspecified(address: Address) -> Address:
    """Return the address that an endpoint is bound to if it is bound to all addresses of a family, at the same port."""
    return ("::", address[1], 0, 0) if is_ipv6(address) else ("0.0.0.0", address[1])


def reaches_many(address: Address) -> bool:
    """Whether a datagram to an address goes to several endpoints: a group, or the broadcast address."""
    return is_multicast(address) or is_limited_broadcast(address)


def interface_of(destination: Address) -> int | None:
    """Return the interface of a route: only if the destination is link-local, a group or a broadcast address."""
    return INTERFACE if is_link_local(destination) or reaches_many(destination) else None


def is_beyond(address: Address) -> bool:
    """Whether a link-local address is on another interface, which this network does not have."""
    return len(address) == 4 and address[3] not in (0, INTERFACE)


def check_families(one: Address, other: Address) -> None:
    if is_ipv6(one) != is_ipv6(other):
        raise ValueError(f"addresses of two different families: {one!r} and {other!r}")
