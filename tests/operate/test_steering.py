"""Steering by address, in the kernel."""

from __future__ import annotations

import socket
import sys
from collections import Counter
from contextlib import ExitStack, suppress

import pytest

from tests.namespaces import Machine, inside, machines, needs_namespaces
from trio_udp.operate._steering import steer, steering_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="BPF is Linux only")

WORKERS = 3


def chosen(machine: Machine, to: str, sources: list[str], **prefixes: int) -> list[set[int]]:
    """For each source, return the sockets of a group that received its datagrams from three ports."""
    family = socket.AF_INET6 if ":" in to else socket.AF_INET
    with ExitStack() as cleanup:
        with inside(machine.name):
            group = [cleanup.enter_context(socket.socket(family, socket.SOCK_DGRAM)) for _ in range(WORKERS)]
        for sock in group:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind((to, 5_000))
        steer(group[0], steering_program(WORKERS, 0x1234_5678, **prefixes))
        found = []
        for source in sources:
            for _ in range(3):
                with machine.socket(source, 0, family) as peer:
                    peer.sendto(b"", (to, 5_000))
            found.append({number for number, sock in enumerate(group) if received(sock)})
    return found


def received(sock: socket.socket) -> int:
    """Return how many datagrams have arrived at a socket."""
    count = 0
    with suppress(BlockingIOError):
        while True:
            sock.recv(100)
            count += 1
    return count


@needs_namespaces
@pytest.mark.parametrize(("to", "network"), [("127.0.0.1", "127.0.1.{}"), ("::1", "fd00::{:x}")], ids=["IPv4", "IPv6"])
def test_one_socket_for_each_address(to: str, network: str) -> None:
    """All ports of an address go to one socket; the addresses are spread over all sockets."""
    with machines("steering") as [machine]:
        sources = [network.format(number) for number in range(1, 101)]
        if ":" in to:
            machine.ip("addr add fd00::/64 dev lo nodad")
            machine.ip("route add local fd00::/64 dev lo")
            machine.set("ipv6/ip_nonlocal_bind", 1)
        found = chosen(machine, to, sources)
    assert {len(sockets) for sockets in found} == {1}
    spread = Counter(number for sockets in found for number in sockets)
    assert len(spread) == WORKERS
    assert min(spread.values()) > 15


@needs_namespaces
def test_one_socket_for_each_network() -> None:
    """With a prefix, all addresses of one network go to one socket; other networks go to others."""
    with machines("steering") as [machine]:
        networks = [
            chosen(machine, "127.0.0.1", [f"127.0.{net}.{host}" for host in range(1, 9)], ipv4_prefix=24)
            for net in range(1, 9)
        ]
    assert all(len(set.union(*found)) == 1 for found in networks)
    assert len(set.union(*(found[0] for found in networks))) > 1


def test_the_kernel_refuses_without_a_group() -> None:
    """Steering a socket that shares its port with no other raises the kernel's error."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="Invalid argument"):
            steer(sock, steering_program(2, 0))
