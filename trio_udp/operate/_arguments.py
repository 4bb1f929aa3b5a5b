"""Checks on the arguments of serve_workers(), before anything is bound or started."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

from .. import Limits
from ._target import split_target

LOG_FORMATS = ("text", "json", "none")


def check_names(*targets: object) -> None:
    """Raise unless each is ``module:name``."""
    for target in targets:
        if not isinstance(target, str):
            raise TypeError(f"target and accept must be strings such as 'module:handler', not {target!r}")
        split_target(target)


def check_hosts(hosts: object, sockets: Sequence[socket.socket] | None) -> None:
    """Raise if there is nothing to serve on."""
    if hosts is not None and not isinstance(hosts, str):
        if not isinstance(hosts, Sequence) or not all(host is None or isinstance(host, str) for host in hosts):
            raise TypeError(f"host must be a string, None or a list of them, not {hosts!r}")
        if not hosts:
            raise ValueError("host must not be an empty list; None stands for every interface")
    if sockets is not None and not sockets:
        raise ValueError("sockets must not be an empty list")


def check_settings(steer: object, limits: object, log_format: object) -> None:
    if steer not in (None, "address"):
        raise ValueError(f"steer must be 'address' or None, not {steer!r}")
    if not isinstance(limits, Limits):
        raise TypeError(f"limits must be Limits, not {limits!r}")
    if log_format not in LOG_FORMATS:
        raise ValueError(f"log_format must be one of {LOG_FORMATS}, not {log_format!r}")


def check_counts(**counts: tuple[object, int]) -> None:
    """Raise if a number is not an int, or is less than its least value; each is a pair of both."""
    for name, (value, least) in counts.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, not {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value!r}")


def check_seconds(**seconds: tuple[object, float]) -> None:
    """Raise if a time is not a number, or is less than its least value; each is a pair of both."""
    for name, (value, least) in seconds.items():
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number of seconds, not {value!r}")
        if not value >= least:
            raise ValueError(f"{name} must be at least {least:g}, not {value!r}")


def check_platform() -> None:
    if sys.platform == "win32":
        raise OSError("workers need a POSIX system, which can pass sockets to a process: use trio_udp.serve")
