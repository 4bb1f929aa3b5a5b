"""From "module:handler" or "path/file.py:handler" to a handler. A mistake raises :class:`TargetError`, in one line.

An error that the user's module raises passes unchanged.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import ModuleType
from typing import Any

from .. import Accept, Handler
from .._handlers import LOOKS_LIKE, DatagramHandler, accepts, is_async, unwrapped


class TargetError(ValueError):
    """The target cannot be served; the message is one line and says what to do."""


def split_target(target: str) -> tuple[str, str]:
    """Return the module or file of a target, and the name in it."""
    module, colon, name = target.rpartition(":")
    if not (colon and module and name):
        raise TargetError(f"{target!r} is not a target: write module:handler or path/file.py:handler")
    return module, name


def load_target(target: str, app_dir: str) -> Any:
    """Import the module or file of a target and return the object that it names, as in ``app.main:server.handler``."""
    module_name, name = split_target(target)
    if app_dir not in sys.path:
        sys.path.insert(0, app_dir)
    is_file = module_name.endswith(".py") or os.sep in module_name
    module = _load_file(os.path.join(app_dir, module_name)) if is_file else _load_module(module_name, app_dir)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise TargetError(f"{module_name!r} has no {name!r}: name a handler that is defined there")
        found = getattr(found, part)
    return found


def _load_module(name: str, app_dir: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise TargetError(f"{name!r} is not a module name: write module:handler or path/file.py:handler")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # With another name, it is a module that the user's own module imports.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise TargetError(f"no module named {error.name!r}: is --app-dir right? It is {app_dir}") from None


def _load_file(path: str) -> ModuleType:
    """Import a file under its own name, with its folder on ``sys.path``, as if it were run as a script."""
    path = os.path.abspath(path)
    if not os.path.isfile(path):
        raise TargetError(f"no such file: {path}")
    folder, name = os.path.dirname(path), os.path.splitext(os.path.basename(path))[0]
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == path:  # for another target in the same file
        return loaded
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"not a Python file: {path}")
    module = importlib.util.module_from_spec(spec)
    # Pickle finds functions by the name of their module, for the user's own worker processes. If the file has the name
    # of a loaded module, such as queue.py, that module stays.
    sys.modules.setdefault(name, module)
    spec.loader.exec_module(module)
    return module


def check_target(found: object, target: str, *, factory: bool = False) -> Handler:
    """Return the object if it is a handler; otherwise raise :class:`TargetError`.

    A factory may yield a plain function that returns an awaitable, such as
    ``lambda client: handler(client, database)``. Without a factory, a plain function is more likely a forgotten
    ``async`` or ``--factory``.
    """
    if isinstance(found, DatagramHandler):
        return found
    function = unwrapped(found)
    if inspect.isclass(found) or not callable(found):
        raise TargetError(f"{target!r} is not a function but {_kind(found)}: {LOOKS_LIKE}")
    if inspect.isasyncgenfunction(function):
        raise TargetError(f"{target!r} is an async generator: {LOOKS_LIKE}, without yield")
    if not factory and not inspect.iscoroutinefunction(function):
        hint = "or use @datagram_handler, or --factory for a function that returns a context manager"
        raise TargetError(f"{target!r} is not async: {LOOKS_LIKE}; {hint}")
    if not accepts(found, 1):
        raise TargetError(f"{target!r} cannot be called with one argument, a client: {LOOKS_LIKE}")
    return found


def check_accept(found: object, target: str, handler: Handler) -> Accept:
    """Return the object if it is an ``accept`` function; otherwise raise :class:`TargetError`."""
    wanted = "--accept needs a plain function with one argument: def accept(datagram) -> bool | bytes"
    if isinstance(handler, DatagramHandler):
        raise TargetError(
            "--accept cannot be used with a datagram_handler, which sees every datagram itself: leave it out"
        )
    if inspect.isclass(found) or not callable(found):
        raise TargetError(f"{target!r} is not a function but {_kind(found)}: {wanted}")
    if is_async(found):
        raise TargetError(f"{target!r} is async: {wanted}")
    if not accepts(found, 1):
        raise TargetError(f"{target!r} cannot be called with one argument, a datagram: {wanted}")
    return found


@asynccontextmanager
async def entered(found: object, target: str, factory: bool) -> AsyncIterator[Handler]:
    """Yield the handler of a target: the object itself, or the object that the context manager of a factory yields."""
    if not factory:
        yield check_target(found, target)
        return
    async with _context_manager(found, target) as handler:
        yield check_target(handler, f"the handler of {target}", factory=True)


def _context_manager(found: object, target: str) -> AbstractAsyncContextManager[Handler]:
    wanted = "--factory needs a function without arguments that returns an async context manager"
    if not callable(found):
        raise TargetError(f"{target!r} is not a function but {_kind(found)}: {wanted}")
    try:
        inspect.signature(found).bind()
    except TypeError:
        raise TargetError(f"{target!r} cannot be called without arguments: {wanted}") from None
    except ValueError:  # some C functions have no signature
        pass
    manager = found()
    if not isinstance(manager, AbstractAsyncContextManager):
        if inspect.iscoroutine(manager):
            manager.close()  # or Python warns that it was never awaited
        raise TargetError(f"{target!r} returned {_kind(manager)}: {wanted} (see contextlib.asynccontextmanager)")
    return manager


def _kind(found: object) -> str:
    if inspect.isclass(found):
        return f"the class {found.__name__}"
    return f"{type(found).__name__} {found!r}"[:80]
