"""Datagram: the public view of one datagram that has arrived."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import attrs
import trio

from .._construction import NoPublicConstructor
from ._address import Address, is_answerable
from ._outbox import YIELD_EVERY, Outbox, Payload
from .engines import Ancillary, Credentials, Route, credentials_of

if TYPE_CHECKING:
    import trio_udp


@attrs.define(eq=False)
class Origin:
    """The endpoint that datagrams arrive on, and the server on it if there is one.

    Attributes:
      amplification: The bytes of a datagram's replies are at most this many times its own; ``None`` for no limit.
      withheld: Replies not sent because of ``amplification``.
      in_accept: ``accept`` is being called.
    """

    endpoint: trio_udp.Endpoint
    outbox: Outbox
    server: trio_udp.Server | None = None
    amplification: float | None = None
    withheld: int = attrs.field(default=0, init=False)
    in_accept: bool = attrs.field(default=False, init=False)


@final
class Datagram(metaclass=NoPublicConstructor):
    """One datagram that has arrived: its payload, its peer address and destination, and a way to reply.

    ``accept`` and a :func:`datagram_handler` are called with one, and :meth:`Endpoint.receive` returns one. The program
    may keep it, and reply to it while its endpoint is open. Addresses are decoded on access.

    Attributes:
      payload: The bytes; ``b""`` is a datagram like any other.
      ancillary: Control messages ``(level, type, data)`` that the socket was configured to receive, such as time
        stamps; see ``configure`` of :func:`open_endpoints`. Nearly always empty.
    """

    __slots__ = ("__weakref__", "_origin", "_replied", "_route", "ancillary", "payload")

    payload: bytes
    ancillary: Ancillary
    _route: Route
    _origin: Origin
    _replied: int  # bytes

    def __repr__(self) -> str:
        return f"<trio_udp.Datagram of {len(self.payload)} bytes from {self.peer_address!r} to {self.destination!r}>"

    @property
    def peer_address(self) -> Address:
        """The address that the datagram came from, as the ``socket`` module gives it."""
        return self._origin.outbox.engine.peer_address(self._route)

    @property
    def local_address(self) -> Address:
        """Our own address that a reply leaves from."""
        return self._origin.outbox.engine.local_address(self._route)

    @property
    def destination(self) -> Address:
        """The address that the datagram was sent to: our own, a group or a broadcast address."""
        return self._origin.outbox.engine.destination(self._route)

    @property
    def interface(self) -> int | None:
        """Index of the arrival interface, if the destination is link-local, a group or a broadcast address.

        A reply leaves on it. ``None`` for other destinations, where routing decides.
        """
        return self._origin.outbox.engine.interface(self._route)

    @property
    def credentials(self) -> Credentials | None:
        """The process that sent the datagram; ``None`` without ``credentials=True`` of :func:`open_unix_endpoint`."""
        return credentials_of(self._origin.outbox.engine, self._route)

    @property
    def endpoint(self) -> trio_udp.Endpoint:
        """The :class:`Endpoint` that received the datagram."""
        return self._origin.endpoint

    @property
    def server(self) -> trio_udp.Server | None:
        """The :class:`Server` that received the datagram; ``None`` if no server runs on the endpoint."""
        return self._origin.server

    async def reply(self, payload: Payload) -> None:
        """Send one datagram to the peer of this one, from :attr:`local_address`, after all datagrams sent before.

        Waits while the send buffer is full, first come first served. Network errors (unreachable, refused) are counted
        in the endpoint's statistics and not raised. ``Limits.amplification``, if set, limits all replies together to
        that many times the bytes of this datagram; a reply beyond the limit is not sent, but counted as
        ``sends_withheld``. A datagram from port 0 or the unspecified address cannot be answered: the reply is counted
        as a send error.

        Raises:
          OSError: ``EMSGSIZE``: longer than a UDP datagram can be.
          TypeError: Not a bytes-like object.
          trio.ClosedResourceError: The endpoint is closed.

        Cancellation:
          Always noticed; nothing is then sent. Other tasks run at least once in 64 replies.
        """
        copy = self._origin.outbox.copy(payload, self._route)
        await trio.lowlevel.checkpoint_if_cancelled()
        outbox = self._origin.outbox
        outbox.check_open()
        if self._may_send(copy):
            outgoing = (copy, self._route, outbox.own)
            try:
                if not outbox.send([outgoing]):
                    await outbox.wait_for_room(outgoing)
            except BaseException:
                self._replied -= len(copy)
                raise
        outbox.turn.sent += 1
        if outbox.turn.sent >= YIELD_EVERY:
            outbox.turn.sent = 0
            await trio.lowlevel.cancel_shielded_checkpoint()

    def reply_nowait(self, payload: Payload) -> None:
        """Like :meth:`reply`, without waiting.

        Raises:
          trio.WouldBlock: The send buffer is full, or other senders wait for it; nothing was sent.
          RuntimeError: Called by ``accept``: return the bytes instead.
        """
        if self._origin.in_accept:
            raise RuntimeError("accept must return its reply as bytes, not send it")
        outbox = self._origin.outbox
        copy = outbox.copy(payload, self._route)
        outbox.check_open()
        if self._may_send(copy) and not outbox.send([(copy, self._route, outbox.own)]):
            self._replied -= len(copy)
            raise trio.WouldBlock

    def _may_send(self, reply: bytes) -> bool:
        origin = self._origin
        if not is_answerable(self.peer_address):
            origin.outbox.count_unanswerable(origin.outbox.own)
            return False
        limit = origin.amplification
        if limit is not None and self._replied + len(reply) > limit * len(self.payload):
            origin.withheld += 1
            return False
        self._replied += len(reply)
        return True


def make_datagram(payload: bytes, route: Route, ancillary: Ancillary, origin: Origin) -> Datagram:
    """Make the public view of a received datagram."""
    # A datagram_handler gets one for every datagram. With an ``__init__``, making it takes 0.1 µs more.
    datagram = object.__new__(Datagram)
    datagram.payload = payload
    datagram.ancillary = ancillary
    datagram._route = route
    datagram._origin = origin
    datagram._replied = 0
    return datagram


def route_of(datagram: Datagram) -> Route:
    """Return the route behind a datagram; for the rest of this package."""
    return datagram._route
