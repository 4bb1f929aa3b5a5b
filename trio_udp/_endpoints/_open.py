"""Opening sockets: from a host and a port to endpoints, bound or connected.

Names are looked up first, asynchronously. After that nothing waits, so cancellation leaves no socket open.
"""

from __future__ import annotations

import errno
import inspect
import logging
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import attrs
import trio

from .._log import LOGGER
from .._trio import is_in_trio
from ._address import Address, describe, family_of, is_link_local, numeric_address
from ._buffers import (
    check_buffer_size,
    check_max_datagram_size,
    granted_receive_buffer,
    request_receive_buffer,
    warn_of_small_buffer,
)
from ._endpoint import Endpoint, make_endpoint
from ._networks import Network, Networks
from .engines import engine_for

# This machine or this process lacks the address family. Serve the other families without it.
NO_SUCH_FAMILY = {errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT}

# Attempts to find a port that is free in every family, for port=0.
PORT_ATTEMPTS = 20

# Options that let several sockets bind one port. The kernel checks them at each bind, on both sockets. (On Windows
# they cannot be set after a bind.)
SHARING_OPTIONS = [
    getattr(socket, name)
    for name in ("SO_REUSEPORT", "SO_REUSEADDR")
    if hasattr(socket, name) and sys.platform != "win32"
]

Configure: TypeAlias = "Callable[[socket.socket], object]"
Target: TypeAlias = tuple[int, Any]  # an address to bind or to connect to, with its family


async def open_endpoints(
    port: int,
    *,
    host: str | bytes | None = None,
    reuse_port: bool = False,
    max_datagram_size: int = 65_535,
    receive_buffer: int | None = None,
    send_buffer: int | None = None,
    configure: Callable[[socket.socket], object] | None = None,
    proxies: Iterable[Network] = (),
) -> list[Endpoint]:
    """Bind UDP sockets to ``port``, one for each local address that ``host`` stands for.

    Args:
      port: UDP port; 0 lets the kernel choose one that no other socket has, the same for every address.
      host: Name or address to bind. ``None`` binds every interface, IPv4 and IPv6, and skips a family that the machine
        lacks. An IPv6 address of a name is skipped, with a warning in the log, if this machine does not have it and
        another address of that name can be bound.
      reuse_port: Let other processes of the same user bind the port too (``SO_REUSEPORT``); the kernel then spreads
        clients over them. Without it a second bind fails.
      max_datagram_size: Longest payload to accept, in bytes; longer datagrams are counted as truncated.
      receive_buffer: Bytes of kernel memory to ask for, for datagrams not yet read (``SO_RCVBUF``); 4 MiB by default.
        The kernel grants at most the system's maximum. If that is less than half, the log warns once and names the
        setting. ``Endpoint.statistics()`` has both figures, and the number of datagrams that found no room.
      send_buffer: Bytes of kernel memory to ask for, for datagrams not yet sent (``SO_SNDBUF``).
      configure: Plain function, called with each ``socket.socket`` right before it is bound, after all other options
        are set: the place for any socket option. With ``port=0`` it may be called again, with new sockets, because the
        first port was not free in every family; ``SO_REUSEADDR`` and ``SO_REUSEPORT`` then take effect after the bind.
      proxies: Networks of load balancers that put a header of the PROXY protocol, version 2, in front of every
        datagram; see :func:`serve`. The header is not part of ``max_datagram_size``.

    Returns:
      The endpoints. Closing them is up to the caller, or to :func:`serve_endpoints`.

    Raises:
      OSError: An address cannot be bound: the kernel's error, with the address in its message. Or the name is unknown.
      TypeError, ValueError: An argument or the environment variable ``TRIO_UDP_ENGINE`` is invalid. The variable
        chooses the engine: ``portable`` or ``linux``; by default the fastest that works here.
      RuntimeError: Trio does not run in this thread.

    Cancellation:
      A checkpoint. After cancellation or any error, including one that ``configure`` raises, no socket is left open.
    """
    _check_port(port, least=0)
    check_max_datagram_size(max_datagram_size)
    check_buffer_size("receive_buffer", receive_buffer)
    check_buffer_size("send_buffer", send_buffer)
    _check_configure(configure)
    networks = Networks.parse("proxies", proxies)
    _check_trio_runs()
    if reuse_port and not hasattr(socket, "SO_REUSEPORT"):
        raise ValueError("reuse_port=True is not possible on this platform: leave it out")
    options = Options(receive_buffer, send_buffer, configure)

    targets = await _resolve(host, port, socket.AI_PASSIVE)

    for attempt in range(1, PORT_ATTEMPTS + 1):
        with ExitStack() as stack:
            try:
                opened, skipped = _bind_all(targets, options, reuse_port, stack)
            except AddressError as failed:
                # The port that the kernel chose for one address is in use for another: let it choose again.
                if port or attempt == PORT_ATTEMPTS or failed.error.errno != errno.EADDRINUSE:
                    raise failed.error from None
                continue
            endpoints = [_make_endpoint(sock, max_datagram_size, requested, networks) for sock, requested in opened]
            stack.pop_all()
        break
    for error in skipped:
        level = logging.INFO if host is None else logging.WARNING  # None asks for no particular address
        LOGGER.log(level, "Not all of host=%r is served: %s", host, error.strerror)
    return endpoints


