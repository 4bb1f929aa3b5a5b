"""Opening and closing Unix-domain sockets: names, permissions, stale files, and errors that name the path."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

import trio_udp

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract names and credentials are Linux's")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "server")


# A name is no ``Address`` to a type checker.
def local_name(resource: trio_udp.Endpoint | trio_udp.Connection) -> Any:
    return resource.local_address


def peer_name(resource: trio_udp.Connection | trio_udp.Datagram) -> Any:
    return resource.peer_address


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def leave_stale(path: str, kind: int = socket.SOCK_DGRAM) -> None:
    """Bind a socket and close it, like a program that crashes: its file stays."""
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.bind(path)


def is_there(path: str) -> bool:
    return os.path.lexists(path)


def permissions(path: str) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


async def exchange(endpoint: trio_udp.Endpoint, connection: trio_udp.Connection) -> None:
    """Send a datagram and its answer."""
    with trio.fail_after(5):
        await connection.send(b"question")
        datagram = await endpoint.receive()
        assert datagram.payload == b"question"
        await datagram.reply(b"answer")
        assert await connection.receive() == b"answer"


@pytest.mark.parametrize("kind", [str, os.fsencode, Path])
async def test_a_path(path: str, kind: Any) -> None:
    """An endpoint is bound to a path of any type, answers, and removes the file when it is closed."""
    async with await trio_udp.open_unix_endpoint(kind(path)) as endpoint:
        assert local_name(endpoint) == path
        async with await trio_udp.connect_unix(kind(path)) as connection:
            assert peer_name(connection) == path
            await exchange(endpoint, connection)
        assert is_there(path)
    assert not is_there(path)


@pytest.mark.parametrize("kind", [str, os.fsencode])
async def test_an_abstract_name(kind: Any) -> None:
    """A name that begins with a zero byte has no file."""
    name = f"\0trio_udp test {os.getpid()}"
    async with await trio_udp.open_unix_endpoint(kind(name)) as endpoint:
        assert local_name(endpoint) == name.encode()
        async with await trio_udp.connect_unix(kind(name)) as connection:
            await exchange(endpoint, connection)
        with pytest.raises(OSError, match=f"cannot bind @trio_udp test {os.getpid()}") as caught:
            await trio_udp.open_unix_endpoint(name)
        assert caught.value.errno == errno.EADDRINUSE


async def test_a_connection_has_a_name_of_the_kernels_choice(path: str) -> None:
    """Without ``local_path``, Linux chooses an abstract name, so that the server can answer."""
    async with await trio_udp.open_unix_endpoint(path), await trio_udp.connect_unix(path) as connection:
        name: Any = connection.local_address
        assert (name[:1], len(name)) == (b"\0", 6)


async def test_a_connection_with_a_path(path: str) -> None:
    """With ``local_path``, the server sees that path; a stale file is replaced, and the file is removed at the end."""
    local_path = path + ".client"
    leave_stale(local_path)
    async with await trio_udp.open_unix_endpoint(path) as endpoint:
        async with await trio_udp.connect_unix(path, local_path=local_path) as connection:
            assert local_name(connection) == local_path
            await connection.send(b"x")
            assert peer_name(await endpoint.receive()) == local_path
        assert not is_there(local_path)


async def test_a_connection_that_fails_leaves_no_file(path: str) -> None:
    """If the server is not there, the file of ``local_path`` is removed again."""
    with pytest.raises(FileNotFoundError, match=f"cannot connect to {path}"):
        await trio_udp.connect_unix(path, local_path=path + ".client")
    assert os.listdir(os.path.dirname(path)) == []


async def test_connecting_to_a_stale_file(path: str) -> None:
    """Connecting to a file that a server has left behind is refused, with the path in the message."""
    leave_stale(path)
    with pytest.raises(ConnectionRefusedError, match=f"cannot connect to {path}"):
        await trio_udp.connect_unix(path)


# Files that exist already


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
async def test_a_stale_file_is_replaced(path: str, kind: int) -> None:
    """A file to which no socket is bound any more does not keep a server from starting."""
    leave_stale(path, kind)
    async with await trio_udp.open_unix_endpoint(path) as endpoint, await trio_udp.connect_unix(path) as connection:
        await exchange(endpoint, connection)
    assert not is_there(path)


@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
async def test_a_socket_in_use_is_not_replaced(path: str, kind: int, connected: bool) -> None:
    """The path of a socket in use, also of a connected or a stream socket, cannot be bound."""
    with socket.socket(socket.AF_UNIX, kind) as living, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        living.bind(path)
        if kind == socket.SOCK_STREAM:
            living.listen()
        elif connected:
            other.bind(path + ".other")
            living.connect(path + ".other")
        before = os.lstat(path).st_ino
        with pytest.raises(OSError, match=f"cannot bind {path}: ") as caught:
            await trio_udp.open_unix_endpoint(path)
        assert caught.value.errno == errno.EADDRINUSE
        assert os.lstat(path).st_ino == before


async def test_files_that_are_not_sockets_are_never_replaced(tmp_path: Path) -> None:
    """A regular file, a folder and a symbolic link are never replaced."""
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    leave_stale(str(tmp_path / "stale"))
    (tmp_path / "link").symlink_to("stale")
    for name in ("file", "folder", "link"):
        with pytest.raises(OSError, match=f"cannot bind {tmp_path / name}: it is not a socket") as caught:
            await trio_udp.open_unix_endpoint(tmp_path / name)
        assert caught.value.errno == errno.EADDRINUSE
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "link", "stale"]


async def test_closing_removes_only_its_own_file(path: str) -> None:
    """A file that another program has put in the place of ours stays."""
    endpoint = await trio_udp.open_unix_endpoint(path)
    os.unlink(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(path)
        await endpoint.aclose()
        assert is_there(path)


async def test_closing_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is removed also after the program has changed its folder. A missing file is no error."""
    monkeypatch.chdir(tmp_path)
    one, other = [await trio_udp.open_unix_endpoint(name) for name in ("one", "other")]
    assert local_name(one) == "one"
    monkeypatch.chdir("/")
    one.close()
    assert os.listdir(tmp_path) == ["other"]
    (tmp_path / "other").unlink()
    other.close()
    other.close()


