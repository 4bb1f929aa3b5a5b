"""The sending half of a conversation, which ``Client`` and ``Connection`` share: one record, and the face users see."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import attrs
import trio

from ._construction import NoPublicConstructor
from ._endpoints import MAX_PAYLOAD_IPV4, MOST_HELD, YIELD_EVERY, Address, Outbox, Outgoing, Payload, Route
from ._lifecycle import CLOSED, LOST, OPEN, End
from ._statistics import Sender
from ._trio import will_be_cancelled


@attrs.define(eq=False)
class ChannelState(Sender):
    """The state that Client and Connection share.

    Attributes:
      route: Peer address and local address, in the engine's form.
      end: Why the conversation is over, or ``OPEN``.
      limited: Sending must call :meth:`reserve` first.
    """

    outbox: Outbox
    route: Route
    end: End = attrs.field(default=OPEN, init=False)
    limited: bool = attrs.field(default=False, init=False)
    # One for each sender that waits for room in the send buffer; cancelled when the conversation is over.
    _blocked_sends: set[trio.CancelScope] | None = attrs.field(default=None, init=False)

    @property
    def is_closed(self) -> bool:
        """Whether sending and receiving raise ``trio.ClosedResourceError``."""
        return self.end is CLOSED or self.end is LOST

    def finish(self, end: End) -> None:
        """End the conversation."""
        self.end = end
        if self._blocked_sends and self.is_closed:
            for scope in self._blocked_sends:
                scope.cancel()

    def check_open(self) -> None:
        if self.is_closed:
            error = trio.ClosedResourceError("this conversation is over")
            error.raised_by = self  # type: ignore[attr-defined]  # for was_raised_by()
            try:
                raise error
            finally:
                del error  # its traceback refers to this frame: avoid a reference cycle

    def reserve(self, size: int) -> bool:
        """Reserve bytes under the amplification limit; False if they may not be sent."""
        return True

    def give_back(self, size: int) -> None:
        """Release reserved bytes that were not sent."""

    def push(self, outgoing: list[Outgoing]) -> int:
        """Send as many datagrams as there is room for; return their number."""
        return self.outbox.send(outgoing)

    def push_row(self, payloads: list[bytes], sizes: list[int]) -> int:
        """Like :meth:`push`, for datagrams to the peer."""
        return self.outbox.send_row(payloads, sizes, self.route, self)

    async def push_when_there_is_room(self, outgoing: Outgoing) -> None:
        if self._blocked_sends is None:
            self._blocked_sends = set()
        with trio.CancelScope() as scope:
            self._blocked_sends.add(scope)
            try:
                return await self._wait_for_room(outgoing)
            finally:
                self._blocked_sends.discard(scope)
        self.check_open()

    async def _wait_for_room(self, outgoing: Outgoing) -> None:
        await self.outbox.wait_for_room(outgoing)


def was_raised_by(error: trio.ClosedResourceError, state: ChannelState) -> bool:
    """Whether this conversation raised the error, and not another channel that the handler uses."""
    return getattr(error, "raised_by", None) is state


class DatagramChannel(trio.abc.Channel[bytes], metaclass=NoPublicConstructor):
    """The base of :class:`Client` and :class:`Connection`: everything but receiving."""

    __slots__ = ("__weakref__", "_state")

    _state: ChannelState

    def __init__(self, state: ChannelState) -> None:
        self._state = state

    def __repr__(self) -> str:
        closed = " closed" if self._state.is_closed else ""
        return f"<trio_udp.{type(self).__name__} {self.local_address!r} with {self.peer_address!r}{closed}>"

    @property
    def peer_address(self) -> Address:
        """The other end's address, as the ``socket`` module gives it."""
        return self._state.outbox.engine.peer_address(self._state.route)

    @property
    def local_address(self) -> Address:
        """Our own address in this conversation, which our datagrams leave from."""
        return self._state.outbox.engine.local_address(self._state.route)

    async def send(self, value: Payload) -> None:
        """Send one datagram to the peer, after all datagrams sent before.

        Waits while the kernel's send buffer is full, first come first served. A client's network errors (unreachable,
        refused, filtered) are counted in :meth:`statistics` and not raised: UDP promises no delivery, and an
        unreachable client is not the handler's error. A connection has only one peer, so there they are raised.

        Args:
          value: The payload: any bytes-like object, copied at the call. ``b""`` is a datagram like any other. (The
            argument's name comes from ``trio.abc.SendChannel``.)

        Raises:
          OSError: ``EMSGSIZE``: longer than a UDP datagram can be (65,507 bytes over IPv4, 65,527 over IPv6). On a
            connection also the kernel's own: no route, no permission. ``ConnectionRefusedError`` says that an earlier
            datagram was refused; then this one has not been sent, and the connection stays usable.
          TypeError: Not a bytes-like object.
          trio.ClosedResourceError: After :meth:`close`, or once the endpoint is closed or the client's server or
            handler has ended.

        Cancellation:
          Always noticed; the datagram is then not sent. Not every call is a full checkpoint: other tasks run at least
          once in 64 sends with no ``receive`` between them, and whenever the send buffer is full.
        """
        state = self._state
        outbox = state.outbox
        if type(value) is bytes and len(value) <= MAX_PAYLOAD_IPV4:
            payload = value  # the usual case: avoid a call
        else:
            payload = outbox.copy(value, state.route)
        turn = outbox.turn
        if turn.context["task"]._cancel_status.effectively_cancelled:  # will_be_cancelled(), inlined
            await trio.lowlevel.checkpoint_if_cancelled()
        if state.end is not OPEN:
            state.check_open()
        if not state.limited or state.reserve(len(payload)):
            outgoing = (payload, state.route, state)
            if outbox.held and len(outbox.queue) < MOST_HELD:
                outbox.queue.append(outgoing)  # the usual case of push(): avoid a call
            else:
                try:
                    if not state.push([outgoing]):
                        await state.push_when_there_is_room(outgoing)
                except BaseException:
                    state.give_back(len(payload))
                    raise
        # Withheld datagrams count too: a handler that never waits must not keep other tasks from running.
        turn.sent += 1
        if turn.sent >= YIELD_EVERY:
            # After sending, so that calls send in order; and shielded, so that a call that has sent cannot raise
            # Cancelled.
            turn.sent = 0
            await trio.lowlevel.cancel_shielded_checkpoint()

    def send_nowait(self, payload: Payload) -> None:
        """Like :meth:`send`, without waiting.

        Raises:
          trio.WouldBlock: The send buffer is full, or other senders wait for it; nothing was sent.
        """
        state = self._state
        state.check_open()
        copy = state.outbox.copy(payload, state.route)
        if state.limited and not state.reserve(len(copy)):
            return
        try:
            if not state.push([(copy, state.route, state)]):
                raise trio.WouldBlock
        except BaseException:
            state.give_back(len(copy))
            raise

    async def send_many(self, payloads: Iterable[Payload]) -> None:
        """Send many datagrams, in order.

        This is cheaper than sending them one by one, above all if they have the same size. Every payload is checked and
        copied before the first is sent: if :meth:`send` would raise ``TypeError`` or ``EMSGSIZE`` for one, none is
        sent. Waiting and other errors are as for ``send``. Datagrams that other tasks send meanwhile may come between.

        Cancellation:
          Noticed before the first datagram and at least once in 64; the datagrams before it have been sent. Other tasks
          run at least once in 64 datagrams, but not after the last one, unless the send buffer is full.
        """
        state, outbox = self._state, self._state.outbox
        turn, route = outbox.turn, state.route
        copies, sizes = outbox.copy_row(payloads, route)
        if state.limited:
            turn.sent += len(copies)
            copies = [payload for payload in copies if state.reserve(len(payload))]
            turn.sent -= len(copies)  # these are counted when they are sent
            sizes = list(map(len, copies))
        if not copies:
            turn.sent += 1  # so that a loop that has nothing to send lets other tasks run
        position = 0
        try:
            while True:
                if turn.sent >= YIELD_EVERY:
                    # Before sending, not after the last datagram: a handler that receives next needs no checkpoint. It
                    # would make a burst of 64 cost a tenth more.
                    turn.sent = 0
                    await trio.lowlevel.checkpoint()
                    turn.sent = 0  # tasks that sent 64 meanwhile have not used up this task's turn
                elif will_be_cancelled(turn.context["task"]):
                    await trio.lowlevel.checkpoint_if_cancelled()
                if state.end is not OPEN:
                    state.check_open()
                end = position + YIELD_EVERY - turn.sent
                some = copies[position:end]
                sent = state.push_row(some, sizes[position:end]) if some else 0
                position += sent
                turn.sent += sent
                if sent < len(some):
                    await state.push_when_there_is_room((some[sent], route, state))
                    position += 1
                    turn.sent += 1
                if position == len(copies):
                    return
        except BaseException:
            state.give_back(sum(sizes[position:]))
            raise

    @abstractmethod
    def close(self) -> None:
        """End the conversation. Idempotent."""

    async def aclose(self) -> None:
        """Like :meth:`close`, and a checkpoint."""
        self.close()
        await trio.lowlevel.checkpoint()
