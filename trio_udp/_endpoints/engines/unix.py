"""The engine for Unix-domain datagrams: names, credentials, passed files, and the file of a bound socket. See unix(7).

It reads and writes like the portable engine. A route is the peer's name, or on a socket with SO_PASSCRED the name and
the credentials that the kernel tells with each datagram. So a process that takes over a name is another client.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TypeAlias, cast, final

import attrs
import trio

from .._address import Address, host_bytes
from ._engine import BATCH, Engine, Received, Route
from ._socket import is_connected
from .ancillary import brings_ancillary, close_passed_files
from .pktinfo import CONTROL_SIZE
from .portable import ConnectedEngine, PortableEngine

AF_UNIX: int | None = getattr(socket, "AF_UNIX", None)

Name: TypeAlias = str | bytes | None
"""A name as the ``socket`` module gives it: a path, an abstract name (bytes that begin with 0), or None for no name."""

# From asm-generic/socket.h and linux/socket.h; the socket module has them only on Linux.
SO_PASSCRED, SCM_CREDENTIALS = 16, 2
UCRED = struct.Struct("@iII")

# Room for one struct ucred and nothing else: the kernel puts it first, so that files that a peer passes (SCM_RIGHTS)
# find no room. The kernel then closes them (MSG_CTRUNC), and none takes a file descriptor of ours.
CREDENTIALS_ONLY = socket.CMSG_SPACE(UCRED.size) if hasattr(socket, "CMSG_SPACE") else 0

# The kernel keeps this much of the send buffer for itself (unix_dgram_sendmsg).
SEND_BUFFER_OVERHEAD = 32

NO_PEER = {errno.ENOENT, errno.ENOTCONN, errno.ECONNREFUSED}


@final
@attrs.frozen
class Credentials:
    """The process that sent a Unix-domain datagram, according to the kernel.

    Attributes:
      pid: Its process ID; 0 if it is in a PID namespace that we cannot see into.
      uid: Its effective user ID.
      gid: Its effective group ID. (A process with ``CAP_SETUID`` and the like may claim others, see unix(7).)
    """

    pid: int
    uid: int
    gid: int


@attrs.frozen
class BoundFile:
    """The file that the bind of a socket made."""

    path: str | bytes  # absolute, because the program may change its folder
    device: int
    inode: int
    owner: int  # the process that made it; processes that it forks share the socket

    def remove(self) -> None:
        """Remove the file, unless another one has its place now. Its inode is not reused while the socket is bound."""
        with suppress(OSError):
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino, os.getpid()) == (self.device, self.inode, self.owner):
                os.unlink(self.path)


def bound_file(path: str | bytes) -> BoundFile:
    """Note the file of a socket that was just bound to a path."""
    path = os.path.abspath(path)
    found = os.lstat(path)
    return BoundFile(path, found.st_dev, found.st_ino, os.getpid())


def switch_on_credentials(sock: socket.socket) -> None:
    """Let the kernel tell the credentials of each datagram that is sent from now on.

    Raises:
      ValueError: This system cannot do so.
    """
    if sys.platform != "linux":
        raise ValueError("credentials=True is not possible on this platform: leave it out")
    sock.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)


def tells_credentials(sock: socket.socket) -> bool:
    return sys.platform == "linux" and bool(sock.getsockopt(socket.SOL_SOCKET, SO_PASSCRED))


def unix_engine(
    sock: trio.socket.SocketType,
    max_datagram_size: int,
    *,
    shared: bool = False,
    file: BoundFile | None = None,
    target: Name = None,
) -> Engine:
    """Make the engine of a Unix-domain socket.

    Args:
      file: Removed when the engine is closed.
      target: The name that a connected socket was connected to; by default the peer's own.
    """
    engine: UnixConnectedEngine | UnixEngine
    if is_connected(sock):
        engine = UnixConnectedEngine(sock, max_datagram_size, shared=shared)
        engine.target = target or engine.target
    else:
        engine = UnixEngine(sock, max_datagram_size, shared=shared)
    engine.file = file
    return engine


class UnixFile(PortableEngine):
    """The part of both engines that knows the file and the largest datagram."""

    file: BoundFile | None = None

    def max_payload(self, route: Route) -> int:
        return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - SEND_BUFFER_OVERHEAD

    def close(self) -> None:
        if self.file is not None and not self.closed:
            self.file.remove()  # first, while the inode cannot be reused
        super().close()


class UnixEngine(UnixFile):
    """A socket that anyone may send to.

    Attributes:
      has_credentials: The kernel tells which process sent each datagram, and routes contain it.
      watched_names: See :func:`watch_names`; at first its own name.
    """

    def __init__(self, sock: trio.socket.SocketType, max_datagram_size: int, *, shared: bool = False) -> None:
        super().__init__(sock, max_datagram_size, shared=shared)
        self.watched_names: frozenset[Name] = frozenset([self.name])
        self._send_one = self._send_by_name
        self._control_size = CONTROL_SIZE
        self.has_credentials = tells_credentials(self._socket)
        if self.has_credentials and not brings_ancillary(self._socket, besides=SO_PASSCRED):
            self._control_size = CREDENTIALS_ONLY

    @property
    def name(self) -> Name:
        return cast("Name", self.bound_address)

    def _receive_with_control(self) -> Received:
        payload, control, _, name = self._socket.recvmsg(
            self._buffer_size, self._control_size, getattr(socket, "MSG_CMSG_CLOEXEC", 0)
        )
        if not self.has_credentials:
            return payload, name, tuple(close_passed_files(control))
        credentials, ancillary = b"", []
        for message in control:
            if message[:2] == (socket.SOL_SOCKET, SCM_CREDENTIALS):
                credentials = message[2]
            else:
                ancillary.append(message)
        return payload, (name, credentials), tuple(close_passed_files(ancillary)) if ancillary else ()

    def _send_by_name(self, payload: bytes, route: Route) -> None:
        name = route[0] if type(route) is tuple else route
        if name is None:
            raise OSError(errno.EDESTADDRREQ, os.strerror(errno.EDESTADDRREQ))
        try:
            self._socket.sendto(payload, cast("str", name))
        except OSError as error:
            if error.errno is not None:
                raise
            # The path fills the structure to its last byte. The kernel allows that, the socket module does not.
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG)) from None

    def route(self, address: Address, local_address: Address | None = None) -> Route:
        self._control_from(address, local_address)
        return (address, b"") if self.has_credentials else address

    def peer_address(self, route: Route) -> Address:
        name = route[0] if type(route) is tuple else route
        return cast("Address", name)

    def credentials(self, route: Route) -> Credentials | None:
        """The credentials of a route's peer; None if the kernel was not asked for them."""
        raw = route[1] if type(route) is tuple else b""
        return Credentials(*UCRED.unpack(raw)) if len(raw) == UCRED.size else None

    def host(self, route: Route) -> bytes:
        # A user counts as one host. Names cost nothing, so without credentials each counts as a host by itself.
        found = self.credentials(route)
        return host_bytes(self.peer_address(route) if found is None else cast("Address", found.uid))

    def doubtful_source(self, route: Route) -> bool:
        name = route[0] if type(route) is tuple else route
        return name is None or name in self.watched_names


