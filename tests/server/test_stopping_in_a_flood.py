"""Stopping while datagrams arrive faster than they can be read."""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import trio

from trio_udp import Server, datagram_handler, serve

from ..conftest import check_adds_up, echo

UDP_SEGMENT = 103  # from linux/udp.h


def send(sock: socket.socket, payload: bytes, times: int) -> None:
    for _ in range(times):
        with suppress(ConnectionRefusedError):  # the server has closed its socket
            sock.send(payload)


async def stop_in_a_flood(handler: Any, payload: bytes, times: int, *, segment: int = 0, **options: Any) -> Server:
    """Stop a server with a backlog. Each time it lets other tasks run, as many datagrams arrive again."""

    async def flood() -> None:
        while True:
            send(sock, payload, times)
            await trio.lowlevel.checkpoint()

    with trio.fail_after(5), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        async with trio.open_nursery() as flooding:
            async with trio.open_nursery() as nursery:
                server: Server = await nursery.start(partial(serve, handler, 0, host="127.0.0.1", **options))
                sock.connect(server.endpoints[0].local_address)
                if segment:
                    sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, segment)
                send(sock, payload, times)
                server.stop()
                flooding.start_soon(flood)
            flooding.cancel_scope.cancel()
    check_adds_up(server)
    return server


@pytest.mark.parametrize("options", [{"proxies": ["127.0.0.1"]}, {"max_datagram_size": 3}], ids=["malformed", "long"])
@pytest.mark.parametrize("handler", [echo, datagram_handler(lambda datagram: None)], ids=["echo", "function"])
async def test_a_flood_of_nothing_usable_does_not_keep_a_server(engine: str, handler: Any, options: Any) -> None:
    """A stop ends even if malformed or truncated datagrams keep arriving faster than they are read."""
    server = await stop_in_a_flood(handler, b"junk", 100, **options)
    statistics = server.statistics()
    assert statistics.received == statistics.refused_malformed + statistics.truncated


@pytest.mark.skipif(sys.platform != "linux", reason="UDP_SEGMENT is an option of Linux")
async def test_a_flood_of_coalesced_datagrams_is_not_caught_up_with(engine: str) -> None:
    """Catching up reads at most a few times the datagrams that had arrived at the stop, also if they are coalesced."""
    handler = datagram_handler(lambda datagram: None)
    server = await stop_in_a_flood(handler, bytes(60 * 100), 40, segment=100)
    assert 40 * 60 <= server.statistics().delivered < 5 * 40 * 60
