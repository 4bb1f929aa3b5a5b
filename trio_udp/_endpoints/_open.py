"""Binding and connecting: from a host and a port to endpoints."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias

import trio

from .._log import warn_once
from ._address import Address
from ._endpoint import Endpoint, check_max_datagram_size

# The machine, or this process, has no such address family at all. Other families are served without it.
NO_SUCH_FAMILY = {errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT}

# What a burst needs that arrives while handlers have the processor: a few thousand small datagrams, or 40 ms of a full
# gigabit. What the systems give unasked, 208 KiB on Linux, holds 256 small ones.
RECEIVE_BUFFER = 4_194_304

Target: TypeAlias = tuple[socket.AddressFamily, Any]  # an address to bind, with its family

# How often to look for a port that is free in every family, for port=0, before giving up.
PORT_ATTEMPTS = 20


async def open_endpoints(
    port: int,
    *,
    host: str | bytes | None = None,
    reuse_port: bool = False,
    max_datagram_size: int = 65_535,
    receive_buffer: int | None = None,
    send_buffer: int | None = None,
) -> list[Endpoint]:
    """Bind UDP sockets to ``port``, one for each local address that ``host`` stands for.

    Args:
      port: UDP port; 0 lets the kernel choose, the same port for every address.
      host: Name or address to bind. ``None`` binds every interface, IPv4 and IPv6; a family that the machine lacks is
        skipped.
      reuse_port: Let other processes of the same user bind the port too (``SO_REUSEPORT``); the kernel then spreads
        clients over them. Without it a second bind fails.
      max_datagram_size: Longest payload to accept, in bytes; longer datagrams are counted as truncated.
      receive_buffer: Bytes of kernel memory to ask for, for datagrams not yet read (``SO_RCVBUF``); 4 MiB by default.
        The kernel grants at most what the system allows. If that is less than half, a warning is logged, once, that
        names the setting; ``Endpoint.statistics()`` tells both figures, and what was lost for want of room.
      send_buffer: The same for datagrams not yet sent (``SO_SNDBUF``).

    Returns:
      The endpoints. Closing them is up to the caller, or to :func:`serve_endpoints`.

    Raises:
      OSError: The kernel's own, when an address cannot be bound; everything opened so far is closed.
      TypeError, ValueError: An argument makes no sense, or ``TRIO_UDP_ENGINE`` in the environment, which chooses the
        engine: ``portable``, or ``linux`` where it must be that; by default the fastest that there is.
    """
    _check_port(port, least=0)
    check_max_datagram_size(max_datagram_size)
    for name, size in (("receive_buffer", receive_buffer), ("send_buffer", send_buffer)):
        if size is not None and not isinstance(size, int):
            raise TypeError(f"{name} must be an int or None, not {size!r}")
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, not {size!r}")
    if reuse_port and not hasattr(socket, "SO_REUSEPORT"):
        raise ValueError("reuse_port=True is not possible on this platform")

    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE)
    # A name may resolve to the same address twice, as in an /etc/hosts with two lines for it.
    targets: list[Target] = list(dict.fromkeys((family, address) for family, _, _, _, address in found))

    def configure(sock: socket.socket) -> None:
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has an endpoint of its own
        if sys.platform == "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)  # or anybody could take the port over
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _set_receive_buffer(sock, receive_buffer)
        if send_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)

    attempts = PORT_ATTEMPTS if port == 0 else 1
    while True:
        attempts -= 1
        try:
            sockets = _bind_all(targets, configure)
        except OSError as error:
            # The port that the kernel chose for one address may be taken for another: let it choose again.
            if not attempts or error.errno != errno.EADDRINUSE:
                raise
        else:
            break
    try:
        endpoints = [Endpoint.from_socket(sock, max_datagram_size=max_datagram_size) for sock in sockets]
    except BaseException:  # TRIO_UDP_ENGINE makes no sense
        for sock in sockets:
            sock.close()
        raise
    for endpoint in endpoints:
        endpoint.receive_buffer_requested = requested = receive_buffer or RECEIVE_BUFFER
        granted = endpoint.statistics().receive_buffer
        if 0 < granted < requested / 2:
            _warn_of_small_buffer(requested, granted)
    return endpoints


def _set_receive_buffer(sock: socket.socket, size: int | None) -> None:
    if size is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    elif sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < RECEIVE_BUFFER:
        with suppress(OSError):  # Linux grants what it may; BSD and macOS grant all or nothing
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)


def _warn_of_small_buffer(requested: int, granted: int) -> None:
    setting = "net.core.rmem_max" if sys.platform == "linux" else "kern.ipc.maxsockbuf"
    warn_once(
        "The kernel has granted a receive buffer of %d bytes, not %d: bursts may be lost (kernel_dropped in the "
        "statistics). The system allows no more; to change that: sysctl -w %s=%d",
        *(granted, requested, setting, requested),
    )


def _bind_all(targets: list[Target], configure: Callable[[socket.socket], None]) -> list[socket.socket]:
    """Bind a socket to every target, or to none; where the port is 0, to one port that the kernel chooses."""
    sockets: list[socket.socket] = []
    chosen_port = 0
    missing: OSError | None = None
    try:
        for family, (host, port, *scope) in targets:
            try:
                sock = socket.socket(family, socket.SOCK_DGRAM)
            except OSError as error:
                if error.errno not in NO_SUCH_FAMILY:
                    raise
                missing = error
                continue
            sockets.append(sock)
            configure(sock)
            try:
                sock.bind((host, port or chosen_port, *scope))
            except OSError as error:
                # "localhost" means ::1 too, even where IPv6 is switched off.
                if family != socket.AF_INET6 or error.errno != errno.EADDRNOTAVAIL or len(targets) == 1:
                    raise
                missing = error
                sockets.pop().close()
                continue
            chosen_port = sock.getsockname()[1]
        if missing is not None and not sockets:
            raise missing
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


async def open_connected_endpoint(host: str | bytes, port: int, local_address: Address | None) -> Endpoint:
    """Open a socket that is connected to one peer; see :func:`connect`."""
    _check_port(port, least=1)
    failure: OSError | None = None
    for family, _, _, _, address in await trio.socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
        sock = None
        try:
            sock = socket.socket(family, socket.SOCK_DGRAM)
            if local_address is not None:
                sock.bind(local_address)
            sock.connect(address)
            return Endpoint.from_socket(sock)
        except BaseException as error:
            if sock is not None:
                sock.close()
            if not isinstance(error, OSError):
                raise
            failure = failure or error
    assert failure is not None  # getaddrinfo raises rather than return nothing
    raise failure


def _check_port(port: int, *, least: int) -> None:
    if not isinstance(port, int):
        raise TypeError(f"port must be an int, not {port!r}")
    if not least <= port <= 65_535:  # getaddrinfo would take it modulo 65,536
        raise ValueError(f"port must be from {least} to 65535, not {port!r}")
