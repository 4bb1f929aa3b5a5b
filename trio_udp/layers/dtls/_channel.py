"""DTLSChannel: an association over a channel. All waiting is here: for datagrams, for room to send, for time."""

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

# The longest wait for an answer in a handshake, in seconds (RFC 6347 section 4.2.4.1). Each wait is twice the last one.
LONGEST_WAIT = 60.0

# Payloads that one receive_many() returns, as of a trio_udp.Client.
MANY = 64


@final
class DTLSChannel(OverClient):
    """DTLS 1.2 over any ``trio.abc.Channel[bytes]`` that keeps datagrams apart; each payload is one record.

    :func:`secure` makes one for each client and :func:`connect` one for a server. Made by hand, it runs over a
    :class:`trio_udp.Client`, a :class:`trio_udp.Connection`, a connection of the simulated network, or a channel of
    your own, as ``trio.SSLStream`` runs over any stream::

        connection = await simulated_network.connect("192.0.2.53", 5684)
        channel = DTLSChannel(connection, context, server_hostname="example.org")
        await channel.do_handshake()

    The names of a ``Client`` are here too, and mean the same, as far as the channel below has them. ``statistics()``
    counts its datagrams, those of the handshake included.

    Datagrams may still be lost, doubled and overtaken: DTLS drops what is doubled or forged, and repeats only the
    handshake.

    Args:
      transport_channel: What it runs over. It belongs to this channel, which closes it.
      context: From ``OpenSSL.SSL.Context(SSL.DTLS_METHOD)``. It is set up for DTLS 1.2 when it is first given to this
        package, and must not have been used elsewhere before. A server's has a certificate and its key.
      server_side: Be the server.
      server_hostname: For clients: verify that the server's certificate is trusted and is for this name or address.
        ``None`` leaves verification to what the context says, which by pyOpenSSL's default is none.
      mtu: Most bytes of a datagram in the handshake. Payloads are not divided: one that is longer travels in IP
        fragments, where the network allows that.
      session: For clients: resume this session if the server agrees. One whose ticket makes the first flight longer
        than a datagram is left out, as no server can answer that.

    Raises:
      TypeError, ValueError: An argument makes no sense, or the context cannot be changed any more.
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
        if isinstance(transport_channel, trio_udp.Client):  # nobody may send to it in the clear by mistake
            show_as(transport_channel, self)  # type: ignore[arg-type]
        self._lock: trio.Lock | None = trio.Lock()  # until the handshake is over
        self._taken = 0
        self._receiving = 0  # tasks, of which all but one are about to fail

    def __repr__(self) -> str:
        return f"<trio_udp.dtls.DTLSChannel {self._association.stage.name.lower()} over {self._transport!r}>"

    async def do_handshake(self, *, retransmit_timeout: float = 1.0) -> None:
        """Shake hands with the peer; return at once if that is done. ``send`` and ``receive`` do it too if need be.

        Flights that the network loses are sent again, for as long as it takes; so put it under ``trio.fail_after``.

        Args:
          retransmit_timeout: Seconds to wait for an answer before a flight is sent again. The wait doubles each time,
            up to a minute.

        Raises:
          trio.BrokenResourceError: The handshake failed; the message says why. It cannot be tried again.
          OSError: The transport's own, such as ``ConnectionRefusedError``: nobody listens there.
          trio.ClosedResourceError: After :meth:`close`.

        Cancellation:
          A handshake that was cancelled goes on when this is called again.
        """
        first_wait = check_seconds("retransmit_timeout", retransmit_timeout)
        lock = self._lock
        if lock is not None:
            async with lock:
                if self._association.stage is HANDSHAKE:
                    await self._shake_hands(first_wait)
                    self._lock = None
        else:
            await trio.lowlevel.checkpoint()
        association = self._association
        if association.stage is BROKEN:
            raise trio.BrokenResourceError(f"the DTLS handshake failed: {association.reason}")
        if association.stage is CLOSED:
            await self._raise_closed()

    async def _shake_hands(self, first_wait: float) -> None:
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
                    self._transport.validate()  # the cookie has shown that
            else:
                answer = association.repeat()
                wait, began = min(2 * wait, LONGEST_WAIT), trio.current_time()
            await self._send_all(answer)
            if association.flights != flights:  # progress; what made none, such as junk, must not put off repetition
                wait, flights, began = first_wait, association.flights, trio.current_time()

    async def receive(self) -> bytes:
        """Wait for the peer's next payload and return it; never empty.

        Raises:
          trio.EndOfChannel: The peer has closed the association or begun a new one, or the channel below has ended; a
            server's :attr:`ended` says which. Also, at a server, if an error of the peer's broke the association.
          trio.BrokenResourceError: At a client: an error broke the association, or the handshake failed.
          trio.ClosedResourceError: After :meth:`close`.
          trio.BusyResourceError: Another task is receiving.

        Cancellation:
          As of the channel below: of a ``Client`` always noticed, and never loses a datagram.
        """
        return await self._next(trio.EndOfChannel)

    def __anext__(self) -> Coroutine[Any, Any, bytes]:
        return self._next(StopAsyncIteration)  # not by way of receive: 230 bytes for each client that waits

    async def _next(self, over: type[Exception]) -> bytes:
        """Wait for the next payload and take it; raise ``over`` where the channel has ended."""
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
                    datagram = await self._transport.receive()  # which raises what it should once we have closed it
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
        """Wait for a payload, and return all that have arrived by then: at least one, at most 64, in order."""
        many = [await self.receive()]
        with suppress(trio.WouldBlock, trio.EndOfChannel, trio.BrokenResourceError, trio.ClosedResourceError):
            while len(many) < MANY:
                many.append(self.receive_nowait())
        return many

    async def send(self, value: trio_udp.Payload) -> None:
        """Send one payload to the peer, after those sent before it.

        What a server sends to a client that has closed or broken the association is dropped, as over plain UDP: nobody
        is there to get it.

        Args:
          value: Any bytes-like object of 1 to 16,384 bytes, copied now. DTLS has no empty payloads.

        Raises:
          ValueError: The payload is empty.
          OSError: ``EMSGSIZE``: it is longer than a record can be. Else the transport's own.
          trio.BrokenResourceError: At a client: the server has closed the association, or an error broke it.
          trio.ClosedResourceError: After :meth:`close`.

        Cancellation:
          As of the channel below: of a ``Client`` always noticed, and then the payload is not sent.
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
            self._transport.send_nowait(datagram)  # raises once we have closed it
        else:
            self._raise_if_broken(or_ended=True)

    async def send_many(self, payloads: Iterable[trio_udp.Payload]) -> None:
        """Send many payloads, in order. Everything is checked first; if :meth:`send` would refuse one, none is sent."""
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
        """Tell the peer that the association is over, if there is room to send that, and close both. Idempotent."""
        self._send_all_nowait(self._association.close())
        self._transport.close()

    async def aclose(self) -> None:
        """Like :meth:`close`, and a checkpoint. A transport that cannot send without waiting is waited for."""
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
        """OpenSSL's own object, to look at: cipher, protocols, keying material. A server has none before the hello."""
        return self._association.ssl

    @property
    def peer_certificate(self) -> Certificate | None:
        """The peer's certificate, as ``cryptography`` has it; ``None`` if it has shown none.

        At a server it is verified only if its context says so.
        """
        connection = self._association.ssl
        return None if connection is None else connection.get_peer_certificate(as_cryptography=True)

    @property
    def session(self) -> Session | None:
        """What a client can resume the session with; ``None`` before the handshake, and at servers."""
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
        """Take in a datagram; return what to send. Make way if the peer has begun another association with it."""
        answer = self._association.take(datagram)
        if self._association.replaced and hasattr(self._transport, "close"):
            self._transport.close()  # the hello, which the peer repeats, then makes it a client
        return answer

    async def _prepare_to_send(self) -> None:
        """Shake hands if that is not done. Until the peer has shown that it has our last flight, see what has arrived.

        It may be the peer's repeated flight, and a handler that only sends would never see it. If a task is receiving,
        that sees it.
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
        """End a send that has nobody to send to."""
        if self._association.stage is CLOSED:
            await self._raise_closed()
        self._raise_if_broken(or_ended=True)
        await trio.lowlevel.checkpoint()

    async def _raise_closed(self) -> NoReturn:
        # The channel below raises it, so that a server knows the error of its own client, which is a normal end.
        await self._transport.send(b"")
        raise trio.ClosedResourceError

    def _raise_if_broken(self, *, or_ended: bool = False) -> None:
        """Raise what a client is told. A server's handler is told of an end only: a stranger's fault is no error."""
        association = self._association
        if not association.is_server and (association.stage is BROKEN or or_ended):
            raise trio.BrokenResourceError(association.reason or "the peer has closed the association")

    async def _send_all(self, datagrams: list[bytes]) -> None:
        try:
            for datagram in datagrams:
                await self._transport.send(datagram)
        except (OSError, trio.BrokenResourceError):
            if self._association.stage in (HANDSHAKE, ESTABLISHED):
                raise  # else it was an alert, and the peer need not be there to get it

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
