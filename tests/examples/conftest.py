"""``start`` and ``serve`` run an example as a process, ``load`` imports one to run it on a simulated network.

``program`` finds a program that an example is tested with.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from types import ModuleType

import pytest

from ..project.conftest import EXAMPLES, serve as serve, start as start


def load(name: str) -> ModuleType:
    """Import an example."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)  # as where it is run
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
