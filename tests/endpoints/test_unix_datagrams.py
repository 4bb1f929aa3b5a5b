"""Unix-domain datagrams on endpoints and connections: credentials, passed files, peers that cannot be answered."""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import trio_udp
from tests.conftest import steps_in
from trio_udp import Credentials, Endpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract names and credentials are Linux's")

OURSELVES = Credentials(os.getpid(), os.geteuid(), os.getegid())
SO_TIMESTAMPNS = 35

SEND = """
import os, socket, sys
path, uid, own = sys.argv[1:]
sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
if own:
    sock.bind(own)
os.setgid(int(uid))
os.setuid(int(uid))
sock.sendto(b"%d" % os.getpid(), path)
"""


@pytest.fixture
def path() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:  # other users may not enter those of tmp_path
        os.chmod(folder, 0o755)
        yield os.path.join(folder, "server")


@pytest.fixture
def unnamed() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        yield sock


@pytest.fixture
def named(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path + ".peer")
        sock.settimeout(5)
        yield sock


def peer_name(datagram: trio_udp.Datagram) -> Any:
    return datagram.peer_address  # a name is no Address to a type checker


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# Credentials


async def test_credentials(path: str, named: socket.socket, unnamed: socket.socket) -> None:
    """The kernel reports which process sent a datagram, whether the sender has a name or not."""
    async with await trio_udp.open_unix_endpoint(path, credentials=True) as endpoint:
        for sock in (named, unnamed):
            sock.sendto(b"x", path)
            datagram = await endpoint.receive()
            assert datagram.credentials == OURSELVES
            assert datagram.ancillary == ()
            assert peer_name(datagram) == (sock.getsockname() or None)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("has_name", [False, True])
async def test_credentials_of_another_user(path: str, has_name: bool) -> None:
    """Another process has its own process ID, and the user ID that it had when it sent."""
    async with await trio_udp.open_unix_endpoint(path, mode=0o666, credentials=True) as endpoint:
        own = path + ".other" if has_name else ""
        await trio.run_process([sys.executable, "-c", SEND, path, "1234", own])
        datagram = await endpoint.receive()
        assert datagram.credentials == Credentials(int(datagram.payload), 1234, 1234)
        assert peer_name(datagram) == (own or None)


async def test_no_credentials_by_default(path: str, named: socket.socket) -> None:
    """Without ``credentials=True``, credentials are None."""
    async with await trio_udp.open_unix_endpoint(path) as endpoint:
        named.sendto(b"x", path)
        assert (await endpoint.receive()).credentials is None


async def test_credentials_of_a_socket_that_is_taken_over(path: str, unnamed: socket.socket) -> None:
    """A socket with SO_PASSCRED, such as one from systemd, gives credentials too, beside other control messages."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    sock.bind(path)
    async with Endpoint.from_socket(sock) as endpoint:
        unnamed.connect(path)
        before = open_files()
        socket.send_fds(unnamed, [b"x"], [0, 1])
        datagram = await endpoint.receive()
        assert datagram.credentials == OURSELVES
        assert [message[:2] for message in datagram.ancillary] == [(socket.SOL_SOCKET, SO_TIMESTAMPNS)]
        assert open_files() == before


async def test_claimed_credentials(path: str, unnamed: socket.socket) -> None:
    """A process without privileges cannot pose as another one: its datagram does not arrive."""
    if os.geteuid() != 0:
        pytest.skip("root tries it as another user")
    async with await trio_udp.open_unix_endpoint(path, credentials=True, mode=0o666) as endpoint:
        claim = (socket.SOL_SOCKET, 2, struct.pack("@iII", 1, 0, 0))
        script = (
            "import os, socket, sys; os.setuid(1234); sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); "
            f"sock.sendto(b'honest', sys.argv[1]); sock.sendmsg([b'x'], [{claim!r}], 0, sys.argv[1])"
        )
        result = await trio.run_process([sys.executable, "-c", script, path], capture_stderr=True, check=False)
        assert b"PermissionError" in result.stderr
        assert (await endpoint.receive()).payload == b"honest"
        with pytest.raises(trio.WouldBlock):
            endpoint.receive_nowait()


def test_credentials_are_values() -> None:
    """Credentials can be compared and hashed, and never change."""
    assert len({Credentials(1, 2, 3), Credentials(1, 2, 3), Credentials(1, 2, 4)}) == 2
    with pytest.raises(AttributeError):
        Credentials(1, 2, 3).uid = 0  # type: ignore[misc]


# Passed files


@pytest.mark.parametrize("credentials", [False, True])
async def test_passed_files_are_never_ours(path: str, unnamed: socket.socket, credentials: bool) -> None:
    """A peer that passes open files uses up none of our descriptors, however many it passes."""
    async with await trio_udp.open_unix_endpoint(path, credentials=credentials) as endpoint:
        unnamed.connect(path)
        before = open_files()
        for count in (1, 2, 100, 253):
            socket.send_fds(unnamed, [b"%d" % count], [0] * count)
            datagram = await endpoint.receive()
            assert (datagram.payload, datagram.ancillary) == (b"%d" % count, ())
            assert datagram.credentials == (OURSELVES if credentials else None)
            assert open_files() == before


async def test_passed_files_with_other_control_messages(path: str, unnamed: socket.socket) -> None:
    """Passed files are closed also on a socket that receives other control messages, even if they do not fit."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    sock.bind(path)
    async with Endpoint.from_socket(sock) as endpoint:
        unnamed.connect(path)
        before = open_files()
        for count in (1, 253):
            socket.send_fds(unnamed, [b"x"], [0] * count)
            datagram = await endpoint.receive()
            assert [message[:2] for message in datagram.ancillary] == [(socket.SOL_SOCKET, SO_TIMESTAMPNS)]
            assert open_files() == before


