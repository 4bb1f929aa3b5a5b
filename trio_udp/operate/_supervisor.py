"""serve_workers() and Supervisor: one server in several processes, which are watched, replaced and stopped together.

Read this first. The supervisor binds the sockets (_sockets.py) and runs a task for each slot (_supervision.py), which
keeps a process (_process.py) reading the slot's sockets (_slot.py). It reads no datagrams itself.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
from collections.abc import Collection, Sequence
from typing import Literal, final

import attrs
import trio

from .. import Address, Limits, ServerStatistics
from ._arguments import check_counts, check_hosts, check_names, check_platform, check_seconds, check_settings
from ._messages import Settings
from ._process import Patience, WorkerProcess
from ._reload import watch_python_files
from ._slot import Slot
from ._sockets import bind_all, deal, describe_address, steer_by_address
from ._supervision import Supervision

LOGGER = logging.getLogger("trio_udp")

# A worker counts as answering for this many seconds after each report. Workers report at least once a second.
ANSWERS_WITHIN = 2.5


@attrs.frozen(kw_only=True)
class WorkerStatus:
    """One worker of a :class:`Supervisor`.

    Attributes:
      number: The worker's number, from 1. A process that replaces another has the same number.
      pid: Process ID of the process that reads the worker's sockets, or was the last to do so.
      state: ``"starting"``, ``"ready"`` (to read), ``"serving"``, ``"leaving"`` (it asks to be replaced),
        ``"stopping"``, ``"draining"`` or ``"dead"``.
      restarts: How often the process was replaced, because it died or by a rolling restart.
      killed: How many of these processes had to be killed, because they did not answer or ignored their drain.
      statistics: Counts of all processes with this number.
    """

    number: int
    pid: int
    state: str
    restarts: int
    killed: int
    statistics: ServerStatistics


@final
class Supervisor:
    """The running workers, as ``await nursery.start(serve_workers, ...)`` returns them."""

    def __init__(self, supervision: Supervision) -> None:
        self._supervision = supervision

    def __repr__(self) -> str:
        addresses = ", ".join(map(describe_address, self.addresses))
        return f"<trio_udp.Supervisor of {len(self.workers)} workers on {addresses}>"

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The addresses that are served, as ``getsockname`` gives them."""
        addresses = [endpoint.local_address for endpoints in self._supervision.bound for endpoint in endpoints]
        return tuple(dict.fromkeys(addresses))

    @property
    def workers(self) -> tuple[WorkerStatus, ...]:
        """The status of each worker now, in the order of their numbers."""
        return tuple(_status(slot, slot.worker) for slot in self._supervision.slots if slot.worker is not None)

    @property
    def ready(self) -> bool:
        """Whether new clients are welcome: from the start until :meth:`stop`, thus not during ``lame_duck``."""
        return not self.stopping

    @property
    def stopping(self) -> bool:
        """Whether the workers are stopping or have ended."""
        return self._supervision.stop_requested.is_set()

    @property
    def answering(self) -> bool:
        """Whether every worker has reported in the last 2.5 seconds."""
        heard = [slot.worker.heard if slot.worker else -math.inf for slot in self._supervision.slots]
        return trio.current_time() - min(heard) <= ANSWERS_WITHIN

    @property
    def drained(self) -> bool:
        """Whether all workers have ended, none of them because of a second signal."""
        return self._supervision.is_drained

    async def wait_stopping(self) -> None:
        """Wait until the workers are told to stop. A checkpoint."""
        await self._supervision.stop_requested.wait()

    def statistics(self) -> ServerStatistics:
        """Return the counts of all workers, including dead ones, so that no counter ever falls.

        The counts of a serving worker are at most 1 second old, or 0.1 seconds under load. If a worker dies suddenly,
        its counts since the last report are lost, and the datagrams in its inboxes count as ``dropped_at_end``. After a
        drain the counts are exact: once the old workers of a rolling restart have ended, and once ``serve_workers`` has
        returned. ``kernel_dropped`` is that of the sockets, regardless of the process that reads them.
        """
        first, *others = [slot.statistics() for slot in self._supervision.slots]
        return sum(others, first)

    @property
    def busiest_clients(self) -> tuple[tuple[Address, float], ...]:
        """The peer addresses of the busiest clients of all workers, with their datagrams a second, the busiest first.

        The rates are of the last second or two. ``serve_workers(busiest_clients=...)`` says how many there are for each
        worker. In a worker with more than 500 clients it may take some seconds until a busy one is found.
        """
        workers = [slot.worker for slot in self._supervision.slots if slot.worker is not None]
        found = [client for worker in workers if worker.is_reading for client in worker.busiest]
        return tuple(sorted(found, key=lambda client: -client[1]))

    async def restart(self) -> None:
        """Replace the workers one after the other by new processes, which import everything again, without loss.

        Each new worker gets ready, then the old one stops reading and says so, then the new one reads. Datagrams that
        arrive in these milliseconds wait in the kernel. Meanwhile the old worker drains: it handles the datagrams that
        it has read. A conversation ends with its old worker, even inside :meth:`Client.transaction`; the client's next
        datagram starts one in the new worker.

        Returns:
          When every worker has been replaced, or once the workers are told to stop.

        Raises:
          WorkerError: A new worker did not become ready. It is ended. The old worker continues, and so do those that
            have not been replaced yet.

        Cancellation:
          The workers that have not been replaced yet stay as they are.
        """
        await self._supervision.restart()

    def stop(self) -> None:
        """Stop gracefully: after ``lame_duck`` seconds, all workers drain and end. Returns at once. Idempotent.

        Datagrams that have reached the machine when the drain begins are handled; see :meth:`Server.stop`.
        """
        self._supervision.stop_requested.set()


