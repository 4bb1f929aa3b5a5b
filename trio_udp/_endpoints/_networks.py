"""Networks: parts of the internet as users write them, such as ``10.0.0.0/8``. Pure values."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_network,
)
from typing import TypeAlias

import attrs

Network: TypeAlias = str | IPv4Network | IPv6Network | IPv4Address | IPv6Address
"""A network as users write it, or a single address."""

# IPv4 addresses as an IPv6 socket shows them. Hosts are compared in their IPv4 form, see host_bytes().
MAPPED_NETWORK = IPv6Network("::ffff:0:0/96")


@attrs.frozen
class Networks:
    """A set of networks, perhaps empty; made by :meth:`parse`."""

    _masks: tuple[tuple[int, int, int], ...]  # bytes of a host, mask, number of the network

    @classmethod
    def parse(cls, name: str, networks: Iterable[Network]) -> Networks:
        """Check networks from the user.

        Args:
          name: The name of the argument, for errors.
          networks: What the user gave.

        Raises:
          TypeError, ValueError: It is not an iterable of networks; the message has one line.
        """
        if isinstance(networks, Network) or not isinstance(networks, Iterable):
            raise TypeError(f"{name} must be a list of networks, not {networks!r}")
        masks = []
        for network in networks:
            if not isinstance(network, Network):
                raise TypeError(f"{name} must be networks as str or of the module ipaddress, not {network!r}")
            try:
                parsed = ip_network(str(network))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if "%" in str(network):
                raise ValueError(f"{name}: a network has no scope: {str(network)!r}")
            if isinstance(parsed, IPv6Network) and parsed.subnet_of(MAPPED_NETWORK):
                number, mask = (int(part) & 0xFFFFFFFF for part in (parsed.network_address, parsed.netmask))
                masks.append((4, mask, number))
            else:
                masks.append((parsed.max_prefixlen // 8, int(parsed.netmask), int(parsed.network_address)))
        return cls(tuple(masks))

    def __bool__(self) -> bool:
        return bool(self._masks)

    def __contains__(self, host: bytes) -> bool:
        """Whether a host, as ``host_bytes`` gives it, is in one of the networks."""
        size, number = len(host), int.from_bytes(host, "big")
        return any(size == length and number & mask == network for length, mask, network in self._masks)