# Sending


async def test_a_payload_that_is_too_long(path: str, named: socket.socket) -> None:
    """A payload longer than any send buffer raises EMSGSIZE at every call; nothing waits or is counted."""
    endpoint = await trio_udp.open_unix_endpoint(path, send_buffer=50_000)
    named.sendto(b"x", path)
    datagram, peer = await endpoint.receive(), named.getsockname()
    async with endpoint, await trio_udp.connect_unix(path) as connection:
        limit = endpoint.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - 32
        for size in (limit + 1, 200_000, 20_000_000):
            payload = bytes(size)
            with pytest.raises(OSError, match="Message too long"):
                await datagram.reply(payload)
            with pytest.raises(OSError, match="Message too long"):
                datagram.reply_nowait(payload)
            with pytest.raises(OSError, match="Message too long"):
                await endpoint.send_to(payload, peer)
            with pytest.raises(OSError, match="Message too long"):
                endpoint.send_to_nowait(payload, peer)
        with pytest.raises(OSError, match="Message too long"):
            await connection.send(bytes(20_000_000))
        with pytest.raises(OSError, match="Message too long"):
            connection.send_nowait(bytes(20_000_000))
        assert (endpoint.statistics().sent, endpoint.statistics().send_errors) == (0, 0)
        await datagram.reply(bytes(limit))
        assert len(named.recv(limit + 1)) == limit


