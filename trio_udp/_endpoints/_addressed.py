"""Datagrams that the program itself addresses: ``Server.send_to`` and ``Endpoint.send_to``.

The program chose the address, so the kernel's error is raised. Errors of replies are only counted.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from typing import Any, TypeAlias

import trio

from ._address import (
    NO_ADDRESS,
    Address,
    family_of,
    is_internet,
    is_limited_broadcast,
    is_mapped,
    is_multicast,
    mapped,
    numeric_address,
    unmapped,
)
from ._echoes import Echoes
from ._outbox import Outbox, Payload
from .engines import Engine, Outgoing, Route, is_by_name

Way: TypeAlias = tuple[Outbox, Route]


def find_way(outboxes: Sequence[Outbox], address: Address | str | bytes, local_address: Address | None) -> Way:
    """Choose the socket to send from, and the route.

    A datagram to an IPv4 address, mapped into IPv6 or not, leaves from an IPv4 socket or from an IPv6 socket that
    carries both. If several sockets are suitable, ``local_address`` decides, then the order.

    Raises:
      TypeError, ValueError: An address is not numeric, or no socket is suitable.
    """
    if isinstance(address, (str, bytes)):
        return _find_way_to_name(outboxes, address, local_address)
    address = _plain(address)
    local = None if local_address is None else _plain(local_address)
    fitting = []
    for outbox in outboxes:
        target = _as_seen_by(outbox.engine, address)
        if target is not None and (local is None or _can_send_from(outbox.engine, local)):
            fitting.append((outbox, target))
    if not fitting:
        origin = "" if local is None else f" from {local_address!r}"
        raise ValueError(f"no endpoint here can send to {address!r}{origin}")
    fitting = [(outbox, target) for outbox, target in fitting if not outbox.engine.closed] or fitting
    if local is None:
        outbox, target = fitting[0]
        return outbox, outbox.engine.route(target)
    outbox, target = next((way for way in fitting if _would_send_from(*way, local)), fitting[0])
    source = _as_seen_by(outbox.engine, (local[0], outbox.engine.bound_address[1], *local[2:]))
    return outbox, outbox.engine.route(target, source)


def _find_way_to_name(outboxes: Sequence[Outbox], name: str | bytes, local_address: Address | None) -> Way:
    """Choose a Unix-domain socket: the one bound to ``local_address``, or without that the first."""
    fitting = [outbox for outbox in outboxes if is_by_name(outbox.engine)]
    if not fitting:
        raise TypeError(f"{NO_ADDRESS}, not {name!r}")
    if local_address is not None:
        fitting = [outbox for outbox in fitting if outbox.engine.bound_address == local_address]
    if not fitting or not name:
        raise ValueError(f"no endpoint here can send to {name!r}")
    outbox = next((outbox for outbox in fitting if not outbox.engine.closed), fitting[0])
    target: Any = name  # a name is not an Address, the type of IPv4 and IPv6 addresses
    return outbox, outbox.engine.route(target)


async def send_on(way: Way, payload: Payload) -> None:
    """Send one datagram; see :meth:`Endpoint.send_to`."""
    outbox, _ = way
    outgoing = _outgoing(way, payload)
    await trio.lowlevel.checkpoint()
    try:
        if not outbox.send([outgoing], raising=True):
            await outbox.wait_for_room(outgoing, raising=True)
    except PermissionError as error:
        raise _explained(error, way) from None


def send_on_nowait(way: Way, payload: Payload) -> None:
    outbox, _ = way
    try:
        if not outbox.send([_outgoing(way, payload)], raising=True):
            raise trio.WouldBlock
    except PermissionError as error:
        raise _explained(error, way) from None


def _explained(error: PermissionError, way: Way) -> PermissionError:
    """Add to the error of a broadcast that the socket lacks SO_BROADCAST."""
    outbox, route = way
    to = outbox.engine.peer_address(route)
    if error.errno == errno.EACCES and is_internet(to) and (is_limited_broadcast(to) or outbox.engine.is_broadcast(to)):
        needs = f"{to[0]} is a broadcast address, and the socket needs the option SO_BROADCAST (see configure=)"
        return PermissionError(error.errno, f"{error.strerror}: {needs}")
    return error


def _outgoing(way: Way, payload: Payload) -> Outgoing:
    outbox, route = way
    copy, echoes = outbox.copy(payload, route), outbox.echoes
    if echoes is not None and _may_echo(outbox.engine, route, echoes):
        echoes.expect(copy, outbox.turn.now())
    return copy, route, outbox.own


def _may_echo(engine: Engine, route: Route, echoes: Echoes) -> bool:
    """Whether a server may receive its own datagram: it goes to one of its ports, and perhaps to many machines."""
    to = engine.peer_address(route)
    if not is_internet(to) or to[1] not in echoes.ports:
        return False
    # A directed broadcast needs SO_BROADCAST. Expecting an echo that does not come is harmless.
    return is_multicast(to) or is_limited_broadcast(to) or engine.allows_broadcast()


def _plain(address: Address) -> Address:
    address = numeric_address(address)
    return unmapped(address) if is_mapped(address) else address


def _as_seen_by(engine: Engine, address: Address) -> Address | None:
    """Return an address in the form that a socket takes; ``None`` if the socket cannot send to it."""
    if engine.connected or not isinstance(engine.bound_address, tuple):
        return None
    if family_of(address) == engine.family:
        return address
    return mapped(address) if engine.family == socket.AF_INET6 and _is_dual_stack(engine) else None


def _is_dual_stack(engine: Engine) -> bool:
    try:
        return engine.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 0
    except OSError:  # it is closed, or simulated, and then has no options
        return False


def _can_send_from(engine: Engine, local: Address) -> bool:
    """Whether a socket is bound to an address, or to all of its family. Port 0 stands for the socket's port."""
    seen = _as_seen_by(engine, local)
    if seen is None or local[1] not in (0, engine.bound_address[1]):
        return False
    return engine.bound_address[0] in (seen[0], "0.0.0.0", "::")


def _would_send_from(outbox: Outbox, target: Address, local: Address) -> bool:
    """Whether the kernel would choose ``local``. This finds the right one of several sockets bound to interfaces."""
    try:
        return _plain(outbox.engine.source_for(target))[0] == local[0]
    except OSError:
        return False
