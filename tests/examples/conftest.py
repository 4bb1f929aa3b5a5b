"""``start`` and ``serve`` run an example as a process, ``load`` imports one to run it on a simulated network.

``program`` finds a program that an example is tested with, and ``received`` empties a connection.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from contextlib import suppress
from types import ModuleType

import pytest
import trio
import trio.testing

import trio_udp

from ..project.conftest import EXAMPLES, serve as serve, start as start

# An example that is run as a script finds those beside it; so do tests, after everything else that is installed.
sys.path.append(str(EXAMPLES))


def load(name: str) -> ModuleType:
    """Import an example. It may import others."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(name: str, package: str) -> str:
    """Return the path of a program. Without it the test is skipped; in CI, where it is installed, the test fails."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        message = f"{name} is missing: install Debian's package {package}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path


async def received(connection: trio_udp.Connection) -> list[bytes]:
    """Return all payloads that have arrived."""
    await trio.testing.wait_all_tasks_blocked()
    payloads = []
    with suppress(trio.WouldBlock):
        while True:
            payloads.append(connection.receive_nowait())
    return payloads
