from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

import trio_udp
from trio_udp import Server

from ..conftest import StartServer, check_adds_up, echo


@pytest.fixture
def path(tmp_path: Path) -> str:
    """The name of a Unix-domain server."""
    return str(tmp_path / "server")


@pytest.fixture
def sockets() -> Iterator[ExitStack]:
    """Closes a test's sockets."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
async def start_on_unix(path: str, nursery: trio.Nursery) -> AsyncIterator[StartServer]:
    """Start a server on ``path``, or on another name; options are those of both functions."""
    servers = []

    async def start(
        handler: Any = echo,
        at: str = path,
        *,
        credentials: bool = False,
        send_buffer: int | None = None,
        **options: Any,
    ) -> Server:
        endpoint = await trio_udp.open_unix_endpoint(at, credentials=credentials, send_buffer=send_buffer)
        server: Server = await nursery.start(partial(trio_udp.serve_endpoints, handler, [endpoint], **options))
        servers.append(server)
        return server

    yield start
    for server in servers:
        check_adds_up(server)
