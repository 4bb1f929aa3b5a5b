"""Client: the server's side of a conversation with one peer address."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, final

import trio

from ._channel import DatagramChannel
from ._endpoints import BATCH, Address, Credentials, Endpoint, credentials_of
from ._lifecycle import CLOSED, EVICTED, IDLE, STOPPING, End
from ._limits import check_seconds
from ._seats import Seat
from ._statistics import ClientStatistics

if TYPE_CHECKING:
    import trio_udp

REASONS: dict[End, Literal["idle", "evicted", "stopping"]] = {
    IDLE: "idle",
    EVICTED: "evicted",
    STOPPING: "stopping",
}


@final
class Client(DatagramChannel):
    """The conversation with one peer address: its datagrams in arrival order, and a way to answer.

    ``receive`` and ``send`` always notice cancellation, but they are not full checkpoints: they let other tasks run at
    least once in 64 datagrams, not each time.

    A client is one pair of peer address and local address on one endpoint. A peer that writes to a group or a broadcast
    address is a client of its own there. A client begins with a stranger's first datagram and ends when its handler
    returns; the next datagram from that address then begins another. (:meth:`Server.connect` makes a client that the
    caller owns and closes.)
    """

    __slots__ = ()

    _state: Seat

    @property
    def server(self) -> trio_udp.Server:
        """The :class:`Server` that the client belongs to."""
        server: trio_udp.Server | None = self._state.place.server
        assert server is not None
        return server

    @property
    def endpoint(self) -> Endpoint:
        """The :class:`Endpoint` that the client's datagrams arrive on."""
        return self._state.place.endpoint

    @property
    def destination(self) -> Address:
        """The address that the client's datagrams were sent to: our own, a group or a broadcast address."""
        return self._state.outbox.engine.destination(self._state.route)

    @property
    def interface(self) -> int | None:
        """Index of the arrival interface, if the destination is link-local, a group or a broadcast address.

        Replies leave on it. ``None`` for other destinations, where routing decides.
        """
        return self._state.outbox.engine.interface(self._state.route)

    @property
    def credentials(self) -> Credentials | None:
        """The process that sends the datagrams; ``None`` without ``credentials=True`` of :func:`open_unix_endpoint`.

        It stays the same: another process that sends from this name is another client.
        """
        return credentials_of(self._state.outbox.engine, self._state.route)

    @property
    def ended(self) -> Literal["idle", "evicted", "stopping"] | None:
        """Why :meth:`receive` raises ``trio.EndOfChannel``; ``None`` while it does not.

        ``"idle"``: silent for ``idle_timeout``. ``"evicted"``: its place was needed. ``"stopping"``: the server drains.
        Sending works until the handler returns, so that it can say goodbye.
        """
        return REASONS.get(self._state.end)

    @property
    def validated(self) -> bool:
        """Whether :meth:`validate` has been called."""
        return self._state.validated

    @property
    def idle_timeout(self) -> float:
        """Seconds of silence after which this client ends, while its handler waits; ``math.inf`` for never.

        Settable; the server's ``idle_timeout`` at first. Silence begins when the handler first waits in :meth:`receive`
        after the last datagram it took. Cancelling a wait and beginning another does not restart it, so a handler that
        polls and pings notices a dead peer. It never interrupts a handler at work. The client ends at most a quarter of
        the timeout late. Setting it to anything but a number greater than 0 raises ``TypeError`` or ``ValueError``.
        """
        return self._state.idle_timeout

    @idle_timeout.setter
    def idle_timeout(self, seconds: float) -> None:
        self._state.set_idle_timeout(check_seconds("idle_timeout", seconds))

    def statistics(self) -> ClientStatistics:
        """Return the counts of this conversation so far, also after it is over."""
        seat = self._state
        return ClientStatistics(
            received=seat.received,
            bytes_received=seat.bytes_received,
            delivered=seat.delivered,
            waiting=len(seat.payloads),
            dropped_inbox_full=seat.dropped_inbox_full,
            dropped_at_end=seat.dropped_at_end,
            sent=seat.sent,
            bytes_sent=seat.bytes_sent,
            send_errors=seat.send_errors,
            requests_timed_out=seat.requests_timed_out,
            sends_withheld=seat.sends_withheld,
            errors=seat.errors,
        )

    async def receive(self) -> bytes:
        """Wait for this client's next datagram and return its payload; ``b""`` is a datagram like any other.

        ``async for payload in client`` does the same until the channel ends.

        Raises:
          trio.EndOfChannel: The conversation is over for the reason in :attr:`ended`. A handler need not catch it.
          trio.ClosedResourceError: After :meth:`close`, or once the server has ended or its endpoint is closed.
          trio.BusyResourceError: Another task is receiving from this client.

        Cancellation:
          Always noticed, and never loses a datagram. Not every call is a full checkpoint: other tasks run at least once
          in 64 datagrams taken.
        """
        return await self._state.__anext__(trio.EndOfChannel)

    # Iterate over the inbox itself: a call in between would cost time for every datagram. Type checkers see the types
    # of trio.abc.ReceiveChannel: each item is bytes.
    if not TYPE_CHECKING:

        def __aiter__(self):
            return self._state

        def __anext__(self):
            return self._state.__anext__()

    def receive_nowait(self) -> bytes:
        """Like :meth:`receive`, without waiting.

        Raises:
          trio.WouldBlock: Nothing waits in the inbox, or another task is about to receive it.
        """
        return self._state.receive_nowait()

    async def receive_many(self) -> list[bytes]:
        """Wait for a datagram, and return the payloads of all that wait by then: at least one, at most 64, in order.

        The counterpart of :meth:`send_many`. Errors and cancellation are as for :meth:`receive`.
        """
        first = await self._state.__anext__(trio.EndOfChannel)
        return [first, *self._state.take_many(BATCH - 1)]

    def close(self) -> None:
        """End this conversation; datagrams that wait in the inbox are dropped and counted. Idempotent.

        A :meth:`receive` that already has its datagram still returns it. The next datagram from this address begins a
        new conversation at once, even while this handler still cleans up.
        """
        if not self._state.is_closed:
            self._state.finish(CLOSED)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Protect this conversation from eviction and drain until the block ends.

        Inside ``with client.transaction():`` datagrams keep arriving while the server drains, for ``drain_timeout`` at
        most, and the client is not evicted to make room. (On a shared endpoint none arrive: it is no longer read.) The
        idle timeout still applies. Blocks may be nested. :attr:`Server.stopping` and :meth:`Server.wait_stopping` tell
        a handler inside one that the server stops.
        """
        self._state.enter_transaction()
        try:
            yield
        finally:
            self._state.leave_transaction()

    def validate(self) -> None:
        """Mark the peer's address as verified, for example after it echoed a token.

        From then on the client is not evicted, ``Limits.amplification`` does not apply to it, and ``Limits.rate_limit``
        counts its host (an IPv4 address or an IPv6 /64) by itself: strangers in its network, and forged addresses,
        cannot use up its share.
        """
        self._state.validate()


def make_client(seat: Seat) -> Client:
    """Make the public face of a seat."""
    client = object.__new__(Client)  # create() would cost 1 % of a new client
    client._state = seat
    return client


def seat_of(client: Client) -> Seat:
    """Return the seat of a client, or of the client under a layer; for the rest of this package."""
    try:
        return client._state
    except AttributeError:
        return seat_of(client.transport_channel)  # type: ignore[attr-defined]
