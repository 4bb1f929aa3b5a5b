"""The pages of docs/ tell the truth: all their code runs. How is in pages.py."""

from __future__ import annotations

import gc
import importlib.util
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .pages import DOCS, Block, as_module, blocks, pages

PROGRAMS = [block for page in pages() for block in blocks(page) if block.dialogue]
TIMEOUT = 20.0  # seconds


def collect() -> None:
    """Make the tests inside pages tests of this module."""
    threshold = gc.get_threshold()
    for page in pages():
        module = as_module(page)
        prefix = re.sub(r"\W", "_", str(page.relative_to(DOCS).with_suffix("")))
        for name, thing in vars(module).items():
            if name.startswith("test_"):
                globals()[f"test_{prefix}__{name.removeprefix('test_')}"] = thing
    gc.set_threshold(*threshold)  # one page is about it


collect()


def command(block: Block, folder: Path, port: int) -> list[str]:
    """Write a program down, with another port, and return how to run it."""
    assert "9999" in block.code
    source = folder / ("server.go" if block.language == "go" else "server.py")
    source.write_text(block.code.replace("9999", str(port)))
    if block.language == "go":
        if shutil.which("go") is None:
            pytest.skip("needs go")
        binary = folder / "server"
        subprocess.run(["go", "build", "-o", str(binary), str(source)], check=True, cwd=folder)
        return [str(binary)]
    for library in re.findall(r"^(?:import|from) (\w+)", block.code, re.MULTILINE):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}")
    return [sys.executable, str(source)]


def ask(sock: socket.socket, payload: bytes) -> bytes:
    """Send a datagram, again while nobody listens yet, and return the answer."""
    end = time.monotonic() + TIMEOUT
    while True:
        try:
            sock.send(payload)
            return sock.recv(2_000)
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_program(block: Block, tmp_path: Path) -> None:
    """A program of a page answers as its page says."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with (
        subprocess.Popen(command(block, tmp_path, port), stderr=subprocess.PIPE, text=True, cwd=tmp_path) as program,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        try:
            sock.settimeout(TIMEOUT)
            sock.connect(("127.0.0.1", port))
            assert [(sent, ask(sock, sent)) for sent, _ in block.dialogue] == list(block.dialogue)
        finally:
            program.kill()
            assert program.stderr is not None
            errors = program.stderr.read()
    assert "Traceback" not in errors


def test_pages_have_code() -> None:
    """Programs and tests of pages were found."""
    assert len(PROGRAMS) > 10
    assert sum(name.startswith("test_howto_") for name in globals()) > 10
