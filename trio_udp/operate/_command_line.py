"""The command line: ``python -m trio_udp``, and the script ``trio-udp``. It calls :func:`serve_workers`.

A mistake of the caller ends in one line on standard error and exit status 2, an error of the system in one line and
status 1. An error inside the user's module keeps its traceback. Ctrl-C before there is anything to stop leaves main()
as a ``KeyboardInterrupt``.
"""

from __future__ import annotations

import argparse
import errno
import ipaddress
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial

import attrs
import trio

from .. import Limits, ServerStatistics
from ._logging import prepare_process
from ._options import Parser, make_parser
from ._process import WorkerError
from ._supervisor import Supervisor, serve_workers
from ._target import split_target
from ._watching import Views, watching
from .systemd import ServiceManager, sockets_from_systemd, warn_of_default_buffers

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

LOGGER = logging.getLogger("trio_udp")

EXPECTED = (OSError, ValueError, TypeError, ImportError, WorkerError)

ONLY_LOOPBACK = "without a handler, an echo is served, and on 127.0.0.1 and ::1 only: name a handler, or use these"
ECHO = "trio_udp.operate._echo:echo"

# What to do about errors of the system.
HINTS = {
    errno.EADDRINUSE: "choose another --port, or end the program that has it (ss -lunp shows it)",
    errno.EACCES: "ports below 1024 need CAP_NET_BIND_SERVICE, or a socket from systemd (--systemd)",
    errno.EPERM: "ports below 1024 need CAP_NET_BIND_SERVICE, or a socket from systemd (--systemd)",
    errno.EADDRNOTAVAIL: "use an address of this machine as --host (ip address shows them), or leave --host out",
    errno.EMFILE: "allow more open files (ulimit -n), or use fewer workers",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = make_parser()
    try:
        options = parser.parse_args(arguments)
    except (UnicodeDecodeError, RecursionError) as error:
        parser.error(f"cannot read a file of options: {error}")
    if sys.platform == "win32":
        parser.error("workers need a POSIX system, which can pass sockets to a process; use trio_udp.serve")
    _check(parser, options)
    level = getattr(logging, options.log_level.upper())
    prepare_process(level, options.log_format, is_worker=False)
    try:
        with watching(live=options.live, metrics=options.metrics) as views:
            return trio.run(_serve, options, level, views)
    except BaseExceptionGroup as group:  # of the nursery
        interrupts, others = group.split(KeyboardInterrupt)
        raise KeyboardInterrupt if others is None else group from interrupts
    except (ValueError, TypeError, ImportError) as error:
        parser.error(str(error))
    except WorkerError as error:
        is_traceback = "\n" in str(error)
        print(error if is_traceback else f"trio-udp: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        hint = "is the name right?" if isinstance(error, socket.gaierror) else HINTS.get(error.errno or 0)
        print(f"trio-udp: {error.strerror or error}{f'; {hint}' if hint else ''}", file=sys.stderr)
        return 1


def _check(parser: Parser, options: argparse.Namespace) -> None:
    """Complete the options; end with an error if they contradict each other."""
    if options.systemd and (options.host or options.port is not None):
        parser.error("with --systemd, leave --host and --port out: the .socket unit has them")
    if options.target is not None:
        try:
            split_target(options.target)
            if options.accept is not None:
                split_target(options.accept)
        except ValueError as error:
            parser.error(str(error))
    elif options.factory or options.accept is not None:
        parser.error("--factory and --accept need a target: module:handler")
    elif options.host is None and not options.systemd:
        options.host = _loopback()
    elif not all(_is_loopback(host) for host in options.host or ()):
        parser.error(ONLY_LOOPBACK)
    if not os.path.isdir(options.app_dir):
        parser.error(f"--app-dir {options.app_dir}: no such folder")


async def _serve(options: argparse.Namespace, level: int, views: Views) -> int:
    manager = ServiceManager.from_environment()
    sockets = [sock for _, sock in sockets_from_systemd(one_port=True)] if options.systemd else None
    if options.target is None and not all(_is_loopback(sock.getsockname()[0]) for sock in sockets or ()):
        raise ValueError(ONLY_LOOPBACK)
    serve = partial(
        serve_workers,
        options.target or ECHO,
        9999 if options.port is None else options.port,
        host=options.host,
        sockets=sockets,
        workers=options.workers,
        steer=options.steer,
        factory=options.factory,
        accept=options.accept,
        app_dir=options.app_dir,
        reload=options.reload,
        receive_buffer=options.receive_buffer,
        idle_timeout=options.idle_timeout,
        limits=Limits(
            max_clients=options.max_clients,
            when_full=options.when_full,
            rate_limit=options.rate,
            amplification=options.amplification,
        ),
        drain_timeout=options.drain,
        lame_duck=options.lame_duck,
        watchdog=options.watchdog,
        stop_signals={signal.SIGINT, signal.SIGTERM},
        log_level=level,
        log_format=options.log_format,
        busiest_clients=views.busiest_clients,
    )
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:

        async def run(task_status: trio.TaskStatus[Supervisor]) -> None:
            await serve(task_status=task_status)
            nursery.cancel_scope.cancel()

        # Both until the end: without a receiver, a signal would kill this process.
        with (
            trio.open_signal_receiver(signal.SIGUSR1) as asked_for_statistics,
            trio.open_signal_receiver(signal.SIGHUP) as asked_for_restart,
        ):
            try:
                await views.start(nursery)
                supervisor: Supervisor = await nursery.start(run)
            except EXPECTED as error:  # here, before it is in a group
                failure = error
            else:
                if sockets and options.receive_buffer is None:
                    warn_of_default_buffers(sockets)
                _announce(supervisor, options)
                views.show(nursery, supervisor)
                nursery.start_soon(_notify, manager, supervisor)
                nursery.start_soon(_restart_at_signals, asked_for_restart, manager, supervisor)
                async for _ in asked_for_statistics:
                    log_statistics(supervisor)
    if failure is not None:
        raise failure
    return 0 if supervisor.drained else 1


async def _notify(manager: ServiceManager, supervisor: Supervisor) -> None:
    """Tell systemd when the service is ready, while all workers answer, and when it stops, until cancelled."""
    _notify_ready(manager, supervisor)
    interval = manager.watchdog_interval or math.inf
    while not supervisor.stopping:
        with trio.move_on_after(interval):
            await supervisor.wait_stopping()
        if supervisor.answering:
            manager.notify(WATCHDOG=1)
    manager.notify(STOPPING=1, STATUS="stopping")
    while True:  # a stop may take longer than the watchdog of systemd allows, and workers end one after the other
        await trio.sleep(interval)
        manager.notify(WATCHDOG=1)


async def _restart_at_signals(signals: AsyncIterator[int], manager: ServiceManager, supervisor: Supervisor) -> None:
    """Restart the workers at each signal, and tell systemd when that begins and ends."""
    async for _ in signals:
        if supervisor.stopping:
            return
        manager.notify(RELOADING=1, STATUS="restarting the workers")
        with suppress(WorkerError):  # it is in the log
            await supervisor.restart()
        if not supervisor.stopping:
            _notify_ready(manager, supervisor)


def _notify_ready(manager: ServiceManager, supervisor: Supervisor) -> None:
    workers = len(supervisor.workers)
    manager.notify(READY=1, STATUS="1 worker serves" if workers == 1 else f"{workers} workers serve")


def _announce(supervisor: Supervisor, options: argparse.Namespace) -> None:
    if options.target is None:
        print(f"Serving an echo. Try it: nc -u 127.0.0.1 {_port_of(supervisor)}", flush=True)
    elif options.port == 0 and not LOGGER.isEnabledFor(logging.INFO):
        print(f"port {_port_of(supervisor)}", flush=True)


def _port_of(supervisor: Supervisor) -> int:
    return supervisor.addresses[0][1]


def log_statistics(supervisor: Supervisor) -> None:
    """Log the counters of all workers together, and the state of each."""
    statistics = supervisor.statistics()
    LOGGER.info("statistics: %s", describe(statistics))
    for worker in supervisor.workers:
        LOGGER.info(
            "worker %d: pid %d, %s, %d restarts, %d killed, received %d, clients %d",
            *(worker.number, worker.pid, worker.state, worker.restarts, worker.killed),
            *(worker.statistics.received, worker.statistics.clients),
        )


def describe(statistics: ServerStatistics) -> str:
    """Format counters on one line: the most important ones, and all others that are not 0."""
    counters = attrs.asdict(statistics)
    errors = counters.pop("errors")
    first = ["received", "delivered", "sent", "clients", "clients_started"]
    others = [name for name, count in counters.items() if count and name not in first]
    return ", ".join(
        [*(f"{name} {counters[name]}" for name in first + others), *(f"{n} {c}" for n, c in errors.items())]
    )


def _loopback() -> list[str]:
    """Return the loopback addresses that this machine has."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return ["127.0.0.1"]
    return ["127.0.0.1", "::1"]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
