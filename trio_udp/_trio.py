"""Trio's internals that this package relies on.

Trio has no public API for these. Each is on the path of every datagram, or makes tests repeatable. Checked on Trio 0.27
to 0.35; ``tests/project/test_trio_internals.py`` has a canary for each name here. :func:`will_be_cancelled` is inlined
in _inbox.py and _channel.py, and Trio's ``reschedule`` in _inbox.py and _receive_loop.py.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import trio
from trio._core._run import GLOBAL_RUN_CONTEXT


def _make_sleep() -> object:
    asleep = trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.SUCCEEDED)  # noqa: ASYNC105
    try:
        return asleep.send(None)
    finally:
        asleep.close()


SLEEP = _make_sleep()
"""A task yields this to Trio's loop to sleep until it is rescheduled or cancelled.

``wait_task_rescheduled`` yields the same value, but makes two coroutines and an outcome for each wait: 0.9 µs of the
6 µs that an echo takes. One value serves all tasks, because cancelling such a sleep needs no work of ours.

Two more properties of Trio are used with it. First, the ``yield`` returns exactly the value that
``trio.lowlevel.reschedule(task, value)`` was called with; for a cancelled task it is an ``outcome.Error`` that raises
``Cancelled``. Second, ``reschedule`` and cancellation clear ``task.custom_sleep_data`` at once, so a task whose
``custom_sleep_data`` is still the object that it set has not been woken yet.
"""


def run_context() -> dict[str, Any]:
    """Return Trio's record of this thread: ``["task"]``, the task that runs now, and ``["runner"]``, its scheduler.

    It stays the same object as long as the thread lives. ``current_task`` and ``reschedule`` look it up in a
    ``threading.local`` at each call; keeping it saves 5 % of an echo.
    """
    return GLOBAL_RUN_CONTEXT.__dict__


def will_be_cancelled(task: trio.lowlevel.Task) -> bool:
    """Whether a task would raise ``Cancelled`` at its next checkpoint.

    ``trio.lowlevel.checkpoint_if_cancelled`` checks the same for the running task, but as a coroutine.
    """
    cancelled: bool = task._cancel_status.effectively_cancelled
    return cancelled


def is_in_trio() -> bool:
    """Whether Trio runs in this thread. Trio 0.29 added ``trio.lowlevel.in_trio_run`` for this."""
    try:
        trio.lowlevel.current_trio_token()
    except RuntimeError:
        return False
    return True


_stdlib_socket = attrgetter("_sock")


def stdlib_socket(sock: trio.socket.SocketType) -> socket.socket:
    """Return the standard library's socket inside a Trio socket. Trio's calls take several times as long as the kernel.

    Raises:
      AttributeError: There is none, because the user's socket factory made the socket.
    """
    inner: socket.socket = _stdlib_socket(sock)
    return inner


def has_stdlib_socket(sock: object) -> bool:
    """Whether :func:`stdlib_socket` would return a socket of the operating system."""
    return isinstance(getattr(sock, "_sock", None), socket.socket)


@contextmanager
def seeded_scheduler(seed: int) -> Iterator[None]:
    """Let a seed decide in which order Trio runs the tasks of one pass.

    Trio's own pytest plugin sets the same two names, for Hypothesis.
    """
    scheduler: Any = trio._core._run
    order: random.Random = scheduler._r
    state, allowed = order.getstate(), scheduler._ALLOW_DETERMINISTIC_SCHEDULING
    order.seed(seed)
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    try:
        yield
    finally:
        order.setstate(state)
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = allowed
