"""The code in docs/ and CONTRIBUTING.md works. pages.py says how it is run."""

from __future__ import annotations

import ast
import gc
import importlib.util
import inspect
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import trio_udp

from ..conftest import free_port
from .pages import ROOT, Block, as_module, awaits_outside_functions, blocks, pages

ALL_BLOCKS = [block for page in pages() for block in blocks(page)]
PROGRAMS = [block for block in ALL_BLOCKS if block.dialogue]
TIMEOUT = 20.0  # seconds


def collect() -> None:
    """Make the tests inside pages tests of this module."""
    threshold = gc.get_threshold()
    for page in pages():
        if awaits_outside_functions(page):
            continue
        module = as_module(page)
        prefix = re.sub(r"\W", "_", str(page.relative_to(ROOT).with_suffix("")))
        for name, thing in vars(module).items():
            if name.startswith("test_"):
                globals()[f"test_{prefix}__{name.removeprefix('test_')}"] = thing
    gc.set_threshold(*threshold)  # one page sets it


collect()


def command(block: Block, folder: Path, port: int) -> list[str]:
    """Write a program to a file, with another port, and return the command that runs it."""
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
    """Send a datagram, again while nothing listens yet, and return the answer."""
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
    port = free_port()
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


@pytest.mark.parametrize("block", [block for block in ALL_BLOCKS if block.language == "python"], ids=str)
def test_names_and_arguments(block: Block) -> None:
    """Every name of trio_udp in a page exists, and takes the keywords in the page."""
    for node in ast.walk(compile(block.code, str(block), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST)):
        match node:
            case ast.Attribute(value=ast.Name("trio_udp"), attr=name):
                assert name == "testing" or hasattr(trio_udp, name), name
            case ast.Call(func=ast.Attribute(value=ast.Name("trio_udp"), attr=name), keywords=keywords):
                parameters = inspect.signature(getattr(trio_udp, name)).parameters
                assert {keyword.arg for keyword in keywords} - {None} <= set(parameters)


def test_pages_have_code() -> None:
    """Programs and tests of pages were found."""
    assert len(PROGRAMS) > 10
    assert sum(name.startswith("test_docs_howto_") for name in globals()) > 10
