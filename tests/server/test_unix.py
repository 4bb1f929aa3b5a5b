"""A server on a Unix-domain socket: what identifies a client, limits, stopping, and the socket file."""

from __future__ import annotations

import logging
import os
import resource
import socket
import sys
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

import trio_udp
from tests.conftest import StartServer, check_adds_up, echo
from trio_udp import Client, Limits, Server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract names and credentials are Linux's")

SEND_AS = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
os.setuid(int(sys.argv[2]))
if len(sys.argv) > 3:
    sock.bind("\\0" + sys.argv[3])
for payload in ("1", "2"):
    sock.sendto(payload.encode(), "\\0" + sys.argv[1])
"""


def peer(sockets: ExitStack, name: str = "", *, connect: str | None = None) -> socket.socket:
    """Open a socket with a name that the kernel chooses, or with a path."""
    sock = sockets.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    sock.bind(name)
    sock.settimeout(5)
    if connect is not None:
        sock.connect(connect)
    return sock


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def send_as(server: Server, uid: int, *name: str) -> None:
    """Let another process send two datagrams."""
    own: Any = server.endpoints[0].local_address
    await trio.run_process([sys.executable, "-c", SEND_AS, own[1:].decode(), str(uid), *name])
    await settle()


# What identifies a client


async def test_each_name_is_a_client(start_on_unix: StartServer, path: str, sockets: ExitStack) -> None:
    """Paths and abstract names are clients, each with its own datagrams in order."""
    seen: dict[Any, list[bytes]] = {}

    async def handler(client: Client) -> None:
        async for payload in client:
            seen.setdefault(client.peer_address, []).append(payload)

    await start_on_unix(handler)
    peers = [peer(sockets, path + ".peer"), peer(sockets), peer(sockets)]
    for number in range(3):
        for sock in peers:
            sock.sendto(b"%d" % number, path)
            await settle()
    assert seen == {sock.getsockname(): [b"0", b"1", b"2"] for sock in peers}


async def test_peers_without_a_name_are_one_client(start_on_unix: StartServer, path: str, sockets: ExitStack) -> None:
    """All peers without a name are one client, because nothing distinguishes them, and it cannot be answered."""
    server = await start_on_unix()
    for _ in range(3):
        sock = sockets.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        sock.sendto(b"x", path)
        await settle()
    assert [client.peer_address for client in server.clients] == [None]
    assert server.statistics().errors == {"EDESTADDRREQ": 3}
    assert (server.statistics().clients_started, server.statistics().handler_errors) == (1, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_credentials_tell_peers_without_a_name_apart(start_on_unix: StartServer) -> None:
    """With credentials, each process without a name is a client, and every datagram has its sender's credentials."""
    seen: list[tuple[int, bytes]] = []

    async def handler(client: Client) -> None:
        async for payload in client:
            assert client.credentials is not None
            seen.append((client.credentials.uid, payload))

    server = await start_on_unix(handler, f"\0trio_udp {os.getpid()}", credentials=True)
    for uid in (1234, 1235, 1234):
        await send_as(server, uid)
    assert seen == [(1234, b"1"), (1234, b"2"), (1235, b"1"), (1235, b"2"), (1234, b"1"), (1234, b"2")]
    assert server.statistics().clients == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_a_name_that_changes_hands(start_on_unix: StartServer) -> None:
    """With credentials, another process that takes over a name is another client."""
    server = await start_on_unix(echo, f"\0trio_udp {os.getpid()}", credentials=True)
    for uid in (1234, 1235):
        await send_as(server, uid, f"trio_udp peer {os.getpid()}")
    found = [client.credentials for client in server.clients]
    assert sorted(credentials.uid for credentials in found if credentials is not None) == [1234, 1235]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_a_user_is_a_host(start_on_unix: StartServer) -> None:
    """With credentials, ``clients_per_host`` counts the clients of a user, who can have any number of names."""
    name = f"\0trio_udp {os.getpid()}"
    server = await start_on_unix(echo, name, credentials=True, limits=Limits(clients_per_host=1))
    for number, uid in enumerate((1234, 1234, 1235)):
        await send_as(server, uid, f"trio_udp peer {os.getpid()} {number}")
    assert (server.statistics().clients, server.statistics().refused_full) == (2, 2)


