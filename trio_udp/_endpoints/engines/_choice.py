"""Which engine moves the datagrams of a socket."""

from __future__ import annotations

import os
import sys

import trio

from ._engine import Engine
from .portable import portable_engine


def engine_for(sock: trio.socket.SocketType, max_datagram_size: int, *, shared: bool = False) -> Engine:
    """Return the fastest engine that there is for a socket, or the one that ``TRIO_UDP_ENGINE`` names.

    Args:
      sock: A bound datagram socket, with all options set: an engine looks at them once.
      max_datagram_size: Longest payload to accept; longer datagrams are counted as truncated.
      shared: Others hold the same socket. UDP_GRO and UDP_SEGMENT are left as they were found.

    Raises:
      ValueError: There is no engine of that name, or not for this socket.
    """
    name = os.environ.get("TRIO_UDP_ENGINE", "")
    if name not in ("", "linux", "portable"):
        raise ValueError(f"TRIO_UDP_ENGINE must be linux or portable, not {name!r}")
    if name != "portable" and sys.platform == "linux":
        try:
            from .linux import LinuxEngine, can_serve
        except (ImportError, AttributeError):  # a Python without ctypes, a C library without the calls
            pass
        else:
            if can_serve(sock):
                return LinuxEngine(sock, max_datagram_size, shared=shared)
    if name == "linux":
        raise ValueError(f"TRIO_UDP_ENGINE=linux, but there is no such engine for {sock!r}")
    return portable_engine(sock, max_datagram_size, shared=shared)
