"""A datagram in transit, and the route on which it arrives. Values only."""

from __future__ import annotations

from typing import NamedTuple

import attrs

from .._endpoints import Address
from .._endpoints._address import is_ipv6


class SimulatedRoute(NamedTuple):
    """A route of the simulated engine. ``interface`` is ``None`` for an ordinary unicast destination."""

    peer: Address
    local: Address
    destination: Address
    interface: int | None


@attrs.frozen(eq=False)
class Packet:
    """A datagram on its way to one receiver, or the refusal that tells its sender that the port is closed (ICMP).

    Attributes:
      number: Counts datagrams. Copies have the number of their original, refusals that of the refused datagram.
      destination: The address that the datagram was sent to.
      receiver: The address of the machine that this copy goes to. Differs from ``destination`` for a group or
        broadcast address, which several machines receive.
    """

    number: int
    payload: bytes
    source: Address
    destination: Address
    receiver: Address
    is_refusal: bool = False

    @property
    def path(self) -> tuple[Address, Address]:
        return self.source, self.receiver

    @property
    def is_copy(self) -> bool:
        """Whether this is a copy of a datagram to a group or broadcast address."""
        return self.receiver != self.destination

    def refusal(self) -> Packet:
        return Packet(self.number, self.payload, self.destination, self.source, self.source, is_refusal=True)

    def fragments(self, mtu: int) -> int:
        """Return how many IP packets it takes. All but the last carry a multiple of 8 bytes: RFC 791, RFC 8200."""
        header, of_fragment = (40, 48) if is_ipv6(self.source) else (20, 20)
        length = 8 + (0 if self.is_refusal else len(self.payload))
        if header + length <= mtu:
            return 1
        return -(-length // ((mtu - of_fragment) // 8 * 8))
