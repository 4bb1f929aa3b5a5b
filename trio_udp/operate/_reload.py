"""``--reload``: noticing that a Python file has changed."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import trio

from ._target import split_target

Watch: TypeAlias = Callable[[Callable[[], object]], Awaitable[None]]


def watch_python_files(app_dir: str, target: str) -> Watch:
    """Return a task that calls a function at each change of Python files under ``app_dir``, or beside the target.

    Raises:
      ImportError: watchfiles is not installed.
    """
    try:
        import watchfiles
    except ImportError:
        raise ImportError("reloading needs watchfiles: pip install 'trio-udp[cli]'") from None
    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it logs every change
    module, _ = split_target(target)
    folders = {app_dir}
    if module.endswith(".py"):
        folders.add(os.path.dirname(os.path.join(app_dir, module)))

    async def watch(changed: Callable[[], object]) -> None:
        stop = threading.Event()
        changes = watchfiles.watch(
            *sorted(folders), watch_filter=watchfiles.PythonFilter(), stop_event=stop, raise_interrupt=False
        )
        try:
            # Use a thread rather than awatch(), which needs an anyio that fits the installed Trio.
            while await trio.to_thread.run_sync(next, changes, None, abandon_on_cancel=True):
                changed()
        finally:
            stop.set()

    return watch
