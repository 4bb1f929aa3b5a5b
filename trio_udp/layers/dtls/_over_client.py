"""What a channel over a ``Client`` hands on to it: names that a handler finds at both. No more than that."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    import trio_udp


class OverClient(trio.abc.Channel[bytes]):
    """A channel over another one: it has these names if that is a ``Client``, and some of them if it is something else.

    They are written out, and no ``__getattr__`` finds them, so that editors, type checkers and readers see them.
    """

    __slots__ = ("__weakref__", "_transport")

    def __init__(self, transport_channel: trio.abc.Channel[bytes]) -> None:
        self._transport: Any = transport_channel

    @property
    def transport_channel(self) -> trio.abc.Channel[bytes]:
        """The channel that it runs over. Sending by it sends in the clear."""
        channel: trio.abc.Channel[bytes] = self._transport
        return channel

    @property
    def peer_address(self) -> trio_udp.Address:
        """The other end's address, as the ``socket`` module gives it."""
        address: trio_udp.Address = self._transport.peer_address
        return address

    @property
    def local_address(self) -> trio_udp.Address:
        """Our own address, which our datagrams leave from."""
        address: trio_udp.Address = self._transport.local_address
        return address

    @property
    def destination(self) -> trio_udp.Address:
        """See :attr:`trio_udp.Client.destination`."""
        address: trio_udp.Address = self._transport.destination
        return address

    @property
    def interface(self) -> int | None:
        """See :attr:`trio_udp.Client.interface`."""
        interface: int | None = self._transport.interface
        return interface

    @property
    def endpoint(self) -> trio_udp.Endpoint:
        """See :attr:`trio_udp.Client.endpoint`."""
        endpoint: trio_udp.Endpoint = self._transport.endpoint
        return endpoint

    @property
    def credentials(self) -> trio_udp.Credentials | None:
        """See :attr:`trio_udp.Client.credentials`."""
        credentials: trio_udp.Credentials | None = self._transport.credentials
        return credentials

    @property
    def server(self) -> trio_udp.Server:
        """See :attr:`trio_udp.Client.server`. Its ``clients`` are channels like this one."""
        server: trio_udp.Server = self._transport.server
        return server

    @property
    def idle_timeout(self) -> float:
        """See :attr:`trio_udp.Client.idle_timeout`. Settable."""
        seconds: float = self._transport.idle_timeout
        return seconds

    @idle_timeout.setter
    def idle_timeout(self, seconds: float) -> None:
        self._transport.idle_timeout = seconds

    @property
    def validated(self) -> bool:
        """Whether the peer's address is verified: at a server, once there is a handshake."""
        validated: bool = self._transport.validated
        return validated

    def validate(self) -> None:
        """See :meth:`trio_udp.Client.validate`. A handshake has done it already."""
        self._transport.validate()

    def transaction(self) -> AbstractContextManager[None]:
        """See :meth:`trio_udp.Client.transaction`."""
        block: AbstractContextManager[None] = self._transport.transaction()
        return block

    def statistics(self) -> Any:
        """Return the statistics of the channel below, in datagrams and their bytes."""
        return self._transport.statistics()
