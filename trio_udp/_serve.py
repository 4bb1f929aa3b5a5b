"""The server. Read this first.

    kernel -> Endpoint.receive_batch() -> receive loop -> known[route] -> inbox -> handler task
    kernel <- engine.send()            <- outbox       <-------------------------- client.send()

One receive loop for each endpoint puts every datagram into the inbox of the client it belongs to, and starts a handler
task for a stranger. A *route* says which client that is: it stands for a peer address and the local address that was
written to. The loop never waits for a client. Everything that grows is bounded by :class:`Limits`.
"""

from __future__ import annotations

import inspect
import signal
import sys
from collections.abc import Awaitable, Callable, Collection, Iterable
from contextlib import ExitStack
from typing import TypeAlias

import attrs
import trio

from ._client import Client
from ._clients import ClientsView, ClientTable
from ._conversation import Payload, as_payload
from ._endpoints import Address, Endpoint, Route, numeric_address, open_endpoints
from ._limits import Limits, check_seconds
from ._log import ErrorLog
from ._rate import RateLimiter
from ._statistics import SendTally, ServerStatistics

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup

# One name for all tasks: Trio would make it anew for each, 80 bytes and half a microsecond.
TASK_NAME = "trio_udp handler"

Handler: TypeAlias = Callable[[Client], Awaitable[object]]
Accept: TypeAlias = Callable[[bytes, Address], bool]
OnError: TypeAlias = Callable[[Client, Exception], None]


def log_error(client: Client, error: Exception) -> None:
    """Log an exception that left a handler, with its traceback, to the logger ``trio_udp``.

    The default ``on_error`` of a server. Writes at most 10 tracebacks a second, and then how many were suppressed.
    """
    client.server._log.write(error, "Handler of client %s failed", client.peer_address)


