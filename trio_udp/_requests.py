"""Request and reply: a handler made of a function that answers one datagram."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import TypeAlias, overload

import trio

from ._client import Client
from ._conversation import Payload
from ._limits import check_seconds
from ._serve import Handler

RequestFunction: TypeAlias = Callable[[bytes, Client], Awaitable["Payload | None"]]


@overload
def request_handler(*, timeout: float | None = None) -> Callable[[RequestFunction], Handler]: ...
@overload
def request_handler(function: RequestFunction, /, *, timeout: float | None = None) -> Handler: ...
def request_handler(
    function: RequestFunction | None = None, /, *, timeout: float | None = None
) -> Handler | Callable[[RequestFunction], Handler]:
    """Turn ``async def f(payload, client)`` into a handler that replies to each datagram with what ``f`` returns.

    Used as ``@request_handler`` or ``@request_handler(timeout=2)``. A client's requests are answered one after the
    other, in arrival order; those of different clients side by side. Like any handler this one waits for more until the
    client has been silent for ``idle_timeout``. Where most strangers send a single request and never return, as DNS
    resolvers do, give the server a short one, or ``Limits(when_full="evict_idle")``.

    Args:
      function: Returns the reply (``b""`` is an empty one) or ``None`` for no reply, as it must once it has closed the
        client. For a method, wrap the bound one: ``request_handler(app.answer)``.
      timeout: Seconds that each request may take. One that takes longer is cancelled (``trio.move_on_after``, so only
        where ``function`` awaits something), counted in ``requests_timed_out`` and not answered; the next one follows.

    Errors:
      An exception in ``function`` goes to the server's ``on_error``; the requests that wait behind it are still
      answered.
    """
    if timeout is not None:
        check_seconds("timeout", timeout)
    if function is None:
        return lambda function: request_handler(function, timeout=timeout)
    if not callable(function):
        raise TypeError(f"expected an async function of a payload and a client, not {function!r}")

    async def handler(client: Client) -> None:
        async for payload in client:
            if timeout is None:
                reply = await function(payload, client)
            else:
                with trio.move_on_after(timeout) as scope:
                    reply = await function(payload, client)
                if scope.cancelled_caught:
                    client._request_timed_out()
                    continue
            if reply is not None:
                await client.send(reply)

    functools.update_wrapper(handler, function)
    del handler.__wrapped__  # type: ignore[attr-defined]  # or its signature would be the function's
    return handler
