"""The groups and multicast options of a simulated socket."""

from __future__ import annotations

import errno
import os

import attrs

from .._endpoints import Address
from .._endpoints._address import family_of
from ._addresses import INTERFACE, INTERFACE_NAME
from ._sockets import SimulatedSocket, SocketTable


@attrs.define(eq=False)
class SimulatedMulticast:
    """See :class:`trio_udp._endpoints.engines._engine.Multicast`. The network has one interface."""

    _socket: SimulatedSocket
    _sockets: SocketTable

    @property
    def families(self) -> list[int]:
        return [family_of(self._socket.bound_address)]

    def join(self, group: Address, source: Address | None, interface: int) -> None:
        _check_interface(interface)
        self._sockets.join(self._socket, group[0], source and source[0])

    def leave(self, group: Address, source: Address | None, interface: int) -> None:
        _check_interface(interface)
        self._sockets.leave(self._socket, group[0], source and source[0])

    @property
    def hops(self) -> int:
        return self._socket.hops

    @hops.setter
    def hops(self, hops: int) -> None:
        self._socket.hops = hops

    @property
    def loop(self) -> bool:
        return self._socket.loop

    @loop.setter
    def loop(self, loop: bool) -> None:
        self._socket.loop = loop

    @property
    def interface(self) -> int:
        return self._socket.interface

    def set_interface(self, index: int, own: Address | None) -> None:
        _check_interface(index)
        self._socket.interface = index

    def index_of(self, interface: str) -> int:
        if interface != INTERFACE_NAME:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return INTERFACE

    def interfaces_with(self, address: Address) -> list[int]:
        own = [address[0] for address in self._socket.own_addresses]
        return [INTERFACE] if address[0] in own else []


def _check_interface(index: int) -> None:
    if index not in (0, INTERFACE):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