async def open_connected_endpoint(
    host: str | bytes,
    port: int,
    local_address: Address | None,
    *,
    flowinfo: int = 0,
    scope_id: int = 0,
    receive_buffer: int | None = None,
    configure: Callable[[socket.socket], object] | None = None,
) -> Endpoint:
    """Open a socket that is connected to one peer; see :func:`connect`.

    Args:
      host: The peer's name or address; of several addresses the first that the kernel can connect to.
      port: The peer's port.
      local_address: Numeric host and port to send from, or ``None``. A link-local one without a scope is on the peer's
        link.
      flowinfo: Third item of an IPv6 peer address; 0 leaves it as ``host`` has it.
      scope_id: Fourth item of an IPv6 peer address; 0 leaves it as ``host`` has it.
      receive_buffer: As for :func:`open_endpoints`.
      configure: As for :func:`open_endpoints`. Called right before the socket is bound or, without ``local_address``,
        connected; once for each address that is tried.

    Raises:
      OSError: The kernel's error for the first address, with the address in its message. Or the name is unknown.
      TypeError, ValueError: An argument is invalid, or does not fit the address family of the peer.
    """
    _check_trio_runs()
    _check_port(port, least=1)
    _check_number("flowinfo", flowinfo, 0xFFFFF)
    _check_number("scope_id", scope_id, 0xFFFFFFFF)
    check_buffer_size("receive_buffer", receive_buffer)
    _check_configure(configure)
    if local_address is not None:
        local_address = numeric_address(local_address)
    options = Options(receive_buffer, None, configure)

    peers: list[Target] = []
    for family, address in await _resolve(host, port):
        peer: Any = address
        if family == socket.AF_INET6:
            peers.append((family, (peer[0], peer[1], flowinfo or peer[2], scope_id or peer[3])))
        elif not flowinfo and not scope_id:
            peers.append((family, peer))
    if not peers:
        raise ValueError(f"flowinfo and scope_id are for IPv6 only: leave them out for {host!r}")
    if local_address is not None:
        peers = [target for target in peers if target[0] == family_of(local_address)]
        if not peers:
            raise ValueError(f"local_address must be of the same family as {host!r}, not {local_address!r}")

    failure: OSError | None = None
    for target in peers:
        try:
            return _connect(target, local_address, options)
        except AddressError as failed:
            failure = failure or failed.error
    assert failure is not None  # getaddrinfo raises rather than return nothing
    raise failure


async def _resolve(host: str | bytes | None, port: int, flags: int = 0) -> list[Target]:
    """Look up the addresses of a name; each once, though /etc/hosts may have two lines for it."""
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=flags)
    except socket.gaierror as error:
        raise socket.gaierror(error.errno, f"{error.strerror}: {host!r}") from None
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


class AddressError(Exception):
    """The kernel cannot bind or connect to an address. Not an ``OSError``, because ``configure`` may raise those."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


@contextmanager
def _address_errors(action: str, address: Address) -> Iterator[None]:
    """Turn the kernel's error into an :class:`AddressError`, with the address in the message."""
    try:
        yield
    except OSError as error:
        # OSError() chooses the subclass by errno, so this has the class of the original.
        advice = ""
        if error.errno == errno.EACCES and action == "bind" and address[1] < 1024:
            advice = "; ports below 1024 need CAP_NET_BIND_SERVICE, or a socket from systemd"
        elif error.errno == errno.EACCES and action == "connect to":
            advice = "; if it is a broadcast address, the socket needs the option SO_BROADCAST (see configure=)"
        named = OSError(error.errno, f"{error.strerror}: cannot {action} {describe(address)}{advice}")
        raise AddressError(named) from None


@attrs.frozen
class Options:
    """Settings of a socket that do not depend on its address."""

    receive_buffer: int | None
    send_buffer: int | None
    configure: Configure | None

    def set(self, sock: socket.socket) -> int:
        """Set the options, ``configure`` last; return the bytes of receive buffer that were asked for."""
        if self.send_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.send_buffer)
        requested = request_receive_buffer(sock, self.receive_buffer)
        granted = granted_receive_buffer(sock)
        if self.configure is not None:
            result = self.configure(sock)
            if inspect.isawaitable(result):
                if inspect.iscoroutine(result):
                    result.close()  # or Python warns that it was never awaited
                raise TypeError(f"configure must be a plain function, but {self.configure!r} returned an awaitable")
            if granted_receive_buffer(sock) != granted:
                return requested  # configure has chosen another size: no warning
        warn_of_small_buffer(requested, granted)
        return requested


