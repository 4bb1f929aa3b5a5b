"""secure: make any handler one for encrypted clients. connect: the other end."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import TypeAlias, final

import attrs
import trio
from OpenSSL import SSL

import trio_udp

# A layer checks handlers and treats their errors as a server does.
from ..._handlers import DatagramHandler, check_awaitable, check_handler, handler_raised
from ..._limits import check_seconds
from ._channel import DTLSChannel, has_waiting, taken_from
from ._context import check_has_certificate, prepare
from ._cookies import Cookies
from ._ends import MTU, Session, check_mtu
from ._identity import check_host

# A handler written for a Client runs unchanged, although it gets a DTLSChannel, which has the same names.
Securable: TypeAlias = Callable[[DTLSChannel], Awaitable[object]] | Callable[[trio_udp.Client], Awaitable[object]]


@final
@attrs.define(eq=False)
class SecuredHandler:
    """A handler for ``trio_udp.serve``, as :func:`secure` makes it.

    Attributes:
      handshakes: Completed handshakes.
      handshakes_failed: Handshakes that a client with a valid cookie began and that were not completed.
      last_error: The error of the last failed handshake: ``trio.BrokenResourceError`` with OpenSSL's reason,
        ``trio.TooSlowError``, or an error of the transport or of a function that the context calls.
    """

    _handler: Callable[[DTLSChannel], Awaitable[object]]
    _context: SSL.Context = attrs.field(repr=False)
    _mtu: int = attrs.field(repr=False)
    _handshake_timeout: float = attrs.field(repr=False)
    _cookies: Cookies = attrs.field(repr=False)
    handshakes: int = attrs.field(default=0, init=False)
    handshakes_failed: int = attrs.field(default=0, init=False)
    last_error: Exception | None = attrs.field(default=None, init=False)

    async def __call__(self, client: trio_udp.Client) -> None:
        """Complete the handshake with a client, and run the handler with its :class:`DTLSChannel`."""
        channel = DTLSChannel(client, self._context, server_side=True, mtu=self._mtu)
        try:
            calls = await self._completes_handshake(channel)
            while calls:  # again while it leaves payloads behind, as over plain UDP
                taken_before = taken_from(channel)
                try:
                    await check_awaitable(self._handler, self._handler(channel))
                except BaseException as error:
                    handler_raised(channel, error)  # type: ignore[arg-type]
                calls = taken_from(channel) != taken_before and has_waiting(channel)
        finally:
            channel.close()

    # trio_udp calls it for every stranger, after the user's own accept.
    def _trio_udp_gate(self, datagram: trio_udp.Datagram) -> bool | bytes:
        return self._cookies.judge(datagram.payload, datagram.peer_address)

    async def _completes_handshake(self, channel: DTLSChannel) -> bool:
        error: Exception
        try:
            with trio.fail_after(self._handshake_timeout):
                await channel.do_handshake()
        except trio.TooSlowError:
            error = trio.TooSlowError(f"the DTLS handshake took longer than {self._handshake_timeout:g} seconds")
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as reason:
            error = reason.with_traceback(None)  # the traceback would keep the whole association alive
            error.__context__ = error.__cause__ = None
        except Exception as raised:  # by a user's function that the context calls
            handler_raised(channel, raised)  # type: ignore[arg-type]
            error = raised.with_traceback(None)
        else:
            self.handshakes += 1
            return True
        self.handshakes_failed += 1
        self.last_error = error
        return False


def secure(
    handler: Securable, context: SSL.Context, *, mtu: int = MTU, handshake_timeout: float = 120.0
) -> SecuredHandler:
    """Make a handler for ``trio_udp.serve`` that speaks DTLS with each client and runs ``handler`` inside::

        context = OpenSSL.SSL.Context(OpenSSL.SSL.DTLS_METHOD)
        context.use_certificate_chain_file("chain.pem")
        context.use_privatekey_file("key.pem")
        trio.run(trio_udp.serve, trio_udp.dtls.secure(handler, context), 5684)

    Once the handshake is done, ``handler(channel)`` is called with a :class:`DTLSChannel` instead of a ``Client``. It
    has the same names, so a handler for plain UDP needs no change. When the handler returns, the client is told
    (close_notify). Limits, idle timeout, statistics, drain and ``on_error`` are those of ``serve``. ``on_error``,
    ``server.clients`` and ``server.send_to_all`` use the channels; ``server.send_to`` knows no clients, and sends in
    the clear.

    The server keeps nothing of a stranger until it sends back a cookie that proves its address. The cookie is the
    answer to its first datagram, which counts as ``answered_by_accept``. Anything that is not a ClientHello is refused.
    Your own ``accept`` is called first, and sees ClientHellos. A client with a valid cookie counts as validated.

    If a client restarts on its port, the old handler's channel ends, and the next handshake makes a new client.

    Args:
      handler: An async function of one argument, a ``request_handler``, or anything else that ``serve`` takes except a
        ``datagram_handler``.
      context: From ``OpenSSL.SSL.Context(SSL.DTLS_METHOD)``, with certificate and key, not yet used. To request
        clients' certificates, call its ``set_verify`` and ``load_verify_locations``. Set everything before this call: a
        context cannot be changed once it is used.
      mtu: The most bytes of a datagram in the handshake.
      handshake_timeout: Seconds that a handshake may take.

    Errors:
      A failed handshake is the peer's fault: it is counted (see :class:`SecuredHandler`) and raises nothing.

    Raises:
      TypeError, ValueError: An argument is invalid, or the context can no longer be changed.
    """
    if isinstance(handler, SecuredHandler):
        raise TypeError("this handler is secured already")
    check_handler(handler)
    if isinstance(handler, DatagramHandler):
        raise TypeError(f"a datagram_handler cannot be secured, because DTLS needs clients: {handler!r}")
    cookies = prepare(context)
    check_has_certificate(context)
    check_mtu(mtu)
    check_seconds("handshake_timeout", handshake_timeout)
    return SecuredHandler(handler, context, mtu, handshake_timeout, cookies)  # type: ignore[arg-type]


async def connect(
    host: str,
    port: int,
    context: SSL.Context,
    *,
    server_hostname: str | None = None,
    mtu: int = MTU,
    session: Session | None = None,
    retransmit_timeout: float = 1.0,
    local_address: trio_udp.Address | None = None,
    receive_buffer: int | None = None,
    configure: Callable[[socket.socket], object] | None = None,
) -> DTLSChannel:
    """Open a DTLS connection: :func:`trio_udp.connect`, then the handshake::

        context = OpenSSL.SSL.Context(OpenSSL.SSL.DTLS_METHOD)
        context.set_default_verify_paths()
        with trio.fail_after(30):
            channel = await trio_udp.dtls.connect("example.org", 5684, context)
        async with channel:
            await channel.send(b"hello")

    The context must trust the server's certificate, and the certificate must be for ``server_hostname``, regardless of
    the context's own verify mode. To leave that to the context, use
    ``DTLSChannel(await trio_udp.connect(host, port), context)``.

    The handshake is repeated, with longer and longer pauses, until the server answers: use ``trio.fail_after``.

    Args:
      host, port, local_address, receive_buffer, configure: As for :func:`trio_udp.connect`.
      context: See :class:`DTLSChannel`; with the certificates to trust, and your own if the server requests one.
      server_hostname: The name or address to verify and to send to the server (SNI); ``host`` by default.
      mtu, session: See :class:`DTLSChannel`.
      retransmit_timeout: See :meth:`DTLSChannel.do_handshake`.

    Raises:
      OSError: As for :func:`trio_udp.connect`; ``ConnectionRefusedError`` if the server's port is closed.
      trio.BrokenResourceError: The handshake failed; the message says why.
      TypeError, ValueError: An argument is invalid, or the context can no longer be changed.

    Cancellation:
      Noticed at any time; it leaves no socket open.
    """
    prepare(context)
    name = check_host(host if server_hostname is None else server_hostname)  # DTLSChannel verifies nothing for None
    check_seconds("retransmit_timeout", retransmit_timeout)
    connection = await trio_udp.connect(
        host, port, local_address=local_address, receive_buffer=receive_buffer, configure=configure
    )
    try:
        channel = DTLSChannel(
            connection,
            context,
            server_hostname=name,
            mtu=mtu,
            session=session,
        )
        await channel.do_handshake(retransmit_timeout=retransmit_timeout)
    except BaseException:
        connection.close()
        raise
    return channel
