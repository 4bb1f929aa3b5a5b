"""The names of a ``Client`` that a channel over it has too; each only calls the channel below."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    import trio_udp


class OverClient(trio.abc.Channel[bytes]):
    """A channel over another one. These names work if that is a ``Client``, and some of them if it is another channel.

    They are written out, instead of a ``__getattr__``, so that editors, type checkers and readers see them.
    """

    __slots__ = ("__weakref__", "_transport")

    def __init__(self, transport_channel: trio.abc.Channel[bytes]) -> None:
        # Typed as at a server. Other channels have some of these names.
        self._transport: trio_udp.Client = transport_channel  # type: ignore[assignment]

    @property
    def transport_channel(self) -> trio.abc.Channel[bytes]:
        """The channel below. Sending over it directly sends in the clear."""
        return self._transport

    @property
    def peer_address(self) -> trio_udp.Address:
        """The other end's address, as the ``socket`` module gives it."""
        return self._transport.peer_address

    @property
    def local_address(self) -> trio_udp.Address:
        """Our own address, from which our datagrams leave."""
        return self._transport.local_address

    @property
    def destination(self) -> trio_udp.Address:
        """See :attr:`trio_udp.Client.destination`."""
        return self._transport.destination

    @property
    def interface(self) -> int | None:
        """See :attr:`trio_udp.Client.interface`."""
        return self._transport.interface

    @property
    def endpoint(self) -> trio_udp.Endpoint:
        """See :attr:`trio_udp.Client.endpoint`."""
        return self._transport.endpoint

    @property
    def credentials(self) -> trio_udp.Credentials | None:
        """See :attr:`trio_udp.Client.credentials`."""
        return self._transport.credentials

    @property
    def server(self) -> trio_udp.Server:
        """See :attr:`trio_udp.Client.server`. Its ``clients`` are channels like this one."""
        return self._transport.server

    @property
    def idle_timeout(self) -> float:
        """See :attr:`trio_udp.Client.idle_timeout`. Settable."""
        return self._transport.idle_timeout

    @idle_timeout.setter
    def idle_timeout(self, seconds: float) -> None:
        self._transport.idle_timeout = seconds

    @property
    def validated(self) -> bool:
        """Whether the peer's address is verified; at a server, once the handshake has begun."""
        return self._transport.validated

    def validate(self) -> None:
        """See :meth:`trio_udp.Client.validate`. The handshake calls it."""
        self._transport.validate()

    def transaction(self) -> AbstractContextManager[None]:
        """See :meth:`trio_udp.Client.transaction`."""
        return self._transport.transaction()

    def statistics(self) -> Any:
        """Return the statistics of the channel below, in datagrams and their bytes."""
        return self._transport.statistics()