async def test_our_own_name_is_refused(
    start_on_unix: StartServer, path: str, sockets: ExitStack, nursery: trio.Nursery
) -> None:
    """A source with the name of an endpoint of this server is refused, so that the server does not answer itself."""
    server = await start_on_unix()
    other = await trio_udp.open_unix_endpoint(path + ".other")
    server.add_endpoint(other)
    names = [path, path + ".other"]
    for name in names:  # as in another mount namespace, where a name can be bound again
        os.rename(name, name + ".moved")
    for name in names:
        forger = peer(sockets, name)
        for target in names:
            forger.sendto(b"x", target + ".moved")
            await settle()
    assert (server.statistics().refused_source, server.statistics().clients_started) == (4, 0)


async def test_connecting_to_a_peer(start_on_unix: StartServer, path: str, sockets: ExitStack) -> None:
    """Server.connect reaches a name, but not the server's own, and not on an endpoint with credentials."""
    server = await start_on_unix()
    sock = peer(sockets)
    client = server.connect(sock.getsockname())
    await client.send(b"question")
    assert sock.recvfrom(100) == (b"question", path)
    sock.sendto(b"answer", path)
    assert await client.receive() == b"answer"
    client.close()
    await server.send_to(b"news", sock.getsockname())
    assert sock.recv(100) == b"news"
    with pytest.raises(ValueError, match="cannot connect to this server itself"):
        server.connect(path)
    with_credentials = await start_on_unix(echo, path + ".other", credentials=True)
    with pytest.raises(ValueError, match="known only once it has sent a datagram"):
        with_credentials.connect(sock.getsockname())


# Limits


async def test_limits(start_on_unix: StartServer, path: str, sockets: ExitStack) -> None:
    """``accept``, ``max_clients`` and ``max_datagram_size`` work as for UDP."""

    def accept(datagram: trio_udp.Datagram) -> bool | bytes:
        return {b"yes": True, b"no": False}.get(datagram.payload, b"who are you?")

    server = await start_on_unix(accept=accept, limits=Limits(max_clients=2))
    for payload in (b"no", b"what is it", b"yes", b"yes", b"yes"):
        sock = peer(sockets, connect=path)
        sock.send(payload)
        await settle()
        if payload == b"what is it":
            assert sock.recv(100) == b"who are you?"
    s = server.statistics()
    assert (s.refused_by_accept, s.answered_by_accept, s.clients, s.refused_full) == (1, 1, 2, 1)


async def test_silence(start_on_unix: StartServer, path: str, sockets: ExitStack) -> None:
    """A silent client ends after ``idle_timeout``."""
    ended = []

    async def handler(client: Client) -> None:
        async for _ in client:
            pass
        ended.append(client.ended)
        server.stop()

    server = await start_on_unix(handler, idle_timeout=0.05)
    peer(sockets).sendto(b"x", path)
    with trio.fail_after(5):
        await server.wait_stopping()
    assert ended == ["idle"]
    assert server.statistics().clients_expired == 1


