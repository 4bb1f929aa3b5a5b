"""Recorded events: one value and one readable line for each event of a datagram."""

from __future__ import annotations

import attrs

from .._endpoints import Address

# Bytes of the payload that a line shows.
SHOWN = 16


@attrs.frozen
class DatagramEvent:
    """One thing that happened to a datagram; ``str()`` of it is one line of the timeline.

    Attributes:
      time: On Trio's clock, in seconds.
      number: Counts datagrams from 1. A duplicate has the number of its original, and so has each copy of a datagram to
        a group; a refusal has the number of the refused datagram.
      fate: On leaving: ``"sent"``, ``"held back"`` (later datagrams may overtake it), ``"duplicated"`` (this is the
        second copy), ``"lost"``, ``"cut off"`` (by a partition) or ``"no receiver"`` (the group has no members). On
        arrival: ``"arrived"``, ``"buffer full"``, ``"port closed"``, ``"cut off"`` or ``"no receiver"``. The refusal
        that tells a connected sender that the port is closed has the same fates after ``"refusal "``.
      source: The address that the datagram comes from, or claims to come from.
      destination: The address that the datagram was sent to.
      payload: The bytes of the datagram; for a refusal, those of the refused datagram.
      receiver: The address of the machine that this copy goes to, if ``destination`` is a group or the broadcast
        address; otherwise ``None``.
    """

    time: float
    number: int
    fate: str
    source: Address
    destination: Address
    payload: bytes
    receiver: Address | None = None

    def __str__(self) -> str:
        start = repr(self.payload[:SHOWN]) + ("..." if len(self.payload) > SHOWN else "")
        path = f"{_text(self.source)} > {_text(self.destination)}"
        if self.receiver is not None:
            path += f" at {_text(self.receiver)}"
        return f"{self.time:12.6f}  #{self.number:<4} {self.fate:<15} {path}  {len(self.payload)} bytes {start}"


def _text(address: Address) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