async def test_a_peer_without_a_name(path: str, unnamed: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    """A reply to a peer without a name is counted as a send error, and not logged."""
    async with await trio_udp.open_unix_endpoint(path) as endpoint:
        unnamed.sendto(b"x", path)
        datagram = await endpoint.receive()
        assert peer_name(datagram) is None
        await datagram.reply(b"y")
        datagram.reply_nowait(b"y")
        assert endpoint.statistics().errors == {"EDESTADDRREQ": 2}
        assert [record for record in caplog.records if record.levelno > logging.INFO] == []
        assert "None" in repr(datagram)


async def test_peers_that_cannot_be_reached(path: str, named: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    """An error that a peer causes at its own path is counted for a reply, raised by ``send_to``, and never logged."""
    async with await trio_udp.open_unix_endpoint(path) as endpoint:
        named.sendto(b"x", path)
        datagram, peer = await endpoint.receive(), named.getsockname()
        os.unlink(peer)
        expected = ["ENOENT"]
        await datagram.reply(b"gone")
        os.mkdir(peer)
        await datagram.reply(b"a folder")
        os.rmdir(peer)
        os.symlink(peer, peer)
        await datagram.reply(b"a loop")
        os.unlink(peer)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
            stream.bind(peer)
            await datagram.reply(b"a stream socket")
        expected += ["ECONNREFUSED", "ELOOP", "EPROTOTYPE"]
        assert endpoint.statistics().errors == dict.fromkeys(expected, 1)
        with pytest.raises(ConnectionRefusedError):
            await endpoint.send_to(b"nobody has it any more", peer)
        with pytest.raises(FileNotFoundError):
            endpoint.send_to_nowait(b"no such file", peer + "?")
        assert [record for record in caplog.records if record.levelno > logging.INFO] == []


async def test_a_name_that_fills_its_structure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A peer may have a path of 108 bytes, without a zero byte at its end, but Python cannot send to it."""
    import ctypes

    path = str(tmp_path / "s")
    async with await trio_udp.open_unix_endpoint(path) as endpoint:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
            name = (os.fsencode(path) + b"x" * 108)[:108]
            address = struct.pack("@H", socket.AF_UNIX) + name
            assert ctypes.CDLL(None, use_errno=True).bind(peer.fileno(), address, len(address)) == 0
            peer.sendto(b"x", path)
            datagram = await endpoint.receive()
            assert peer_name(datagram) == os.fsdecode(name)
            await datagram.reply(b"y")
            assert endpoint.statistics().errors == {"ENAMETOOLONG": 1}
            assert [record for record in caplog.records if record.levelno > logging.INFO] == []


async def test_send_to_names(path: str, named: socket.socket) -> None:
    """``send_to`` takes paths and abstract names, as str or bytes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as abstract:
        abstract.bind("")
        abstract.settimeout(5)
        async with await trio_udp.open_unix_endpoint(path) as endpoint:
            for sock in (named, abstract):
                name: Any = sock.getsockname()
                for same in (name, os.fsencode(name), os.fsdecode(name)):
                    await endpoint.send_to(b"x", same)
                    assert sock.recvfrom(10) == (b"x", path)
            for wrong in ("", b""):
                with pytest.raises(ValueError, match="no endpoint here can send to"):
                    await endpoint.send_to(b"x", wrong)
            with pytest.raises(ValueError, match="no endpoint here can send to"):
                await endpoint.send_to(b"x", ("127.0.0.1", 9))


# Connections


async def test_a_server_that_does_not_read(path: str) -> None:
    """A full server makes ``send`` wait without spinning; everything arrives once and in order."""
    async with await trio_udp.open_unix_endpoint(path) as endpoint, await trio_udp.connect_unix(path) as connection:
        sent = 0
        with suppress(trio.WouldBlock):
            while True:
                connection.send_nowait(b"%d" % sent)
                sent += 1
        assert 0 < sent < 10_000
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.send_many, [b"%d" % i for i in range(sent, sent + 100)])
            assert await steps_in(0.2) < 100
            with trio.fail_after(5):
                received = [(await endpoint.receive()).payload for _ in range(sent + 100)]
        assert received == [b"%d" % i for i in range(sent + 100)]
        assert (connection.statistics().sent, connection.statistics().send_errors) == (sent + 100, 0)


async def test_a_server_that_goes_away_and_comes_back(path: str) -> None:
    """Without its server, each send of a connection raises ConnectionRefusedError; a new server is reached again."""
    first = await trio_udp.open_unix_endpoint(path)
    async with await trio_udp.connect_unix(path) as connection:
        await connection.send(b"x")
        first.close()
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                await connection.send(b"refused")
        async with await trio_udp.open_unix_endpoint(path) as second:
            await connection.send(b"question")
            datagram = await second.receive()
            await datagram.reply(b"answer")
            assert await connection.receive() == b"answer"
            assert connection.statistics().errors == {"ECONNREFUSED": 3}


async def test_a_server_that_goes_away_while_a_send_waits(path: str) -> None:
    """A send that waits for room raises at once when the server is gone."""
    endpoint = await trio_udp.open_unix_endpoint(path)
    async with await trio_udp.connect_unix(path) as connection:

        async def fill() -> None:
            while True:
                await connection.send(b"x")

        refused = pytest.RaisesGroup(ConnectionRefusedError)
        with trio.fail_after(5), refused:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fill)
                await trio.testing.wait_all_tasks_blocked(0.01)
                endpoint.close()


async def test_a_connection_receives_from_its_server_only(path: str, named: socket.socket) -> None:
    """A connection never receives datagrams that other peers send to its name, even while its server is gone."""
    async with await trio_udp.connect_unix(named.getsockname(), local_path=path) as connection:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            with pytest.raises(PermissionError):
                stranger.sendto(b"forged", path)
            server_path = named.getsockname()
            named.close()
            os.unlink(server_path)
            with pytest.raises(ConnectionRefusedError):
                await connection.send(b"refused")
            stranger.sendto(b"forged", path)  # the kernel allows it now
            with pytest.raises(trio.WouldBlock):
                connection.receive_nowait()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as again:
            again.bind(server_path)
            await connection.send(b"question")
            again.sendto(b"answer", path)
            assert await connection.receive() == b"answer"


async def test_a_server_that_may_not_be_written_to(path: str) -> None:
    """Connecting to a file without write permission is refused, with the path in the message."""
    if os.geteuid() != 0:
        pytest.skip("root tries it as another user")
    script = (
        "import os, sys, trio, trio_udp\n"
        "async def main():\n"
        "    os.setuid(1234)\n"
        "    await trio_udp.connect_unix(sys.argv[1])\n"
        "trio.run(main)"
    )
    async with await trio_udp.open_unix_endpoint(path, mode=0o600):
        result = await trio.run_process([sys.executable, "-c", script, path], capture_stderr=True, check=False)
        assert f"cannot connect to {path}" in result.stderr.decode()
