"""A network for load balancers: clients with many addresses, a balancer and two servers, each on its own machine.

The servers and the clients run in this process. The balancer is a program.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import attrs
import trio

from tests.namespaces import Machine, inside, machines
from trio_udp import Client, Endpoint, Handler, Server, serve_endpoints

EXAMPLES = Path(__file__).parents[2] / "examples" / "load_balancers"

BALANCER = "192.0.2.254"  # the address for clients; for servers it is 10.0.0.1
HOSTS = {"a": "10.0.0.11", "b": "10.0.0.12"}
# An odd number, so that a balancer that takes the servers in turn does not look like one that keeps clients.
CLIENTS = [f"192.0.2.{number}" for number in range(1, 42)]
INTERVAL = 0.04  # seconds between two datagrams of a client


@attrs.frozen
class Answer:
    """An answer of a server: its name, the number of the datagram in its conversation, and the datagram's source."""

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
    """One of the servers, which also reports over HTTP whether it is ready."""

    name: str
    machine: Machine
    server: Server = attrs.field(init=False)
    ready: bool = True
    _alive: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)

    async def run(
        self,
        port: int,
        handler: Handler,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
        **options: Any,
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
        """End the server like SIGKILL: close the sockets without any notice."""
        self._alive.cancel()

    def disconnect(self) -> None:
        """Cut the server's machine off: nothing comes back, not even a refusal."""
        self.machine.ip(f"link set to-{self.name} down")

    def withdraw(self) -> None:
        """Report that the server is not ready, and go on serving."""
        self.ready = False


@attrs.define(eq=False)
class Talker:
    """A client, with the datagrams that it has sent and received."""

    host: str
    sock: trio.socket.SocketType
    protocol: Protocol
    sent: int = 0
    first: int = 0  # sequence number of the first datagram that counts
    empty: int = 0  # answers without a payload
    answers: list[Answer] = attrs.field(factory=list)

    async def send(self) -> None:
        await self.sock.sendto(self.protocol.query(self.sent), (BALANCER, self.protocol.port))
        self.sent += 1

    @property
    def servers(self) -> list[str]:
        """The servers that have answered, in order, each once for a run of answers."""
        return [name for name, _ in groupby(answer.server for answer in self.answers)]

    @property
    def lost(self) -> int:
        answered = {answer.sequence for answer in self.answers if answer.sequence >= self.first}
        return self.sent - self.first - len(answered)


@attrs.define(eq=False)
class Load:
    """All clients. Each sends a datagram every ``INTERVAL`` seconds."""

    talkers: list[Talker] = attrs.field(factory=list)
    _arrived: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, init=False)
    _sending: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)

    async def listen(self, talker: Talker) -> None:
        with talker.sock:
            while True:
                if payload := await talker.sock.recv(2000):
                    talker.answers.append(talker.protocol.read(payload))
                else:
                    talker.empty += 1
                self._arrived.unpark_all()

    async def until(self, happened: Callable[[], bool]) -> None:
        """Wait for answers until a condition holds."""
        while not happened():
            await self._arrived.park()

    async def until_served(self) -> None:
        """Wait until the balancer and both servers work: all clients get answers, from both servers."""
        while not all(talker.answers for talker in self.talkers) or len(self.by_server()) < 2:
            for talker in self.talkers:
                await talker.send()
            await trio.sleep(0.1)
        for talker in self.talkers:
            talker.first = talker.sent
            talker.answers.clear()

    async def run(self) -> None:
        """Send until :meth:`stop`."""
        with self._sending:
            while True:
                for talker in self.talkers:
                    await talker.send()
                    await trio.sleep(INTERVAL / len(self.talkers))

    def stop(self) -> None:
        self._sending.cancel()

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
        """Run a program on the balancer's machine until the block ends."""
        # setpriv(1) ends it together with the tests, even if these are killed.
        on_balancer = ["ip", "netns", "exec", self.balancer.name, "setpriv", "--pdeathsig", "TERM", *command]
        with subprocess.Popen(on_balancer, start_new_session=True) as process:
            try:
                yield
            finally:
                process.terminate()
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)


@attrs.frozen
class Protocol:
    """The payloads that clients and servers exchange."""

    handler: Callable[[str], Handler]  # makes the handler of a server with this name
    query: Callable[[int], bytes]
    read: Callable[[bytes], Answer]
    port: int


CONVERSATION = Protocol(conversation, b"%d".__mod__, Answer.from_bytes, 9999)


@asynccontextmanager
async def balanced(
    command: Callable[[Network], list[str]], protocol: Protocol = CONVERSATION, **options: Any
) -> AsyncIterator[tuple[Backend, Backend, Load]]:
    """Run a balancer and two servers, and clients that talk to them.

    Args:
      command: Prepares the balancer, and returns its command.
      options: For the endpoints of the servers.
    """
    with network() as net:
        async with trio.open_nursery() as nursery:
            servers = [Backend(name, machine) for name, machine in net.servers.items()]
            for server in servers:
                await nursery.start(partial(server.run, protocol.port, protocol.handler(server.name), **options))
            load = Load()
            for host in CLIENTS:
                sock = trio.socket.from_stdlib_socket(net.clients.socket(host))
                load.talkers.append(Talker(host, sock, protocol))
                nursery.start_soon(load.listen, load.talkers[-1])
            with net.running(*command(net)):
                await load.until_served()
                nursery.start_soon(load.run)
                yield servers[0], servers[1], load
                nursery.cancel_scope.cancel()


@contextmanager
def network() -> Iterator[Network]:
    """Make the machines, and remove them when the block ends."""
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
