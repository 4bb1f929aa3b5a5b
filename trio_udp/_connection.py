"""The other end: a conversation with one server, over a connected socket."""

from __future__ import annotations

import os
import socket as stdlib_socket
from collections.abc import Callable
from typing import final

import attrs
import trio

from ._channel import ChannelState, DatagramChannel
from ._construction import create
from ._endpoints import (
    BATCH,
    Address,
    Endpoint,
    OneByOne,
    Outgoing,
    open_connected_endpoint,
    open_connected_unix_endpoint,
    reader_of,
)
from ._lifecycle import CLOSED
from ._statistics import ConnectionStatistics


async def connect(
    host: str | bytes,
    port: int,
    flowinfo: int = 0,
    scope_id: int = 0,
    *,
    local_address: Address | None = None,
    receive_buffer: int | None = None,
    configure: Callable[[stdlib_socket.socket], object] | None = None,
) -> Connection:
    """Open a connection to a UDP server. Nothing is sent; the server's first answer shows that it exists.

    Args:
      host: Name or address; of several addresses the first that the machine has a route to.
      port: UDP port.
      flowinfo, scope_id: As in an IPv6 socket address, so that ``connect(*client.peer_address)`` works.
      local_address: Numeric host and port to send from; the kernel's choice by default.
      receive_buffer: Bytes of kernel memory to ask for, for datagrams not yet read (``SO_RCVBUF``); 4 MiB by default.
        See :func:`open_endpoints`.
      configure: Called with the ``socket.socket`` before it is bound and connected, to set any socket option.

    Raises:
      OSError: The name is unknown, there is no route, or ``local_address`` is not ours.
      TypeError, ValueError: An argument is invalid.

    Cancellation:
      A checkpoint; it leaves no socket open.
    """
    return make_connection(
        await open_connected_endpoint(
            host,
            port,
            local_address,
            flowinfo=flowinfo,
            scope_id=scope_id,
            receive_buffer=receive_buffer,
            configure=configure,
        )
    )


async def connect_unix(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    *,
    local_path: str | bytes | os.PathLike[str] | os.PathLike[bytes] | None = None,
) -> Connection:
    r"""Open a connection to a Unix-domain datagram socket. Nothing is sent; the server must be there.

    If the server does not read, ``send`` waits and ``send_nowait`` raises ``trio.WouldBlock``. If the server is gone, a
    send raises ``ConnectionRefusedError``, and later ones reach a new server with the same name as soon as there is
    one. ``receive`` does not notice.

    Args:
      path: The path of the server's socket, or on Linux an abstract name (``"\0name"``).
      local_path: A path or an abstract name of our own, for the server to answer. Its file is made and removed as by
        :func:`open_unix_endpoint`. By default Linux chooses an abstract name; elsewhere there is none, and the server
        cannot answer.

    Raises:
      OSError: There is no such file, no server has it (``ECONNREFUSED``), we may not write to it, or ``local_path``
        cannot be bound. The message has the path.
      TypeError, ValueError: An argument is invalid, or this system has no such sockets.
    """
    return make_connection(await open_connected_unix_endpoint(path, local_path))


@attrs.define(eq=False)
class ConnectionState(ChannelState):
    """The state of a connection. Send errors are raised, because there is only one peer."""

    incoming: OneByOne
    delivered: int = attrs.field(default=0, init=False)
    dropped_at_end: int = attrs.field(default=0, init=False)

    def push(self, outgoing: list[Outgoing]) -> int:
        self.incoming.raise_refusal()
        return self.outbox.send(outgoing, raising=True)

    def push_row(self, payloads: list[bytes], sizes: list[int]) -> int:
        self.incoming.raise_refusal()
        return self.outbox.send_row(payloads, sizes, self.route, self, raising=True)

    async def _wait_for_room(self, outgoing: Outgoing) -> None:
        await self.outbox.wait_for_room(outgoing, raising=True)


