"""Examples for UDP, unchanged on Unix-domain sockets."""

from __future__ import annotations

import io
import logging
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import trio_udp

from ..conftest import check_adds_up
from .conftest import load

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs Unix-domain sockets")


async def serve_unix(nursery: trio.Nursery, path: Path, handler: Any, **options: Any) -> trio_udp.Server:
    endpoint = await trio_udp.open_unix_endpoint(path)
    server: trio_udp.Server = await nursery.start(
        partial(trio_udp.serve_endpoints, handler, [endpoint], on_error=trio_udp.raise_error, **options)
    )
    return server


def send_without_name(path: Path, payload: bytes) -> None:
    """Send from a socket that is not bound, as logger and socat do."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(payload, str(path))


async def test_uppercase(nursery: trio.Nursery, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The uppercase server prints peers with a name and peers without one."""
    path = tmp_path / "server"
    await serve_unix(nursery, path, load("uppercase").uppercase)
    async with await trio_udp.connect_unix(path, local_path=tmp_path / "peer") as connection:
        send_without_name(path, b"a")
        await connection.send(b"b")
        with trio.fail_after(5):
            assert await connection.receive() == b"B"
        await trio.testing.wait_all_tasks_blocked()
    printed = sorted(capsys.readouterr().out.splitlines())  # by two clients at the same time
    assert printed == [f"'{tmp_path / 'peer'}' wrote b'b'", "None wrote b'a'"]


async def test_collector(nursery: trio.Nursery, tmp_path: Path) -> None:
    """The collector writes the lines of peers with a name and of peers without one."""
    path, file = tmp_path / "server", io.BytesIO()
    handler = trio_udp.datagram_handler(load("collector").Collector(file).handler)
    server = await serve_unix(nursery, path, handler)
    async with await trio_udp.connect_unix(path, local_path=tmp_path / "peer") as connection:
        send_without_name(path, b"a")
        await connection.send(b"b")
        server.stop()
        await server.wait_stopping()
        with trio.fail_after(5):
            while server.statistics().delivered < 2:
                await trio.lowlevel.checkpoint()
    assert file.getvalue().decode() == f"None a\n'{tmp_path / 'peer'}' b\n"


async def test_chat_room(nursery: trio.Nursery, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The token of one path does not admit another, and a peer without a name gets none."""
    path, chat_room = tmp_path / "server", load("chat_room")
    server = await serve_unix(nursery, path, partial(chat_room.handler, {}), accept=chat_room.accept)
    async with (
        await trio_udp.connect_unix(path, local_path=tmp_path / "ada") as ada,
        await trio_udp.connect_unix(path, local_path=tmp_path / "eve") as eve,
    ):
        with trio.fail_after(5):
            send_without_name(path, b"hello")
            await ada.send(b"hello")
            _, token = (await ada.receive()).split()
            await eve.send(b"join %b tea eve" % token)
            await ada.send(b"join %b tea ada" % token)
            assert await ada.receive() == b"ada joins\n"
    statistics = server.statistics()
    assert (statistics.clients_started, statistics.refused_by_accept, statistics.answered_by_accept) == (1, 1, 2)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    check_adds_up(server)


async def test_relay_drops_payloads_that_are_too_long_for_the_server(nursery: trio.Nursery, tmp_path: Path) -> None:
    """A payload that is too long for the server's socket is lost, and the conversation goes on."""

    async def echo(client: trio_udp.Client) -> None:
        async for payload in client:
            await client.send(payload)

    upstream: trio_udp.Server = await nursery.start(partial(trio_udp.serve, echo, 0, host="127.0.0.1"))
    path, to = tmp_path / "server", upstream.endpoints[0].local_address
    server = await serve_unix(nursery, path, partial(load("relay").relay, partial(trio_udp.connect, *to), 10))
    async with await trio_udp.connect_unix(path) as connection:
        await connection.send(bytes(65_508))
        await connection.send(b"a")
        with trio.fail_after(5):
            assert await connection.receive() == b"a"
    assert server.statistics().clients_started == 1