async def serve(
    handler: Handler,
    port: int,
    *,
    host: str | bytes | None = None,
    reuse_port: bool = False,
    max_datagram_size: int = 65_535,
    receive_buffer: int | None = None,
    send_buffer: int | None = None,
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

    A client's datagrams reach its handler in arrival order; different clients run side by side. This is
    :func:`open_endpoints` followed by :func:`serve_endpoints`, which describe the arguments::

        async def shout(client):
            async for payload in client:
                await client.send(payload.upper())

        trio.run(trio_udp.serve, shout, 9999)

    Returns:
      After ``Server.stop()`` or one of ``stop_signals``, when the server has drained.
      ``await nursery.start(serve, ...)`` gives the running :class:`Server`.

    Errors:
      ``OSError`` from binding propagates unchanged. Nothing that a stranger sends raises here:
      see :class:`ServerStatistics`.

    Cancellation:
      Ends every client at once and closes the sockets; datagrams still in inboxes are dropped.
    """
    endpoints = await open_endpoints(
        port,
        host=host,
        reuse_port=reuse_port,
        max_datagram_size=max_datagram_size,
        receive_buffer=receive_buffer,
        send_buffer=send_buffer,
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
    """Serve on endpoints that are already open; :func:`serve` opens them itself.

    A stranger's first datagram starts a task that runs ``handler(client)``; later ones go to the same :class:`Client`
    until its handler returns. If that leaves datagrams behind, a new client and a new handler call take them over, in
    order, provided the old one took any.

    Args:
      handler: Async function, called with a new :class:`Client`. ``trio.EndOfChannel`` leaving it is a normal end.
      endpoints: From :func:`open_endpoints` or :meth:`Endpoint.from_socket`. They are closed when this function ends.
      idle_timeout: Seconds of silence after which a waiting handler's ``async for`` ends; see ``Client.idle_timeout``.
      limits: What may be held in memory for strangers, how many datagrams they may send, and how much they may be sent.
      accept: ``accept(payload, peer_address)`` is asked about every stranger before anything is kept of it; false means
        that the datagram is refused. If it raises, the datagram is refused too, and the error logged. A plain function,
        run in the receive loop: it should be quick. It is not asked about known clients, nor about datagrams taken
        over from a handler that has ended; to be rid of a client, close it.
      on_error: Called with the client and the exception when a handler raises. That ends this client only, unless
        ``on_error`` itself raises: then the server ends with that exception, as ``trio.serve_tcp`` would.
      drain_timeout: Seconds that handlers have to finish once the server stops. What is left then is cancelled.
      stop_signals: Signals that stop the server as :meth:`Server.stop` does; the second one stops it at once.
      handler_nursery: Run handlers there rather than in a nursery of the server's own. They are then the caller's to
        cancel, also after ``drain_timeout``, and what they raise goes there; a client used after its server has ended
        raises ``trio.ClosedResourceError``.
      task_status: With ``nursery.start``, gives the running :class:`Server`.

    Raises:
      trio.ClosedResourceError: Every endpoint was closed under the running server.
      BaseExceptionGroup: ``on_error`` raised, or a handler raised something that is not an ``Exception``.

    Cancellation:
      Ends every client at once and closes the endpoints; datagrams still in inboxes are dropped.
    """
    endpoints = tuple(endpoints)
    with ExitStack() as cleanup:
        for endpoint in endpoints:
            if isinstance(endpoint, Endpoint):
                cleanup.callback(endpoint.close)
        _check_arguments(handler, endpoints, limits, accept, on_error, drain_timeout, stop_signals)
        now = trio.lowlevel.current_clock().current_time
        known: dict[Endpoint, dict[Route, Client]] = {endpoint: {} for endpoint in endpoints}
        table = ClientTable(limits, check_seconds("idle_timeout", idle_timeout), now, known)
        limiter = RateLimiter(limits.rate_limit, now) if limits.rate_limit else None
        log = ErrorLog(now)
        async with trio.open_nursery() as nursery:
            server = Server(
                endpoints, table, handler, limiter, accept, on_error, log, nursery, handler_nursery or nursery
            )
            cleanup.callback(server._end)
            if stop_signals:
                await nursery.start(server._stop_at_signals, stop_signals)
            nursery.start_soon(table.expire_forever)
            nursery.start_soon(log.write_suppressed_in_time)
            for endpoint in endpoints:
                nursery.start_soon(endpoint.flush_when_stuck)
                nursery.start_soon(server._receive_from, endpoint)
            task_status.started(server)

            await table.stopping.wait()
            with trio.move_on_after(drain_timeout):
                await table.all_gone.wait()
                for endpoint in endpoints:
                    await endpoint.flush()
            nursery.cancel_scope.cancel()

        if server._has_lost_its_endpoints():
            raise trio.ClosedResourceError("every endpoint of this server has been closed")


@attrs.define(eq=False, repr=False)
class Server:
    """A running server, as ``await nursery.start(serve, ...)`` and ``Client.server`` give it.

    Attributes:
      endpoints: The endpoints it serves on; ``server.endpoints[0].local_address`` tells the port.
    """

    endpoints: tuple[Endpoint, ...]
    _table: ClientTable
    _handler: Handler
    _limiter: RateLimiter | None
    _accept: Accept | None
    _on_error: OnError
    _log: ErrorLog
    _nursery: trio.Nursery
    _handler_nursery: trio.Nursery
    _unsolicited: SendTally = attrs.field(factory=SendTally, init=False)  # counts of send_to: no client's
    # Datagrams of the current batch not handed out yet. Not 0 only while accept is asked, which may look at statistics.
    _in_hand: int = attrs.field(default=0, init=False)
    _refused_by_rate: int = attrs.field(default=0, init=False)
    _refused_by_accept: int = attrs.field(default=0, init=False)
    _refused_full: int = attrs.field(default=0, init=False)
    _refused_stopping: int = attrs.field(default=0, init=False)
    _handler_errors: int = attrs.field(default=0, init=False)
    _requests_timed_out: int = attrs.field(default=0, init=False)
    _sends_withheld: int = attrs.field(default=0, init=False)

    @property
    def clients(self) -> Collection[Client]:
        """A live, read-only collection of the clients whose handlers run. Iterating goes over those of the moment."""
        return ClientsView(self._table)

    def __repr__(self) -> str:
        addresses = ", ".join(str(endpoint.local_address) for endpoint in self.endpoints)
        return f"<trio_udp.Server on {addresses} with {len(self.clients)} clients>"

    def stop(self) -> None:
        """Stop gracefully: refuse strangers, let handlers finish what has arrived, then end.

        Callable from anywhere inside Trio, handlers included; returns at once. Idempotent.

        While the server drains, what waits in an inbox is handled and then the channel ends; datagrams that still
        arrive count as ``refused_stopping``, except those of clients inside :meth:`Client.transaction`. When
        ``drain_timeout`` is over, handlers that still run are cancelled.
        """
        self._table.stop()

    async def send_to(self, payload: Payload, address: Address) -> None:
        """Send one datagram to any address, whether it has ever written to us or not.

        It leaves from the first endpoint of the address's family. Waiting and errors are as for :meth:`Client.send`.

        Args:
          payload: Any bytes-like object, copied now.
          address: Numeric host and port, as a socket gives them.

        Raises:
          OSError: ``EMSGSIZE``: longer than a UDP datagram can be.
          TypeError, ValueError: It is not a numeric address, or no endpoint is of its family.
          trio.ClosedResourceError: The server has ended.

        Cancellation:
          A checkpoint; when it raises ``Cancelled``, the datagram was not sent.
        """
        address = numeric_address(address)
        endpoint = self._endpoint_for(address)
        route = endpoint.route(address)
        payload = as_payload(payload, endpoint, route)
        await trio.lowlevel.checkpoint()
        try:
            endpoint.send_nowait(payload, route, self._unsolicited)
        except trio.WouldBlock:
            await endpoint.send(payload, route, self._unsolicited)

    def statistics(self) -> ServerStatistics:
        """What has happened so far to every datagram; also available once the server has ended."""
        table, totals = self._table, self._table.totals
        sockets = [endpoint.statistics() for endpoint in self.endpoints]
        errors: dict[str, int] = {}
        for of_socket in sockets:
            for name, count in of_socket.errors.items():
                errors[name] = errors.get(name, 0) + count
        return ServerStatistics(
            received=sum(s.received for s in sockets) - self._in_hand,
            bytes_received=sum(s.bytes_received for s in sockets),
            sent=sum(s.sent for s in sockets),
            bytes_sent=sum(s.bytes_sent for s in sockets),
            delivered=totals.delivered,
            waiting=totals.waiting,
            dropped_inbox_full=totals.dropped_inbox_full,
            dropped_at_end=totals.dropped_at_end,
            truncated=sum(s.truncated for s in sockets),
            refused_by_rate=self._refused_by_rate,
            refused_by_accept=self._refused_by_accept,
            refused_full=self._refused_full,
            refused_stopping=self._refused_stopping,
            clients=len(table.running),
            clients_started=table.started,
            clients_expired=table.expired,
            clients_evicted=table.evicted,
            handler_errors=self._handler_errors,
            requests_timed_out=self._requests_timed_out,
            sends_withheld=self._sends_withheld,
            receive_errors=sum(s.receive_errors for s in sockets),
            send_errors=sum(s.send_errors for s in sockets),
            errors=errors,
            kernel_dropped=sum(s.kernel_dropped for s in sockets),
        )

    async def _receive_from(self, endpoint: Endpoint) -> None:
        """The receive loop: hand every datagram to its client, for ever, until the endpoint is closed."""
        known, limiter = self._table.known[endpoint], self._limiter
        now = 0.0
        try:
            while True:
                batch = await endpoint.receive_batch()
                if len(batch) > 1:
                    endpoint.cork()
                if limiter is not None:
                    now = limiter.now()
                for number, (payload, route) in enumerate(batch):
                    client = known.get(route)
                    if limiter is not None:
                        bucket = client._bucket if client else limiter.bucket_of(endpoint.peer_address_of(route))
                        if not limiter.take(bucket, now):
                            self._refused_by_rate += 1
                            continue
                    if client is None:
                        self._in_hand = len(batch) - number
                        client = self._admit(endpoint, route, payload)
                        self._in_hand = 0
                        if client is not None and limiter is not None:
                            client._bucket = limiter.keep(bucket)
                    # Put it into the inbox here, in arrival order, rather than in a task per datagram: Trio shuffles
                    # tasks that become runnable together, so spawning would reorder the datagrams of a batch.
                    if client is not None:
                        client._inbox.put(payload)
                if self._table.overfull:
                    # Let evicted handlers take their leave before the next strangers come. (receive_batch lets tasks
                    # run too, but in a random order: once may be too early for them.)
                    await trio.lowlevel.checkpoint()
        except trio.ClosedResourceError:
            self._table.abandon(endpoint)
            if self._has_lost_its_endpoints():
                self._nursery.cancel_scope.cancel()
        finally:
            # Where accept or handler_nursery has failed, and so has the server, the rest of a batch comes too late.
            self._refused_stopping += self._in_hand
            self._in_hand = 0
            # The last words of handlers that are being cancelled must not wait for a loop that is gone.
            endpoint.uncork()

    def _admit(self, endpoint: Endpoint, route: Route, payload: bytes) -> Client | None:
        """Make a stranger a client, or count why not."""
        table, accept = self._table, self._accept
        # Whether the server is stopping is asked twice: accept need not look at what is refused anyway, and may itself
        # have stopped the server.
        if accept is not None and not table.stopping.is_set() and not self._accepts(accept, endpoint, route, payload):
            self._refused_by_accept += 1
        elif table.stopping.is_set():
            self._refused_stopping += 1
        elif not table.has_room_for(payload):
            table.totals.dropped_inbox_full += 1
        elif not table.make_room():
            self._refused_full += 1
        else:
            client = table.add(self, endpoint, route)
            try:
                self._handler_nursery.start_soon(self._run_handler, client, name=TASK_NAME)
            except BaseException:  # the caller's nursery is over
                table.remove(client)
                raise
            return client
        return None

    def _accepts(self, accept: Accept, endpoint: Endpoint, route: Route, payload: bytes) -> bool:
        address = endpoint.peer_address_of(route)
        try:
            answer = accept(payload, address)
            if inspect.iscoroutine(answer):  # which would count as true
                answer.close()
                raise TypeError(f"accept must be a plain function, not {accept!r}")
            return answer
        except Exception as error:
            self._log.write(error, "accept failed on a datagram from %s", address)
            return False

    async def _run_handler(self, client: Client) -> None:
        """Call the handler for a client, and again for as long as it leaves datagrams behind."""
        current: Client | None = client
        try:
            while current is not None:
                try:
                    await self._handler(current)
                except Exception as error:
                    self._handler_failed(current, error)
                except BaseExceptionGroup as group:
                    # From a nursery of the handler's. If some of its tasks were cancelled and others failed, errors are
                    # errors all the same; if one of them is to end the program, then let all of it be seen.
                    errors, others = group.split(Exception)
                    if errors is None or others is None or others.split(trio.Cancelled)[1] is not None:
                        raise
                    self._handler_failed(current, errors)
                    raise others from None
                current = self._table.hand_over(current)
        finally:
            if current is not None:  # cancelled, or the server is to crash
                self._table.remove(current)

    def _handler_failed(self, client: Client, error: Exception) -> None:
        if not _is_normal_end(error, client):
            self._handler_errors += 1
            self._on_error(client, error)

    async def _stop_at_signals(
        self, signals: Collection[signal.Signals], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(*signals) as arriving:
            task_status.started()
            await anext(arriving)
            self.stop()
            await anext(arriving)
            self._nursery.cancel_scope.cancel()

    def _has_lost_its_endpoints(self) -> bool:
        """Whether there is nothing left to serve on, though nobody has stopped the server."""
        return not self._table.stopping.is_set() and all(endpoint.closed for endpoint in self.endpoints)

    def _end(self) -> None:
        """Close every client: using one after the server has ended raises ``trio.ClosedResourceError``."""
        self._table.abandon()
        self._log.write_suppressed()

    def _endpoint_for(self, address: Address) -> Endpoint:
        fitting = [endpoint for endpoint in self.endpoints if endpoint.can_send_to(address)]
        if not fitting:
            raise ValueError(f"no endpoint of this server can send to {address!r}")
        return next((endpoint for endpoint in fitting if not endpoint.closed), fitting[0])


def _is_normal_end(error: Exception, client: Client) -> bool:
    """Whether an exception only says that the conversation is over, perhaps from inside a nursery of the handler's."""
    if isinstance(error, ExceptionGroup):
        return all(_is_normal_end(inner, client) for inner in error.exceptions)
    closed = client._abandoned or client._endpoint.closed  # by the server or its endpoint, not by the handler itself
    return isinstance(error, trio.EndOfChannel) or (closed and isinstance(error, trio.ClosedResourceError))


def _is_async(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _check_arguments(
    handler: object,
    endpoints: Collection[Endpoint],
    limits: object,
    accept: object,
    on_error: object,
    drain_timeout: object,
    stop_signals: object,
) -> None:
    """Raise for the caller's mistakes now, rather than at the first datagram."""
    # A plain function may return what an async one does. An async generator, one "yield" too many, never does anything.
    if not callable(handler) or inspect.isasyncgenfunction(handler):
        raise TypeError(f"handler must be an async function to be called with a client, not {handler!r}")
    if not endpoints:
        raise ValueError("no endpoints to serve on")
    for endpoint in endpoints:
        if not isinstance(endpoint, Endpoint):
            raise TypeError(f"expected an Endpoint, not {endpoint!r}")
    if len(set(endpoints)) < len(endpoints):
        raise ValueError("an endpoint cannot be served on twice")
    if not isinstance(limits, Limits):
        raise TypeError(f"limits must be Limits, not {limits!r}")
    if (accept is not None and not callable(accept)) or _is_async(accept):
        raise TypeError(f"accept must be a plain function or None, not {accept!r}")
    if not callable(on_error) or _is_async(on_error):
        raise TypeError(f"on_error must be a plain function, not {on_error!r}")
    check_seconds("drain_timeout", drain_timeout, zero=True)
    if not isinstance(stop_signals, Collection) or not all(isinstance(s, int) for s in stop_signals):
        raise TypeError(f"stop_signals must be a collection of signals, not {stop_signals!r}")
