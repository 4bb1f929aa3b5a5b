"""Socket buffers and sizes, for sockets that we open and for those that another program bound.

These are not in _open.py because _endpoint.py needs them too, and _open.py imports _endpoint.py.
"""

from __future__ import annotations

import socket
import sys
from contextlib import suppress

import trio

from .._log import warn_once

# Enough for a burst that arrives while handlers run: a few thousand small datagrams, or 40 ms at 1 Gbit/s. The systems'
# own default, 208 KiB on Linux, holds 256 small datagrams.
RECEIVE_BUFFER = 4_194_304

# The kernel takes a C int.
LARGEST_BUFFER = 2**31 - 1


def check_max_datagram_size(size: int, most: int = 65_535) -> None:
    """Raise ``TypeError`` or ``ValueError`` if ``max_datagram_size`` is invalid."""
    if not isinstance(size, int):
        raise TypeError(f"max_datagram_size must be an int, not {size!r}")
    if not 1 <= size <= most:
        raise ValueError(f"max_datagram_size must be from 1 to {most}, not {size!r}")


def check_buffer_size(name: str, size: int | None) -> None:
    """Raise ``TypeError`` or ``ValueError`` if a ``receive_buffer`` or ``send_buffer`` is invalid."""
    if size is None:
        return
    if not isinstance(size, int):
        raise TypeError(f"{name} must be an int or None, not {size!r}")
    if not 1 <= size <= LARGEST_BUFFER:
        raise ValueError(f"{name} must be from 1 to {LARGEST_BUFFER}, not {size!r}")


def request_receive_buffer(sock: socket.socket | trio.socket.SocketType, size: int | None) -> int:
    """Ask for ``size`` bytes of receive buffer; return the bytes that were asked for.

    ``None`` asks for ``RECEIVE_BUFFER``, unless the buffer is larger already.

    Raises:
      OSError: The system refuses an explicit size. Linux grants a part instead.
    """
    if size is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        return size
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < RECEIVE_BUFFER:
        with suppress(OSError):  # BSD and macOS grant all or nothing
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    return RECEIVE_BUFFER


def granted_receive_buffer(sock: socket.socket | trio.socket.SocketType) -> int:
    """Return the bytes of receive buffer that the kernel has granted, in the units that ``SO_RCVBUF`` is set in."""
    size = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    return size // 2 if sys.platform == "linux" else size  # Linux doubles the requested size, see socket(7)


def warn_of_small_buffer(requested: int, granted: int) -> None:
    """Log once that the kernel has granted less than half of a receive buffer, and name the setting to change."""
    if granted >= requested / 2:
        return
    setting = "net.core.rmem_max" if sys.platform == "linux" else "kern.ipc.maxsockbuf"
    warn_once(
        "The kernel has granted a receive buffer of %d bytes, not %d: bursts may be dropped (kernel_dropped in the "
        "statistics). The system allows no more; to change that: sysctl -w %s=%d",
        *(granted, requested, setting, requested),
    )


def grant_receive_buffer(sock: socket.socket | trio.socket.SocketType, size: int | None) -> int:
    """Ask for a receive buffer and warn if it is small, in one step; return the bytes that were asked for.

    This is for sockets that other code bound; see ``Endpoint.from_socket``. Arguments and errors are those of
    :func:`request_receive_buffer`.
    """
    requested = request_receive_buffer(sock, size)
    warn_of_small_buffer(requested, granted_receive_buffer(sock))
    return requested
