"""The code, names and links in the README and the other documents are right."""

from __future__ import annotations

import ast
import inspect
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import trio_udp

from .pages import DOCS, ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *(page for page in sorted(DOCS.rglob("*.md")) if "_build" not in page.parts)]

# The types of the variables in the README's programs.
VARIABLES = {
    "client": trio_udp.Client,
    "datagram": trio_udp.Datagram,
    "server": trio_udp.Server,
}


def calls_and_attributes() -> list[ast.expr]:
    """Every call and every attribute in the README's programs."""
    nodes: list[ast.expr] = []
    for block in BLOCKS:
        tree = compile(block, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST)
        nodes += [node for node in ast.walk(tree) if isinstance(node, ast.Call | ast.Attribute)]
    return nodes


def test_the_first_program_runs() -> None:
    """The five-line server answers in upper case."""
    # The log says when the server has started, and which port the kernel has chosen.
    program = "import logging\nlogging.basicConfig(level=logging.INFO)\n" + BLOCKS[0].replace("9999", "0")
    with (
        subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        try:
            assert server.stderr is not None
            serving = re.fullmatch(r"INFO:trio_udp:serving on \('0.0.0.0', (\d+)\)\n", server.stderr.readline())
            assert serving
            sock.settimeout(20)
            sock.connect(("127.0.0.1", int(serving[1])))
            sock.send(b"hello")
            assert sock.recv(100) == b"HELLO"
        finally:
            server.kill()


def test_every_name_exists() -> None:
    """Functions, classes, methods and attributes in the README's programs exist."""
    used = set()
    for node in calls_and_attributes():
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "trio_udp":
                assert node.attr in [*trio_udp.__all__, "dtls"]
            elif node.value.id in VARIABLES:
                assert hasattr(VARIABLES[node.value.id], node.attr) or node.attr == "payload", ast.unparse(node)
            used.add(node.value.id)
    assert {"trio_udp", *VARIABLES} <= used


def test_every_argument_exists() -> None:
    """Functions that the README calls take the keywords in the README."""
    checked = 0
    for node in calls_and_attributes():
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id == "trio_udp":
            parameters = inspect.signature(getattr(trio_udp, node.func.attr)).parameters
            assert {keyword.arg for keyword in node.keywords} <= set(parameters), ast.unparse(node)
            checked += 1
    assert checked


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    """Every file that a document links to exists."""
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        if not target.startswith("https://"):
            assert (document.parent / target).is_file(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_named_is_there(document: Path) -> None:
    """Every file of this project that a document names exists, for example a test of a guarantee."""
    if document.name in ("testing.md", "results.md"):  # these name files of the reader
        return
    folders = ["trio_udp", "tests", "examples", "benchmarks"]
    files = {path.name for folder in folders for path in (ROOT / folder).rglob("*")}
    named = re.findall(r"`(?:[\w.]+/)*(\w+\.(?:py|c))`", document.read_text())
    assert set(named) <= files


def test_all_keywords_of_serve_are_in_its_docstring() -> None:
    """``help(trio_udp.serve)`` explains every argument."""
    documented = set(re.findall(r"^  (\w+): ", inspect.getdoc(trio_udp.serve) or "", re.MULTILINE))
    assert set(inspect.signature(trio_udp.serve).parameters) <= documented
