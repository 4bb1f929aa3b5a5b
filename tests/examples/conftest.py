"""``start`` and ``serve`` run an example as a process, ``load`` imports one to run it on a simulated network."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from ..project.conftest import EXAMPLES, serve as serve, start as start


def load(name: str) -> ModuleType:
    """Import an example."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
