"""``--reload``: noticing that a Python file has changed."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable
from functools import partial

from ._target import split_target


def changes_of_python_files(app_dir: str, target: str) -> Callable[[], AsyncIterator[object]]:
    """Return a function that gives an item for each change of Python files under ``app_dir``, or beside the target.

    Raises:
      ImportError: watchfiles is not installed.
    """
    try:
        import watchfiles
    except ImportError:
        raise ImportError("reloading needs watchfiles: pip install 'trio-udp[cli]'") from None
    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it tells of every change
    module, _ = split_target(target)
    folders = {app_dir}
    if module.endswith(".py"):
        folders.add(os.path.dirname(os.path.join(app_dir, module)))
    return partial(watchfiles.awatch, *sorted(folders), watch_filter=watchfiles.PythonFilter())
