"""What both ends of a conversation share: two addresses, and sending from one to the other."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

import attrs
import trio
from trio.lowlevel import current_task

from ._endpoints import MAX_PAYLOAD_IPV4, Address, Endpoint, Route
from ._statistics import SendTally

if TYPE_CHECKING:
    from typing_extensions import Buffer

    Payload: TypeAlias = Buffer
else:
    Payload = bytes | bytearray | memoryview  # for readers of annotations; any bytes-like object will do

# Sending and receiving need not let other tasks run each time: that costs more than the datagram itself. But a task
# that only sends, or only takes what already waits, must not keep the others from running. Once in so many calls they
# may.
YIELD_EVERY = 64


@attrs.define(eq=False, repr=False)
class Conversation(trio.abc.Channel[bytes]):
    """One peer address and one local address on one endpoint; the base of ``Client`` and ``Connection``."""

    _endpoint: Endpoint
    _route: Route
    _sending: SendTally = attrs.field(factory=SendTally, init=False)
    _closed: bool = attrs.field(default=False, init=False)
    # Whether something limits what may be sent to the peer; see Client._reserve.
    _limited: bool = attrs.field(default=False, init=False)
    # Cancelled to tell senders that wait for room in the send buffer that the conversation is over.
    _blocked_sends: set[trio.CancelScope] | None = attrs.field(default=None, init=False)

    def __repr__(self) -> str:
        state = " closed" if self._closed else ""
        return f"<trio_udp.{type(self).__name__} {self.local_address} with {self.peer_address}{state}>"

    @property
    def peer_address(self) -> Address:
        """The other end's address, as the ``socket`` module gives it."""
        return self._endpoint.peer_address_of(self._route)

    @property
    def local_address(self) -> Address:
        """Our own address in this conversation: where the peer sends to, and where it sees our datagrams come from."""
        return self._endpoint.local_address_of(self._route)

    async def send(self, value: Payload) -> None:
        """Send one datagram to the peer, after those sent before it.

        Waits while the kernel's send buffer is full, first come first served. What the network answers (unreachable,
        refused, filtered) is counted in :meth:`statistics` and not raised: UDP promises no delivery.

        Args:
          value: The payload: any bytes-like object, copied now. ``b""`` is a datagram like any other. (It is called
            what ``trio.abc.SendChannel`` calls it.)

        Raises:
          OSError: ``EMSGSIZE``: longer than a UDP datagram can be (65,507 bytes over IPv4, 65,527 over IPv6).
          TypeError: Not a bytes-like object.
          trio.ClosedResourceError: After :meth:`close`, or when the endpoint or the client's server or handler is gone.

        Cancellation:
          Always noticed, and then the datagram is not sent. Other tasks run at least once in 64 sends that no
          ``receive`` came between, and whenever the send buffer is full.
        """
        endpoint, route = self._endpoint, self._route
        if type(value) is bytes and len(value) <= MAX_PAYLOAD_IPV4:
            payload = value  # nearly always: spare the call
        else:
            payload = as_payload(value, endpoint, route)
        # checkpoint_if_cancelled() looks at this too, but as a coroutine: 0.13 µs more, twice in an echo of 4 µs. Trio
        # has no public name for it; if that changes, every test will tell.
        if current_task()._cancel_status.effectively_cancelled:
            await trio.lowlevel.checkpoint_if_cancelled()
        if self._closed:
            self._check_open()
        if not self._limited or self._reserve(len(payload)):
            try:
                endpoint.send_nowait(payload, route, self._sending)
            except trio.WouldBlock:
                try:
                    await self._send_when_there_is_room(payload)
                except BaseException:
                    self._give_back(len(payload))
                    raise
        # A datagram that is withheld counts too: a handler that never waits must not keep others from running.
        endpoint.sent_in_a_row += 1
        if endpoint.sent_in_a_row >= YIELD_EVERY:
            # Only now, and not to be cancelled: what is called first is sent first, and what was sent has not failed.
            endpoint.sent_in_a_row = 0
            await trio.lowlevel.cancel_shielded_checkpoint()

    def send_nowait(self, payload: Payload) -> None:
        """Like :meth:`send`, without waiting.

        Raises:
          trio.WouldBlock: The send buffer is full, or others are waiting for it; nothing was sent.
        """
        self._check_open()
        endpoint, route = self._endpoint, self._route
        copy = as_payload(payload, endpoint, route)
        if self._limited and not self._reserve(len(copy)):
            return
        try:
            endpoint.send_nowait(copy, route, self._sending)
        except BaseException:
            self._give_back(len(copy))
            raise

    async def send_many(self, payloads: Iterable[Payload]) -> None:
        """Send many datagrams, in order.

        Cheaper than to send them one by one, most of all if they have one size. Everything is checked and copied before
        the first is sent: what :meth:`send` would raise for one of them means that none is sent. Waiting, cancellation
        and the turns of other tasks are as for ``send``, though cancellation is noticed once in 64 datagrams, and those
        before it have been sent. What another task sends meanwhile may come in between.
        """
        endpoint, route = self._endpoint, self._route
        copies = [
            # The same condition as in send(), for the same reason.
            payload
            if type(payload) is bytes and len(payload) <= MAX_PAYLOAD_IPV4
            else as_payload(payload, endpoint, route)
            for payload in payloads
        ]
        if self._limited:
            endpoint.sent_in_a_row += len(copies)
            copies = [payload for payload in copies if self._reserve(len(payload))]
            endpoint.sent_in_a_row -= len(copies)  # they are counted when they are sent
        position = 0
        try:
            while True:
                await trio.lowlevel.checkpoint_if_cancelled()
                self._check_open()
                some = copies[position : position + max(0, YIELD_EVERY - endpoint.sent_in_a_row)]
                sent = endpoint.send_many_nowait(some, route, self._sending)
                position += sent
                endpoint.sent_in_a_row += sent
                if sent < len(some):
                    await self._send_when_there_is_room(some[sent])
                    position += 1
                    endpoint.sent_in_a_row += 1
                if endpoint.sent_in_a_row >= YIELD_EVERY:
                    endpoint.sent_in_a_row = 0
                    await trio.lowlevel.cancel_shielded_checkpoint()
                if position == len(copies):
                    return
        finally:
            self._give_back(sum(map(len, copies[position:])))

    async def aclose(self) -> None:
        """Like :meth:`close`, and a checkpoint."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """End the conversation. Idempotent."""
        self._closed = True
        for scope in self._blocked_sends or ():
            scope.cancel()

    def _reserve(self, size: int) -> bool:
        """Whether so many bytes may be sent now; they count as sent then, unless they are given back."""
        return True

    def _give_back(self, size: int) -> None:
        """Bytes that were reserved have not been sent after all."""

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this conversation is over")

    async def _send_when_there_is_room(self, payload: bytes) -> None:
        if self._blocked_sends is None:
            self._blocked_sends = set()
        with trio.CancelScope() as scope:
            self._blocked_sends.add(scope)
            try:
                return await self._endpoint.send(payload, self._route, self._sending)
            finally:
                self._blocked_sends.discard(scope)
        self._check_open()


def as_payload(payload: Payload, endpoint: Endpoint, route: Route) -> bytes:
    """Return a payload as bytes of our own, if one datagram on a route can carry it."""
    if type(payload) is not bytes:
        # By way of memoryview, because bytes(5) and bytes([1, 2]) work too, and mean something else.
        payload = bytes(memoryview(payload))
    # Every route carries as much as IPv4 does; to ask for its own limit costs more than all the rest.
    if len(payload) > MAX_PAYLOAD_IPV4 and len(payload) > endpoint.max_payload(route):
        raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    return payload
