"""The documentation site: ``sphinx-build -W --keep-going docs docs/_build``.

Every warning is an error in CI, and every reference must lead somewhere (``nitpicky``).
"""

import ast
import inspect
import posixpath
import re
import textwrap
import zlib
from pathlib import Path

from sphinx.application import Sphinx

import trio_udp

DOCS = Path(__file__).parent
REPOSITORY = "https://github.com/trio-udp/trio-udp"

project = "trio_udp"
author = "the trio_udp contributors"
copyright = "the trio_udp contributors. MIT license"
version = release = trio_udp.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = True

# The reference: docstrings as they are.
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 80
napoleon_attr_annotations = False
napoleon_custom_sections = [("Errors", "notes_style"), ("Cancellation", "notes_style")]

# Private names in the signatures of public functions, in words that readers know.
WRITTEN_OUT = {
    "ClientHandler": "Handler",
    "DatagramHandler": "Handler",
    "RequestFunction": "Callable[[bytes, Client], Awaitable[Payload | None]]",
    "Network": "str | ipaddress.IPv4Network | ipaddress.IPv6Network | ipaddress.IPv4Address | ipaddress.IPv6Address",
    "Securable": "Callable[[DTLSChannel], Awaitable[object]] | Callable[[trio_udp.Client], Awaitable[object]]",
    "stdlib_socket": "socket",
}
nitpick_ignore_regex = [
    ("py:class", r"(trio_udp\.layers\.\w+\.)?(Received|Sent|T|Transport)"),  # type variables
    ("py:class", r"(OpenSSL\.)?SSL\.\w+|Certificate"),  # of pyOpenSSL and cryptography
]

# Names of Trio and Python that we refer to are written down in docs/inventories, a line for each, and packed into the
# format of intersphinx here. So a build needs no network and is the same everywhere; a link that a new release of Trio
# moves shows as a dead link, not as a failed build. tests/project/test_site.py compares the names with the packages.
INVENTORIES = {"trio": "https://trio.readthedocs.io/en/stable/", "python": "https://docs.python.org/3/"}


def packed_inventory(name: str) -> str:
    """Write docs/inventories/NAME.txt as an objects.inv of version 2, and return its path."""
    lines = []
    for line in (DOCS / "inventories" / f"{name}.txt").read_text().splitlines():
        role, page, *names = line.split()
        for each in names:  # an entry is a name as annotations write it, and the full name if that is longer
            short, _, full = each.partition("=")
            lines.append(f"{short} py:{role} 1 {page}.html#{full or short} -\n")
    packed = DOCS / "_build" / f"{name}.inv"
    packed.parent.mkdir(exist_ok=True)
    header = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n# compressed with zlib.\n"
    packed.write_bytes(header.encode() + zlib.compress("".join(lines).encode()))
    return str(packed)


intersphinx_mapping = {name: (url, packed_inventory(name)) for name, url in INVENTORIES.items()}

html_theme = "furo"
html_title = "trio_udp"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"source_repository": REPOSITORY, "source_branch": "main", "source_directory": "docs/"}
html_copy_source = False


def prepare_page(app: Sphinx, name: str, content: list[str]) -> None:
    """Make a page of docs/ one of the site.

    A page that only includes a file of the repository is that file. HTML comments, which hold a page's tests, are left
    out. Links to files outside docs/ lead to the repository.
    """
    here = folder = posixpath.join("docs", posixpath.dirname(name))
    text = content[0]
    included = re.fullmatch(r"```\{include\} (\S+)\n```\n", text)
    if included:
        file = posixpath.normpath(posixpath.join(here, included[1]))
        folder, text = posixpath.dirname(file), (DOCS.parent / file).read_text()

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        outside = not path.startswith("docs/") and not path.endswith(".svg")
        return f"]({REPOSITORY}/blob/main/{path}" if outside else f"]({posixpath.relpath(path, here)}"

    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    content[0] = re.sub(r"\]\(([^)\s#:]+)(?=[)#])", link, text)


def signature_as_written(
    app: object, what: str, name: str, thing: object, options: object, signature: str | None, returns: str | None
) -> tuple[str, ...] | None:
    """Show a signature as it stands in the source, with the names of our aliases and defaults."""
    if what == "class" and (type(thing).__name__ == "NoPublicConstructor" or "._" in (signature or "")):
        return "", ""  # users do not call it
    if what not in ("function", "method") or signature is None:
        return None
    function = inspect.unwrap(getattr(thing, "__func__", thing))
    definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef)
    arguments = definition.args
    if what == "method":
        del (arguments.posonlyargs or arguments.args)[0]
    shown = f"({ast.unparse(arguments)})", ast.unparse(definition.returns or ast.Constant(None)).strip("'")
    return tuple(re.sub(r"\b\w+\b", lambda word: WRITTEN_OUT.get(word[0], word[0]), part) for part in shown)


def one_attribute_a_line(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Give each of several attributes that a docstring describes together a line of its own."""
    for position in range(len(lines) - 1, -1, -1):
        together = re.match(r"( +)(\w+(?:, \w+)+): ", lines[position])
        if together:
            end = position + 1
            while end < len(lines) and lines[end].startswith(together[1] + " "):
                end += 1
            text = lines[position][together.end() :], *lines[position + 1 : end]
            lines[position:end] = [
                line for each in together[2].split(", ") for line in (f"{together[1]}{each}: {text[0]}", *text[1:])
            ]


def text_of_property(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Restore what a property says: napoleon takes the words before a colon in its first line for its type."""
    if what == "property" and any(line.startswith(":type:") for line in lines):
        lines[:] = [*(inspect.getdoc(thing) or "").splitlines(), ""]


def setup(app: Sphinx) -> None:
    app.connect("source-read", prepare_page)
    app.connect("autodoc-process-signature", signature_as_written)
    app.connect("autodoc-process-docstring", one_attribute_a_line, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", text_of_property, priority=600)  # after it
