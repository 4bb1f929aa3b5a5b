"""The choice of the engine that moves the datagrams of a socket."""

from __future__ import annotations

import os
import sys

import trio

from .._networks import Networks
from ._engine import Engine
from .portable import portable_engine
from .proxy import INNER_SIZE, ProxyEngine
from .unix import AF_UNIX, unix_engine


def engine_for(
    sock: trio.socket.SocketType, max_datagram_size: int, *, shared: bool = False, proxies: Networks | None = None
) -> Engine:
    """Make the fastest engine for a socket, or the one that ``TRIO_UDP_ENGINE`` names.

    Args:
      sock: A bound datagram socket, with all options set: an engine reads them once.
      max_datagram_size: Longest payload to accept; longer datagrams are counted as truncated.
      shared: Another process holds the same socket. UDP_GRO and UDP_SEGMENT stay as they are.
      proxies: Senders that put a header in front of each payload.

    Raises:
      ValueError: ``TRIO_UDP_ENGINE`` names no engine, or one that cannot serve this socket. It has no effect on
        Unix-domain sockets.
    """
    if proxies:
        return ProxyEngine(engine_for(sock, INNER_SIZE, shared=shared), proxies, max_datagram_size)
    name = os.environ.get("TRIO_UDP_ENGINE", "")
    if name not in ("", "linux", "portable"):
        raise ValueError(f"TRIO_UDP_ENGINE must be linux or portable, not {name!r}")
    if sock.family == AF_UNIX:
        return unix_engine(sock, max_datagram_size, shared=shared)
    if name != "portable" and sys.platform == "linux":
        try:
            from .linux import LinuxEngine, can_serve
        except (ImportError, AttributeError):  # a Python without ctypes, a C library without the calls
            pass
        else:
            if can_serve(sock):
                return LinuxEngine(sock, max_datagram_size, shared=shared)
    if name == "linux":
        raise ValueError(f"TRIO_UDP_ENGINE=linux, but that engine cannot serve {sock!r}")
    return portable_engine(sock, max_datagram_size, shared=shared)
