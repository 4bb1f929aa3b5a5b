"""Linux network namespaces, which play separate machines. They need root and ip(8).

A socket belongs to the namespace in which it was opened, so a server in this process can be on any of these machines.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import attrs
import pytest

CLONE_NEWNET = 0x40000000
# From linux/rtnetlink.h: the groups that report changes.
RTMGRP_LINK, RTMGRP_IPV6_IFADDR = 0x1, 0x100


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Open sockets and files in a namespace until the block ends."""
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns exists since Python 3.12
    with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{namespace}") as there:
        if libc.setns(there.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
        try:
            yield
        finally:
            if libc.setns(home.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "cannot leave again")


@cache
def can_make_namespaces() -> bool:
    """Whether this process may make network namespaces; root in a container often may not."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    with suppress(OSError), machines("try"):
        return True
    return False


@attrs.frozen
class Machine:
    """A network namespace."""

    name: str

    def ip(self, command: str) -> str:
        return run("ip", "-netns", self.name, *command.split())

    def set(self, setting: str, value: int) -> None:
        with inside(self.name):
            Path("/proc/sys/net", setting).write_text(str(value))

    def index(self, interface: str) -> int:
        with inside(self.name):
            return socket.if_nametoindex(interface)

    def wire_to(self, other: Machine, name: str = "wire") -> None:
        """Connect two machines by a wire. Its interface has the same name on both machines, and is down."""
        self.ip(f"link add {name} type veth peer name {name} netns {other.name}")

    def wait_until_up(self, *interfaces: str) -> None:
        """Wait until interfaces are up at both ends of their wires."""
        self._wait(lambda: all("state UP" in self.ip(f"link show {interface}") for interface in interfaces))

    def add_address(self, address: str, interface: str) -> None:
        """Give an interface an address, and wait until it is usable: the kernel takes a moment for IPv6."""
        self.ip(f"address add {address} dev {interface} {'nodad' if ':' in address else ''}")
        self._wait(lambda: not self.ip(f"address show dev {interface} tentative"))

    def _wait(self, is_done: Callable[[], bool]) -> None:
        """Wait for changes of links and IPv6 addresses until a condition holds."""
        with inside(self.name):
            changes = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        with changes:
            changes.bind((0, RTMGRP_LINK | RTMGRP_IPV6_IFADDR))
            changes.settimeout(5)
            while not is_done():
                changes.recv(65_535)

    def socket(self, host: str, port: int = 0, family: int = socket.AF_INET) -> socket.socket:
        """Open a socket on this machine; the host may have a scope, as in ``fe80::1%wire``."""
        with inside(self.name):
            sock = socket.socket(family, socket.SOCK_DGRAM)
            sock.setblocking(False)
            try:
                sock.bind(socket.getaddrinfo(host, port, family, socket.SOCK_DGRAM)[0][4])
            except BaseException:
                sock.close()
                raise
            return sock


@contextmanager
def machines(*names: str) -> Iterator[list[Machine]]:
    """Make machines that only have a loopback interface, which is up. Remove them when the block ends."""
    made: list[Machine] = []
    try:
        for name in names:
            machine = Machine(f"trio-udp-{os.getpid()}-{name}")
            run("ip", "netns", "add", machine.name)
            made.append(machine)
            machine.ip("link set lo up")
        yield made
    finally:
        for machine in made:
            run("ip", "netns", "delete", machine.name)


@contextmanager
def link_local_machines() -> Iterator[tuple[Machine, Machine]]:
    """Make two machines with a wire between them, on which they have the addresses fe80::1 and fe80::2."""
    with machines("ours", "theirs") as (ours, theirs):
        ours.wire_to(theirs)
        for machine, host in ((ours, "fe80::1"), (theirs, "fe80::2")):
            machine.ip("link set wire addrgenmode none")
            machine.ip("link set wire up")
            machine.ip(f"addr add {host}/64 dev wire nodad")
        yield ours, theirs


needs_namespaces = pytest.mark.skipif(not can_make_namespaces(), reason="needs root and network namespaces")