async def serve_workers(
    target: str,
    port: int,
    *,
    host: str | Sequence[str] | None = None,
    workers: int = 1,
    steer: Literal["address"] | None = None,
    factory: bool = False,
    accept: str | None = None,
    app_dir: str = ".",
    reload: bool = False,
    sockets: Sequence[socket.socket] | None = None,
    receive_buffer: int | None = None,
    max_datagram_size: int = 65_535,
    idle_timeout: float = 60.0,
    limits: Limits = Limits(),  # noqa: B008  # frozen
    drain_timeout: float = 5.0,
    lame_duck: float = 0.0,
    watchdog: float = 5.0,
    ready_timeout: float = 60.0,
    stop_signals: Collection[signal.Signals] = (),
    restart_signals: Collection[signal.Signals] = (),
    log_level: int = logging.INFO,
    log_format: Literal["text", "json", "none"] = "text",
    busiest_clients: int = 0,
    task_status: trio.TaskStatus[Supervisor] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve on ``port`` with several processes, thus on several CPUs; restart them without losing a datagram.

    This process, the supervisor, binds a socket for each worker (``SO_REUSEPORT``), and the kernel assigns each client
    to one of them. The sockets outlive the workers: when a worker dies, arriving datagrams wait for its successor, and
    no client moves to another worker. When the supervisor dies, by any signal, its workers drain and end::

        trio.run(partial(trio_udp.serve_workers, "app:handler", 9999, workers=4, stop_signals={signal.SIGTERM}))

    Workers share nothing: only its own worker sees what a handler keeps in memory. This needs a POSIX system; only
    Linux spreads clients over sockets.

    Args:
      target: ``"module:handler"`` or ``"path/file.py:handler"``. Each worker imports it; this process does not.
      port: As for :func:`serve`; 0 lets the kernel choose (see :attr:`Supervisor.addresses`).
      host: As for :func:`serve`, or a list of names and addresses.
      workers: Number of processes.
      steer: ``"address"``: all ports of one IP address go to one worker; with a rate limit, all addresses that share
        one of its buckets do. ``limits.rate_limit`` then holds for all workers together. Otherwise each worker allows
        the whole rate. If the kernel refuses, a warning is logged.
      factory: The target is a function without arguments that returns an async context manager, which yields the
        handler. Each worker enters it before it serves, and exits it after its drain.
      accept: ``"module:function"``, for the ``accept`` of :func:`serve`.
      app_dir: Folder to import from, and the base of relative paths.
      reload: Restart when a Python file in ``app_dir``, or beside the target's file, changes. Needs the extra ``cli``.
      sockets: Serve on these bound sockets instead, for example those of systemd; ``port`` and ``host`` are ignored.
        The sockets of each address are assigned to the workers in turn. They are closed at the end.
      receive_buffer: As for :func:`serve`, for each socket.
      max_datagram_size, idle_timeout: As for :func:`serve`.
      limits: For all workers together: each gets its part of ``max_clients`` and ``total_bytes``.
      drain_timeout: Seconds that handlers have to finish when a worker stops. A worker that has not ended 2 seconds
        later is killed.
      lame_duck: Seconds to keep serving after :meth:`Supervisor.stop`, while :attr:`Supervisor.ready` is false, so that
        load balancers send their clients elsewhere.
      watchdog: Seconds without a report after which a worker is killed and replaced, because it is stopped or blocked;
        at least 2.
      ready_timeout: Seconds for a new worker to import the target and enter its factory.
      stop_signals: Signals that stop as :meth:`Supervisor.stop` does; the second one kills the workers.
      restart_signals: Signals that restart as :meth:`Supervisor.restart` does; errors are logged.
      log_level, log_format: For the log of the workers, on standard error. ``"none"``: workers do not configure
        logging.
      busiest_clients: How many of its busiest clients each worker reports each second (2 ms of CPU time), for
        :attr:`Supervisor.busiest_clients`.
      task_status: With ``nursery.start``, gives the :class:`Supervisor` once all workers serve.

    Returns:
      After ``Supervisor.stop()`` or one of ``stop_signals``, when all workers have ended.

    Raises:
      OSError: A socket cannot be bound; the message names the address and port.
      WorkerError: A worker did not become ready at the start. A later failure is logged and the start tried again: at
        once, then with growing delays.
      TypeError, ValueError: An argument is invalid.

    Cancellation:
      Kills the workers and closes the sockets.
    """
    check_platform()
    check_names(target, *([] if accept is None else [accept]))
    check_hosts(host, sockets)
    check_settings(steer, limits, log_format)
    check_counts(
        workers=(workers, 1),
        max_datagram_size=(max_datagram_size, 1),
        log_level=(log_level, 0),
        busiest_clients=(busiest_clients, 0),
    )
    check_seconds(
        idle_timeout=(idle_timeout, 0.001),
        drain_timeout=(drain_timeout, 0),
        lame_duck=(lame_duck, 0),
        watchdog=(watchdog, 2),  # workers report once a second
        ready_timeout=(ready_timeout, 0),
    )
    app_dir = os.path.abspath(app_dir)  # noqa: ASYNC240  # reads only the current folder
    watch = watch_python_files(app_dir, target) if reload else None
    if sockets is None:
        hosts = [host] if host is None or isinstance(host, str) else list(host)
        bound = await bind_all(workers, port, hosts, receive_buffer)
    else:
        bound = deal(sockets, workers, receive_buffer)
    try:
        if steer is not None:
            steer_by_address(bound, limits.rate_limit)
        settings = Settings(
            number=0,
            descriptors=[],
            inherited=sockets is not None,
            target=target,
            factory=factory,
            accept=accept,
            app_dir=app_dir,
            idle_timeout=idle_timeout,
            limits=_part_of(limits, workers),
            drain_timeout=drain_timeout,
            max_datagram_size=max_datagram_size,
            log_level=log_level,
            log_format=log_format,
            busiest_clients=busiest_clients,
        )
        supervision = Supervision(bound, settings, Patience(ready_timeout, watchdog, drain_timeout), lame_duck)
        supervisor = Supervisor(supervision)
        has_started = False

        def started() -> None:
            nonlocal has_started
            how = f"Ctrl-C or kill {os.getpid()}" if stop_signals else "Supervisor.stop()"
            LOGGER.info(
                "serving %s on %s; to stop: %s", target, ", ".join(map(describe_address, supervisor.addresses)), how
            )
            task_status.started(supervisor)
            has_started = True

        await supervision.run(stop_signals, restart_signals, watch, started)
        if supervisor.drained:
            totals = supervisor.statistics()
            LOGGER.info(
                "stopped: %d datagrams received in all, %d handlers cancelled",
                *(totals.received, totals.handlers_cancelled),
            )
        if not has_started:  # it was stopped before
            task_status.started(supervisor)
    finally:
        for endpoints in bound:
            for endpoint in endpoints:
                endpoint.close()


def _part_of(limits: Limits, workers: int) -> Limits:
    """Return the limits of one worker of several."""
    return attrs.evolve(
        limits, max_clients=math.ceil(limits.max_clients / workers), total_bytes=math.ceil(limits.total_bytes / workers)
    )


def _status(slot: Slot, worker: WorkerProcess) -> WorkerStatus:
    return WorkerStatus(
        number=slot.number,
        pid=worker.pid,
        state=worker.state.value,
        restarts=slot.restarts,
        killed=slot.killed,
        statistics=slot.statistics(),
    )