async def test_many_open_one_stale_path(path: str) -> None:
    """Of many tasks that open one stale path at once, one gets it, and the others raise EADDRINUSE."""
    leave_stale(path)
    opened: list[trio_udp.Endpoint] = []
    errors: list[int | None] = []

    async def open_it() -> None:
        try:
            opened.append(await trio_udp.open_unix_endpoint(path))
        except OSError as error:
            errors.append(error.errno)

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(open_it)
    assert (len(opened), errors) == (1, [errno.EADDRINUSE] * 19)
    async with await trio_udp.connect_unix(path) as connection:
        await exchange(opened[0], connection)
    opened[0].close()


OPEN_AND_WAIT = """
import sys, trio, trio_udp
async def main():
    sys.stdin.readline()  # all begin at once
    try:
        async with await trio_udp.open_unix_endpoint(sys.argv[1]):
            print("opened", flush=True)
            sys.stdin.readline()
    except OSError as error:
        print(error.errno, flush=True)
        sys.stdin.readline()
trio.run(main)
"""


async def test_several_processes_open_one_stale_path(path: str) -> None:
    """Of several processes that open one stale path at once, one gets it, and none removes its socket."""
    leave_stale(path)
    arguments = [sys.executable, "-c", OPEN_AND_WAIT, path]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes: list[Any] = [subprocess.Popen(arguments, **pipes) for _ in range(4)]  # noqa: ASYNC220  # nothing else runs

    def press_enter() -> None:
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()

    press_enter()
    said = [process.stdout.readline().strip() for process in processes]
    assert sorted(said) == [str(errno.EADDRINUSE)] * 3 + ["opened"]
    (await trio_udp.connect_unix(path)).close()  # the file exists
    press_enter()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    assert not is_there(path)


async def test_a_locked_folder(path: str, autojump_clock: trio.abc.Clock) -> None:
    """While another process holds the lock on the folder, opening waits for it, and then gives up."""
    leave_stale(path)
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with pytest.raises(OSError, match=f"cannot bind {path}: another process holds a lock on its folder"):
            await trio_udp.open_unix_endpoint(path)
        assert trio.current_time() == pytest.approx(1)
    finally:
        os.close(folder)
    (await trio_udp.open_unix_endpoint(path)).close()


