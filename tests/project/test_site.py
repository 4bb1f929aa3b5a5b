"""The site includes every page and every public name. Sphinx itself runs in ``.ci/run``."""

from __future__ import annotations

import builtins
import importlib
import re
from functools import reduce

import pytest

from .pages import DOCS

PAGES = [page for page in DOCS.rglob("*.md") if "_build" not in page.parts]
REFERENCE = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))


def test_every_public_name_is_in_the_reference() -> None:
    """The reference documents each public name exactly once, and nothing else."""
    pytest.importorskip("OpenSSL")
    found = re.findall(r"^\.\. (currentmodule|auto\w+):: ([\w.]+)$", REFERENCE, re.MULTILINE)
    documented: dict[str, list[str]] = {}
    for directive, name in found:
        if directive == "currentmodule":
            names = documented.setdefault(name, [])
        else:
            names.append(name)
    for module, names in documented.items():
        everything = getattr(importlib.import_module(module), "__all__", names)
        assert sorted(names) == sorted(set(everything) - {"dtls"}), module
    assert {"trio_udp", "trio_udp.dtls", "trio_udp.testing"} <= set(documented)


def test_every_page_is_in_the_navigation() -> None:
    """Each page is in one table of contents."""
    listed = []
    for page in PAGES:
        for entries in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            listed += [(page.parent / f"{entry}.md").resolve() for entry in re.findall(r"^[\w./-]+$", entries, re.M)]
    first = min(PAGES, key=lambda page: (len(page.parts), page.stem != "index"))
    assert sorted(listed) == sorted(page for page in PAGES if page != first)


@pytest.mark.parametrize("library", ["trio", "python"])
def test_names_that_the_site_links_to_exist(library: str) -> None:
    """The names of Trio and Python in docs/inventories exist."""
    for line in (DOCS / "inventories" / f"{library}.txt").read_text().splitlines():
        for entry in line.split()[2:]:
            first, *rest = entry.rpartition("=")[2].split(".")
            if rest and len(rest) > 1:
                importlib.import_module(f"{first}.{rest[0]}")
            thing = getattr(builtins, first, None) if not rest else importlib.import_module(first)
            if first not in ("None", "BaseExceptionGroup"):  # the latter is new in Python 3.11
                assert reduce(getattr, rest, thing) is not None, entry
