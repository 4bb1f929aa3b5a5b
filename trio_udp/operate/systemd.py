"""Running as a systemd service: the sockets that systemd passes, and the notices that we send to it.

The protocols are those of sd_listen_fds(3) and sd_notify(3), without libsystemd. This file does not decide when a
server is ready, what its watchdog watches, or which socket goes to which worker.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import final

import attrs

from .._endpoints import Endpoint

LOGGER = logging.getLogger("trio_udp")

FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
LISTEN_VARIABLES = ("LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES")

# As getsockopt(2) reports it. It holds 256 small datagrams, and more may arrive during a restart.
KERNEL_DEFAULT_BUFFER = 212_992

INTERNET = {socket.AF_INET, socket.AF_INET6}
PROTOCOLS = {socket.SOCK_DGRAM: "UDP", socket.SOCK_STREAM: "TCP"}


def endpoints_from_systemd() -> list[Endpoint]:
    """Make endpoints from the sockets that systemd has passed to this process, in the order of their ``.socket`` units.

    They are ``shared``, because systemd holds them too. Datagrams that arrive while no process of the service runs wait
    in the kernel, and a server on them reads nothing once it stops, so a restart loses no datagram.

    Accepts UDP sockets and Unix-domain datagram sockets. Removes the environment variables of sd_listen_fds(3), so that
    no child process takes the sockets for its own; a second call therefore raises. Logs a warning for sockets with the
    kernel's default receive buffer: ``ReceiveBuffer=`` in the unit makes it larger.

    Raises:
      ValueError: systemd has passed no sockets, or a socket that is neither of the two. Nothing has changed then.
    """
    passed = sockets_from_systemd()
    warn_of_default_buffers(sock for _, sock in passed)
    with ExitStack() as stack:
        for _, sock in passed:
            stack.enter_context(sock)
        endpoints = [Endpoint.from_socket(sock, shared=True) for _, sock in passed]
        stack.pop_all()
    return endpoints


def sockets_from_systemd(*, one_port: bool = False) -> list[tuple[str, socket.socket]]:
    """Take over the datagram sockets that systemd has passed to this process: name and socket of each, in order.

    The name is ``FileDescriptorName=`` of the unit, by default the unit's own name. The sockets are as systemd made
    them, so they may be blocking, but child processes do not inherit them. See also
    :func:`trio_udp.endpoints_from_systemd`.

    Args:
      one_port: Accept UDP sockets only, all with the same port, as for the workers of one server.

    Raises:
      ValueError: As :func:`trio_udp.endpoints_from_systemd`, or the sockets are not what ``one_port`` asks for.
    """
    names = _passed_names(os.environ)
    with ExitStack() as stack:
        passed: list[tuple[str, socket.socket]] = []
        for descriptor, name in enumerate(names, FIRST_DESCRIPTOR):
            try:
                sock = socket.socket(fileno=descriptor)
            except OSError as error:
                raise ValueError(f"descriptor {descriptor} ({name}) from systemd is not a socket: {error}") from None
            stack.callback(sock.detach)  # an error leaves all descriptors open, as they were
            _check(sock, name, one_port)
            passed.append((name, sock))
        ports = {sock.getsockname()[1] for _, sock in passed} if one_port else set()
        if len(ports) > 1:
            listed = ", ".join(_describe(sock) for _, sock in passed)
            raise ValueError(f"the sockets from systemd must all have one port, not {listed}")
        stack.pop_all()

    for name in LISTEN_VARIABLES:
        os.environ.pop(name, None)
    for _, sock in passed:
        sock.set_inheritable(False)
    return passed


def _passed_names(environment: Mapping[str, str]) -> list[str]:
    """Return the name of each socket that the variables announce."""
    pid, count, names = (environment.get(name) for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid is None or count is None:
        missing = "LISTEN_PID" if pid is None else "LISTEN_FDS"
        raise ValueError(f"no sockets from systemd: {missing} is not set. Is there a .socket unit for this service?")
    if pid != str(os.getpid()):
        raise ValueError(
            f"no sockets from systemd: they are for process {pid}, and this is process {os.getpid()}. "
            "A script that starts this program must exec it"
        )
    # isdecimal() and int() accept the digits of all scripts.
    if not (count.isascii() and count.isdecimal()):
        raise ValueError(f"LISTEN_FDS must be a number, not {count!r}")
    if not 0 < int(count) <= 65_536:
        raise ValueError(f"no sockets from systemd: LISTEN_FDS is {count}")
    if names is None:
        return ["unknown"] * int(count)  # as sd_listen_fds_with_names(3) does
    if len(names.split(":")) != int(count):
        raise ValueError(f"LISTEN_FDS is {count}, but LISTEN_FDNAMES has {len(names.split(':'))} names: {names!r}")
    return names.split(":")


def _check(sock: socket.socket, name: str, one_port: bool) -> None:
    """Raise ``ValueError`` if a socket cannot be served on."""
    if sock.type != socket.SOCK_DGRAM:
        raise ValueError(
            f"{name} has passed a socket that is not for datagrams ({_describe(sock)}): write ListenDatagram= in the "
            ".socket unit, in place of ListenStream= or another"
        )
    is_unix = hasattr(socket, "AF_UNIX") and sock.family == socket.AF_UNIX
    if sock.family not in INTERNET and (one_port or not is_unix):
        raise ValueError(
            f"{name} has passed a socket that is not UDP ({_describe(sock)}): write ListenDatagram=PORT or "
            "ListenDatagram=ADDRESS:PORT in the .socket unit"
        )


def _describe(sock: socket.socket) -> str:
    if sock.family in INTERNET and sock.type in PROTOCOLS:
        host, port = sock.getsockname()[:2]
        return f"{PROTOCOLS[sock.type]} [{host}]:{port}" if ":" in host else f"{PROTOCOLS[sock.type]} {host}:{port}"
    family, kind = (getattr(constant, "name", constant) for constant in (sock.family, sock.type))
    return f"{family} {kind} {sock.getsockname()!r}"


def warn_of_default_buffers(sockets: Iterable[socket.socket]) -> None:
    """Log a warning if sockets have the kernel's default receive buffer."""
    sizes = [sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) for sock in sockets]
    if defaults := sizes.count(KERNEL_DEFAULT_BUFFER):
        LOGGER.warning(
            "%d of %d sockets from systemd have the kernel's default receive buffer of %d bytes: datagrams of bursts, "
            "and those that arrive during a restart, may be lost. Write ReceiveBuffer=4M in the .socket unit",
            *(defaults, len(sizes), KERNEL_DEFAULT_BUFFER),
        )


