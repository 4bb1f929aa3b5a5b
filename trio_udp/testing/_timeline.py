"""What has happened on a network: one value, and one readable line, for each event."""

from __future__ import annotations

import attrs

from .._endpoints import Address

# Bytes of each payload that a line shows.
SHOWN = 16


@attrs.frozen
class DatagramEvent:
    """Something that happened to a datagram; ``str()`` of it is one line of the timeline.

    Attributes:
      time: On Trio's clock, in seconds.
      number: Which datagram, counted from 1. A duplicate has the number of its original, a refusal that of the datagram
        that was refused.
      fate: On leaving: ``"sent"``, ``"held back"`` (so that others overtake it), ``"duplicated"`` (this is the second
        copy), ``"lost"`` or ``"cut off"`` (by a partition). On arrival: ``"arrived"``, ``"buffer full"``,
        ``"port closed"`` or ``"cut off"``. The same with ``"refusal "`` before it for what tells a connected sender
        that the port is closed.
      source: Where it comes from, or claims to.
      destination: Where it goes.
      payload: What it carries; a refusal, what was refused.
    """

    time: float
    number: int
    fate: str
    source: Address
    destination: Address
    payload: bytes

    def __str__(self) -> str:
        start = repr(self.payload[:SHOWN]) + ("..." if len(self.payload) > SHOWN else "")
        path = f"{_text(self.source)} > {_text(self.destination)}"
        return f"{self.time:12.6f}  #{self.number:<4} {self.fate:<15} {path}  {len(self.payload)} bytes {start}"


def _text(address: Address) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
