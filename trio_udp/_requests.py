"""Request and reply: a handler made of a function that answers one datagram."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import TypeAlias, overload

import trio

from ._client import Client, seat_of
from ._endpoints import Payload
from ._handlers import accepts, handler_failed
from ._limits import check_seconds

RequestFunction: TypeAlias = "Callable[[bytes, Client], Awaitable[Payload | None]]"
ClientHandler: TypeAlias = Callable[[Client], Awaitable[None]]

# An attribute of the handlers made here; see makes_room().
KEEPS_NOTHING = "_trio_udp_keeps_nothing"


@overload
def request_handler(
    *, timeout: float | None = None, concurrency: int = 1
) -> Callable[[RequestFunction], ClientHandler]: ...
@overload
def request_handler(
    function: RequestFunction, /, *, timeout: float | None = None, concurrency: int = 1
) -> ClientHandler: ...
def request_handler(
    function: RequestFunction | None = None, /, *, timeout: float | None = None, concurrency: int = 1
) -> ClientHandler | Callable[[RequestFunction], ClientHandler]:
    """Turn ``async def f(payload, client)`` into a handler that replies to each datagram with what ``f`` returns.

    Used as ``@request_handler`` or ``@request_handler(timeout=2)``. A client's requests are answered one after the
    other, in arrival order; different clients are answered side by side. Like any handler, it waits for more until the
    client has been silent for ``idle_timeout``. But a client that waits for its next request holds nothing, so at
    ``max_clients`` it makes room for a stranger regardless of ``Limits.when_full``, unless it is validated.

    Args:
      function: Returns the reply (``b""`` is an empty one) or ``None`` for no reply, and must return ``None`` once it
        has closed the client. For a method, wrap the bound one: ``request_handler(app.answer)``.
      timeout: Seconds that each request may take. One that takes longer is cancelled (``trio.move_on_after``, so only
        where ``function`` awaits something), counted in ``requests_timed_out`` and not answered; the next one follows.
      concurrency: Requests of one client at once, for clients such as proxies that stand for many users. If it is more
        than 1, replies leave as they are ready, in any order. A client with running requests is neither idle nor
        evicted. ``Limits.worst_case_memory(concurrency=...)`` takes them into account.

    Errors:
      An exception in ``function`` goes to the server's ``on_error``. It ends no other request: those that wait behind
      it are still answered, and with ``concurrency`` those beside it continue. An invalid argument raises ``TypeError``
      or ``ValueError`` at once.
    """
    if timeout is not None:
        check_seconds("timeout", timeout)
    if not isinstance(concurrency, int) or isinstance(concurrency, bool):
        raise TypeError(f"concurrency must be an int, not {concurrency!r}")
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, not {concurrency!r}")
    if function is None:
        return lambda function: request_handler(function, timeout=timeout, concurrency=concurrency)
    if not callable(function):
        raise TypeError(f"a request_handler must be an async function of a payload and a Client, not {function!r}")
    if not accepts(function, 2):
        raise TypeError(f"a request_handler must be a function of a payload and a Client, not {function!r}")

    async def answer(payload: bytes, client: Client) -> None:
        if timeout is None:
            reply = await function(payload, client)
        else:
            with trio.move_on_after(timeout) as scope:
                reply = await function(payload, client)
            if scope.cancelled_caught:
                seat_of(client).count_timed_out_request()
                return
        if reply is not None:
            await client.send(reply)

    async def one_by_one(client: Client) -> None:
        async for payload in client:
            await answer(payload, client)

    async def side_by_side(client: Client) -> None:
        seat = seat_of(client)
        free = trio.Semaphore(concurrency)

        async def answer_one(payload: bytes) -> None:
            try:
                await answer(payload, client)
            except Exception as error:
                handler_failed(client, error)
            finally:
                seat.end_request()
                free.release()

        async with trio.open_nursery() as nursery:
            while True:
                try:
                    free.acquire_nowait()
                except trio.WouldBlock:
                    await free.acquire()
                try:
                    payload = await client.receive()
                except (trio.EndOfChannel, trio.ClosedResourceError):
                    return
                seat.begin_request()
                nursery.start_soon(answer_one, payload)

    handler = one_by_one if concurrency == 1 else side_by_side
    functools.update_wrapper(handler, function)
    del handler.__wrapped__  # type: ignore[attr-defined]  # or inspect.signature() would return the function's
    setattr(handler, KEEPS_NOTHING, True)
    return handler


def makes_room(handler: object) -> bool:
    """Whether a client of this handler holds nothing while it waits, so that it may be evicted for a stranger."""
    return getattr(handler, KEEPS_NOTHING, False) is True
