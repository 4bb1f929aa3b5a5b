"""The site has a place for everything; what Sphinx itself checks is left to ``.ci/run``."""

from __future__ import annotations

import builtins
import importlib
import re
from functools import reduce

import pytest

import trio_udp
import trio_udp.testing

from .pages import DOCS

REFERENCE = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))


def test_every_public_name_is_in_the_reference() -> None:
    """The reference documents each public name, exactly once, and nothing else."""
    documented = re.findall(r"^\.\. auto\w+:: ([\w.]+)$", REFERENCE, re.MULTILINE)
    assert sorted(documented) == sorted([*trio_udp.__all__, *trio_udp.testing.__all__])


def test_every_page_is_in_the_navigation() -> None:
    """Each page is in one table of contents."""
    listed = []
    for page in DOCS.rglob("*.md"):
        for entries in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            listed += [(page.parent / f"{entry}.md").resolve() for entry in re.findall(r"^[\w./-]+$", entries, re.M)]
    assert sorted(listed) == sorted(page for page in DOCS.rglob("*.md") if page.name != "index.md" or page.parent != DOCS)


@pytest.mark.parametrize("library", ["trio", "python"])
def test_names_that_the_site_links_to_exist(library: str) -> None:
    """The names of Trio and Python in docs/inventories are there."""
    for line in (DOCS / "inventories" / f"{library}.txt").read_text().splitlines():
        for entry in line.split()[2:]:
            first, *rest = entry.rpartition("=")[2].split(".")
            if rest and len(rest) > 1:
                importlib.import_module(f"{first}.{rest[0]}")
            thing = getattr(builtins, first, None) if not rest else importlib.import_module(first)
            if first not in ("None", "BaseExceptionGroup"):  # the latter is new in Python 3.11
                assert reduce(getattr, rest, thing) is not None, entry