# Permissions


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777])
@pytest.mark.parametrize("mode", [0o000, 0o600, 0o660, 0o666, 0o777])
async def test_the_mode_of_the_file(path: str, mask: int, mode: int) -> None:
    """The file has exactly the given permissions, whatever the umask is."""
    with umask(mask):
        async with await trio_udp.open_unix_endpoint(path, mode=mode):
            assert permissions(path) == mode


async def test_the_umask_by_default(path: str) -> None:
    """Without a mode, the umask decides, as for any file."""
    with umask(0o027):
        async with await trio_udp.open_unix_endpoint(path):
            assert permissions(path) == 0o750


async def test_the_file_never_allows_more(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the file is being created, it never has more permissions than ``mode``."""
    seen = []
    chmod = os.chmod

    def look_first(*arguments: Any) -> None:
        seen.append(permissions(path))
        chmod(*arguments)

    monkeypatch.setattr(os, "chmod", look_first)
    for mask, mode in ((0o000, 0o600), (0o022, 0o666)):
        with umask(mask):
            (await trio_udp.open_unix_endpoint(path, mode=mode)).close()
    assert seen == [0o644]  # where the umask was 0, nothing was left to do


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": ""}, ValueError, "path must not be empty"),
        ({"path": 5}, TypeError, "path must be a path, not 5"),
        ({"path": "a\0b"}, ValueError, "path must not have a zero byte inside: 'a\\x00b'"),
        ({"path": "/nowhere/at/all"}, FileNotFoundError, "cannot bind /nowhere/at/all"),
        ({"path": "/etc/passwd/x"}, NotADirectoryError, "cannot bind /etc/passwd/x"),
        ({"path": "/tmp/" + "x" * 200}, OSError, f"cannot bind /tmp/{'x' * 200}"),
        ({"path": "\0" + "x" * 200}, OSError, f"cannot bind @{'x' * 200}"),
        ({"path": "x", "mode": "660"}, TypeError, "mode must be an int such as 0o660, not '660'"),
        ({"path": "x", "mode": 0o1777}, ValueError, "mode must be from 0 to 0o777, not 0o1777"),
        ({"path": "\0x", "mode": 0o660}, ValueError, "mode is for a path"),
        ({"path": "x", "max_datagram_size": 0}, ValueError, "max_datagram_size must be from 1 to"),
        ({"path": "x", "send_buffer": 0}, ValueError, "send_buffer must be from 1 to"),
        ({"path": "x", "receive_buffer": "1"}, TypeError, "receive_buffer must be an int"),
    ],
)
async def test_mistakes(arguments: Any, error: type[Exception], message: str) -> None:
    """A wrong argument raises an error of one line that names the value, and leaves nothing behind."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(error) as caught:
        await trio_udp.open_unix_endpoint(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir("/proc/self/fd") == before


async def test_buffers(path: str) -> None:
    """The requested buffer sizes are set, and reported."""
    async with await trio_udp.open_unix_endpoint(path, receive_buffer=50_000, send_buffer=60_000) as endpoint:
        assert endpoint.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 120_000
        assert endpoint.statistics().receive_buffer_requested == 50_000


async def test_a_datagram_of_the_largest_size(path: str) -> None:
    """``max_datagram_size`` may be larger than for UDP; longer datagrams count as truncated."""
    async with (
        await trio_udp.open_unix_endpoint(path, max_datagram_size=100_000) as endpoint,
        await trio_udp.connect_unix(path) as connection,
    ):
        await connection.send(bytes(100_001))
        await connection.send(bytes(100_000))
        assert len((await endpoint.receive()).payload) == 100_000
        assert endpoint.statistics().truncated == 1


async def test_the_choice_of_an_engine_is_for_udp(monkeypatch: pytest.MonkeyPatch) -> None:
    """With TRIO_UDP_ENGINE=linux, a program can still take over Unix-domain sockets."""
    monkeypatch.setenv("TRIO_UDP_ENGINE", "linux")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with theirs:
        async with trio_udp.Endpoint.from_socket(ours) as endpoint:
            theirs.send(b"a")
            with trio.fail_after(5):
                assert (await endpoint.receive()).payload == b"a"