@final
@attrs.define(eq=False)
class ServiceManager:
    """Tells the service manager about this process. Without a manager, it does nothing.

    A notice never waits and never raises. If it cannot be delivered, because the manager is gone or its socket is full,
    it is sent again with the next one. The first failure is logged.

    Attributes:
      watchdog_interval: Seconds between two ``WATCHDOG=1``, half of what ``WatchdogSec=`` allows; ``None`` if the
        manager does not watch this process.
    """

    watchdog_interval: float | None
    _address: str | None
    _unsent: dict[str, str] = attrs.field(factory=dict, init=False)
    _has_failed: bool = attrs.field(default=False, init=False)

    @classmethod
    def from_environment(cls) -> ServiceManager:
        """Read ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID``, and remove them from the environment.

        Child processes then do not see them; the manager refuses notices from them anyway.
        """
        address, microseconds, pid = (
            os.environ.pop(name, "") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
        )
        watched = microseconds.isascii() and microseconds.isdecimal() and pid in ("", str(os.getpid()))
        seconds = int(microseconds) / 1_000_000 if watched else 0
        return cls(seconds / 2 or None, address or None)

    def notify(self, **assignments: str | int) -> None:
        """Send assignments of sd_notify(3), as in ``notify(READY=1, STATUS="serving on port 9999")``.

        ``RELOADING=1`` gets its ``MONOTONIC_USEC``; the next ``READY=1`` ends the reload. Without arguments, send the
        assignments that were not delivered.
        """
        if self._address is None:
            return
        for name, value in assignments.items():
            self._unsent.pop(name, None)  # the latest value, in the last place
            self._unsent[name] = str(value).replace("\n", " ")  # a line break would begin another assignment
        if "RELOADING" in assignments:
            self._unsent["MONOTONIC_USEC"] = str(time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)
        if not self._unsent:
            return
        notice = "\n".join(f"{name}={value}" for name, value in self._unsent.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                # "@" stands for the 0 with which abstract addresses begin.
                sock.connect("\0" + self._address[1:] if self._address[0] == "@" else self._address)
                sock.send(notice.encode(errors="surrogateescape"))
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                LOGGER.warning("Cannot notify the service manager at %s: %s", self._address, error)
        else:
            self._unsent.clear()
