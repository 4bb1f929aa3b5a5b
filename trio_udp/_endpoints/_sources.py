"""Sources that a server does not trust: its own addresses, those of many machines, and those of no machine.

Anyone can forge the source of a datagram. A few forged sources turn a server against itself or others:

- our own address with a port of ours: every answer is a new request, for ever (10,000 a second);
- a group or a broadcast address: one answer goes to many machines;
- port 0 or the unspecified address: these are legal (RFC 768; a DHCP client has no other address), but an answer goes
  nowhere, or to a service of this machine.

Cheap checks come first. ``Engine.doubtful_source`` checks every stranger and is false for nearly all of them. The other
checks need decoded addresses and sometimes a system call, whose result is cached for a while.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import Any

import attrs

from ._address import (
    Address,
    is_answerable,
    is_internet,
    is_limited_broadcast,
    is_mapped,
    is_multicast,
    unmapped,
)
from .engines import Engine, Route, watch_names

# The most cached results for each endpoint and check. Strangers choose how many hosts there are, so a full cache is
# emptied. A check by the kernel takes 8 to 18 µs.
HOSTS = 1_000

# Seconds that a cached result is valid. A machine's addresses can change.
LIFETIME = 10


class Source(enum.Enum):
    """A decision about the source of one datagram."""

    FINE = enum.auto()

    REFUSED = enum.auto()
    """Drop the datagram, and count it as ``refused_source``."""

    UNANSWERABLE = enum.auto()
    """Deliver the datagram, but never send an answer."""


@attrs.define(eq=False)
class Watch:
    """An endpoint of the server, and the kernel's cached answers about its sources."""

    engine: Engine
    allows_broadcast: bool = False  # SO_BROADCAST is set: a directed broadcast would be sent
    expires: float = -math.inf
    own: dict[str, bool] = attrs.field(factory=dict)  # is it a host of this machine?
    broadcast: dict[str, bool] = attrs.field(factory=dict)  # is it the broadcast address of a network of ours?


@attrs.define(eq=False)
class Sources:
    """Decides about the sources of datagrams, for all endpoints of one server.

    A server calls :meth:`refresh` once for each batch that has strangers in it, or for each batch if it keeps no
    clients. If that returns false and no source of the batch is doubtful, it need not call :meth:`verdict`, which saves
    a call for nearly every datagram::

        checks = sources.refresh(engine, now) or engine.doubtful_sources(routes)
        for route in routes:
            if checks:
                source = sources.verdict(engine, route)
    """

    _watches: dict[Engine, Watch] = attrs.field(factory=dict, init=False)
    _ports: frozenset[int] = attrs.field(default=frozenset((0,)), init=False)  # of all endpoints, and 0

    _names: frozenset[Any] = attrs.field(default=frozenset(), init=False)  # of all Unix-domain endpoints

    def add(self, engine: Engine) -> None:
        """Watch the port of one more endpoint, on all endpoints."""
        self._watches.setdefault(engine, Watch(engine))
        self._watch_ports()

    def discard(self, engine: Engine) -> None:
        """Forget an endpoint that is closed: another socket may have its port now."""
        if self._watches.pop(engine, None):
            self._watch_ports()

    def refresh(self, engine: Engine, now: float) -> bool:
        """Check whether SO_BROADCAST is set on an endpoint, and discard old cached results. Takes 0.5 µs.

        Args:
          now: Time in seconds, by any clock that does not go back.

        Returns:
          True if :meth:`verdict` must check every source, even where ``doubtful_source`` is false.
        """
        watch = self._watches[engine]
        if now >= watch.expires:
            watch.expires = now + LIFETIME
            watch.own.clear()
            watch.broadcast.clear()
        watch.allows_broadcast = engine.allows_broadcast()
        return watch.allows_broadcast

    def verdict(self, engine: Engine, route: Route) -> Source:
        """Decide about the source of a datagram that arrived on an endpoint of this server."""
        watch = self._watches[engine]
        if not engine.doubtful_source(route) and not watch.allows_broadcast:
            return Source.FINE
        peer = engine.peer_address(route)
        if not is_internet(peer):
            # The name of a Unix-domain socket can be forged too, by binding it in another mount namespace.
            if peer in self._names:
                return Source.REFUSED
            return Source.FINE if is_answerable(peer) else Source.UNANSWERABLE
        if is_multicast(peer) or is_limited_broadcast(peer):
            return Source.REFUSED
        if not is_answerable(peer):
            return Source.UNANSWERABLE
        if peer[1] in self._ports and _is_own(watch, peer) and not self._is_to_many(watch, route):
            return Source.REFUSED
        if watch.allows_broadcast and _is_broadcast(watch, peer, if_unknown=True):
            return Source.REFUSED
        return Source.FINE

    def is_from_here_to_many(self, engine: Engine, route: Route) -> bool:
        """Whether a datagram came from a port of ours on this machine, and was sent to a group or broadcast."""
        watch = self._watches[engine]
        if not engine.doubtful_source(route):
            return False
        peer = engine.peer_address(route)
        return is_internet(peer) and peer[1] in self._ports and _is_own(watch, peer) and self._is_to_many(watch, route)

    def _is_to_many(self, watch: Watch, route: Route) -> bool:
        """Whether a datagram was sent to a group or a broadcast address.

        Such a datagram may come from another program of this machine with the same port: all mDNS programs use 5353. A
        forged one makes no loop, because our answer goes to a single address and is refused when it arrives.
        """
        to = watch.engine.destination(route)
        return is_multicast(to) or is_limited_broadcast(to) or _is_broadcast(watch, to, if_unknown=False)

    def _watch_ports(self) -> None:
        addresses = [engine.bound_address for engine in self._watches]
        self._ports = frozenset([0] + [address[1] for address in addresses if is_internet(address)])
        self._names = frozenset(address for address in addresses if not is_internet(address))
        for engine in self._watches:
            engine.watch_ports(self._ports)
            watch_names(engine, self._names)


def _is_own(watch: Watch, address: Address) -> bool:
    return _cached(watch.own, watch.engine.is_own_host, address, True)


def _is_broadcast(watch: Watch, address: Address, *, if_unknown: bool) -> bool:
    if ":" in address[0] and not is_mapped(address):
        return False  # IPv6 has no broadcast
    return _cached(watch.broadcast, watch.engine.is_broadcast, address, if_unknown)


def _cached(answers: dict[str, bool], ask: Callable[[Address], bool], address: Address, if_unknown: bool) -> bool:
    """Return the kernel's answer about an address, cached or new. If asking fails, return ``if_unknown``."""
    host = unmapped(address)[0]
    if len(address) == 4 and address[3]:
        host = f"{host}%{address[3]}"
    answer = answers.get(host)
    if answer is None:
        try:
            answer = ask(address)
        except OSError:  # for example because this process may open no more files
            return if_unknown
        if len(answers) >= HOSTS:
            answers.clear()
        answers[host] = answer
    return answer
