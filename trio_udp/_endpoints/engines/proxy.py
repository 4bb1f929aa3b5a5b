"""The engine of an endpoint with ``proxies``: another engine, and the headers that proxies put in front of payloads.

Senders in the networks of ``proxies`` are trusted, and must put a header of the PROXY protocol, version 2, in front of
every datagram. This engine takes it off. In a datagram from any other sender, bytes that look like a header are
payload. Replies have no header, and leave on the route that the datagram arrived on, thus through the proxy.

A route is the inner engine's route and the *ends* from the header, b"" for a datagram that no proxy has passed on; see
proxy_header.py. So a client is a pair of its own address and the proxy's socket: a proxy expects the answer on the
socket that it sent the request from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, cast

import trio

from ..._log import WarningLog
from .._address import Address, describe, is_limited_broadcast, is_multicast, is_unspecified
from .._networks import Networks
from ._engine import BATCH, Engine, Multicast, Received, Route
from .pktinfo import MAPPED, is_doubtful_host
from .proxy_header import IPV6, addresses, read_header

ProxiedRoute: TypeAlias = tuple[Route, bytes]

# The most cached answers to whether a route leads to a proxy. Strangers choose how many routes there are, so a full
# cache is emptied. A new answer takes 1 µs.
MAX_ROUTES = 1_000

# ``max_datagram_size`` of the inner engine: any datagram. The user's limit is for payloads, without the header.
INNER_SIZE = 65_535

# Datagrams to pass to the inner engine at once: as many as it considers for one call, but not a queue of thousands.
SEND_AT_ONCE = 4 * BATCH


class ProxyEngine:
    """An engine whose datagrams from proxies have a header; see :class:`Engine`.

    Attributes:
      _inner: The engine that reads and writes them. Its ``max_datagram_size`` is ``INNER_SIZE``.
      _is_proxy: Cached answers: whether the sender of an inner route is a proxy.
    """

    def __init__(self, inner: Engine, proxies: Networks, max_datagram_size: int) -> None:
        self._inner = inner
        self._proxies = proxies
        self._longest = max_datagram_size
        self._is_proxy: dict[Route, bool] = {}
        self._ports: frozenset[bytes] = frozenset()
        self._warnings = WarningLog()
        self.family = inner.family
        self.bound_address = inner.bound_address
        self.connected = inner.connected
        self.counts = inner.counts
        self.wakes_tasks = inner.wakes_tasks
        # Methods that do not use routes are those of the inner engine, without a call in between.
        self.source_for = inner.source_for
        self.is_own_host = inner.is_own_host
        self.is_broadcast = inner.is_broadcast
        self.allows_broadcast = inner.allows_broadcast
        self.kernel_figures = inner.kernel_figures
        self.is_readable = inner.is_readable
        self.wait_readable = inner.wait_readable
        self.wait_writable = inner.wait_writable
        self.close = inner.close
        self.abandon = inner.abandon

    @property
    def socket(self) -> trio.socket.SocketType:
        return self._inner.socket

    @property
    def multicast(self) -> Multicast:
        return self._inner.multicast

    @property
    def closed(self) -> bool:
        return self._inner.closed

    # Moving datagrams.

    @property
    def read_ahead(self) -> int:
        return self._inner.read_ahead

    def receive(self, batch: list[Received]) -> bool:
        try:
            return self._inner.receive(batch)
        finally:  # also if reading failed: datagrams that were read before are in the batch
            batch[:] = self._without_headers(batch)

    def _without_headers(self, batch: list[Received]) -> list[Received]:
        """Return the datagrams as their clients sent them; count malformed ones and those that are too long."""
        known, longest, counts = self._is_proxy, self._longest, self.counts
        kept: list[Received] = []
        malformed: list[Route] = []
        for payload, route, ancillary in batch:
            is_proxy = known.get(route)
            if is_proxy is None:
                is_proxy = self._check_proxy(route)
            ends = b""
            if is_proxy:
                found = read_header(payload)
                if found is None:
                    malformed.append(route)
                    continue
                start, ends = found
                payload = payload[start:]
                counts.bytes_received -= start
            if len(payload) > longest:
                counts.truncated += 1
                continue
            kept.append((payload, (route, ends), ancillary))
        if malformed:
            counts.refused_malformed += len(malformed)
            proxy = describe(self._inner.peer_address(malformed[-1]))
            self._warnings.warn("malformed", "refused a datagram without a valid PROXY header from proxy %s", proxy)
        return kept

    def _check_proxy(self, route: Route) -> bool:
        """Whether a route leads to a proxy; cache the answer."""
        is_proxy = self._inner.host(route) in self._proxies
        if is_proxy:  # except an address of many machines or of none, which must not be answered
            peer = self._inner.peer_address(route)
            is_proxy = not (is_multicast(peer) or is_limited_broadcast(peer) or is_unspecified(peer))
        if len(self._is_proxy) >= MAX_ROUTES:
            self._is_proxy.clear()
        self._is_proxy[route] = is_proxy
        return is_proxy

    def send(self, payloads: Sequence[bytes], sizes: Sequence[int], routes: Sequence[Route]) -> int:
        inner_routes = [_parts(route)[0] for route in routes[:SEND_AT_ONCE]]
        return self._inner.send(payloads[:SEND_AT_ONCE], sizes[:SEND_AT_ONCE], inner_routes)

    # Routes.

    def route(self, address: Address, local_address: Address | None = None) -> Route:
        return self._inner.route(
            address, local_address
        ), b""  # datagrams that the program itself addresses go there directly

    def max_payload(self, route: Route) -> int:
        return self._inner.max_payload(_parts(route)[0])

    def peer_address(self, route: Route) -> Address:
        inner, ends = _parts(route)
        return addresses(ends)[0] if ends else self._inner.peer_address(inner)

    def local_address(self, route: Route) -> Address:
        inner, ends = _parts(route)
        return addresses(ends)[1] if ends else self._inner.local_address(inner)

    def destination(self, route: Route) -> Address:
        inner, ends = _parts(route)
        return addresses(ends)[1] if ends else self._inner.destination(inner)

    def interface(self, route: Route) -> int | None:
        inner, ends = _parts(route)
        return None if ends else self._inner.interface(inner)

    def host(self, route: Route) -> bytes:
        inner, ends = _parts(route)
        if not ends:
            return self._inner.host(inner)
        if len(ends) < IPV6.size:
            return ends[:4]
        return ends[12:16] if ends.startswith(MAPPED) else ends[:16]

    # Untrusted sources: the rules also hold for the address in the header, because the proxy sends the answer there.

    def watch_ports(self, ports: frozenset[int]) -> None:
        self._ports = frozenset(port.to_bytes(2, "big") for port in ports)
        self._inner.watch_ports(ports)

    def doubtful_source(self, route: Route) -> bool:
        inner, ends = _parts(route)
        if not ends:
            return self._inner.doubtful_source(inner)
        if len(ends) < IPV6.size:
            return ends[8:10] in self._ports or not 0 < ends[0] < 0xE0
        return ends[32:34] in self._ports or is_doubtful_host(ends[:16])

    def doubtful_sources(self, routes: Sequence[Route]) -> bool:
        return any(map(self.doubtful_source, routes))


def _parts(route: Route) -> ProxiedRoute:
    return cast("ProxiedRoute", route)