def _bind_all(
    targets: list[Target], options: Options, reuse_port: bool, stack: ExitStack
) -> tuple[list[tuple[socket.socket, int]], list[OSError]]:
    """Bind a socket to every target; if the port is 0, all of them to one port that the kernel chooses.

    Args:
      stack: Closes the sockets, unless the caller takes them over.

    Returns:
      The sockets, each with the bytes of receive buffer that were asked for; and the errors that were tolerated.
    """
    opened: list[tuple[socket.socket, int]] = []
    skipped: list[OSError] = []
    chosen_port = 0
    for family, (host, port, *scope) in targets:
        address: Any = (host, port or chosen_port, *scope)
        try:
            with _address_errors("bind", address):
                sock = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        except AddressError as failed:
            if failed.error.errno not in NO_SUCH_FAMILY:
                raise
            skipped.append(failed.error)
            continue
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has an endpoint of its own
        if sys.platform == "win32":
            # Without it any program on the machine can take over the port.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        elif reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        requested = options.set(sock)
        try:
            with _address_errors("bind", address):
                if port:
                    sock.bind(address)
                else:
                    _bind_unshared(sock, address)
        except AddressError as failed:
            # "localhost" is ::1 too, even where IPv6 is turned off.
            if family != socket.AF_INET6 or failed.error.errno != errno.EADDRNOTAVAIL:
                raise
            sock.close()
            skipped.append(failed.error)
            continue
        chosen_port = sock.getsockname()[1]
        opened.append((sock, requested))
    if not opened:
        raise AddressError(skipped[0])
    return opened, skipped


def _bind_unshared(sock: socket.socket, address: Any) -> None:
    """Bind to a port that no other socket has, even if the socket's options allow sharing it.

    With ``SO_REUSEPORT``, 29 of 1,500 binds to port 0 gave a port that another socket of the same user had, on Linux
    6.18. So the options are off during the bind. Set after it, they still let later sockets share the port.
    """
    values = {option: sock.getsockopt(socket.SOL_SOCKET, option) for option in SHARING_OPTIONS}
    sharing = {option: value for option, value in values.items() if value}
    for option in sharing:
        sock.setsockopt(socket.SOL_SOCKET, option, 0)
    sock.bind(address)
    for option, value in sharing.items():
        sock.setsockopt(socket.SOL_SOCKET, option, value)


def _connect(target: Target, local_address: Address | None, options: Options) -> Endpoint:
    """Open a socket that is connected to one address."""
    family, peer = target
    with ExitStack() as stack:
        with _address_errors("connect to", peer):
            sock = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        requested = options.set(sock)
        if local_address is not None:
            if len(local_address) == 4 and not local_address[3] and is_link_local(local_address):
                local_address = (*local_address[:3], peer[3])
            with _address_errors("bind", local_address):
                sock.bind(local_address)
        with _address_errors("connect to", peer):
            sock.connect(peer)
        endpoint = _make_endpoint(sock, 65_535, requested)
        stack.pop_all()
    return endpoint


def _make_endpoint(
    sock: socket.socket, max_datagram_size: int, requested: int, proxies: Networks | None = None
) -> Endpoint:
    engine = engine_for(trio.socket.from_stdlib_socket(sock), max_datagram_size, proxies=proxies)
    return make_endpoint(engine, receive_buffer_requested=requested)


def _check_trio_runs() -> None:
    if not is_in_trio():
        raise RuntimeError(
            "no Trio is running: use trio.run(), or trio.lowlevel.start_guest_run() beside asyncio or another loop"
        )


def _check_port(port: int, *, least: int) -> None:
    if not isinstance(port, int):
        raise TypeError(f"port must be an int, not {port!r}")
    if not least <= port <= 65_535:  # getaddrinfo would take it modulo 65,536
        raise ValueError(f"port must be from {least} to 65535, not {port!r}")


def _check_number(name: str, number: int, most: int) -> None:
    if not isinstance(number, int):
        raise TypeError(f"{name} must be an int, not {number!r}")
    if not 0 <= number <= most:
        raise ValueError(f"{name} must be from 0 to {most}, not {number!r}")


def _check_configure(configure: Configure | None) -> None:
    if configure is None:
        return
    if not callable(configure):
        raise TypeError(f"configure must be a function that takes a socket, not {configure!r}")
    is_async = inspect.iscoroutinefunction(configure) or inspect.isasyncgenfunction(configure)
    if is_async or inspect.iscoroutinefunction(getattr(configure, "__call__", None)):  # noqa: B004
        raise TypeError(f"configure must be a plain function, not the async function {configure!r}")
