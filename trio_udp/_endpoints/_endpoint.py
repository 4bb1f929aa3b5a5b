"""Endpoint: the public face of a bound socket, with its address, its counters, and receiving without a server."""

from __future__ import annotations

import socket as stdlib_socket
from collections.abc import Iterable
from typing import final

import trio

from .._construction import NoPublicConstructor, create
from .._log import FaultLog
from .._statistics import EndpointStatistics
from .._trio import has_stdlib_socket, stdlib_socket as inner_socket
from ._address import Address
from ._addressed import find_way, send_on, send_on_nowait
from ._buffers import check_max_datagram_size, grant_receive_buffer
from ._datagram import Datagram, Origin, make_datagram
from ._multicast import check_hops, check_loop, join_group, leave_group, multicast_of, set_interface
from ._networks import Network, Networks
from ._one_by_one import OneByOne
from ._outbox import INTERNET, Outbox, Payload
from ._reader import Reader
from ._unix_outbox import UnixOutbox
from .engines import Engine, engine_for, is_by_name, is_connected


@final
class Endpoint(trio.abc.AsyncResource, metaclass=NoPublicConstructor):
    """A bound datagram socket and its counters, for :func:`serve_endpoints` to serve on.

    Made by :func:`open_endpoints`, :func:`open_unix_endpoint` or :meth:`from_socket`.

    An endpoint that no server runs on is a datagram socket by itself: one task receives the datagrams of all senders
    (:meth:`receive`, ``async for datagram in endpoint``), in arrival order. Sending is always allowed.
    """

    __slots__ = ("__weakref__", "_reader", "_receive_buffer_requested")

    def __init__(self, reader: Reader, receive_buffer_requested: int) -> None:
        self._reader = reader
        self._receive_buffer_requested = receive_buffer_requested

    @classmethod
    def from_socket(
        cls,
        sock: stdlib_socket.socket | trio.socket.SocketType,
        *,
        shared: bool = False,
        max_datagram_size: int = 65_535,
        receive_buffer: int | None = None,
        proxies: Iterable[Network] = (),
    ) -> Endpoint:
        """Make an endpoint from a bound datagram socket that other code opened.

        The endpoint owns the socket from now on, makes it non-blocking for every process that holds it, and closes it.
        (If the program closes a ``socket.socket`` that it passed in, the endpoint notices only when a datagram arrives,
        because Trio is not told.)

        Args:
          sock: A ``socket.socket`` or ``trio.socket`` of type ``SOCK_DGRAM``. An inherited one may be blocking.
          shared: Another process (systemd, a supervisor, the next worker) holds the same socket and reads it after us.
            The UDP_GRO option stays as it is. A server on it reads nothing once it stops, so datagrams wait for the
            next reader. Two readers at the same time would each get part of every conversation.
          max_datagram_size: Longest payload to accept, in bytes; longer datagrams are counted as truncated.
          receive_buffer: Bytes of kernel memory to ask for (``SO_RCVBUF``); by default it stays as it is.
          proxies: As for :func:`open_endpoints`.

        Raises:
          TypeError, ValueError: It is not a bound datagram socket, or another argument is invalid.
        """
        check_max_datagram_size(max_datagram_size)
        networks = Networks.parse("proxies", proxies)
        # A Trio socket from the user's own socket factory may have no socket inside.
        if not isinstance(sock, stdlib_socket.socket) and not has_stdlib_socket(sock):
            raise TypeError(f"expected a socket of the operating system, not a {type(sock).__name__}")
        if sock.type != stdlib_socket.SOCK_DGRAM:
            raise ValueError(f"not a datagram socket: {sock!r}")
        is_inet = sock.family in INTERNET
        if networks and not is_inet:
            raise ValueError(f"proxies are for sockets of IPv4 and IPv6, not {sock!r}")
        if sock.getsockname()[1] == 0 if is_inet else not sock.getsockname() and not is_connected(sock):
            raise ValueError(f"not bound to an address: {sock!r}")
        if isinstance(sock, stdlib_socket.socket):
            sock = trio.socket.from_stdlib_socket(sock)
        requested = 0 if receive_buffer is None else grant_receive_buffer(inner_socket(sock), receive_buffer)
        engine = engine_for(sock, max_datagram_size, shared=shared, proxies=networks)
        return make_endpoint(engine, shared=shared, receive_buffer_requested=requested)

    def __repr__(self) -> str:
        return f"<trio_udp.Endpoint {self.local_address!r}{' closed' if self.closed else ''}>"

    @property
    def socket(self) -> trio.socket.SocketType:
        """The bound socket, for options and inspection. Reading or writing it directly is not counted."""
        return self._reader.engine.socket

    @property
    def local_address(self) -> Address:
        """The address that the socket is bound to, as ``getsockname`` gives it."""
        return self._reader.engine.bound_address

    @property
    def closed(self) -> bool:
        """Whether the socket is closed, by :meth:`aclose` or otherwise."""
        return self._reader.engine.closed

    @property
    def shared(self) -> bool:
        """Whether another process reads the socket after us, so that a server reads nothing more once it stops.

        Set it to false before the stop if no such process is left. The server then catches up and lets clients finish
        their transactions, as on a socket of its own.
        """
        return self._reader.shared

    @shared.setter
    def shared(self, shared: bool) -> None:
        self._reader.shared = shared

    def statistics(self) -> EndpointStatistics:
        """Return the counts since the endpoint was made, also after it is closed."""
        reader, kernel = self._reader, self._reader.engine.kernel_figures()
        received, sent = reader.engine.counts, reader.outbox.counts
        return EndpointStatistics(
            received=received.received,
            bytes_received=received.bytes_received,
            truncated=received.truncated,
            refused_malformed=received.refused_malformed,
            sent=sent.sent,
            bytes_sent=sent.bytes_sent,
            receive_errors=sent.receive_errors,
            send_errors=sent.send_errors,
            errors=sent.errors,
            kernel_dropped=kernel.dropped,
            kernel_queued=kernel.queued,
            receive_buffer=kernel.receive_buffer,
            receive_buffer_requested=self._receive_buffer_requested,
        )

    async def receive(self) -> Datagram:
        """Wait for the next datagram from any sender, and return it; ``async for`` on the endpoint does the same.

        Raises:
          trio.ClosedResourceError: The endpoint is closed. Only this ends ``async for``, which raises it too.
          trio.BusyResourceError: A server runs on the endpoint, or another task is receiving.

        Cancellation:
          Always noticed, and never loses a datagram. Other tasks run at least once in 64 datagrams.
        """
        return make_datagram(*await OneByOne(self._reader).next(), self._origin())

    def receive_nowait(self) -> Datagram:
        """Like :meth:`receive`, without waiting.

        Raises:
          trio.WouldBlock: Nothing has arrived, or another task is about to receive it.
        """
        return make_datagram(*OneByOne(self._reader).next_nowait(), self._origin())

    def __aiter__(self) -> Endpoint:
        return self

    async def __anext__(self) -> Datagram:
        return await self.receive()

    async def send_to(
        self, payload: Payload, address: Address | str | bytes, *, local_address: Address | None = None
    ) -> None:
        """Send one datagram to any address.

        Waits while the send buffer is full, first come first served.

        Args:
          payload: Any bytes-like object, copied at the call.
          address: Numeric host and port, as a socket gives them. IPv4 addresses may be written as mapped into IPv6.
            On a Unix-domain socket a path or an abstract name.
          local_address: Our own address to send from; by default the kernel's choice.

        Raises:
          OSError: The kernel's error about this datagram: no route, a broadcast that the socket does not allow
            (``SO_BROADCAST``), port 0, a ``local_address`` that is not ours, or a payload that is too long.
          TypeError: The payload is not bytes-like, or ``address`` is not a numeric address.
          ValueError: ``address`` is not numeric, or this socket cannot send to it from ``local_address``.
          trio.ClosedResourceError: The endpoint is closed.

        Cancellation:
          A checkpoint. If it raises ``Cancelled``, the datagram was not sent.
        """
        await send_on(find_way([self._reader.outbox], address, local_address), payload)

    def send_to_nowait(
        self, payload: Payload, address: Address | str | bytes, *, local_address: Address | None = None
    ) -> None:
        """Like :meth:`send_to`, without waiting.

        Raises:
          trio.WouldBlock: The send buffer is full, or other senders wait for it; nothing was sent.
        """
        send_on_nowait(find_way([self._reader.outbox], address, local_address), payload)

    def join_group(self, group: str, *, interface: int | str | None = None, source: str | None = None) -> None:
        """Receive the datagrams that are sent to a group, at this endpoint's port.

        The endpoint must be bound to all addresses (``host=None``, ``"0.0.0.0"``, ``"::"``) or to the group. It
        receives the groups that it has joined, on the interfaces where it has joined them, and no group that another
        program has joined. ``Datagram.destination`` and ``Client.destination`` tell the group. An IPv6 endpoint without
        ``IPV6_V6ONLY`` joins IPv4 groups too. The endpoint leaves its groups when it is closed or the interface is
        removed.

        Args:
          group: Numeric address; ``"ff02::fb%eth0"`` names the interface too.
          interface: Name, index (as in ``Datagram.interface``) or one of our own addresses on it. By default the
            interface of the machine's route to the group. To join on several, make a call for each.
          source: Receive from this sender only (source-specific multicast, RFC 4607). For several senders, make a call
            for each. An endpoint is in a group either for all sources or for single ones. Linux only.

        Raises:
          OSError: The kernel's error, with the reason in its message: not a group (``EINVAL``), no such interface
            (``ENODEV``), joined already (``EADDRINUSE``; for a source ``EADDRNOTAVAIL``), more groups than the system
            allows (``ENOBUFS``).
          TypeError, ValueError: It is not a numeric address, or not of a family that this endpoint receives.
          NotImplementedError: This system cannot join for a single source.
          trio.ClosedResourceError: The endpoint is closed.
        """
        join_group(self._reader.engine, group, interface, source)

    def leave_group(self, group: str, *, interface: int | str | None = None, source: str | None = None) -> None:
        """Undo :meth:`join_group`, with the same arguments. Datagrams that have arrived are still received.

        Raises:
          OSError: ``EADDRNOTAVAIL`` or ``EINVAL``: the endpoint is not in this group, on this interface, for this
            source. Other errors are as for :meth:`join_group`.
        """
        leave_group(self._reader.engine, group, interface, source)

    @property
    def multicast_hops(self) -> int:
        """Time to live of datagrams that this endpoint sends to groups: 0 to 255. The default, 1, stays on the link."""
        return multicast_of(self._reader.engine).hops

    @multicast_hops.setter
    def multicast_hops(self, hops: int) -> None:
        multicast_of(self._reader.engine).hops = check_hops(hops)

    @property
    def multicast_loop(self) -> bool:
        """Whether members on this machine receive what this endpoint sends to groups, itself included. Default: true.

        A server makes no client of itself: its own datagrams count as ``refused_source``.
        """
        return multicast_of(self._reader.engine).loop

    @multicast_loop.setter
    def multicast_loop(self, loop: bool) -> None:
        multicast_of(self._reader.engine).loop = check_loop(loop)

    @property
    def multicast_interface(self) -> int | None:
        """Index of the interface that ``send_to`` uses for groups. ``None``, the default, leaves it to the routes.

        Set it to a name, an index, one of our own addresses (also to send from), or ``None``. The ``local_address`` of
        :meth:`send_to` and the scope of an IPv6 address take precedence. A reply always leaves on the interface on
        which its datagram arrived.
        """
        return multicast_of(self._reader.engine).interface or None

    @multicast_interface.setter
    def multicast_interface(self, interface: int | str | None) -> None:
        set_interface(self._reader.engine, interface)

    def close(self) -> None:
        """Close the socket. Collected replies are sent if the kernel takes them now. Idempotent.

        Calls that wait on it raise ``trio.ClosedResourceError``. So does a server once all its endpoints are closed.
        """
        try:
            self._reader.outbox.close()
        finally:
            self._reader.engine.close()

    async def aclose(self) -> None:
        """Like :meth:`close`, and a checkpoint. A server that runs on the endpoint loses its clients there."""
        self.close()
        await trio.lowlevel.checkpoint()

    def _origin(self) -> Origin:
        return Origin(self, self._reader.outbox)


def make_endpoint(engine: Engine, *, shared: bool = False, receive_buffer_requested: int = 0) -> Endpoint:
    """Make an endpoint from an engine."""
    outbox = UnixOutbox(engine, FaultLog()) if is_by_name(engine) else Outbox(engine, FaultLog())
    return create(Endpoint, Reader(engine, outbox, shared), receive_buffer_requested)


def reader_of(endpoint: Endpoint) -> Reader:
    """Return the reader of an endpoint; for the rest of this package."""
    return endpoint._reader
