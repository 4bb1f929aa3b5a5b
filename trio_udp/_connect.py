"""The other end: a conversation with one server, over a connected endpoint."""

from __future__ import annotations

from collections import deque

import attrs
import trio

from ._conversation import Conversation
from ._endpoints import Address, Datagram, open_connected_endpoint
from ._statistics import ConnectionStatistics


async def connect(host: str | bytes, port: int, *, local_address: Address | None = None) -> Connection:
    """Open a connection to a UDP server. Nothing is sent; that the server exists shows when it answers.

    Args:
      host: Name or address; of several addresses the first that the machine has a route to.
      port: UDP port.
      local_address: Numeric host and port to send from; the kernel's choice by default.

    Raises:
      OSError: The kernel's own: the name is unknown, there is no route, or ``local_address`` is not ours.
      TypeError, ValueError: The port is not from 1 to 65,535.
    """
    endpoint = await open_connected_endpoint(host, port, local_address)
    endpoint.tells_refusals = True
    return Connection(endpoint, endpoint.route(endpoint.socket.getpeername()))


@attrs.define(eq=False, repr=False)
class Connection(Conversation):
    """A conversation with one server, over a connected socket: only datagrams from that server are received.

    Made by :func:`connect`. ``async with`` closes it. One task at a time may receive; any number may send.
    """

    _ahead: deque[Datagram] = attrs.field(factory=deque, init=False)  # read from the kernel, not yet asked for
    _receiving: bool = attrs.field(default=False, init=False)
    _delivered: int = attrs.field(default=0, init=False)
    _dropped_at_end: int = attrs.field(default=0, init=False)

    @property
    def socket(self) -> trio.socket.SocketType:
        """The connected socket, for options and inspection."""
        return self._endpoint.socket

    def statistics(self) -> ConnectionStatistics:
        """Counts since the connection was opened; also available once it is closed."""
        of_socket = attrs.asdict(self._endpoint.statistics())
        return ConnectionStatistics(
            **of_socket, delivered=self._delivered, waiting=len(self._ahead), dropped_at_end=self._dropped_at_end
        )

    async def receive(self) -> bytes:
        """Wait for the server's next datagram and return its payload; ``b""`` is a datagram like any other.

        Raises:
          ConnectionRefusedError: Nobody listens at the server's port, says an ICMP answer to something sent earlier.
            Raised once for it; the connection stays usable.
          trio.ClosedResourceError: After :meth:`close`.
          trio.BusyResourceError: Another task is receiving.

        Cancellation:
          Always noticed, and never loses a datagram. Other tasks run at least once in a batch of 64 datagrams.
        """
        if self._ahead and not self._receiving:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await self._read_ahead()
        self._endpoint.sent_in_a_row = 0
        return self._take()

    def receive_nowait(self) -> bytes:
        """Like :meth:`receive`, without waiting.

        Raises:
          trio.WouldBlock: Nothing has arrived, or another task is about to receive it.
        """
        self._check_open()
        if self._receiving:
            raise trio.WouldBlock
        if not self._ahead:
            self._read_ahead_nowait()
        return self._take()

    def close(self) -> None:
        """Close the socket; what has not been received is dropped and counted. Idempotent."""
        if not self._closed:
            super().close()
            self._dropped_at_end += len(self._ahead)
            self._ahead.clear()
            self._endpoint.close()

    async def _read_ahead(self) -> None:
        """Let other tasks run, until a batch has arrived."""
        if self._receiving:
            raise trio.BusyResourceError("another task is already receiving from this connection")
        self._receiving = True
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            while not self._ahead:
                self._check_open()
                try:
                    self._read_ahead_nowait()
                except trio.WouldBlock:
                    self._ahead.extend(await self._endpoint.receive_batch())
                else:
                    # Not to be cancelled: what has been read is received, however soon the caller wants to give up.
                    await trio.lowlevel.cancel_shielded_checkpoint()
        finally:
            self._receiving = False

    def _read_ahead_nowait(self) -> None:
        self._endpoint.raise_refusal()
        batch: list[Datagram] = []
        self._endpoint.read(batch)
        if not batch:
            self._endpoint.raise_refusal()
            raise trio.WouldBlock
        self._ahead.extend(batch)

    def _take(self) -> bytes:
        payload, _ = self._ahead.popleft()
        self._delivered += 1
        return payload
