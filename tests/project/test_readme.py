"""The README tells the truth."""

from __future__ import annotations

import ast
import re
import socket
import subprocess
import sys
from pathlib import Path

import trio_udp

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_program_runs() -> None:
    """The five-line server answers in upper case."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    # How should a test learn that the server is there? By asking until it answers.
    with (
        subprocess.Popen([sys.executable, "-c", BLOCKS[0].replace("9999", str(port))]) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        try:
            sock.settimeout(0.1)
            answer = b""
            for _ in range(200):
                try:
                    sock.sendto(b"hello", ("127.0.0.1", port))
                    answer = sock.recv(100)
                    break
                except (TimeoutError, ConnectionRefusedError):
                    assert server.poll() is None
        finally:
            server.kill()
    assert answer == b"HELLO"


def test_every_name_exists() -> None:
    """What the README calls by name is there, with the arguments that it gives."""
    for block in BLOCKS:
        compile(block, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    names = set(re.findall(r"trio_udp\.([a-zA-Z]\w*)\b(?!\.py)", "".join(BLOCKS)))
    assert names
    assert names <= set(trio_udp.__all__)


def test_every_link_leads_somewhere() -> None:
    """Files that the README links to are there."""
    root = Path(__file__).parents[2]
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("https://"):
            assert (root / target).is_file(), target
