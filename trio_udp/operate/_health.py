"""``--metrics``: ``/metrics``, ``/live`` and ``/ready`` over HTTP, from the supervisor.

Trio accepts the connections, so the port is closed as soon as the supervisor ends. A thread answers each request, with
prometheus-client's own handler; the collector asks Trio for the counts.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import trio
from prometheus_client import CollectorRegistry, MetricsHandler

from ..metrics import ServerCollector
from ._moments import show_address
from ._supervisor import Supervisor

LOGGER = logging.getLogger("trio_udp")

# Seconds that a request may take, from its connection to the last byte of the answer.
PATIENCE = 5.0
# Seconds that requests may still take when the supervisor ends.
GRACE = 0.5
# The most connections at once. Further ones are closed: strangers must not use up the supervisor's descriptors.
MOST_CONNECTIONS = 16


class Health:
    """The answers of the supervisor's HTTP port."""

    def __init__(self) -> None:
        self._supervisor: Supervisor | None = None
        self._registry = CollectorRegistry()
        self._handler = _make_handler(self._registry, self.is_ready)

    def begin(self, supervisor: Supervisor) -> None:
        """Report about this supervisor from now on."""
        self._supervisor = supervisor
        self._registry.register(ServerCollector(supervisor))

    def is_ready(self) -> bool:
        """Whether new clients are welcome: not all workers are dead, and they were not told to stop.

        Replacing a worker changes nothing, because datagrams wait for the new one.
        """
        supervisor = self._supervisor
        return supervisor is not None and supervisor.ready and any(w.state != "dead" for w in supervisor.workers)

    async def serve(self, host: str, port: int, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer requests until cancelled.

        Raises:
          OSError: The port cannot be bound; the message names it.
        """
        listeners = await _listen(host, port)
        addresses = [listener.socket.getsockname() for listener in listeners]
        scopes: set[trio.CancelScope] = set()
        limiter = trio.CapacityLimiter(MOST_CONNECTIONS)

        async def answer(stream: trio.SocketStream) -> None:
            sock = socket.socket(fileno=stream.socket.detach())
            if limiter.available_tokens == 0:
                sock.close()
                return
            sock.settimeout(PATIENCE)
            with trio.CancelScope(shield=True, deadline=trio.current_time() + PATIENCE) as scope:
                scopes.add(scope)
                try:
                    await trio.to_thread.run_sync(self._answer, sock, abandon_on_cancel=True, limiter=limiter)
                finally:
                    scopes.remove(scope)
                    with suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)  # wakes an abandoned thread, which closes the socket

        async with trio.open_nursery() as answers:
            try:
                for where in addresses:
                    LOGGER.info("metrics on http://%s/metrics", show_address(where))
                task_status.started()
                await trio.serve_listeners(answer, listeners, handler_nursery=answers)
            finally:
                for scope in scopes:
                    scope.deadline = min(scope.deadline, trio.current_time() + GRACE)

    def _answer(self, sock: socket.socket) -> None:
        """Answer one request, in a thread."""
        with sock:
            try:
                self._handler(sock, None, None)
            except (OSError, trio.RunFinishedError):
                pass  # the other end is gone, or Trio has ended
            except Exception:
                LOGGER.exception("a request for metrics failed")


def _make_handler(registry: CollectorRegistry, is_ready: Callable[[], bool]) -> Any:
    """Add our paths to prometheus-client's handler, which answers every path with metrics."""

    class Handler(MetricsHandler):
        server_version, sys_version = "trio-udp", ""

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if path == "/metrics" and self.command == "GET":
                super().do_GET()
            elif path == "/metrics":
                self.tell(200, "")
            elif path == "/live":  # Trio has accepted the connection, so the supervisor is alive
                self.tell(200, "alive")
            elif path == "/ready":
                is_now = trio.from_thread.run_sync(is_ready)
                self.tell(200 if is_now else 503, "ready" if is_now else "not ready")
            else:
                self.tell(404, "try /metrics, /live or /ready")

        def do_HEAD(self) -> None:
            self.do_GET()

        def tell(self, status: int, text: str) -> None:
            body = f"{text}\n".encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    Handler.registry = registry
    return Handler


async def _listen(host: str, port: int) -> list[trio.SocketListener]:
    try:
        return await trio.open_tcp_listeners(port, host=host)
    except socket.gaierror as error:
        raise OSError(f"cannot serve metrics on {host}: {error.strerror}; is the name right?") from error
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        where = show_address((host, port))
        raise OSError(f"cannot serve metrics on {where}: {reason}; choose another address") from error
