"""The options of the command line, and the parsing of their values. _command_line.py checks combinations."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from .. import RateLimit, __version__


class Parser(argparse.ArgumentParser):
    """A parser with error messages of one line."""

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
        description="Serve UDP with your handler, on several CPUs, and restart it without losing a datagram.",
        epilog="Options can be in a file: trio-udp @FILE. Signals: SIGTERM and SIGINT stop the server (a second one at "
        "once), SIGHUP restarts it worker by worker without loss, SIGUSR1 logs statistics. Exit status: 0 after a "
        "drain, 1 if serving failed or a second signal stopped it, 2 for a wrong command line.",
        fromfile_prefix_chars="@",
        allow_abbrev=False,
        formatter_class=partial(argparse.HelpFormatter, width=79, max_help_position=26),
    )
    parser.add_argument(
        "target",
        nargs="?",
        metavar="module:handler",
        help="an async function with one argument, a client; without it, an echo is served",
    )
    parser.add_argument("--version", action="version", version=f"trio-udp {__version__}")

    sockets = parser.add_argument_group("sockets")
    sockets.add_argument(
        "--host", action="append", metavar="HOST", help="name or address to bind; may be repeated; all by default"
    )
    sockets.add_argument(
        "--port", type=_port, metavar="PORT", help="9999 by default; 0 lets the kernel choose and prints the choice"
    )
    sockets.add_argument("--systemd", action="store_true", help="serve on the sockets that systemd passes")
    sockets.add_argument(
        "--receive-buffer",
        type=_count,
        metavar="BYTES",
        help="kernel memory for datagrams not yet read; 4 MiB by default",
    )

    handler = parser.add_argument_group("handler")
    handler.add_argument(
        "--app-dir", default=".", metavar="DIR", help="folder to import from; the current one by default"
    )
    handler.add_argument(
        "--factory",
        action="store_true",
        help="the target is a function that returns an async context manager, which yields the handler",
    )

    handler.add_argument(
        "--accept",
        metavar="module:function",
        help="a plain function that decides about every stranger's datagram: True, False, or bytes to answer",
    )

    workers = parser.add_argument_group("workers")
    workers.add_argument(
        "--workers",
        type=_workers,
        default=1,
        metavar="N",
        help="number of processes, 1 by default; auto: one for each CPU",
    )
    workers.add_argument("--steer", choices=["address"], help="send all ports of one IP address to one worker")
    workers.add_argument("--reload", action="store_true", help="restart when a Python file changes")
    workers.add_argument(
        "--drain",
        type=_at_least(0, " s"),
        default=5.0,
        metavar="S",
        help="seconds for handlers to finish at a stop; 5 by default",
    )
    workers.add_argument(
        "--lame-duck",
        type=_at_least(0, " s"),
        default=0.0,
        metavar="S",
        help="seconds to keep serving after SIGTERM, no longer ready, before the drain; 0 by default",
    )
    workers.add_argument(
        "--watchdog",
        type=_at_least(2, " s"),
        default=5.0,
        metavar="S",
        help="seconds without a report after which a worker is replaced; 5 by default",
    )

    limits = parser.add_argument_group("limits", "For all workers together.")
    limits.add_argument(
        "--idle-timeout",
        type=_positive,
        default=60.0,
        metavar="S",
        help="seconds of silence that end a conversation; 60 by default",
    )
    limits.add_argument(
        "--max-clients", type=_count, default=10_000, metavar="N", help="clients at once; 10000 by default"
    )
    limits.add_argument(
        "--when-full",
        type=lambda text: text.replace("-", "_"),
        choices=["refuse", "evict_idle"],
        default="refuse",
        help="what happens to a stranger at --max-clients; refuse by default",
    )
    limits.add_argument(
        "--rate",
        type=_rate,
        metavar="N[/BURST]",
        help="datagrams a second, and at once, from each IPv4 /24 or IPv6 /56; exact only with --steer address, "
        "otherwise each worker allows as many",
    )
    limits.add_argument(
        "--amplification",
        type=_positive,
        metavar="X",
        help="send at most X times the bytes received, until the handler has validated the client",
    )

    watch = parser.add_argument_group("watch")
    watch.add_argument(
        "--live", action="store_true", help="show the traffic on the terminal; without one, log a line every 10 s"
    )
    watch.add_argument(
        "--metrics",
        type=_host_and_port,
        metavar="[HOST:]PORT",
        help="serve /metrics for Prometheus, /live and /ready over HTTP, on 127.0.0.1 if no HOST is given",
    )

    log = parser.add_argument_group("log, on standard error")
    log.add_argument(
        "--log-level", choices=["debug", "info", "warning", "error", "critical"], default="info", help="info by default"
    )
    log.add_argument("--log-format", choices=["text", "json"], default="text", help="text by default")
    return parser


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _at_least(least: float, unit: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        number = _number(text)
        if not number >= least:
            raise argparse.ArgumentTypeError(f"must be at least {least:g}{unit}, not {text}")
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


def _host_and_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if colon and not host:
        raise argparse.ArgumentTypeError(f"must be PORT or HOST:PORT, not {text!r}")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", _port(port)


def _rate(text: str) -> RateLimit:
    rate, slash, burst = text.partition("/")
    try:
        return RateLimit(float(rate), int(burst)) if slash else RateLimit(float(rate))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be N or N/BURST, datagrams a second and at once, such as 200 or 200/50, not {text!r}"
        ) from None
