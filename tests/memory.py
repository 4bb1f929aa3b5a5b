"""An endpoint without a socket, for tests in virtual time: what arrives and what fails is up to the test."""

from __future__ import annotations

import errno
from collections import deque
from socket import AF_INET
from typing import Any

import trio

from trio_udp import Endpoint
from trio_udp._endpoints._address import Address
from trio_udp._endpoints._engine import BATCH, Datagram, Outgoing, Route
from trio_udp._statistics import EndpointTally, KernelFigures

ALICE = ("192.0.2.1", 1000)
BOB = ("192.0.2.2", 2000)
CAROL = ("192.0.2.3", 3000)


class MemoryEngine:
    """One end of an ideal network. ``arriving`` may hold errors too, raised in their turn."""

    connected = False
    socket: Any = None
    family: int = AF_INET

    def __init__(self, address: Address = ("192.0.2.53", 53)) -> None:
        self.bound_address = address
        self.tally = EndpointTally()
        self.arriving: deque[Datagram | OSError] = deque()
        self.sent: list[tuple[Any, bytes]] = []
        self.room = 1_000_000  # datagrams that fit into the send buffer
        self.unreachable: dict[Route, int] = {}  # routes to which sending fails, with the errno
        self.receive_calls = 0
        self.closed = False
        self._waiting = trio.lowlevel.ParkingLot()

    def put(self, payload: bytes, source: Address = ALICE) -> None:
        """Let a datagram arrive."""
        self.arriving.append((payload, source))
        self._waiting.unpark_all()

    def fail(self, code: int) -> None:
        """Let a read fail, in its turn."""
        self.arriving.append(OSError(code, "injected"))
        self._waiting.unpark_all()

    def make_room(self, datagrams: int) -> None:
        self.room += datagrams
        self._waiting.unpark_all()

    def sent_to(self, address: Address) -> list[bytes]:
        return [payload for route, payload in self.sent if route == address]

    # What an endpoint asks of an engine.

    def receive(self, batch: list[Datagram]) -> bool:
        self.receive_calls += 1
        if self.closed:
            raise OSError(errno.EBADF, "closed")
        for _ in range(BATCH):
            if not self.arriving:
                return True
            datagram = self.arriving.popleft()
            if isinstance(datagram, BlockingIOError):
                return True
            if isinstance(datagram, OSError):
                raise datagram
            batch.append(datagram)
            self.tally.received += 1
            self.tally.bytes_received += len(datagram[0])
        return False

    def send(self, outbox: deque[Outgoing]) -> None:
        while outbox:
            payload, route, tally = outbox[0]
            if self.closed:
                raise OSError(errno.EBADF, "closed")
            if self.room == 0:
                raise BlockingIOError
            if route in self.unreachable:
                raise OSError(self.unreachable[route], "injected")
            self.room -= 1
            self.sent.append((route, payload))
            outbox.popleft()
            tally.sent += 1
            tally.bytes_sent += len(payload)
            self.tally.sent += 1
            self.tally.bytes_sent += len(payload)

    def kernel_figures(self) -> KernelFigures:
        return KernelFigures()

    def route(self, address: Address) -> Route:
        return address

    def max_payload(self, route: Route) -> int:
        return 65_507

    def peer_address(self, route: Any) -> Address:
        address: Address = route
        return address

    def local_address(self, route: Route) -> Address:
        return self.bound_address

    def is_readable(self) -> bool:
        return bool(self.arriving)

    async def wait_readable(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self.arriving:
            self._check_open()
            await self._waiting.park()
        self._check_open()

    async def wait_writable(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        while self.room == 0:
            self._check_open()
            await self._waiting.park()
        self._check_open()

    def close(self) -> None:
        self.closed = True
        self._waiting.unpark_all()

    def abandon(self) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.closed:
            raise trio.ClosedResourceError("this endpoint is closed")


def memory_endpoint(address: Address = ("192.0.2.53", 53)) -> tuple[Endpoint, MemoryEngine]:
    engine = MemoryEngine(address)
    return Endpoint(engine), engine
