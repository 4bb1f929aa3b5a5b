"""What an endpoint asks of the code that makes the system calls.

An engine moves datagrams between one socket and Python, a batch at a time. ``receive`` and ``send`` are plain calls
that never block; when to wait, with ``wait_readable`` and ``wait_writable``, is up to the endpoint.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Protocol, TypeAlias

import trio

from .._limits import BATCH as BATCH
from .._statistics import EndpointTally, KernelFigures, SendTally
from ._address import Address

# Who a datagram came from and which of our addresses it was sent to, in the form that is cheapest for the engine.
# Equal routes are the same client. Only the engine looks inside.
Route: TypeAlias = Hashable
Datagram: TypeAlias = tuple[bytes, Route]
Outgoing: TypeAlias = tuple[bytes, Route, SendTally]


class Engine(Protocol):
    """One socket, and all that an :class:`Endpoint` does with it.

    Attributes:
      family: Its address family.
      bound_address: Where it is bound to.
      connected: It has one peer, and is told when that refuses a datagram.
      tally: Counts of what passed through, kept by ``receive`` and ``send``.
    """

    family: int
    bound_address: Address
    connected: bool
    tally: EndpointTally

    @property
    def socket(self) -> trio.socket.SocketType:
        """For the user; everything else goes by way of the engine."""

    def receive(self, batch: list[Datagram]) -> bool:
        """Append what has arrived to ``batch``, which is empty; at most ``BATCH`` datagrams. True if that is all.

        Raises:
          OSError: Reading failed; ``batch`` holds what had arrived before.
        """

    def send(self, outbox: deque[Outgoing]) -> None:
        """Send and remove datagrams from the left of ``outbox`` until it is empty.

        Raises:
          BlockingIOError: The send buffer is full; ``outbox`` holds what is left.
          OSError: The datagram that is now the first in ``outbox`` could not be sent.
        """

    def route(self, address: Address) -> Route:
        """The route to an address that has not necessarily written to us."""

    def max_payload(self, route: Route) -> int:
        """Length of the longest payload that one datagram can carry on a route."""

    def peer_address(self, route: Route) -> Address:
        """The address at the other end of a route."""

    def local_address(self, route: Route) -> Address:
        """Our own address at this end of a route."""

    def kernel_figures(self) -> KernelFigures:
        """What the kernel says about the socket; also available once it is closed."""

    def is_readable(self) -> bool:
        """Whether ``wait_readable`` would return at once."""

    async def wait_readable(self) -> None:
        """Sleep until ``receive`` is worth a try; ``trio.ClosedResourceError`` once the socket is closed."""

    async def wait_writable(self) -> None:
        """Sleep until ``send`` is worth a try; ``trio.ClosedResourceError`` once the socket is closed."""

    @property
    def closed(self) -> bool:
        """Whether the socket is closed, by whomever."""

    def close(self) -> None:
        """Close the socket and wake whoever waits for it."""

    def abandon(self) -> None:
        """Forget the file descriptor, which is not ours any more, and wake whoever waits for it."""
