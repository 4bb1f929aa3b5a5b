"""The sockets of all workers, bound by the supervisor: one SO_REUSEPORT group for each address, one socket per worker.

A socket outlives its worker, and so does its place in the group, by which the kernel assigns clients. Datagrams that
arrive while a worker is replaced wait in the socket's queue.
"""

from __future__ import annotations

import errno
import logging
import secrets
import socket
from collections.abc import Sequence
from contextlib import ExitStack

from .. import Endpoint, RateLimit, open_endpoints
from ._steering import steer, steering_program

LOGGER = logging.getLogger("trio_udp")

# Attempts to find a port that is free on every host, for port 0 and several hosts.
PORT_ATTEMPTS = 20

Hosts = Sequence[str | None]


async def bind_all(workers: int, port: int, hosts: Hosts, receive_buffer: int | None) -> list[list[Endpoint]]:
    """Bind the sockets of each worker; for port 0, all of them to one port that no other socket has.

    Raises:
      OSError: An address cannot be bound; the message names it. No socket is left open.
    """
    for attempt in range(1, PORT_ATTEMPTS + 1):
        with ExitStack() as stack:
            try:
                bound = await _bind_all(stack, workers, port, hosts, receive_buffer)
            except OSError as error:
                if port or len(hosts) == 1 or attempt == PORT_ATTEMPTS or error.errno != errno.EADDRINUSE:
                    raise
                continue
            stack.pop_all()
        break
    return bound


async def _bind_all(
    stack: ExitStack, workers: int, port: int, hosts: Hosts, receive_buffer: int | None
) -> list[list[Endpoint]]:
    bound: list[list[Endpoint]] = [[] for _ in range(workers)]
    for number, endpoints in enumerate(bound):
        for host in hosts:
            # The first bind is exclusive: another server on the port is an error, and does not share the clients.
            opened = await open_endpoints(port, host=host, reuse_port=number > 0, receive_buffer=receive_buffer)
            for endpoint in opened:
                stack.callback(endpoint.close)
                if number == 0 and workers > 1:
                    endpoint.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            endpoints += opened
            port = opened[0].local_address[1]
    return bound


def describe_address(address: object) -> str:
    if not isinstance(address, tuple):
        return str(address)
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def deal(sockets: Sequence[socket.socket], workers: int, receive_buffer: int | None) -> list[list[Endpoint]]:
    """Make endpoints from sockets that another program bound; deal those of each address to the workers in turn.

    Raises:
      ValueError: There are fewer sockets of an address than workers.
    """
    by_address: dict[object, list[socket.socket]] = {}
    for sock in sockets:
        by_address.setdefault(sock.getsockname(), []).append(sock)
    for address, group in by_address.items():
        if len(group) < workers:
            where = describe_address(address)
            raise ValueError(
                f"{workers} workers need {workers} sockets for {where}, not {len(group)}: use fewer workers, or "
                "more sockets (one ListenDatagram= for each, and ReusePort=yes)"
            )
    dealt: list[list[Endpoint]] = [[] for _ in range(workers)]
    for group in by_address.values():
        for number, sock in enumerate(group):
            dealt[number % workers].append(Endpoint.from_socket(sock, shared=True, receive_buffer=receive_buffer))
    return dealt


def steer_by_address(bound: list[list[Endpoint]], rate_limit: RateLimit | None) -> None:
    """Send all ports of one IP address to one worker; with a rate limit, each part of the network that it limits.

    If the kernel refuses, a warning is logged once.
    """
    groups: dict[object, list[Endpoint]] = {}
    for endpoints in bound:
        for endpoint in endpoints:
            groups.setdefault(endpoint.local_address, []).append(endpoint)
    prefixes = (rate_limit.ipv4_prefix, rate_limit.ipv6_prefix) if rate_limit else (32, 128)
    seed = secrets.randbits(32)
    try:
        for group in groups.values():
            if len(group) > 1:
                steer(group[0].socket, steering_program(len(group), seed, *prefixes))
    except OSError as error:
        LOGGER.warning("The kernel cannot steer by address; it steers by address and port: %s", error)
