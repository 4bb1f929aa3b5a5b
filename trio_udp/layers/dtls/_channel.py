"""DTLSChannel: an association over a channel. It does all the waiting: for datagrams, for room to send, for time."""

from __future__ import annotations

import errno
import os
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NoReturn, final

import trio
from OpenSSL import SSL

import trio_udp

from ..._handlers import show_as
from ..._limits import check_seconds
from ._association import BROKEN, CLOSED, ENDED, ESTABLISHED, HANDSHAKE, MAX_PAYLOAD
from ._ends import MTU, Session, client_end, host_of, server_end
from ._over_client import OverClient

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

# The longest wait for an answer in a handshake, in seconds (RFC 6347 section 4.2.4.1). Each wait is twice the one
# before.
LONGEST_WAIT = 60.0

# The most payloads that receive_many() returns, as for a trio_udp.Client.
MANY = 64


@final
class DTLSChannel(OverClient):
    """DTLS 1.2 over any ``trio.abc.Channel[bytes]`` that carries datagrams; each payload is one record.

    :func:`secure` makes one for each client, and :func:`connect` makes one. Made directly, it runs over a
    :class:`trio_udp.Client`, a :class:`trio_udp.Connection`, a connection of the simulated network, or your own
    channel, as ``trio.SSLStream`` runs over any stream::

        connection = await simulated_network.connect("192.0.2.53", 5684)
        channel = DTLSChannel(connection, context, server_hostname="example.org")
        await channel.do_handshake()

    The names of a ``Client`` mean the same here, as far as the channel below has them. ``statistics()`` counts the
    datagrams of that channel, including those of the handshake.

    Payloads may still be lost or arrive out of order. DTLS drops duplicate and forged datagrams, and retransmits only
    the handshake.

    Args:
      transport_channel: The channel below. It belongs to this channel, which closes it.
      context: From ``OpenSSL.SSL.Context(SSL.DTLS_METHOD)``. This package sets it up for DTLS 1.2 at its first use, so
        it must not have been used elsewhere before. A server's context has a certificate and its key.
      server_side: Be the server.
      server_hostname: For clients: verify that the server's certificate is trusted and is for this name or address.
        ``None`` leaves verification to the context; by pyOpenSSL's default there is none.
      mtu: The most bytes of a datagram in the handshake. Payloads are not split: a longer one travels in IP fragments,
        if the network allows that.
      session: For clients: resume this session if the server agrees. A session with a ticket that makes the first
        flight longer than a datagram is not used, because no server could answer.

    Raises:
      TypeError, ValueError: An argument is invalid, or the context can no longer be changed.
    """

    __slots__ = ("_association", "_lock", "_receiving", "_taken")

    def __init__(
        self,
        transport_channel: trio.abc.Channel[bytes],
        context: SSL.Context,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        mtu: int = MTU,
        session: Session | None = None,
    ) -> None:
        address = getattr(transport_channel, "peer_address", None)
        if not server_side:
            self._association = client_end(context, mtu, address, server_hostname, session)
        elif server_hostname is None and session is None:
            self._association = server_end(context, mtu, address)
        else:
            raise ValueError("server_hostname and session are for clients")
        super().__init__(transport_channel)
        if isinstance(transport_channel, trio_udp.Client):  # or a program could send in the clear by mistake
            show_as(transport_channel, self)  # type: ignore[arg-type]
        self._lock: trio.Lock | None = trio.Lock()  # until the handshake is over
        self._taken = 0
        self._receiving = 0  # number of tasks; all but one of them are about to fail

    def __repr__(self) -> str:
        return f"<trio_udp.dtls.DTLSChannel {self._association.stage.name.lower()} over {self._transport!r}>"

    async def do_handshake(self, *, retransmit_timeout: float = 1.0) -> None:
        """Complete the handshake with the peer; a checkpoint if it is done. ``send`` and ``receive`` call it if needed.

        Flights that the network loses are sent again without limit, so use ``trio.fail_after``.

        Args:
          retransmit_timeout: Seconds to wait for an answer before a flight is sent again. The wait doubles each time,
            up to a minute.

        Raises:
          trio.BrokenResourceError: The handshake failed; the message says why. It cannot be tried again.
          OSError: An error of the channel below, such as ``ConnectionRefusedError``: the peer's port is closed.
          trio.ClosedResourceError: After :meth:`close`.

        Cancellation:
          Always noticed. A cancelled handshake continues when this is called again.
        """
        first_wait = check_seconds("retransmit_timeout", retransmit_timeout)
        lock = self._lock
        if lock is not None:
            async with lock:
                if self._association.stage is HANDSHAKE:
                    await self._run_handshake(first_wait)
                    self._lock = None
        else:
            await trio.lowlevel.checkpoint()
        association = self._association
        if association.stage is BROKEN:
            raise trio.BrokenResourceError(f"the DTLS handshake failed: {association.reason}")
        if association.stage is CLOSED:
            await self._raise_closed()

    async def _run_handshake(self, first_wait: float) -> None:
        association = self._association
        await self._send_all(association.begin())
        wait, flights, began = first_wait, association.flights, trio.current_time()
        while association.stage is HANDSHAKE:
            datagram = None
            with trio.move_on_at(began + wait):
                try:
                    datagram = await self._transport.receive()
                except trio.EndOfChannel:
                    association.fail("the conversation ended")
                    return
            if datagram is not None:
                answer = self._take(datagram)
                if association.ssl is not None and hasattr(self._transport, "validate"):
                    self._transport.validate()  # the cookie has proved the address
            else:
                answer = association.repeat()
                wait, began = min(2 * wait, LONGEST_WAIT), trio.current_time()
            await self._send_all(answer)
            if association.flights != flights:  # progress; junk makes none, and must not delay the next repetition
                wait, flights, began = first_wait, association.flights, trio.current_time()

    async def receive(self) -> bytes:
        """Wait for the peer's next payload and return it; never empty.

        Raises:
          trio.EndOfChannel: The peer has closed the association or begun a new one, or the channel below has ended;
            :attr:`ended` says which. At a server also if an error of the peer broke the association.
          trio.BrokenResourceError: At a client: an error broke the association, or the handshake failed.
          trio.ClosedResourceError: After :meth:`close`.
          trio.BusyResourceError: Another task is receiving.

        Cancellation:
          As for the channel below. With a ``Client`` it is always noticed, and never loses a datagram.
        """
        return await self._next(trio.EndOfChannel)

    def __anext__(self) -> Coroutine[Any, Any, bytes]:
        return self._next(StopAsyncIteration)  # without receive(), which takes 230 bytes for each client that waits

    async def _next(self, over: type[Exception]) -> bytes:
        """Wait for the next payload and take it; raise ``over`` once the channel has ended."""
        association = self._association
        payloads = association.payloads
        if payloads:
            await trio.lowlevel.checkpoint()
        while not payloads:
            if association.stage is HANDSHAKE:
                await self.do_handshake()
            elif association.stage is ENDED or association.stage is BROKEN:
                await trio.lowlevel.checkpoint()
                self._raise_if_broken()
                raise over
            else:
                self._receiving += 1
                try:
                    datagram = await self._transport.receive()  # raises the right error once it is closed
                except trio.EndOfChannel:
                    raise over from None
                finally:
                    self._receiving -= 1
                answer = self._take(datagram)
                if answer:
                    await self._send_all(answer)
        self._taken += 1
        return payloads.pop(0)

    def receive_nowait(self) -> bytes:
        """Like :meth:`receive`, without waiting.

        Raises:
          trio.WouldBlock: No payload has arrived, or the handshake is not done.
        """
        association = self._association
        if association.stage is HANDSHAKE:
            raise trio.WouldBlock
        while not association.payloads:
            if association.stage is ENDED or association.stage is BROKEN:
                self._raise_if_broken()
                raise trio.EndOfChannel
            self._send_all_nowait(self._take(self._transport.receive_nowait()))
        self._taken += 1
        return association.payloads.pop(0)

    async def receive_many(self) -> list[bytes]:
        """Wait for a payload, and return all that have arrived by then: at least one, at most 64, in order.

        Errors and cancellation are as for :meth:`receive`.
        """
        many = [await self.receive()]
        with suppress(trio.WouldBlock, trio.EndOfChannel, trio.BrokenResourceError, trio.ClosedResourceError):
            while len(many) < MANY:
                many.append(self.receive_nowait())
        return many

    async def send(self, value: trio_udp.Payload) -> None:
        """Send one payload to the peer, after all payloads sent before.

        A server's payload to a client that has closed or broken the association is dropped, as over plain UDP: no peer
        is left to receive it.

        Args:
          value: Any bytes-like object of 1 to 16,384 bytes, copied at the call. DTLS has no empty payloads.

        Raises:
          TypeError: Not a bytes-like object.
          ValueError: The payload is empty.
          OSError: ``EMSGSIZE``: it is longer than a record can be. Otherwise an error of the channel below.
          trio.BrokenResourceError: At a client: the server has closed the association, or an error broke it.
          trio.ClosedResourceError: After :meth:`close`.

        Cancellation:
          As for the channel below. With a ``Client`` it is always noticed, and the payload is then not sent.
        """
        payload = _payload(value)
        association = self._association
        if not association.confirmed:
            await self._prepare_to_send()
        datagram = association.protect(payload)
        if datagram:
            await self._transport.send(datagram)
        else:
            await self._send_nothing()

    def send_nowait(self, payload: trio_udp.Payload) -> None:
        """Like :meth:`send`, without waiting.

        Raises:
          trio.WouldBlock: The send buffer is full, or the handshake is not done; nothing was sent.
        """
        copy = _payload(payload)
        association = self._association
        if association.stage is HANDSHAKE:
            raise trio.WouldBlock
        datagram = association.protect(copy)
        if datagram or association.stage is CLOSED:
            self._transport.send_nowait(datagram)  # raises the right error once it is closed
        else:
            self._raise_if_broken(or_ended=True)

    async def send_many(self, payloads: Iterable[trio_udp.Payload]) -> None:
        """Send many payloads, in order. If :meth:`send` would refuse one, none is sent.

        Other errors and cancellation are as for ``send_many`` of the channel below.
        """
        copies = [_payload(payload) for payload in payloads]
        association = self._association
        if not association.confirmed:
            await self._prepare_to_send()
        datagrams = [association.protect(copy) for copy in copies]
        if all(datagrams):
            await self._transport.send_many(datagrams)
        else:
            await self._send_nothing()

    def close(self) -> None:
        """Tell the peer, if there is room to send, and close the association and the channel below. Idempotent."""
        self._send_all_nowait(self._association.close())
        self._transport.close()

    async def aclose(self) -> None:
        """Like :meth:`close`, and a checkpoint. If the channel below has no ``send_nowait``, wait for its ``send``."""
        goodbye = self._association.close()
        try:
            if hasattr(self._transport, "send_nowait"):
                self._send_all_nowait(goodbye)
            else:
                with suppress(trio.ClosedResourceError):
                    await self._send_all(goodbye)
        finally:
            await self._transport.aclose()

    @property
    def ssl_connection(self) -> SSL.Connection | None:
        """OpenSSL's own object, to inspect: cipher, protocols, keying material. A server has none before the hello."""
        return self._association.ssl

    @property
    def peer_certificate(self) -> Certificate | None:
        """The peer's certificate, as an object of ``cryptography``; ``None`` if the peer has sent none.

        A server verifies it only if its context says so.
        """
        connection = self._association.ssl
        return None if connection is None else connection.get_peer_certificate(as_cryptography=True)

    @property
    def session(self) -> Session | None:
        """The session, which a client can resume later; ``None`` before the handshake, and at servers."""
        association = self._association
        if association.is_server or association.ssl is None or association.stage in (HANDSHAKE, BROKEN):
            return None
        session = association.ssl.get_session()
        return None if session is None else Session(host_of(association.identity), session)

    @property
    def ended(self) -> Literal["idle", "evicted", "stopping", "closed"] | None:
        """Why :meth:`receive` raises ``trio.EndOfChannel``; ``None`` while it does not.

        As :attr:`trio_udp.Client.ended`, or ``"closed"``: the peer has closed the association or begun a new one.
        """
        if self._association.stage in (ENDED, BROKEN):
            return "closed"
        ended: Literal["idle", "evicted", "stopping"] | None = getattr(self._transport, "ended", None)
        return ended

    def _take(self, datagram: bytes) -> list[bytes]:
        """Process a datagram; return datagrams to send. Close this channel if it begins another association."""
        answer = self._association.take(datagram)
        if self._association.replaced and hasattr(self._transport, "close"):
            self._transport.close()  # the peer repeats its hello, which then makes it a new client
        return answer

    async def _prepare_to_send(self) -> None:
        """Complete the handshake if needed. Then process datagrams until the peer has confirmed our last flight.

        They may repeat a flight of the peer, and a handler that only sends would never see them. If a task is
        receiving, that task processes them.
        """
        association = self._association
        if association.stage is HANDSHAKE:
            await self.do_handshake()
        receive_nowait = getattr(self._transport, "receive_nowait", None)
        if self._receiving or receive_nowait is None:
            return
        with suppress(trio.WouldBlock, trio.EndOfChannel):
            while association.stage is ESTABLISHED and not association.confirmed:
                await self._send_all(self._take(receive_nowait()))

    async def _send_nothing(self) -> None:
        """End a send that no peer can receive."""
        if self._association.stage is CLOSED:
            await self._raise_closed()
        self._raise_if_broken(or_ended=True)
        await trio.lowlevel.checkpoint()

    async def _raise_closed(self) -> NoReturn:
        # Let the channel below raise it: a server recognises the error of its own client as a normal end.
        await self._transport.send(b"")
        raise trio.ClosedResourceError

    def _raise_if_broken(self, *, or_ended: bool = False) -> None:
        """Raise the error at a client. A server sees only an end: a stranger's fault is not the handler's error."""
        association = self._association
        if not association.is_server and (association.stage is BROKEN or or_ended):
            raise trio.BrokenResourceError(association.reason or "the peer has closed the association")

    async def _send_all(self, datagrams: list[bytes]) -> None:
        try:
            for datagram in datagrams:
                await self._transport.send(datagram)
        except (OSError, trio.BrokenResourceError):
            if self._association.stage in (HANDSHAKE, ESTABLISHED):
                raise  # otherwise it was an alert, and the peer need not receive it

    def _send_all_nowait(self, datagrams: list[bytes]) -> None:
        with suppress(trio.WouldBlock, OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            for datagram in datagrams:
                self._transport.send_nowait(datagram)


def taken_from(channel: DTLSChannel) -> int:
    """Return how many payloads have been received from a channel; for :func:`secure`."""
    return channel._taken


def has_waiting(channel: DTLSChannel) -> bool:
    """Whether a payload has arrived and has not been received; for :func:`secure`."""
    association = channel._association
    with suppress(trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
        while association.stage is ESTABLISHED and not association.payloads:
            channel._send_all_nowait(channel._take(channel._transport.receive_nowait()))
    return association.stage is not CLOSED and bool(association.payloads)


def _payload(value: trio_udp.Payload) -> bytes:
    payload = value if type(value) is bytes else bytes(memoryview(value))
    if not payload:
        raise ValueError("DTLS has no empty payloads")
    if len(payload) > MAX_PAYLOAD:
        raise OSError(errno.EMSGSIZE, f"{os.strerror(errno.EMSGSIZE)}: a DTLS record holds {MAX_PAYLOAD} bytes")
    return payload
