"""Opening Unix-domain datagram sockets: from a path or an abstract name to an endpoint, bound or connected.

A program that ends without closing its socket leaves the file behind. Such a stale file is replaced; the file of a live
socket never is. The folder stays locked from the check that no process has the file until it is replaced.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import cast

import trio

from ._buffers import check_buffer_size, check_max_datagram_size, grant_receive_buffer
from ._endpoint import Endpoint, make_endpoint
from .engines import AF_UNIX, Name, bound_file, switch_on_credentials, unix_engine

if sys.platform != "win32":
    import fcntl

# A send buffer of the system's default size, 208 KiB on Linux, holds 277 unread small datagrams, of all peers together.
SEND_BUFFER = 4_194_304

# A larger datagram would need a send buffer that no system allows by default.
LARGEST_DATAGRAM = 2**24

# The longest payload that a connection receives. Reading with a buffer of more than 128 KiB takes six times as long.
LARGEST_OF_CONNECTION = 65_535

# Seconds between attempts to lock a folder in which another process replaces a file, and the number of attempts.
LOCK_PAUSE, LOCK_ATTEMPTS = 0.01, 100


async def open_unix_endpoint(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    *,
    mode: int | None = None,
    credentials: bool = False,
    max_datagram_size: int = 65_535,
    receive_buffer: int | None = None,
    send_buffer: int | None = None,
) -> Endpoint:
    r"""Bind a Unix-domain datagram socket to a path, or on Linux to an abstract name, for :func:`serve_endpoints`.

    A file that a socket has left behind, and that no process is bound to any more, is replaced. Closing the endpoint
    removes the file, unless another one has taken its place.

    Args:
      path: The path of the file to make. A ``str`` or ``bytes`` that begins with a zero byte is an abstract name of
        Linux (``"\0name"``), which has no file.
      mode: Permissions of the file, such as ``0o660``, regardless of the umask. Senders need permission to write. The
        file never allows more, not even for a moment. By default the umask decides.
      credentials: Let the kernel tell which process sent each datagram: :attr:`Datagram.credentials`,
        :attr:`Client.credentials`. A client is then one pair of name and credentials, and a host in ``Limits`` is a
        user. Linux only.
      max_datagram_size: Longest payload to accept, in bytes; longer datagrams are counted as truncated. More than about
        130,000 makes every read slower, also of short datagrams.
      receive_buffer: Bytes of kernel memory to ask for (``SO_RCVBUF``). On Linux it has no effect: the number of
        datagrams that wait for a socket is limited, by ``net.unix.max_dgram_qlen``.
      send_buffer: Bytes of kernel memory to ask for, for datagrams that their receivers have not read yet
        (``SO_SNDBUF``); by default as near to 4 MiB as the system allows. No payload can be longer.

    Raises:
      OSError: The path cannot be bound: ``EADDRINUSE`` if another process serves it or it is not a socket; otherwise
        the kernel's error. The message has the path.
      TypeError, ValueError: An argument is invalid, or this system has no such sockets.

    Cancellation:
      A checkpoint; it leaves no socket open and no new file.
    """
    name = _checked_name(path)
    check_max_datagram_size(max_datagram_size, LARGEST_DATAGRAM)
    check_buffer_size("receive_buffer", receive_buffer)
    check_buffer_size("send_buffer", send_buffer)
    if mode is not None:
        _check_mode(mode, name)
    with ExitStack() as stack:
        sock = stack.enter_context(_new_socket(send_buffer))
        requested = 0 if receive_buffer is None else grant_receive_buffer(sock, receive_buffer)
        if credentials:
            switch_on_credentials(sock)
        await _bind(sock, name, mode)
        endpoint = _make_endpoint(sock, name, max_datagram_size, requested)
        stack.pop_all()
    return endpoint


async def open_connected_unix_endpoint(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    local_path: str | bytes | os.PathLike[str] | os.PathLike[bytes] | None,
) -> Endpoint:
    """Open a socket that is connected to a path or an abstract name; see :func:`connect_unix`."""
    name = _checked_name(path)
    local_name = None if local_path is None else _checked_name(local_path, "local_path")
    with ExitStack() as stack:
        sock = stack.enter_context(_new_socket(None))
        if local_name is not None:
            await _bind(sock, local_name, None)
            if _is_path(local_name):
                stack.callback(bound_file(local_name).remove)
        elif sys.platform == "linux":
            sock.bind("")  # an abstract name of the kernel's choice: five hexadecimal digits
            await trio.lowlevel.checkpoint()
        with _errors_name("connect to", name):
            sock.connect(cast("str", name))
        endpoint = _make_endpoint(sock, local_name, LARGEST_OF_CONNECTION, 0, target=name)
        stack.pop_all()
    return endpoint


def _new_socket(send_buffer: int | None) -> socket.socket:
    if AF_UNIX is None:
        raise ValueError("this system has no Unix-domain datagram sockets")
    sock = socket.socket(AF_UNIX, socket.SOCK_DGRAM)
    if send_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    elif sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < SEND_BUFFER:
        with suppress(OSError):  # BSD and macOS grant all or nothing
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    return sock


def _make_endpoint(
    sock: socket.socket, name: Name, max_datagram_size: int, requested: int, *, target: Name = None
) -> Endpoint:
    file = bound_file(name) if name is not None and _is_path(name) else None
    engine = unix_engine(trio.socket.from_stdlib_socket(sock), max_datagram_size, file=file, target=target)
    return make_endpoint(engine, receive_buffer_requested=requested)


# Names and modes.


def _checked_name(path: str | bytes | os.PathLike[str] | os.PathLike[bytes], argument: str = "path") -> str | bytes:
    """Return a path, or an abstract name, as the ``socket`` module takes it."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise TypeError(f"{argument} must be a path, not {path!r}")
    name = os.fspath(path)
    raw = os.fsencode(name)
    if not raw:
        raise ValueError(f"{argument} must not be empty")
    if raw[0] == 0:
        if sys.platform != "linux":
            raise ValueError(f"{argument} must be a path: only Linux has abstract names, such as {name!r}")
        return raw
    if 0 in raw:  # a C string ends at a zero byte
        raise ValueError(f"{argument} must not have a zero byte inside: {name!r}")
    return name


