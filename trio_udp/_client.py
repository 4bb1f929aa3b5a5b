"""The server's side of the conversation with one peer address: what a handler is called with."""

from __future__ import annotations

import types
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import attrs
import trio
from trio.lowlevel import current_task

from ._conversation import YIELD_EVERY, Conversation
from ._inbox import SLEEP, WOKEN, Inbox
from ._limits import check_seconds
from ._rate import NO_BUCKET, Bucket
from ._statistics import ClientStatistics

if TYPE_CHECKING:
    from ._clients import ClientTable
    from ._serve import Server


@attrs.define(eq=False, repr=False)
class Client(Conversation):
    """The conversation with one peer address: its datagrams in arrival order, and a way to answer.

    A client is one pair of peer address and local address on one endpoint. It begins with a stranger's first
    datagram and ends when its handler returns; the next datagram from that address then begins another.

    Attributes:
      server: The :class:`Server` it belongs to.
      ended: Why :meth:`receive` raises ``trio.EndOfChannel``: ``"idle"`` (silent for ``idle_timeout``),
        ``"evicted"`` (its place was needed) or ``"stopping"`` (the server drains); ``None`` while it does not.
        Sending works until the handler returns, so that it can say goodbye.
      validated: Whether :meth:`validate` has been called.
    """

    server: Server
    _table: ClientTable
    _inbox: Inbox
    _idle_timeout: float
    ended: Literal["idle", "evicted", "stopping"] | None = attrs.field(default=None, init=False)
    _abandoned: bool = attrs.field(default=False, init=False)  # closed because its endpoint or its server was
    _taken_in_a_row: int = attrs.field(default=0, init=False)  # since receive last let other tasks run
    _receiving: bool = attrs.field(default=False, init=False)
    _transactions: int = attrs.field(default=0, init=False)
    _requests_timed_out: int = attrs.field(default=0, init=False)
    _sends_withheld: int = attrs.field(default=0, init=False)
    validated: bool = attrs.field(default=False, init=False)
    _bucket: Bucket = attrs.field(default=NO_BUCKET, init=False)  # of its part of the network, or of its host
    _amplified: float = attrs.field(default=0.0, init=False)  # bytes sent before it was validated
    # For the table of clients: since when the handler has been waiting, and when to look whether that is too long.
    _waiting_since: float = attrs.field(default=0.0, init=False)
    _check: list[Any] | None = attrs.field(default=None, init=False)

    @property
    def idle_timeout(self) -> float:
        """Seconds of silence after which this client ends, while its handler waits; ``math.inf`` for never.

        Settable; the server's ``idle_timeout`` at first. Silence counts from the moment the handler began to wait
        in :meth:`receive`, so a busy handler is never ended by it, nor one that never waits for as long: each call
        of ``receive`` begins a new wait. It is noticed at most a quarter of the timeout late.
        """
        return self._idle_timeout

    @idle_timeout.setter
    def idle_timeout(self, seconds: float) -> None:
        self._idle_timeout = check_seconds("idle_timeout", seconds)
        self._table.timeout_changed(self)

    @property
    def _is_waiting(self) -> bool:
        """Whether the handler waits in :meth:`receive`, and nothing has arrived that will end its wait."""
        return self._inbox.is_awaited

    def statistics(self) -> ClientStatistics:
        """Counts of this conversation so far; also available once it is over."""
        inbox, sending = self._inbox, self._sending
        return ClientStatistics(
            received=inbox.received,
            bytes_received=inbox.bytes_received,
            delivered=inbox.delivered,
            waiting=len(inbox.payloads),
            dropped_inbox_full=inbox.dropped_inbox_full,
            dropped_at_end=inbox.dropped_at_end,
            sent=sending.sent,
            bytes_sent=sending.bytes_sent,
            send_errors=sending.send_errors,
            requests_timed_out=self._requests_timed_out,
            sends_withheld=self._sends_withheld,
            errors=sending.errors,
        )

    async def receive(self) -> bytes:
        """Wait for this client's next datagram and return its payload; ``b""`` is a datagram like any other.

        ``async for payload in client`` does the same until the channel ends.

        Raises:
          trio.EndOfChannel: The conversation is over for the reason in :attr:`ended`. A handler need not catch it.
          trio.ClosedResourceError: After :meth:`close`, or when the server or its endpoint is gone.
          trio.BusyResourceError: Another task is receiving from this client.

        Cancellation:
          Always noticed, and never loses a datagram. Other tasks run at least once in 64 datagrams taken.
        """
        inbox = self._inbox
        if inbox.payloads and self._taken_in_a_row < YIELD_EVERY and not self._receiving:
            if current_task()._cancel_status.effectively_cancelled:  # see Conversation.send
                await trio.lowlevel.checkpoint_if_cancelled()
        else:
            return await self._wait_for_datagram()
        self._taken_in_a_row += 1
        self._endpoint.sent_in_a_row = 0
        return inbox.take()

    async def __anext__(self) -> bytes:
        # The body of receive() again: awaiting that here would make an echo 4 % dearer.
        inbox = self._inbox
        if inbox.payloads and self._taken_in_a_row < YIELD_EVERY and not self._receiving:
            if current_task()._cancel_status.effectively_cancelled:  # see Conversation.send
                await trio.lowlevel.checkpoint_if_cancelled()
        else:
            try:
                return await self._wait_for_datagram()
            except trio.EndOfChannel:
                raise StopAsyncIteration from None
        self._taken_in_a_row += 1
        self._endpoint.sent_in_a_row = 0
        return inbox.take()

    def receive_nowait(self) -> bytes:
        """Like :meth:`receive`, without waiting.

        Raises:
          trio.WouldBlock: Nothing waits in the inbox, or another task is about to receive it.
        """
        if not self._inbox.payloads:
            if self._is_over():
                self._raise_over()
            raise trio.WouldBlock
        if self._receiving:
            raise trio.WouldBlock
        return self._inbox.take()

    def close(self) -> None:
        """End this conversation; what waits in the inbox is dropped and counted. Idempotent.

        (What has been handed to a :meth:`receive` that was waiting for it does not wait any more: that returns it.) The
        next datagram from this address begins a new conversation at once, even while this handler still tidies up.
        """
        if not self._closed:
            super().close()
            self._table.forget(self)
            self._inbox.drop_all()
            self._inbox.wake()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Say that the conversation is in the middle of something that wants to be finished.

        Inside ``with client.transaction():`` datagrams go on arriving while the server drains (for ``drain_timeout`` at
        most), and the client is not evicted to make room. The idle timeout still applies. May be nested.
        """
        self._transactions += 1
        self._table.transaction_changed(self)
        try:
            yield
        finally:
            self._transactions -= 1
            self._table.transaction_changed(self)

    def validate(self) -> None:
        """Say that the peer has shown that it gets what is sent to its address, as by sending back a token.

        From then on ``Limits.amplification`` does not apply to it, and ``Limits.rate_limit`` counts its host by itself
        (an address of IPv4, a /64 of IPv6), so that neither others in its part of the network nor whoever forges their
        addresses can use up its share.
        """
        if not self.validated:
            self.validated = True
            self._limited = False
            if self.server._limiter is not None:
                self._bucket = self.server._limiter.bucket_of_host(self.peer_address)

    @types.coroutine  # in which "yield from" is what "await" is in others
    def _wait_for_datagram(self) -> Generator[Any, Any, bytes]:
        """Let other tasks run, until there is a datagram; take it."""
        if self._receiving:
            raise trio.BusyResourceError("another task is already receiving from this client")
        inbox, table = self._inbox, self._table
        self._receiving = True
        self._taken_in_a_row = 1  # the one about to be taken; if this is cancelled it does no harm
        try:
            if inbox.payloads:
                yield from trio.lowlevel.checkpoint()  # noqa: ASYNC105
            while not inbox.payloads:
                if self._is_over():
                    yield from trio.lowlevel.checkpoint_if_cancelled()  # noqa: ASYNC105
                    self._raise_over()
                table.begins_to_wait(self)
                inbox.receiver = task = current_task()
                task.custom_sleep_data = inbox  # until Trio is to run it again, for whatever reason
                try:
                    # Here, not in a coroutine further down: 200 bytes less for each client that waits.
                    outcome = yield SLEEP
                finally:
                    inbox.receiver = None
                    table.waits_no_more(self)
                if type(outcome) is bytes:
                    self._endpoint.sent_in_a_row = 0
                    return outcome
                if outcome is not WOKEN:
                    outcome.unwrap()
            self._endpoint.sent_in_a_row = 0
            return inbox.take()
        finally:
            self._receiving = False

    def _is_over(self) -> bool:
        """Whether there is nothing to wait for, now that the inbox is empty."""
        if self.ended is None and not self._transactions and self._table.stopping.is_set():
            self.ended = "stopping"
        return self._closed or self.ended is not None

    def _raise_over(self) -> NoReturn:
        self._check_open()
        raise trio.EndOfChannel

    def _take_over_from(self, predecessor: Client) -> None:
        """Go on with what a client of the same peer has left behind."""
        predecessor._inbox.hand_over(self._inbox)
        self._taken_in_a_row = predecessor._taken_in_a_row
        self._bucket = predecessor._bucket
        self.validated = predecessor.validated
        if self._limited:
            self._limited = not self.validated
            # What it has sent on the strength of datagrams that it leaves behind.
            self._amplified = max(0.0, predecessor._amplified - predecessor._allowed())

    def _allowed(self) -> float:
        """Bytes that may be sent before the client is validated, for what has been received from it."""
        assert self._table.limits.amplification is not None
        return self._table.limits.amplification * self._inbox.bytes_received

    def _reserve(self, size: int) -> bool:
        if self._amplified + size > self._allowed():
            self._sends_withheld += 1
            self.server._sends_withheld += 1
            return False
        self._amplified += size
        return True

    def _give_back(self, size: int) -> None:
        self._amplified -= size

    def _request_timed_out(self) -> None:
        self._requests_timed_out += 1
        self.server._requests_timed_out += 1

    def _end(self, reason: Literal["idle", "evicted"]) -> None:
        """End the channel of a client whose handler waits, and let it go on."""
        self.ended = reason
        self._table.forget(self)
        self._inbox.wake()
