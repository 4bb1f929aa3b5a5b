"""Multicast: joining and leaving groups, and the choice of interfaces. See RFC 1112, RFC 3678, RFC 4607.

This file checks arguments and explains errors; the engine's :class:`Multicast` makes the system calls.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import trio

from .._log import LOGGER
from ._address import (
    Address,
    family_of,
    is_internet,
    is_limited_broadcast,
    is_mapped,
    is_multicast,
    is_unspecified,
    numeric_address,
    unmapped,
)
from .engines import Engine, Multicast

# The meaning of the kernel's errors, by action. {0} is the group, with its source and its interface.
REASONS = {
    ("join", errno.EADDRINUSE): "already in {0}",
    ("join for a source", errno.EADDRNOTAVAIL): "already in {0}",
    ("join", errno.EINVAL): "cannot join {0}, which may lack this version of IP",
    (
        "join",
        errno.ENOBUFS,
    ): "cannot join {0}: the system allows no more (igmp_max_memberships, igmp_max_msf or mld_max_msf)",
    ("join", errno.ENOMEM): "cannot join {0}: the system allows no more (optmem_max)",
    ("leave", errno.EADDRNOTAVAIL): "not in {0}",
    ("leave", errno.EINVAL): "not in {0}",
    ("leave", errno.ENOENT): "not in {0}",
}


def join_group(engine: Engine, group: str, interface: int | str | None, source: str | None) -> None:
    """See :meth:`Endpoint.join_group`."""
    multicast = multicast_of(engine)
    to, origin, index = _membership(multicast, group, interface, source)
    with _explained("join", to, origin, index):
        multicast.join(to, origin, index)
    bound = unmapped(engine.bound_address)
    if sys.platform != "win32" and not is_unspecified(bound) and bound[0] != to[0]:
        LOGGER.warning(
            "an endpoint bound to %s receives nothing from group %s: bind it to all addresses", bound[0], to[0]
        )


def leave_group(engine: Engine, group: str, interface: int | str | None, source: str | None) -> None:
    """See :meth:`Endpoint.leave_group`."""
    multicast = multicast_of(engine)
    to, origin, index = _membership(multicast, group, interface, source)
    with _explained("leave", to, origin, index):
        multicast.leave(to, origin, index)


def multicast_of(engine: Engine) -> Multicast:
    """Return the groups and options of an open socket."""
    if engine.closed:
        raise trio.ClosedResourceError("this endpoint is closed")
    if not is_internet(engine.bound_address):
        raise ValueError("a Unix-domain socket has no groups")
    return engine.multicast


def set_interface(engine: Engine, interface: int | str | None) -> None:
    """See :attr:`Endpoint.multicast_interface`."""
    multicast = multicast_of(engine)
    index = index_of(multicast, interface)
    try:
        multicast.set_interface(index, _address_in(interface))
    except OSError as error:
        raise _error(error.errno or errno.ENODEV, f"no interface {index}") from None


def check_hops(hops: object) -> int:
    if not isinstance(hops, int) or isinstance(hops, bool):
        raise TypeError(f"multicast_hops must be an int, not {hops!r}")
    if not 0 <= hops <= 255:
        raise ValueError(f"multicast_hops must be from 0 to 255, not {hops!r}")
    return hops


def check_loop(loop: object) -> bool:
    if not isinstance(loop, bool):
        raise TypeError(f"multicast_loop must be a bool, not {loop!r}")
    return loop


def index_of(multicast: Multicast, interface: object) -> int:
    """Return the index of an interface, by its name, its index or one of its addresses; 0 for ``None``.

    Raises:
      OSError: ``ENODEV``: no such interface. ``EADDRNOTAVAIL``: not an address of this machine.
      ValueError: Several interfaces have the address.
    """
    if interface is None:
        return 0
    if isinstance(interface, int) and not isinstance(interface, bool):
        if not 0 < interface < 2**31:
            raise ValueError(f"an interface index must be at least 1, not {interface!r}")
        return interface
    if not isinstance(interface, str):
        raise TypeError(f"interface must be a name, an index or an address, not {interface!r}")
    address = _address_in(interface)
    if address is None:
        try:
            return multicast.index_of(interface)
        except OSError as error:
            raise _error(error.errno or errno.ENODEV, f"no interface {interface!r}") from None
    having = multicast.interfaces_with(address)
    if scope := interface.partition("%")[2]:
        having = [index for index in having if index == _index_of_scope(multicast, scope)]
    if not having:
        raise _error(errno.EADDRNOTAVAIL, f"{interface} is not an address of this machine")
    if len(having) > 1:
        raise ValueError(f"several interfaces have the address {interface}: use a name or an index")
    return having[0]


def _address_in(interface: object) -> Address | None:
    """Return the address that names an interface, or None for any other name; a name may have a dot too."""
    if isinstance(interface, str) and ("." in interface or ":" in interface):
        with suppress(ValueError):
            return unmapped(numeric_address((interface.partition("%")[0], 0)))
    return None


def _membership(
    multicast: Multicast, group: object, interface: object, source: object
) -> tuple[Address, Address | None, int]:
    """Check the arguments of a membership; return the group, the source and the index of the interface."""
    if not isinstance(group, str):
        raise TypeError(f"group must be an address as a str, not {group!r}")
    host, _, scope = group.partition("%")
    to = _numeric("group", host)
    origin = None if source is None else _numeric("source", source)
    if not is_multicast(to):
        raise _error(errno.EINVAL, f"{group} is not a group")
    for address in (to, origin):
        if address is not None and family_of(address) not in multicast.families:
            raise ValueError(f"this endpoint does not receive the address family of {address[0]}")
    if origin is not None:
        if family_of(origin) != family_of(to):
            raise ValueError(f"source must be of the same address family as {group}, not {source!r}")
        if is_multicast(origin) or is_limited_broadcast(origin) or is_unspecified(origin):
            raise ValueError(f"source must be the address of one machine, not {source!r}")
    index = index_of(multicast, interface)
    if scope:
        scope_index = _index_of_scope(multicast, scope)
        if index not in (0, scope_index):
            raise ValueError(f"{group} is on another interface than {interface!r}")
        index = scope_index
    return to, origin, index


def _index_of_scope(multicast: Multicast, scope: str) -> int:
    """Return the index of the interface after the ``%`` of an address."""
    return index_of(multicast, int(scope) if scope.isdecimal() else scope)


def _numeric(name: str, host: object) -> Address:
    if not isinstance(host, str):
        raise TypeError(f"{name} must be an address as a str, not {host!r}")
    try:
        address = numeric_address((host, 0))
    except ValueError:
        raise ValueError(f"{name} must be a numeric address, not {host!r}") from None
    return unmapped(address) if is_mapped(address) else address


@contextmanager
def _explained(action: str, group: Address, source: Address | None, interface: int) -> Iterator[None]:
    """Add the meaning to the kernel's error."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        name = f"group {group[0]}"
        name += f" for source {source[0]}" if source else ""
        name += f" on interface {interface}" if interface else ""
        if error.errno == errno.ENODEV:
            reason = f"no interface {interface}" if interface else f"no route to {name}: name an interface"
        else:
            special = REASONS.get((f"{action} for a source", error.errno)) if source else None
            reason = (special or REASONS.get((action, error.errno), f"cannot {action} {{0}}")).format(name)
        raise _error(error.errno, reason) from None


def _error(number: int, reason: str) -> OSError:
    return OSError(number, f"{os.strerror(number)}: {reason}")
