"""Canaries for the internals of Trio that the package relies on, one for each name in trio_udp/_trio.py.

Each docstring says what breaks if its test fails with a new version of Trio.
"""

from __future__ import annotations

import random
import socket
import types
from collections.abc import Generator
from typing import Any

import outcome
import pytest
import trio
import trio.testing
from trio.lowlevel import current_task, reschedule

from trio_udp._trio import SLEEP, run_context, seeded_scheduler, stdlib_socket, will_be_cancelled


@types.coroutine
def sleep() -> Generator[Any, Any, Any]:
    """Sleep as an inbox does; return the value that the task was woken with."""
    return (yield SLEEP)


async def test_sleep_returns_the_value_of_reschedule(nursery: trio.Nursery) -> None:
    """A task that yields SLEEP sleeps, and gets back the very object that reschedule was called with.

    If this fails, ``Inbox.put`` hands datagrams over in a way that ``Inbox.receive`` does not understand: a handler
    that waits gets no datagram, or something else in its place.
    """
    woken: list[object] = []
    tasks: list[trio.lowlevel.Task] = []

    async def sleeper() -> None:
        tasks.append(current_task())
        woken.extend([await sleep() for _ in range(3)])

    nursery.start_soon(sleeper)
    payload = b"payload"
    value: Any
    for value in (payload, b"", None):
        await trio.testing.wait_all_tasks_blocked()
        assert woken == []  # it sleeps until it is woken
        reschedule(tasks[0], value)
    await trio.testing.wait_all_tasks_blocked()
    assert woken == [b"payload", b"", None]
    assert woken[0] is payload


async def test_sleep_gives_back_cancellation_as_an_error() -> None:
    """A task that sleeps in SLEEP and is cancelled gets back an ``outcome.Error`` which raises Cancelled.

    If this fails, ``Inbox.receive`` takes cancellation for a datagram or for a wake-up: a handler that is cancelled
    while it waits goes on, and the server cannot stop.
    """
    woken: list[object] = []
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def sleeper() -> None:
                woken.append(await sleep())
                (error,) = woken
                assert isinstance(error, outcome.Error)
                error.unwrap()

            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    (error,) = woken
    assert isinstance(error, outcome.Error)
    assert isinstance(error.error, trio.Cancelled)


@pytest.mark.parametrize("way", ["reschedule", "cancellation"])
async def test_waking_a_task_clears_its_sleep_data(way: str) -> None:
    """reschedule and cancellation clear ``custom_sleep_data`` at once, before the task runs.

    If this fails, ``Inbox.is_awaited`` is true for a task that was woken already: a second datagram is handed to it and
    lost, or Trio ends the program because a task is rescheduled twice.
    """
    tasks: list[trio.lowlevel.Task] = []
    mark = object()
    has_run = False

    async def sleeper() -> None:
        nonlocal has_run
        task = current_task()
        tasks.append(task)
        task.custom_sleep_data = mark
        woken: Any = await sleep()
        has_run = True
        if woken is not None:
            woken.unwrap()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleeper)
        await trio.testing.wait_all_tasks_blocked()
        (task,) = tasks
        assert task.custom_sleep_data is mark
        if way == "reschedule":
            reschedule(task)
        else:
            nursery.cancel_scope.cancel()
        assert not has_run
        assert task.custom_sleep_data is None


async def would_be_cancelled() -> bool:
    """Ask Trio itself whether this task would raise Cancelled."""
    try:
        await trio.lowlevel.checkpoint_if_cancelled()
    except trio.Cancelled:
        return True  # only a test; the scope raises it again at the next checkpoint
    return False


async def test_will_be_cancelled_agrees_with_trio() -> None:
    """will_be_cancelled agrees with ``checkpoint_if_cancelled``, in nested and shielded scopes too.

    If this fails, ``receive`` and ``send`` do not notice cancellation while there is something to receive and room to
    send: a handler under ``move_on_after`` goes on after its time.
    """
    seen = []

    async def look() -> None:
        seen.append(will_be_cancelled(current_task()))
        assert await would_be_cancelled() == seen[-1]

    await look()
    with trio.CancelScope() as outer:
        await look()
        with trio.CancelScope() as inner:
            await look()
            with trio.CancelScope(shield=True) as shield:
                outer.cancel()
                await look()  # shielded
                shield.shield = False
                await look()
            await look()
        await look()
        assert not inner.cancel_called
    await look()
    with trio.CancelScope() as inner:
        inner.cancel()
        await look()
    await look()
    assert seen == [False, False, False, False, True, True, True, False, True, False]


async def test_run_context_is_the_record_of_this_thread(nursery: trio.Nursery) -> None:
    """One record serves a thread for as long as it lives; it tells the running task, and a scheduler that wakes tasks.

    If this fails, ``receive`` takes one task for another, and a handler that waits is not woken.
    """
    context = run_context()
    tasks: list[trio.lowlevel.Task] = []
    woken: list[object] = []

    async def look() -> None:
        assert run_context() is context
        assert context["task"] is current_task()
        tasks.append(current_task())
        woken.append(await sleep())
        assert context["task"] is current_task()

    for _ in range(2):
        nursery.start_soon(look)
    await trio.testing.wait_all_tasks_blocked()
    for task in tasks:
        context["runner"].reschedule(task, b"payload")
    await trio.testing.wait_all_tasks_blocked()
    assert woken == [b"payload"] * 2

    async def other_run() -> None:
        assert run_context() is not context
        assert run_context()["task"] is current_task()

    await trio.to_thread.run_sync(trio.run, other_run)


async def test_stdlib_socket_is_the_same_socket() -> None:
    """stdlib_socket gives the ``socket.socket`` inside a Trio socket, and fails where there is none.

    If this fails, no endpoint can be made: the engines make their system calls on that socket.
    """
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        inner = stdlib_socket(sock)
        assert isinstance(inner, socket.socket)
        assert inner.fileno() == sock.fileno()
        assert inner.gettimeout() == 0  # in non-blocking mode
        sock.close()
        assert inner.fileno() == -1
    other: Any = object()  # such as one from a socket factory
    with pytest.raises(AttributeError):
        stdlib_socket(other)


def order_of_tasks(seed: int) -> list[int]:
    """Run 20 tasks that become runnable together, ten times; return the order in which they ran."""
    order: list[int] = []

    async def task(number: int) -> None:
        for _ in range(10):
            order.append(number)
            await trio.lowlevel.checkpoint()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(task, number)

    with seeded_scheduler(seed):
        trio.run(main)
    return order


def test_seeded_scheduler_repeats_the_order_of_tasks() -> None:
    """Under seeded_scheduler the seed decides in which order Trio runs tasks; afterwards all is as it was.

    If this fails, ``deterministic_scheduling`` and the fixture ``simulated_network`` give another run each time: a
    failing test cannot be repeated by its seed.
    """
    scheduler: Any = trio._core._run
    random_order: random.Random = scheduler._r
    before = random_order.getstate(), scheduler._ALLOW_DETERMINISTIC_SCHEDULING
    one, other, again = order_of_tasks(1), order_of_tasks(2), order_of_tasks(1)
    assert one == again
    assert one != other
    assert one != sorted(one)
    assert (random_order.getstate(), scheduler._ALLOW_DETERMINISTIC_SCHEDULING) == before
