"""A network for load balancers: clients with many addresses, a balancer, and two servers, each a machine of its own.

The servers and the clients run in this process; the balancer is a program.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import attrs
import trio

from tests.namespaces import Machine, inside, machines
from trio_udp import Client, Endpoint, Handler, Server, serve_endpoints

EXAMPLES = Path(__file__).parents[2] / "examples" / "load_balancers"

BALANCER = "192.0.2.254"  # as clients see it; as servers do, it is 10.0.0.1
HOSTS = {"a": "10.0.0.11", "b": "10.0.0.12"}
CLIENTS = [f"192.0.2.{number}" for number in range(1, 41)]
INTERVAL = 0.04  # seconds between two datagrams of a client


@attrs.frozen
class Answer:
    """What a server answers: its name, which datagram of a conversation it was, and from where it came."""

    server: str
    number: int
    host: str
    port: int
    sequence: int

    def to_bytes(self) -> bytes:
        return " ".join(map(str, attrs.astuple(self))).encode()

    @classmethod
    def from_bytes(cls, payload: bytes) -> Answer:
        server, number, host, port, sequence = payload.decode().split()
        return cls(server, int(number), host, int(port), int(sequence))


def conversation(name: str) -> Handler:
    async def answer(client: Client) -> None:
        number = 0
        async for payload in client:
            number += 1
            host, port = client.peer_address[:2]
            await client.send(Answer(name, number, host, port, int(payload)).to_bytes())

    return answer


@attrs.define(eq=False)
class Backend:
    """One of the servers, which also says over HTTP whether it is ready."""

    name: str
    machine: Machine
    server: Server = attrs.field(init=False)
    ready: bool = True
    _alive: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)

    async def run(
        self, port: int, handler: Handler, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED, **options: Any
    ) -> None:
        host = HOSTS[self.name]
        with inside(self.machine.name):
            sock = socket.create_server((host, 9100))
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        with self._alive:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, self.tell_ready, [listener])
                endpoint = Endpoint.from_socket(self.machine.socket(host, port), **options)
                self.server = await nursery.start(partial(serve_endpoints, handler, [endpoint]))
                task_status.started()

    async def tell_ready(self, stream: trio.SocketStream) -> None:
        try:
            while await stream.receive_some():
                status = "200 OK" if self.ready else "503 Service Unavailable"
                await stream.send_all(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
        except trio.BrokenResourceError:
            pass
        finally:
            await trio.aclose_forcefully(stream)

    def kill(self) -> None:
        """End it as SIGKILL does: the sockets are closed, nobody is told."""
        self._alive.cancel()


@attrs.define(eq=False)
class Talker:
    """A client, and what it has sent and got."""

    host: str
    sock: trio.socket.SocketType
    port: int
    query: Callable[[int], bytes]
    read: Callable[[bytes], Answer]
    sent: int = 0
    empty: int = 0
    answers: list[Answer] = attrs.field(factory=list)

    async def send(self) -> None:
        await self.sock.sendto(self.query(self.sent), (BALANCER, self.port))
        self.sent += 1

    @property
    def servers(self) -> list[str]:
        """The names of the servers that it got answers from, in order, each once for a run of answers."""
        return [name for name, _ in groupby(answer.server for answer in self.answers)]

    @property
    def lost(self) -> int:
        return self.sent - len({answer.sequence for answer in self.answers})


@attrs.define(eq=False)
class Load:
    """All clients. Each sends a datagram every ``INTERVAL`` seconds."""

    talkers: list[Talker]
    _arrived: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, init=False)

    async def listen(self, talker: Talker) -> None:
        while True:
            payload = await talker.sock.recv(2000)
            if payload:
                talker.answers.append(talker.read(payload))
            else:
                talker.empty += 1
            self._arrived.unpark_all()

    async def until(self, happened: Callable[[], bool]) -> None:
        """Wait for answers until something is so."""
        while not happened():
            await self._arrived.park()

    async def until_served(self) -> None:
        """Wait until the balancer and both servers are there: until all clients get answers, from both."""
        while not all(talker.answers for talker in self.talkers) or len(self.by_server()) < 2:
            for talker in self.talkers:
                await talker.send()
            await trio.sleep(0.1)
        await trio.sleep(0.1)
        for talker in self.talkers:
            talker.sent = 0
            talker.answers.clear()

    async def run(self, task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED) -> None:
        """Send until the scope is cancelled."""
        with trio.CancelScope() as scope:
            task_status.started(scope)
            while True:
                for talker in self.talkers:
                    await talker.send()
                    await trio.sleep(INTERVAL / len(self.talkers))

    def by_server(self) -> dict[str, list[Talker]]:
        """The clients of each server, by their latest answers."""
        clients: dict[str, list[Talker]] = {}
        for talker in self.talkers:
            if talker.answers:
                clients.setdefault(talker.answers[-1].server, []).append(talker)
        return clients


@attrs.define(eq=False)
class Network:
    clients: Machine
    balancer: Machine
    servers: dict[str, Machine]

    @contextmanager
    def running(self, *command: str) -> Iterator[None]:
        """Run a program on the balancer until the block ends."""
        with subprocess.Popen(
            ["ip", "netns", "exec", self.balancer.name, *command], start_new_session=True, stderr=subprocess.PIPE
        ) as process:
            try:
                yield
            finally:
                process.terminate()
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)

    def load(self, port: int, query: Callable[[int], bytes], read: Callable[[bytes], Answer]) -> Load:
        socks = [trio.socket.from_stdlib_socket(self.clients.socket(host)) for host in CLIENTS]
        return Load([Talker(host, sock, port, query, read) for host, sock in zip(CLIENTS, socks, strict=True)])


@contextmanager
def network() -> Iterator[Network]:
    """Make the machines; they are gone when the block ends."""
    with machines("clients", "balancer", *HOSTS) as (clients, balancer, *servers):
        balancer.wire_to(clients, "front")
        clients.ip("addr add 192.0.2.253/24 dev front")
        clients.ip("route add local 192.0.2.0/26 dev lo")  # all of these addresses are its own
        balancer.ip(f"addr add {BALANCER}/24 dev front")
        balancer.ip("link add back type bridge")
        balancer.ip("addr add 10.0.0.1/24 dev back")
        for machine in (clients, balancer):
            machine.ip("link set front up")
        balancer.ip("link set back up")
        for server, (name, host) in zip(servers, HOSTS.items(), strict=True):
            balancer.wire_to(server, f"to-{name}")
            balancer.ip(f"link set to-{name} master back up")
            server.ip(f"link set to-{name} up")
            server.ip(f"addr add {host}/24 dev to-{name}")
            server.ip("route add default via 10.0.0.1")
        yield Network(clients, balancer, dict(zip(HOSTS, servers, strict=True)))