class UnixConnectedEngine(UnixFile, ConnectedEngine):
    """A socket connected to one name. Once its peer is gone, each send tries to reach a new peer with that name.

    Attributes:
      target: The name to connect to. (The peer's own path may be relative to another folder.)
    """

    def __init__(self, sock: trio.socket.SocketType, max_datagram_size: int, *, shared: bool = False) -> None:
        super().__init__(sock, max_datagram_size, shared=shared)
        self.target = cast("Name", self._peer_address)

    def _receive_plain(self) -> Received:
        # Anyone may send to a bound socket that is not connected: before the connect, and after the peer is gone.
        for _ in range(BATCH):
            payload, name = self._socket.recvfrom(self._buffer_size)
            if (name or "") == self._peer_address:
                return payload, None, ()
        raise BlockingIOError  # so that other tasks run during a flood from others

    def send(self, payloads: Sequence[bytes], sizes: Sequence[int], routes: Sequence[Route]) -> int:
        try:
            return super().send(payloads, sizes, routes)
        except OSError as error:
            # The first send to a peer that is gone gives ECONNREFUSED and disconnects the socket.
            if error.errno != errno.ENOTCONN:
                raise
        try:
            if self.target:
                self._socket.connect(self.target)
                self._peer_address = self._socket.getpeername()
                return super().send(payloads, sizes, routes)
        except OSError as error:
            if error.errno not in NO_PEER:
                raise
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def credentials_of(engine: Engine, route: Route) -> Credentials | None:
    """The credentials of a peer, if the engine has any."""
    return engine.credentials(route) if isinstance(engine, UnixEngine) else None


def watch_names(engine: Engine, names: frozenset[Name]) -> None:
    """Set the names for which ``doubtful_source`` of a Unix-domain engine is true."""
    if isinstance(engine, UnixEngine):
        engine.watched_names = names


def is_by_name(engine: Engine) -> bool:
    """Whether an engine sends to Unix-domain names."""
    return isinstance(engine, UnixEngine)


def route_to_name(engine: Engine, route: Route) -> Route:
    """Check that the datagrams of a peer to which we write first will have the same route; return the route.

    Raises:
      ValueError: They will not, because they bring credentials; or the peer is ourselves.
    """
    if isinstance(engine, UnixEngine):
        if engine.has_credentials:
            raise ValueError("cannot connect: with credentials=True a peer is known only once it has sent a datagram")
        if route == engine.name:
            raise ValueError(f"cannot connect to this server itself: {route!r}")
    return route