def _is_path(name: str | bytes) -> bool:
    return name[:1] not in ("\0", b"\0")


def _check_mode(mode: int, name: str | bytes) -> None:
    if not isinstance(mode, int) or isinstance(mode, bool):
        raise TypeError(f"mode must be an int such as 0o660, not {mode!r}")
    if not 0 <= mode <= 0o777:
        raise ValueError(f"mode must be from 0 to 0o777, not {mode:#o}")
    if not _is_path(name):
        raise ValueError(f"mode is for a path: the abstract name {name!r} has no file")


def _describe(name: str | bytes) -> str:
    """Format a name for people, an abstract one as ss(8) writes it."""
    text = os.fsdecode(name)
    return text if _is_path(name) else "@" + text[1:]


@contextmanager
def _errors_name(action: str, name: str | bytes) -> Iterator[None]:
    """Put the name into the message of the kernel's error."""
    try:
        yield
    except OSError as error:
        # The socket module gives no errno if a path is too long.
        code = error.errno or errno.ENAMETOOLONG
        raise OSError(code, f"{os.strerror(code)}: cannot {action} {_describe(name)}") from None


# Binding.


async def _bind(sock: socket.socket, name: str | bytes, mode: int | None) -> None:
    """Bind a socket, in place of a stale file if there is one."""
    await trio.lowlevel.checkpoint()
    try:
        _bind_with_mode(sock, name, mode)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or not _is_path(name):
            raise
    else:
        return
    with _errors_name("bind", name):
        folder = _open_folder(name)
    try:
        await _lock(folder, name)
        _remove_if_stale(name)
        _bind_with_mode(sock, name, mode)
    finally:
        os.close(folder)  # which unlocks it


def _open_folder(name: str | bytes) -> int:
    return os.open(os.path.dirname(os.path.abspath(name)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


async def _lock(folder: int, name: str | bytes) -> None:
    """Keep other processes from replacing a file in a folder; see flock(2)."""
    for _ in range(LOCK_ATTEMPTS):
        try:
            return fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            await trio.sleep(LOCK_PAUSE)
    raise _in_use(name, "another process holds a lock on its folder")


def _remove_if_stale(name: str | bytes) -> None:
    """Remove the file of a socket if no process is bound to it any more.

    Raises:
      OSError: ``EADDRINUSE``: a process is, or the file is not a socket.
    """
    try:
        before = os.lstat(name)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(before.st_mode):
        raise _in_use(name, "it is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(cast("str", name))
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            pass
        except OSError as error:  # for example EPERM for a connected socket, EPROTOTYPE for a stream socket
            raise _in_use(name, f"cannot check whether it is stale: {error.strerror}") from None
        else:
            raise _in_use(name, "another socket is bound to it")
    with _errors_name("bind", name):
        now = os.lstat(name)
        if (now.st_dev, now.st_ino, now.st_ctime_ns) == (before.st_dev, before.st_ino, before.st_ctime_ns):
            return os.unlink(name)
    raise _in_use(name, "another process has just replaced it")


def _in_use(name: str | bytes, reason: str) -> OSError:
    return OSError(errno.EADDRINUSE, f"{os.strerror(errno.EADDRINUSE)}: cannot bind {_describe(name)}: {reason}")


def _bind_with_mode(sock: socket.socket, name: str | bytes, mode: int | None) -> None:
    """Bind a socket whose file never allows more than ``mode``, not even for a moment."""
    if mode is None:
        with _errors_name("bind", name):
            sock.bind(cast("str", name))
    elif sys.platform == "linux":
        # The kernel makes the file with the mode of the socket, less the umask.
        os.fchmod(sock.fileno(), mode)
        with _errors_name("bind", name):
            sock.bind(cast("str", name))
            file = bound_file(name)
            try:
                _allow(name, mode)
            except BaseException:
                file.remove()
                raise
    else:
        before = os.umask(0o777 & ~mode)  # of the whole process, for a moment
        try:
            with _errors_name("bind", name):
                sock.bind(cast("str", name))
        finally:
            os.umask(before)


def _allow(name: str | bytes, mode: int) -> None:
    """Give a socket's file the permissions that the umask took away. Never follows a symbolic link."""
    file = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(file).st_mode
        if stat.S_ISSOCK(found) and stat.S_IMODE(found) != mode:
            os.chmod(f"/proc/self/fd/{file}", mode)
    finally:
        os.close(file)
