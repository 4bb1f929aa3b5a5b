"""``serve`` and ``serve_endpoints``: check the arguments, put the parts of a server together, and run it.

_receive_loop.py shows the path of a datagram.
"""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Collection, Iterable
from contextlib import ExitStack
from functools import partial
from typing import cast

import trio

from ._admission import Admission
from ._client import Client
from ._construction import create
from ._datagram_handler import to_function
from ._endpoints import Endpoint, Network, Sources, open_endpoints, reader_of
from ._handlers import (
    Accept,
    DatagramHandler,
    Handler,
    OnError,
    accepts,
    ask_both,
    check_handler,
    is_async,
    run_handler,
)
from ._limits import Limits, check_seconds
from ._log import ErrorLog, WarningLog
from ._rate import RateLimiter
from ._receive_loop import receive_loop, to_clients
from ._requests import makes_room
from ._seats import Seat, Seats
from ._server import Server, ServerState, log_error

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

# One shared name: Trio would build a new string for each task, 80 bytes and half a microsecond.
TASK_NAME = "trio_udp handler"


async def serve(
    handler: Handler,
    port: int,
    *,
    host: str | bytes | None = None,
    reuse_port: bool = False,
    max_datagram_size: int = 65_535,
    receive_buffer: int | None = None,
    send_buffer: int | None = None,
    configure: Callable[[socket.socket], object] | None = None,
    proxies: Iterable[Network] = (),
    idle_timeout: float = 60.0,
    limits: Limits = Limits(),
    accept: Accept | None = None,
    on_error: OnError = log_error,
    drain_timeout: float = 5.0,
    stop_signals: Collection[signal.Signals] = (),
    handler_nursery: trio.Nursery | None = None,
    task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Receive datagrams on ``port`` and run ``handler(client)`` once for each client.

    A client's datagrams reach its handler in arrival order; different clients run side by side::

        async def shout(client):
            async for payload in client:
                await client.send(payload.upper())

        trio.run(trio_udp.serve, shout, 9999)

    A stranger's first datagram starts a task that runs the handler with a new :class:`Client`; later ones go to the
    same client until its handler returns. If the handler returns or raises while datagrams wait, it is called again
    with the same client, unless that call took no datagram.

    Nothing that a stranger sends raises here: see :class:`ServerStatistics`.

    Args:
      handler: Async function, called with a :class:`Client`; or a :func:`datagram_handler`, or a
        :func:`request_handler`. A plain function that returns an awaitable works too. A ``trio.EndOfChannel`` that
        leaves the handler is a normal end.
      port: UDP port; 0 lets the kernel choose one that is free in every family (see ``Server.endpoints``).
      host: Name or address to bind. ``None`` binds every interface, IPv4 and IPv6, with one endpoint for each; a family
        that the machine lacks is skipped.
      reuse_port: Let other processes of the same user bind the port too (``SO_REUSEPORT``); the kernel then spreads
        clients over them. Without it a second bind fails.
      max_datagram_size: Longest payload to accept, in bytes; longer datagrams are counted as truncated.
      receive_buffer: Bytes of kernel memory to ask for, for datagrams not yet read (``SO_RCVBUF``); 4 MiB by default.
        The kernel grants at most what the system allows; if that is less than half, a warning says so once.
      send_buffer: The same for datagrams not yet sent (``SO_SNDBUF``); the system's default unless given.
      configure: Called with each ``socket.socket`` right before it is bound, after everything above is set: the place
        for any other socket option (``SO_BROADCAST``, ``SO_BINDTODEVICE``, ...).
      proxies: Networks of load balancers, such as ``["10.0.0.0/8"]`` (strings, or objects of the module ``ipaddress``).
        Senders in them must put a header of the PROXY protocol, version 2, in front of every datagram, as dnsdist does
        with ``useProxyProtocol=true``. The addresses in it count everywhere: ``peer_address`` is the client's, for
        handlers, ``accept`` and every limit, and ``local_address`` is the address that the client wrote to. Replies go
        back through the proxy. A datagram without a valid header is refused (``refused_malformed``). A header from any
        other sender is payload. Name no network whose addresses others can forge.
      idle_timeout: Seconds of silence after which a waiting handler's ``async for`` ends; ``math.inf`` for never. See
        :attr:`Client.idle_timeout`.
      limits: Bounds on memory, on the rate of strangers, and on the bytes sent to them.
      accept: ``accept(datagram)`` is called for every stranger's :class:`Datagram`, before the server keeps anything
        and before it checks ``max_clients``. ``True``: it becomes a client, if there is room. ``False``: it is refused.
        Bytes: they are sent back at once, from the address that the datagram was sent to, and nothing is kept (cookies,
        QUIC Retry, "server full"); at most 3 times the datagram's bytes, or ``Limits.amplification`` times if that is
        set. Any other value, or an exception, refuses the datagram and is logged as an error. It is a plain function,
        called when a batch has been read and in none of Trio's tasks, so it should be quick: nothing else runs
        meanwhile. While the server drains it is still called, and only bytes count. Answer only datagrams that parse as
        requests, with bytes that do not, or two servers may answer each other for ever (CVE-2024-2169).
      on_error: Called with the client (or, for a ``datagram_handler``, the datagram) and the exception when a handler
        raises. That ends this client only, unless ``on_error`` itself raises: then the server ends with that exception.
        :func:`log_error` by default; :func:`raise_error` for tests.
      drain_timeout: Seconds that handlers have to finish once the server stops. Handlers that still run are cancelled.
      stop_signals: Signals that stop the server as :meth:`Server.stop` does; the second one stops it at once.
      handler_nursery: Run handlers there rather than in the server's own nursery. Only the caller cancels them, even
        after ``drain_timeout``, and their exceptions go to that nursery. A client used after its server has ended
        raises ``trio.ClosedResourceError``.
      task_status: With ``nursery.start``, gives the running :class:`Server`.

    Returns:
      After ``Server.stop()`` or one of ``stop_signals``, when the server has drained.

    Raises:
      OSError: A socket cannot be bound; the message names the address and port.
      TypeError, ValueError: An argument is invalid. A plain-function handler that returns no awaitable also ends the
        server, with a ``TypeError``.
      trio.ClosedResourceError: Every endpoint was closed under the running server.
      KeyboardInterrupt, SystemExit: Bare, not in a group; other errors of the group become the ``__cause__``.
      BaseExceptionGroup: ``on_error`` raised, or a handler raised something that is not an ``Exception``.

    Cancellation:
      Ends every client at once and closes the sockets; datagrams still in inboxes are dropped.
    """
    _check_arguments(handler, limits, accept, on_error, idle_timeout, drain_timeout, stop_signals)
    endpoints = await open_endpoints(
        port,
        host=host,
        reuse_port=reuse_port,
        max_datagram_size=max_datagram_size,
        receive_buffer=receive_buffer,
        send_buffer=send_buffer,
        configure=configure,
        proxies=proxies,
    )
    await serve_endpoints(
        handler,
        endpoints,
        idle_timeout=idle_timeout,
        limits=limits,
        accept=accept,
        on_error=on_error,
        drain_timeout=drain_timeout,
        stop_signals=stop_signals,
        handler_nursery=handler_nursery,
        task_status=task_status,
    )


async def serve_endpoints(
    handler: Handler,
    endpoints: Iterable[Endpoint],
    *,
    idle_timeout: float = 60.0,
    limits: Limits = Limits(),
    accept: Accept | None = None,
    on_error: OnError = log_error,
    drain_timeout: float = 5.0,
    stop_signals: Collection[signal.Signals] = (),
    handler_nursery: trio.Nursery | None = None,
    task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve on endpoints that are already open, and close them at the end; :func:`serve` opens them itself.

    Args:
      endpoints: From :func:`open_endpoints`, :func:`open_unix_endpoint` or :meth:`Endpoint.from_socket`. The server
        owns them: they are closed when this function ends, also if it raises. An endpoint that another server or task
        receives from stays open.

    Everything else is as for :func:`serve`.

    Raises:
      trio.BusyResourceError: Another server runs on one of the endpoints, or a task is receiving from it.
    """
    if isinstance(endpoints, Endpoint):
        raise TypeError(f"endpoints must be a list, [endpoint], not {endpoints!r}")
    endpoints = tuple(endpoints)
    with ExitStack() as cleanup:
        busy: trio.BusyResourceError | None = None
        for endpoint in dict.fromkeys(endpoints):
            if isinstance(endpoint, Endpoint):
                try:
                    reader_of(endpoint).take_over()
                except trio.BusyResourceError as error:
                    busy = error
                else:
                    cleanup.callback(endpoint.close)
        for endpoint in endpoints:
            if not isinstance(endpoint, Endpoint):
                raise TypeError(f"expected an Endpoint, not {endpoint!r}")
        if busy is not None:
            raise busy
        if len(set(endpoints)) < len(endpoints):
            raise ValueError("an endpoint cannot be served on twice")
        if not endpoints:
            raise ValueError("no endpoints to serve on")
        _check_arguments(handler, limits, accept, on_error, idle_timeout, drain_timeout, stop_signals)
        try:
            async with trio.open_nursery() as nursery:
                state = _assemble(handler, limits, float(idle_timeout), accept, on_error, nursery, handler_nursery)
                server = create(Server, state)
                cleanup.callback(state.end)
                if stop_signals:
                    await nursery.start(state.stop_at_signals, stop_signals)
                nursery.start_soon(state.seats.idle.run)
                nursery.start_soon(state.errors.write_suppressed_in_time)
                for endpoint in endpoints:
                    state.add_place(server, endpoint)
                task_status.started(server)

                await state.stop_requested.wait()
                await state.drain(drain_timeout)
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            # Raise KeyboardInterrupt and SystemExit bare, so that the program ends as usual.
            ends, rest = group.split((KeyboardInterrupt, SystemExit))
            if ends is None:
                raise
            end: BaseException = ends
            while isinstance(end, BaseExceptionGroup):
                end = end.exceptions[0]
            raise end from rest
        if state.failure is not None:
            raise state.failure
        if state.has_lost_its_endpoints:
            raise trio.ClosedResourceError("every endpoint of this server has been closed")


def _assemble(
    handler: Handler,
    limits: Limits,
    idle_timeout: float,
    accept: Accept | None,
    on_error: OnError,
    nursery: trio.Nursery,
    handler_nursery: trio.Nursery | None,
) -> ServerState:
    """Put the parts of a server together."""
    errors = ErrorLog(trio.lowlevel.current_clock().current_time)
    limiter = RateLimiter(limits.rate_limit) if limits.rate_limit else None
    seats = Seats(limits, limiter, on_error, makes_room(handler))

    start_soon = (handler_nursery or nursery).start_soon
    function = cast("Callable[[Client], Awaitable[object]]", handler)  # not a DatagramHandler, which has no clients

    def start_handler(seat: Seat, client: Client) -> None:
        start_soon(run_handler, function, seat, client, name=TASK_NAME)

    admission = Admission(
        seats, Sources(), ask_both(accept, handler), idle_timeout, errors, WarningLog(), start_handler
    )
    if isinstance(handler, DatagramHandler):
        loop = partial(receive_loop, partial(to_function, handler, admission), False)
    else:
        loop = partial(receive_loop, partial(to_clients, admission), True)
    state = ServerState(seats, admission, errors, nursery, handler_nursery is None, loop)
    seats.crash = state.crash
    return state


def _check_arguments(
    handler: object,
    limits: object,
    accept: object,
    on_error: object,
    idle_timeout: object,
    drain_timeout: object,
    stop_signals: object,
) -> None:
    """Raise for the caller's mistakes now, rather than at the first datagram."""
    check_handler(handler)
    if not isinstance(limits, Limits):
        raise TypeError(f"limits must be Limits, not {limits!r}")
    if accept is not None:
        _check_function("accept", accept, "a Datagram")
        if isinstance(handler, DatagramHandler):
            raise ValueError("accept cannot be used with a datagram_handler, which sees every datagram itself")
    _check_function("on_error", on_error, "a Client (or a Datagram)", "an exception")
    check_seconds("idle_timeout", idle_timeout)
    check_seconds("drain_timeout", drain_timeout, zero=True)
    if not isinstance(stop_signals, Collection) or not all(isinstance(s, int) for s in stop_signals):
        raise TypeError(f"stop_signals must be a collection of signals, not {stop_signals!r}")


def _check_function(name: str, function: object, *arguments: str) -> None:
    if not callable(function):
        raise TypeError(f"{name} must be a plain function, not {function!r}")
    if is_async(function):
        raise TypeError(f"{name} must be a plain function, not the async function {function!r}")
    if not accepts(function, len(arguments)):
        raise TypeError(f"{name} must be a function of {' and '.join(arguments)}, not {function!r}")