async def test_a_flood_from_ten_thousand_names(start_on_unix: StartServer, path: str, sockets: ExitStack) -> None:
    """10,000 peers take no more than ``max_clients`` places, each gets an answer, and every datagram is counted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 11_000:
        pytest.skip("this process may not open so many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 11_000), hard))
    sockets.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
    server = await start_on_unix(limits=Limits(max_clients=1_000))
    peers = [peer(sockets, connect=path) for _ in range(10_000)]
    with trio.fail_after(30):
        for sock in peers:
            await trio.lowlevel.wait_writable(sock)
            sock.send(b"x")
        await settle()
    s = server.statistics()
    assert (s.received, s.clients, s.refused_full, s.sent, s.send_errors) == (10_000, 1_000, 9_000, 1_000, 0)
    assert {sock.recv(100) for sock in peers[:1_000]} == {b"x"}


# Stopping


async def test_datagrams_that_have_arrived_are_handled(
    start_on_unix: StartServer, path: str, sockets: ExitStack
) -> None:
    """A server that stops handles and answers all datagrams that have arrived, refuses the rest, removes its file."""
    server = await start_on_unix()
    sock = peer(sockets, connect=path)
    sock.setblocking(False)
    sent = 0
    try:
        while sent < 100:
            sock.send(b"%d" % sent)
            sent += 1
    except BlockingIOError:
        pass
    server.stop()
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert [sock.recv(100) for _ in range(sent)] == [b"%d" % number for number in range(sent)]
    assert server.statistics().delivered == sent
    with pytest.raises(FileNotFoundError):
        await trio_udp.connect_unix(path)


async def test_a_file_that_is_deleted_under_the_server(
    start_on_unix: StartServer, path: str, sockets: ExitStack
) -> None:
    """If its file is deleted, a server still serves connected peers, and a new server can take and keep the path."""
    server = await start_on_unix()
    sock = peer(sockets, connect=path)
    os.unlink(path)
    sock.send(b"x")
    await settle()
    assert sock.recv(100) == b"x"
    with pytest.raises(FileNotFoundError):
        await trio_udp.connect_unix(path)
    await start_on_unix()
    server.stop()
    await trio.testing.wait_all_tasks_blocked(0.01)
    async with await trio_udp.connect_unix(path) as connection:
        await connection.send(b"y")
        with trio.fail_after(5):
            assert await connection.receive() == b"y"


@pytest.mark.parametrize("how", ["close", "stop", "close the socket"])
async def test_closing_in_the_middle(start_on_unix: StartServer, path: str, sockets: ExitStack, how: str) -> None:
    """If an endpoint is closed while datagrams arrive, the counters add up, and no task is left."""
    server = await start_on_unix(drain_timeout=0.2)
    endpoint = server.endpoints[0]
    extra = await trio_udp.open_unix_endpoint(path + ".other")
    server.add_endpoint(extra)  # the server goes on
    peers = [peer(sockets, connect=path) for _ in range(20)]
    for sock in peers:
        sock.setblocking(False)
    for number in range(50):
        for sock in peers:
            try:
                sock.send(b"x")
            except (BlockingIOError, ConnectionRefusedError, OSError):
                pass
        await trio.lowlevel.checkpoint()
        if number == 25:
            if how == "close":
                endpoint.close()
            elif how == "stop":
                server.stop()
            else:
                endpoint.socket.close()
    await trio.testing.wait_all_tasks_blocked(0.01)
    check_adds_up(server)
    assert server.statistics().received > 0
    assert endpoint.closed


async def test_handing_a_socket_over(path: str, sockets: ExitStack, nursery: trio.Nursery) -> None:
    """A server does not touch the file of a supervisor's socket, and leaves unread datagrams to the next server."""
    held = peer(sockets, path)
    sock = peer(sockets, connect=path)
    for payload in (b"one", b"two"):
        endpoint = trio_udp.Endpoint.from_socket(held.dup(), shared=True)
        server: Server = await nursery.start(partial(trio_udp.serve_endpoints, echo, [endpoint]))
        sock.send(payload)
        await settle()
        assert sock.recv(100) == payload
        server.stop()
        await trio.testing.wait_all_tasks_blocked(0.01)
        check_adds_up(server)
    assert os.path.exists(path)  # noqa: ASYNC240


async def test_names_cannot_forge_lines_of_the_log(
    start_on_unix: StartServer, path: str, sockets: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    """Control characters and invalid UTF-8 in a peer's name are escaped in every log line."""
    described: list[str] = []

    async def fail(channel: trio_udp.TypedChannel[int, bytes]) -> None:
        await channel.receive()
        described.append(repr(channel))
        raise ValueError("no")

    def accept(datagram: trio_udp.Datagram) -> bool:
        described.append(repr(datagram))
        return bool(datagram.payload[0:1].isalpha() or int(datagram.payload))

    server = await start_on_unix(trio_udp.typed(fail, decode=int, encode=bytes), accept=accept)
    for name in (b"a\nERROR:forged", b"b\xff\x1b[31m"):
        sock = sockets.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        sock.bind(os.path.dirname(os.fsencode(path)) + b"/" + name)
        for payload in (b"", b"junk", b"1"):  # accept raises; it does not decode; the handler raises
            sock.sendto(payload, path)
        await settle()
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 6
    assert all(line.isprintable() for line in [*lines, *described])
    assert server.statistics().handler_errors == 2
