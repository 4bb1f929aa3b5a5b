"""The code in the pages of docs/ and in CONTRIBUTING.md, as modules and programs that tests run.

A page is a module: its ``python`` blocks, one after the other, with the line numbers of the page. Blocks inside an HTML
comment are part of it, and not of what readers see: there a page keeps the tests of the code beside them. A statement
``trio.run(...)`` is left out. (If a block awaits something outside a function, as a guide may show, nothing of the page
is run: its names and arguments are checked. So are those of a block under ``<!-- not run: why -->``.)

A block under ``<!-- program: b"hello" -> b"HELLO" -->`` is a program too: it runs as a process that is sent the first
payload, and must answer with the second one. Programs for other libraries (and in Go) are nothing else.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import ModuleType

import attrs
import trio

import trio_udp

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TESTS = ROOT / "tests"

BLOCK = re.compile(
    r"^(?:<!-- program: (?P<dialogue>[^\n]*?) -->\n|<!-- not run: (?P<reason>[^\n]*?) -->\n)?"
    r"```(?P<language>python|go)\n(?P<code>.*?)^```",
    re.MULTILINE | re.DOTALL,
)

LITERAL = r'(b"(?:[^"\\]|\\.)*")'
PAIR = re.compile(f"{LITERAL} -> {LITERAL}")


@attrs.frozen
class Block:
    """A block of code in a page.

    Attributes:
      dialogue: What the program is sent and answers; empty if it is no program.
      is_run: It stands under no ``<!-- not run: why -->``.
    """

    page: Path
    line: int
    language: str
    code: str
    dialogue: tuple[tuple[bytes, bytes], ...]
    is_run: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """All pages, except those that a file of tests names because it runs their code itself."""
    tests = "".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    documents = [page for page in sorted(DOCS.rglob("*.md")) if "_build" not in page.parts]
    return [page for page in [*documents, ROOT / "CONTRIBUTING.md"] if f'"{page.name}"' not in tests]


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        pairs = PAIR.findall(match["dialogue"] or "")
        dialogue = tuple((ast.literal_eval(sent), ast.literal_eval(answer)) for sent, answer in pairs)
        assert dialogue or not match["dialogue"], f"{page}:{line}"
        found.append(Block(page, line, match["language"], match["code"], dialogue, match["reason"] is None))
    return found


def as_module(page: Path) -> ModuleType:
    """Run the code of a page, and return its names."""
    name = "pages." + ".".join(page.relative_to(ROOT).with_suffix("").parts)
    module = ModuleType(name)
    module.__dict__.update(trio=trio, trio_udp=trio_udp, __file__=str(page))
    del (
        module.__spec__,
        module.__loader__,
    )  # Python 3.15 warns of a spec that is None, in tracebacks
    sys.modules[name] = module  # dataclasses look there
    for block in blocks(page):
        if block.language != "python" or not block.is_run:
            continue
        tree = ast.parse("\n" * (block.line - 1) + block.code)
        statements = [statement for statement in tree.body if not _runs_trio(statement)]
        if block.dialogue and len(statements) == len(tree.body):
            continue  # a program for another library
        tree.body = statements
        exec(compile(tree, str(page), "exec", dont_inherit=True), module.__dict__)
    return module


def awaits_outside_functions(page: Path) -> bool:
    """Whether a page has statements that only work inside an async function of the reader."""
    for block in blocks(page):
        if block.language == "python":
            try:
                compile(block.code, str(page), "exec", dont_inherit=True)
            except SyntaxError:
                return True
    return False


def _runs_trio(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'":
        return _runs_trio(statement.body[-1])
    return isinstance(statement, ast.Expr) and ast.unparse(statement).startswith("trio.run(")
