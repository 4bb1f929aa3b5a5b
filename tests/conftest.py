from __future__ import annotations

import errno
import random
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from trio_udp import Client, Endpoint, Server, ServerStatistics, serve, serve_endpoints
from trio_udp._endpoints import Address
from trio_udp.testing import SimulatedNetwork

pytest_plugins = ["pytester", "trio_udp._pytest_plugin"]

SERVER = ("192.0.2.53", 53)
ALICE = ("192.0.2.1", 1000)
BOB = ("192.0.2.2", 2000)
CAROL = ("192.0.2.3", 3000)

# A shell makes its background jobs ignore SIGINT, and programs that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Enough for all datagrams that a test lets arrive at once, because no test is about drops by a kernel.
PLENTY = 2**40


async def echo(client: Client) -> None:
    """The handler of most servers here."""
    async for payload in client:
        await client.send(payload)


@attrs.define
class InMemory:
    """An endpoint at ``SERVER`` on a simulated network, and methods for a test to send to it and read its replies."""

    network: SimulatedNetwork
    endpoint: Endpoint

    def put(self, payload: bytes, source: Address = ALICE) -> None:
        """Let a datagram arrive."""
        self.network.inject(payload, source, SERVER)

    @property
    def sent(self) -> list[tuple[Address, bytes]]:
        """The receiver and the payload of each datagram that the endpoint has sent."""
        events = self.network.events
        return [
            (event.destination, event.payload) for event in events if (event.fate, event.source) == ("sent", SERVER)
        ]

    def sent_to(self, address: Address) -> list[bytes]:
        return [payload for destination, payload in self.sent if destination == address]

    async def settle(self) -> None:
        """Let all tasks run until each of them waits for time to pass or for a datagram."""
        await trio.testing.wait_all_tasks_blocked()


@attrs.define
class RunningInMemory(InMemory):
    """A server on such an endpoint."""

    server: Server


def in_memory(*, send_buffer: int | None = None, bandwidth: float | None = None) -> InMemory:
    network = SimulatedNetwork(bandwidth=bandwidth)
    return InMemory(network, network.endpoint(*SERVER, receive_buffer=PLENTY, send_buffer=send_buffer))


def narrow() -> InMemory:
    """Open an endpoint that sends one byte a second, so its send buffer is full until a datagram has left."""
    return in_memory(send_buffer=1, bandwidth=1)


StartInMemory = Callable[..., Awaitable[RunningInMemory]]


@pytest.fixture
def start_in_memory(nursery: trio.Nursery) -> StartInMemory:
    """Start a server in memory. The keywords are those of ``serve_endpoints``.

    A test in which time passes also uses ``autojump_clock``.
    """

    async def start(
        handler: Callable[[Client], Awaitable[object]], on: InMemory | None = None, **options: Any
    ) -> RunningInMemory:
        on = on or in_memory()
        server = await nursery.start(partial(serve_endpoints, handler, [on.endpoint], **options))
        return RunningInMemory(on.network, on.endpoint, server)

    return start


@pytest.fixture(params=["linux", "portable"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test once with each engine: the Linux engine, and the portable one."""
    if request.param == "linux" and sys.platform != "linux":
        pytest.skip("needs Linux")
    monkeypatch.setenv("TRIO_UDP_ENGINE", "" if request.param == "linux" else "portable")
    return str(request.param)


StartServer = Callable[..., Awaitable[Server]]


@pytest.fixture
def start_on_loopback(engine: str, nursery: trio.Nursery) -> StartServer:
    """Start a server on 127.0.0.1 with each engine. The keywords are those of ``serve``."""

    async def start(handler: Callable[[Client], Awaitable[object]] = echo, **options: Any) -> Server:
        options.setdefault("host", "127.0.0.1")
        server: Server = await nursery.start(partial(serve, handler, 0, **options))
        return server

    return start


def port_of(server: Server) -> int:
    return server.endpoints[0].local_address[1]


@contextmanager
def plain_socket(host: str = "127.0.0.9") -> Iterator[socket.socket]:
    """Open a UDP socket of the standard library on a free port. Its calls fail after 5 seconds."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((host, 0))
        sock.settimeout(5)
        yield sock


def free_port() -> int:
    """Return a port of loopback that is free over IPv4 and IPv6, for UDP and TCP, for a program that binds it later.

    Nothing else gets it meanwhile: the kernel hands out higher ports only.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with ExitStack() as sockets:
            try:
                for family, host in [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]:
                    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                        sockets.enter_context(socket.socket(family, kind)).bind((host, port))
            except OSError as error:  # any other than this one: the machine has no IPv6
                if error.errno == errno.EADDRINUSE:
                    continue
        return port


class Bystander:
    """Another task, which counts how often the one under test lets it run.

    Attributes:
      turns: How often it has run.
      most: The most by which what ``look`` returns has grown between two of its turns.
    """

    def __init__(self, look: Callable[[], int] = lambda: 0) -> None:
        self.turns = self.most = 0
        self._look = look

    async def run(self) -> None:
        before = self._look()
        while True:
            self.turns += 1
            now = self._look()
            self.most, before = max(self.most, now - before), now
            await trio.lowlevel.checkpoint()


class Steps(trio.abc.Instrument):
    """Counts the steps of all tasks: a task that spins takes tens of thousands in a second."""

    def __init__(self) -> None:
        self.count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += 1


async def steps_in(seconds: float) -> int:
    """Let time pass, and return how many steps all tasks have taken."""
    steps = Steps()
    trio.lowlevel.add_instrument(steps)
    await trio.sleep(seconds)
    trio.lowlevel.remove_instrument(steps)
    return steps.count


# Where ServerStatistics says that a datagram went; each is in exactly one of these.
FATES = {
    "delivered",
    "waiting",
    "dropped_inbox_full",
    "dropped_at_end",
    "truncated",
    "refused_malformed",
    "refused_source",
    "refused_by_rate",
    "refused_by_accept",
    "answered_by_accept",
    "refused_full",
    "refused_stopping",
}


def check_adds_up(server: Server) -> None:
    """Check that every datagram that was received is accounted for, exactly once.

    The sum is made here of the single fields, so that it checks the one in the package; a field whose name says that it
    is a fate cannot be forgotten in either.
    """
    s = server.statistics()
    names = {field.name for field in attrs.fields(ServerStatistics)}
    assert {name for name in names if name.startswith(("dropped_", "refused_", "answered_"))} <= FATES <= names
    assert s.received == sum(getattr(s, name) for name in FATES) == s.accounted_for