@final
class Connection(DatagramChannel):
    """A conversation with one server, over a connected socket: only datagrams from that server are received.

    ``receive`` and ``send`` always notice cancellation, but they are not full checkpoints: they let other tasks run at
    least once in 64 datagrams, not each time.

    Made by :func:`connect`, :func:`connect_unix` or :meth:`from_socket`. ``async with`` closes it. One task at a time
    may receive; any number may send.
    """

    __slots__ = ("_endpoint",)

    _state: ConnectionState

    def __init__(self, state: ConnectionState, endpoint: Endpoint) -> None:
        super().__init__(state)
        self._endpoint = endpoint

    @classmethod
    def from_socket(cls, sock: stdlib_socket.socket | trio.socket.SocketType) -> Connection:
        """Make a connection from a connected datagram socket that other code opened. It owns the socket from now on.

        Raises:
          TypeError, ValueError: It is not a connected datagram socket.
        """
        peer = _peer_of(sock)
        endpoint = Endpoint.from_socket(sock)
        return make_connection(endpoint, peer)

    @property
    def socket(self) -> trio.socket.SocketType:
        """The connected socket, for options and inspection."""
        return self._endpoint.socket

    def statistics(self) -> ConnectionStatistics:
        """Return the counts since the connection was opened, also after it is closed."""
        state = self._state
        return ConnectionStatistics(
            **attrs.asdict(self._endpoint.statistics()),
            delivered=state.delivered,
            waiting=len(state.incoming.reader.ahead),
            dropped_at_end=state.dropped_at_end,
        )

    async def receive(self) -> bytes:
        """Wait for the server's next datagram and return its payload; ``b""`` is a datagram like any other.

        Raises:
          ConnectionRefusedError: The server's port is closed (an ICMP answer to an earlier datagram). Raised once, here
            or by a send; the connection stays usable.
          trio.ClosedResourceError: After :meth:`close`.
          trio.BusyResourceError: Another task is receiving.

        Cancellation:
          Always noticed, and never loses a datagram. Other tasks run at least once in a batch of 64 datagrams.
        """
        payload, _, _ = await self._state.incoming.next()
        self._state.delivered += 1
        return payload

    def receive_nowait(self) -> bytes:
        """Like :meth:`receive`, without waiting.

        Raises:
          trio.WouldBlock: Nothing has arrived, or another task is about to receive it.
        """
        self._state.check_open()
        payload, _, _ = self._state.incoming.next_nowait()
        self._state.delivered += 1
        return payload

    async def receive_many(self) -> list[bytes]:
        """Wait for a datagram, and return the payloads of all that wait by then: at least one, at most 64, in order.

        The counterpart of :meth:`send_many`. Errors and cancellation are as for :meth:`receive`.
        """
        many = [await self.receive()]
        many += [payload for payload, _, _ in self._state.incoming.reader.take_ahead(BATCH - 1)]
        self._state.delivered += len(many) - 1
        return many

    def close(self) -> None:
        """Close the socket; datagrams not yet received are dropped and counted. Idempotent."""
        state = self._state
        if not state.is_closed:
            state.finish(CLOSED)
            state.dropped_at_end += len(state.incoming.reader.take_ahead(BATCH))
            self._endpoint.close()


def make_connection(endpoint: Endpoint, peer_address: Address | None = None) -> Connection:
    """Make a connection from an endpoint with a connected socket, which by default tells the peer address."""
    reader = reader_of(endpoint)
    peer = peer_address if peer_address is not None else endpoint.socket.getpeername()
    return create(
        Connection,
        ConnectionState(reader.outbox, reader.engine.route(peer), OneByOne(reader, tells_refusals=True)),
        endpoint,
    )


def _peer_of(sock: stdlib_socket.socket | trio.socket.SocketType) -> Address:
    if not hasattr(sock, "getpeername"):
        raise TypeError(f"expected a socket, not {sock!r}")
    try:
        peer: Address = sock.getpeername()
    except OSError:
        raise ValueError(f"not a connected socket: {sock!r}") from None
    return peer
