"""The command line: ``python -m trio_udp``, and the script ``trio-udp``. A shell around :func:`serve_workers`.

Every mistake of the caller ends in one line on standard error and exit status 2; an error of the system in one line
and 1; an error inside the user's module keeps its traceback.
"""

from __future__ import annotations

import argparse
import errno
import ipaddress
import logging
import math
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import attrs
import trio

from .. import Limits, RateLimit, ServerStatistics, __version__
from ._logging import prepare_process
from ._process import WorkerError
from ._supervisor import Supervisor, serve_workers
from ._target import split_target
from .systemd import ServiceManager, sockets_from_systemd, warn_of_default_buffers

LOGGER = logging.getLogger("trio_udp")

EXPECTED = (OSError, ValueError, TypeError, ImportError, WorkerError)

ONLY_LOOPBACK = "without a handler an echo is served, on 127.0.0.1 and ::1 only: name a handler, or other addresses"
ECHO = "trio_udp.operate._echo:echo"

# What to do about errors of the system.
HINTS = {
    errno.EADDRINUSE: "choose another --port, or end the program that has it (ss -lunp tells which)",
    errno.EACCES: "ports below 1024 need CAP_NET_BIND_SERVICE, or a socket from systemd (--systemd)",
    errno.EPERM: "ports below 1024 need CAP_NET_BIND_SERVICE, or a socket from systemd (--systemd)",
    errno.EADDRNOTAVAIL: "give an address of this machine as --host (ip address shows them), or leave --host out",
    errno.EMFILE: "allow more open files (ulimit -n), or use fewer workers",
}


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"trio-udp: {' '.join(message.split())} (see trio-udp --help)\n")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Split a line of an ``@FILE`` as a shell would; ``#`` begins a comment."""
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:
            self.error(f"cannot read {arg_line!r} in a file of options: {error}")


def make_parser() -> Parser:
    parser = Parser(
        prog="trio-udp",
        usage="trio-udp [options] [module:handler | path/file.py:handler]",
        description="Serve UDP with a handler of yours, on all cores, restarted without loss.",
        epilog="Options may stand in a file: trio-udp @FILE. Signals: SIGTERM or SIGINT stops (a second one at once), "
        "SIGHUP restarts worker by worker and loses nothing, SIGUSR1 logs statistics. Exit status: 0 after a drain, 1 "
        "when serving failed or was cut short, 2 for a wrong command line.",
        fromfile_prefix_chars="@",
        allow_abbrev=False,
        formatter_class=partial(argparse.HelpFormatter, width=79, max_help_position=26),
    )
    parser.add_argument(
        "target",
        nargs="?",
        metavar="module:handler",
        help="an async function of a client; without it, an echo is served",
    )
    parser.add_argument("--version", action="version", version=f"trio-udp {__version__}")

    where = parser.add_argument_group("where")
    where.add_argument(
        "--host", action="append", metavar="HOST", help="name or address to bind; may be repeated; all by default"
    )
    where.add_argument(
        "--port", type=_port, metavar="PORT", help="9999 by default; 0 lets the kernel choose and prints the choice"
    )
    where.add_argument("--systemd", action="store_true", help="serve on the sockets that systemd passes")
    where.add_argument(
        "--receive-buffer",
        type=_count,
        metavar="BYTES",
        help="kernel memory for datagrams not yet read; 4 MiB by default",
    )

    what = parser.add_argument_group("what")
    what.add_argument("--app-dir", default=".", metavar="DIR", help="folder to import from; the current one by default")
    what.add_argument(
        "--factory",
        action="store_true",
        help="the target is a function that returns an async context manager, which gives the handler",
    )

    how = parser.add_argument_group("how")
    how.add_argument("--workers", type=_workers, default=1, metavar="N", help="processes; auto: one for each CPU")
    how.add_argument("--steer", choices=["address"], help="all ports of one IP address go to one worker")
    how.add_argument("--reload", action="store_true", help="restart when a Python file changes")
    how.add_argument(
        "--drain",
        type=_at_least(0, " s"),
        default=5.0,
        metavar="S",
        help="seconds for handlers to finish at a stop; 5 by default",
    )
    how.add_argument(
        "--lame-duck",
        type=_at_least(0, " s"),
        default=0.0,
        metavar="S",
        help="seconds to go on serving after SIGTERM, no longer ready, until the drain",
    )
    how.add_argument(
        "--watchdog",
        type=_at_least(2, " s"),
        default=5.0,
        metavar="S",
        help="seconds of silence after which a worker is replaced; 5 by default",
    )

    limits = parser.add_argument_group("limits", "Of all workers together.")
    limits.add_argument(
        "--idle-timeout",
        type=_positive,
        default=60.0,
        metavar="S",
        help="seconds of silence that end a conversation; 60 by default",
    )
    limits.add_argument("--max-clients", type=_count, default=10_000, metavar="N", help="10000 by default")
    limits.add_argument(
        "--when-full",
        type=lambda text: text.replace("-", "_"),
        choices=["refuse", "evict_idle"],
        default="refuse",
        help="what happens to a stranger at --max-clients",
    )
    limits.add_argument(
        "--rate",
        type=_rate,
        metavar="N[/BURST]",
        help="datagrams a second, and at once, from each IPv4 /24 or IPv6 /56; exact only with --steer address, "
        "otherwise each worker allows so many",
    )
    limits.add_argument(
        "--amplification",
        type=_positive,
        metavar="X",
        help="send at most X times the bytes received, until the handler has validated the client",
    )

    log = parser.add_argument_group("log, on standard error")
    log.add_argument(
        "--log-level", choices=["debug", "info", "warning", "error", "critical"], default="info", help="info by default"
    )
    log.add_argument("--log-format", choices=["text", "json"], default="text", help="text by default")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = make_parser()
    try:
        options = parser.parse_args(arguments)
    except (UnicodeDecodeError, RecursionError) as error:
        parser.error(f"cannot read a file of options: {error}")
    _check(parser, options)
    level = getattr(logging, options.log_level.upper())
    prepare_process(level, options.log_format, is_worker=False)
    try:
        return trio.run(_serve, options, level)
    except KeyboardInterrupt:  # before the signals are handled
        return 1
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
    """Complete the options; end with an error if they do not go together."""
    if options.systemd and (options.host or options.port is not None):
        parser.error("with --systemd, leave --host and --port out: the .socket unit has them")
    if options.target is not None:
        try:
            split_target(options.target)
        except ValueError as error:
            parser.error(str(error))
    elif options.factory:
        parser.error("--factory needs a target: module:function")
    elif options.host is None and not options.systemd:
        options.host = _loopback()
    elif not all(_is_loopback(host) for host in options.host or ()):
        parser.error(ONLY_LOOPBACK)
    if not os.path.isdir(options.app_dir):
        parser.error(f"--app-dir {options.app_dir}: no such folder")


