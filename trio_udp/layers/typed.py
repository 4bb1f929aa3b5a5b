"""Objects instead of bytes: a channel over any channel, with two functions of the user and no format of its own."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from types import GenericAlias
from typing import TYPE_CHECKING, Generic, final

import trio

from .._client import Client
from .._handlers import DatagramHandler, check_handler, is_async
from .._log import PeerLog
from .._requests import makes_room

if TYPE_CHECKING:
    from typing_extensions import TypeVar  # with defaults, which the standard library has since Python 3.13

    Received = TypeVar("Received")
    Sent = TypeVar("Sent", default=Received)
    Transport = TypeVar("Transport", bound=trio.abc.Channel[bytes], default=Client)
    F = TypeVar("F", bound=Callable[..., object])
else:
    from typing import TypeVar

    Received, Sent, Transport, F = map(TypeVar, ("Received", "Sent", "Transport", "F"))


def _plain_function(name: str, function: F) -> F:
    if not callable(function) or is_async(function):
        raise TypeError(f"{name} must be a plain function, not {function!r}")
    return function


def _check_channel(channel: object) -> None:
    if not isinstance(channel, trio.abc.SendChannel) or not isinstance(channel, trio.abc.ReceiveChannel):
        raise TypeError(f"channel must be a trio.abc.Channel, not {channel!r}")


def _takes_a_channel(handler: object) -> bool:
    try:
        check_handler(handler)
    except TypeError:
        return False
    return not isinstance(handler, DatagramHandler) and not makes_room(handler)  # made by request_handler


@final
class TypedChannel(trio.abc.Channel[Received], Generic[Received, Sent, Transport]):
    """A channel of objects over a channel of bytes: ``TypedChannel(connection, decode=json.loads, encode=dump)``.

    In annotations: ``TypedChannel[Move]``, or ``TypedChannel[Request, Reply]`` if what is sent has another type.

    A payload for which ``decode`` raises an ``Exception`` is skipped, and the conversation continues: that is the
    peer's fault, not the handler's. It is counted, and logged at most once a minute for each peer. With
    ``on_decode_error(channel, payload, exception)`` that is called instead of the log: to answer with
    ``channel.send_nowait(...)``, or to raise. An exception of ``encode`` is raised by :meth:`send`; nothing is sent.

    Attributes:
      channel: The channel of bytes, with everything else that it has: ``channel.peer_address``, ``channel.server``.
      decode_errors: Payloads skipped so far.
    """

    channel: Transport
    decode_errors: int
    _decode: Callable[[bytes], Received]
    _encode: Callable[[Sent], bytes]
    _on_decode_error: Callable[[Transport, bytes, Exception], object]

    def __init__(
        self,
        channel: Transport,
        *,
        decode: Callable[[bytes], Received],
        encode: Callable[[Sent], bytes],
        on_decode_error: Callable[[Transport, bytes, Exception], object] | None = None,
    ) -> None:
        _check_channel(channel)
        self.channel = channel
        self.decode_errors = 0
        self._decode = _plain_function("decode", decode)
        self._encode = _plain_function("encode", encode)
        self._on_decode_error = _plain_function("on_decode_error", on_decode_error or PeerLog())

    def __repr__(self) -> str:
        return f"<trio_udp.TypedChannel over {self.channel!r}>"

    if not TYPE_CHECKING:
        __class_getitem__ = classmethod(GenericAlias)  # any number of types, since some have defaults

    async def receive(self) -> Received:
        """Wait for the next payload that decodes, and return the object. Errors and cancellation are the channel's."""
        while True:
            payload = await self.channel.receive()
            try:
                return self._decode(payload)
            except Exception as error:
                self.decode_errors += 1
                self._on_decode_error(self.channel, payload, error)

    async def send(self, value: Sent) -> None:  # type: ignore[override]
        """Encode an object and send it.

        Errors are those of ``encode`` and of the channel's ``send``. Cancellation is as for that.
        """
        await self.channel.send(self._encode(value))

    async def aclose(self) -> None:
        """Close the channel of bytes."""
        await self.channel.aclose()


def typed(
    handler: Callable[[TypedChannel[Received, Sent, Transport]], Awaitable[object]],
    *,
    decode: Callable[[bytes], Received],
    encode: Callable[[Sent], bytes],
    on_decode_error: Callable[[Transport, bytes, Exception], object] | None = None,
) -> Callable[[Transport], Awaitable[object]]:
    """Turn a handler that takes a :class:`TypedChannel` into one that takes a channel of bytes, such as a ``Client``.

    Used as ``serve(typed(handler, decode=..., encode=...), 9999)``. The arguments are those of :class:`TypedChannel`.
    The result works wherever a handler does, so also inside other layers. An invalid argument raises ``TypeError``.
    """
    if not _takes_a_channel(handler):
        raise TypeError(f"a typed handler is an async function with one argument, a TypedChannel, not {handler!r}")
    _plain_function("decode", decode)
    _plain_function("encode", encode)
    report = _plain_function("on_decode_error", on_decode_error or PeerLog())  # one log for all clients

    @functools.wraps(handler)  # not async, so that a server can report a handler that returns nothing to await
    def typed_handler(channel: Transport) -> Awaitable[object]:
        return handler(TypedChannel(channel, decode=decode, encode=encode, on_decode_error=report))

    return typed_handler