async def _serve(options: argparse.Namespace, level: int) -> int:
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
        restart_signals={signal.SIGHUP},
        log_level=level,
        log_format=options.log_format,
    )
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:

        async def run(task_status: trio.TaskStatus[Supervisor]) -> None:
            await serve(task_status=task_status)
            nursery.cancel_scope.cancel()

        with trio.open_signal_receiver(signal.SIGUSR1) as asked_for_statistics:
            try:
                supervisor: Supervisor = await nursery.start(run)
            except EXPECTED as error:  # here, where it is not in a group
                failure = error
            else:
                if sockets and options.receive_buffer is None:
                    warn_of_default_buffers(sockets)
                _announce(supervisor, options)
                nursery.start_soon(_notify, manager, supervisor)
                async for _ in asked_for_statistics:
                    log_statistics(supervisor)
    if failure is not None:
        raise failure
    return 0 if supervisor.drained else 1


async def _notify(manager: ServiceManager, supervisor: Supervisor) -> None:
    """Tell systemd that the service is ready, that all workers answer, and that it stops."""
    manager.notify(READY=1, STATUS=f"{len(supervisor.workers)} workers serve")
    while not supervisor.stopping:
        with trio.move_on_after(manager.watchdog_interval or math.inf):
            await supervisor.wait_stopping()
        if supervisor.answering:
            manager.notify(WATCHDOG=1)
    manager.notify(STOPPING=1, STATUS="the workers drain")


def _announce(supervisor: Supervisor, options: argparse.Namespace) -> None:
    if options.target is None:
        print(f"An echo is served. Try it: nc -u 127.0.0.1 {_port_of(supervisor)}", flush=True)
    elif options.port == 0 and not LOGGER.isEnabledFor(logging.INFO):
        print(f"port {_port_of(supervisor)}", flush=True)


def _port_of(supervisor: Supervisor) -> int:
    return supervisor.addresses[0][1]


def log_statistics(supervisor: Supervisor) -> None:
    """Log the counters of all workers together, and what each of them is doing."""
    statistics = supervisor.statistics()
    LOGGER.info("statistics: %s", describe(statistics))
    for worker in supervisor.workers:
        LOGGER.info(
            "worker %d: pid %d, %s, %d restarts, %d killed, received %d, clients %d",
            *(worker.number, worker.pid, worker.state, worker.restarts, worker.killed),
            *(worker.statistics.received, worker.statistics.clients),
        )


def describe(statistics: ServerStatistics) -> str:
    """Write counters on one line: the most important ones, and all others that are not 0."""
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


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _at_least(least: float, unit: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        number = _number(text)
        if not number >= least:
            raise argparse.ArgumentTypeError(f"at least {least:g}{unit}, not {text}")
        return number

    return parse


def _positive(text: str) -> float:
    number = _number(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be greater than 0, not {text}")
    return number


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, not {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) <= 65_535):
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 65535, not {text!r}")
    return int(text)


def _workers(text: str) -> int:
    if text == "auto":
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return _count(text)


def _rate(text: str) -> RateLimit:
    rate, slash, burst = text.partition("/")
    try:
        return RateLimit(float(rate), int(burst)) if slash else RateLimit(float(rate))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be N or N/BURST, datagrams a second and at once, such as 200 or 200/50, not {text!r}"
        ) from None
