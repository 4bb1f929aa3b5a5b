"""Run a server under bad network conditions for any time: ``python tests/project/soak.py --seconds 3600``.

    Peer -> network -> socket -> kernel -> server -> Handlers
    '--- Traffic, a process ---'           '--- Soak, this ---'

Hundreds of peers send numbered datagrams, which the network loses, duplicates, delays and corrupts. Some peers vanish
and come back, and some send nonsense. Handlers raise, return, close, are slow or impatient. One server after the other
runs on the same port. Each is flooded from 100,000 forged addresses, and stopped or cancelled during the traffic.

When a datagram leaves the network for the kernel, it gets a new number for its peer, and a seal, which is a checksum.
So whatever the network did, handlers must receive growing numbers and whole seals, over all lives of the server, and so
must the peers. At the end of each life the counters must add up: see ``Soak.check``.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import itertools
import logging
import math
import multiprocessing
import os
import random
import selectors
import socket
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection as Pipe
from typing import Any, Literal

import attrs
import trio

from trio_udp import (
    Address,
    Client,
    Datagram as Arrived,
    Endpoint,
    Limits,
    Server,
    ServerStatistics,
    request_handler,
    serve,
    serve_endpoints,
)
from trio_udp._endpoints.engines.pktinfo import IP_PKTINFO

SERVER = "127.4.0.1"
FIRST_PORT = 20_000  # Linux hands out ports from 32,768 on: one below that stays free while its owner is away
MAX_DATAGRAM_SIZE = 1_000
PATIENCE = 120  # seconds for a step that should take a moment: a machine may be busy, but a run must end

# Kinds of peers and their handlers, by the peer's number. A flood must not affect the regulars.
KINDS = ("regular", "regular", "brief", "careful", "closing", "slow", "transacting", "asking", "impatient", "vandal")


def kind_of(number: int) -> str:
    return KINDS[number % len(KINDS)]


def number_of(peer: Address) -> int | None:
    """Return the number of the peer at an address 127.2.x.y; None for a forged address."""
    raw = socket.inet_aton(peer[0])
    return int.from_bytes(raw[2:], "big") if raw[1] == 2 else None


# Datagrams. A letter is the payload of a peer, with a checksum, as in real protocols. It is sealed when it leaves the
# network, corrupted or not.

CHECKSUM = struct.Struct("!I")
SEAL = struct.Struct("!IIIB")  # peer, number on the wire, phase of the run, whether the network left the letter whole


class NonsenseError(Exception):
    """A peer has sent a payload that no protocol knows."""


@attrs.frozen
class Datagram:
    peer: int
    number: int
    phase: int
    whole: bool
    letter: bytes = attrs.field(repr=False)

    def seal(self) -> bytes:
        return with_checksum(SEAL.pack(self.peer, self.number, self.phase, self.whole) + self.letter)

    @classmethod
    def unseal(cls, payload: bytes) -> Datagram:
        if not checksum_is_right(payload) or len(payload) < CHECKSUM.size + SEAL.size:
            raise NonsenseError(payload)
        rest = payload[CHECKSUM.size :]
        peer, number, phase, whole = SEAL.unpack_from(rest)
        return cls(peer, number, phase, whole, rest[SEAL.size :])


def with_checksum(content: bytes) -> bytes:
    return CHECKSUM.pack(zlib.crc32(content)) + content


def checksum_is_right(data: bytes) -> bool:
    return data[: CHECKSUM.size] == CHECKSUM.pack(zlib.crc32(data[CHECKSUM.size :]))


def travel(letter: bytes, random_: random.Random) -> Iterator[tuple[float, bytes, bool]]:
    """Yield each copy of a letter that arrives: its delay, its bytes, and whether the bytes are unchanged."""
    if random_.random() < 0.05:
        return
    for _ in range(2 if random_.random() < 0.05 else 1):
        corrupted = random_.random() < 0.02
        copy = bytearray(letter)
        if corrupted:
            copy[random_.randrange(len(copy))] ^= random_.randint(1, 255)
        # Some letters are overtaken by the peer's next ones.
        yield random_.uniform(0, 0.02 if random_.random() < 0.9 else 0.3), bytes(copy), not corrupted


# The traffic, in a process of its own.


class Peer:
    """A socket at an address of its own."""

    def __init__(self, number: int, port: int) -> None:
        self.number = number
        self.kind = kind_of(number)
        self.address = (f"127.2.{number >> 8}.{number & 255}", port)
        self.socket: socket.socket | None = None
        self.sent = 0
        self.last_answer = 0


@attrs.frozen
class Report:
    """The traffic so far: datagrams sent, answers to regulars by phase, and complaints."""

    sent: int
    answers: Counter[int]
    complaints: list[str]


class Traffic:
    """All peers, the network, and the flood, in one thread that works through an agenda."""

    def __init__(self, pipe: Pipe, destination: Address, peers: int, seed: int) -> None:
        self.pipe = pipe
        self.destination = destination
        self.random = random.Random(seed)
        self.phase = 0
        self.paused = False
        self.under_way = 0  # letters in the network
        self.sent = 0
        self.answers: Counter[int] = Counter()
        self.complaints: list[str] = []
        self.agenda: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.selector = selectors.DefaultSelector()
        self.selector.register(pipe, selectors.EVENT_READ, self.obey)
        self.forger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.forger.bind(("0.0.0.0", 0))
        port = destination[1] + 1  # not the server's own: it would probe each such source
        self.peers = [Peer(number, port) for number in range(peers)]
        for peer in self.peers:
            self.appear(peer)
            self.later(self.random.uniform(0, 0.1), partial(self.write, peer))

    def run(self) -> None:
        """Run the agenda until the other process closes its end of the pipe, or ends."""
        try:
            while True:
                while self.agenda and self.agenda[0][0] <= time.monotonic():
                    heapq.heappop(self.agenda)[2]()
                for key, _ in self.selector.select(timeout=0.001):
                    key.data()
        except EOFError:
            pass
        finally:
            for peer in self.peers:
                if peer.socket is not None:
                    peer.socket.close()
            self.selector.close()
            self.forger.close()
            self.pipe.close()

    def later(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self.agenda, (time.monotonic() + seconds, next(self.order), do))

    def obey(self) -> None:
        """Carry out a command of the other process, and answer it with a report."""
        command, *arguments = self.pipe.recv()
        getattr(self, command)(*arguments)

    def report(self) -> None:
        for key in self.selector.get_map().values():
            if key.data != self.obey:
                key.data()
        self.pipe.send(Report(self.sent, self.answers, self.complaints))
        self.complaints = []

    def pause(self) -> None:
        """Stop all peers from sending, and report when no letter is in transit."""
        self.paused = True
        if self.under_way:
            self.later(0.01, self.pause)
        else:
            self.report()

    def resume(self, phase: int) -> None:
        self.paused = False
        self.phase = phase
        self.report()

    def flood(self, forged: int) -> None:
        """Send from one forged address after the other, as fast as the rest of the traffic allows."""
        for number in range(forged, max(0, forged - 100), -1):
            # struct in_pktinfo: the middle is the address to send from; 127.16.0.0 and up, by number.
            source = bytes(4) + (0x7F100000 + number).to_bytes(4, "big") + bytes(4)
            self.forger.sendmsg([b"flood"], [(socket.IPPROTO_IP, IP_PKTINFO or 0, source)], 0, self.destination)
            self.sent += 1
        if forged > 100:
            self.later(0.001, partial(self.flood, forged - 100))
        else:
            self.report()

    def appear(self, peer: Peer) -> None:
        peer.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        peer.socket.bind(peer.address)
        peer.socket.setblocking(False)
        self.selector.register(peer.socket, selectors.EVENT_READ, partial(self.read, peer))

    def vanish(self, peer: Peer) -> None:
        assert peer.socket is not None
        self.selector.unregister(peer.socket)
        peer.socket.close()
        peer.socket = None
        self.later(self.random.uniform(0.1, 1), partial(self.appear, peer))

    def write(self, peer: Peer) -> None:
        random_ = self.random
        if peer.socket is not None and not self.paused:
            for _ in range(random_.choice((1, 1, 1, 3, 20 if peer.kind == "slow" else 5))):
                letter = with_checksum(random_.randbytes(random_.randrange(200)))
                for delay, copy, whole in travel(letter, random_):
                    self.under_way += 1
                    self.later(delay, partial(self.transmit, peer, copy, whole))
            if peer.kind != "regular" and random_.random() < 0.02:
                self.vanish(peer)
        self.later(random_.uniform(0, 0.2), partial(self.write, peer))

    def transmit(self, peer: Peer, letter: bytes, whole: bool) -> None:
        self.under_way -= 1
        if peer.socket is None:
            return
        peer.sent += 1
        payload = Datagram(peer.number, peer.sent, self.phase, whole, letter).seal()
        if peer.kind == "vandal":  # which has never seen a seal
            payload = self.random.choice((b"", self.random.randbytes(30), bytes(2 * MAX_DATAGRAM_SIZE)))
        peer.socket.sendto(payload, self.destination)
        self.sent += 1

    def read(self, peer: Peer) -> None:
        assert peer.socket is not None
        while True:
            try:
                payload = peer.socket.recv(65_535)
            except BlockingIOError:
                return
            answer = Datagram.unseal(payload)
            if answer.peer != peer.number or answer.number <= peer.last_answer:
                self.complaints.append(f"{answer} came to peer {peer.number} after number {peer.last_answer}")
            peer.last_answer = answer.number
            if peer.kind == "regular":
                self.answers[answer.phase] += 1


def traffic(*arguments: Any) -> None:
    Traffic(*arguments).run()


# The handlers.


class Handlers:
    """The handlers of one life of the server, one for each kind of peer, and their counts and complaints."""

    def __init__(self, last_taken: dict[int, int], random_: random.Random) -> None:
        self.last_taken = last_taken  # number on the wire, by peer
        self.random = random_
        self.clients = self.taken = self.sent = self.cancelled = self.errors = 0
        self.complaints: list[str] = []
        self.regulars: set[int] = set()  # that have been here
        # How many datagrams of the regular peers have reached the server, by phase: those that handlers have taken, and
        # those of strangers (which accept sees first, whether they are then refused or taken).
        self.reached: Counter[int] = Counter()
        self.seen_by_accept: set[tuple[int, int]] = set()  # and not taken

    async def handle(self, client: Client) -> None:
        self.clients += client.statistics().delivered == 0  # or it is called again for the remaining datagrams
        number = number_of(client.peer_address)
        try:
            await getattr(self, "forged" if number is None else kind_of(number))(client)
        except trio.Cancelled:
            self.cancelled += 1
            raise

    def accept(self, arrived: Arrived) -> bool:
        number = number_of(arrived.peer_address)
        if number is not None and kind_of(number) == "regular":
            datagram = Datagram.unseal(arrived.payload)
            self.reached[datagram.phase] += 1
            self.seen_by_accept.add((number, datagram.number))
        return True

    def failed(self, client: Client, error: Exception) -> None:
        self.errors += 1
        number = number_of(client.peer_address)
        expected = isinstance(error, NonsenseError) and number is not None and kind_of(number) in ("careful", "vandal")
        if not expected:
            self.complaints.append(f"handler of {client.peer_address} failed: {error!r}")

    def take(self, client: Client, payload: bytes) -> Datagram:
        """Check and count a datagram that a handler has just received."""
        self.taken += 1
        datagram = Datagram.unseal(payload)
        last = self.last_taken.get(datagram.peer, 0)
        if datagram.peer != number_of(client.peer_address) or datagram.number <= last:
            self.complaints.append(f"{client} was given {datagram} after number {last}")
        if datagram.whole != checksum_is_right(datagram.letter):
            self.complaints.append(f"{client} was given {datagram}, which is not as it was sent")
        self.last_taken[datagram.peer] = datagram.number
        return datagram

    async def answer(self, client: Client, payload: bytes) -> Datagram:
        datagram = self.take(client, payload)
        await client.send(payload)
        self.sent += 1
        return datagram

    async def forged(self, client: Client) -> None:
        async for payload in client:
            self.taken += 1
            await client.send(payload)
            self.sent += 1

    async def regular(self, client: Client) -> None:
        client.idle_timeout = math.inf
        try:
            async for payload in client:
                datagram = self.take(client, payload)
                self.regulars.add(datagram.peer)
                if (datagram.peer, datagram.number) in self.seen_by_accept:
                    self.seen_by_accept.remove((datagram.peer, datagram.number))
                else:
                    self.reached[datagram.phase] += 1
                await client.send(payload)
                self.sent += 1
        finally:
            if dropped := client.statistics().dropped_inbox_full:
                self.complaints.append(f"{dropped} datagrams of {client} found its inbox full")

    async def brief(self, client: Client) -> None:
        """Return early, perhaps with datagrams left behind."""
        for _ in range(self.random.randint(1, 5)):
            await self.answer(client, await client.receive())

    async def careful(self, client: Client) -> None:
        """Answer whole datagrams; raise at a corrupted one."""
        async for payload in client:
            datagram = self.take(client, payload)
            if not checksum_is_right(datagram.letter):
                raise NonsenseError(datagram)
            await client.send(payload)
            self.sent += 1

    vandal = careful

    async def closing(self, client: Client) -> None:
        async for payload in client:
            await self.answer(client, payload)
            if self.random.random() < 0.2:
                client.close()
                await trio.sleep(0.1)
                return

    async def slow(self, client: Client) -> None:
        async for payload in client:
            await self.answer(client, payload)
            await trio.sleep(self.random.choice((0, 0, 0.04)))

    async def transacting(self, client: Client) -> None:
        await self.answer(client, await client.receive())
        with client.transaction(), trio.move_on_after(0.3):
            for _ in range(5):
                await self.answer(client, await client.receive())

    async def asking(self, client: Client) -> None:
        async def answer(payload: bytes, client: Client) -> bytes:
            self.take(client, payload)
            await trio.sleep(self.random.choice((0, 0, 0, 0.02)))
            self.sent += 1
            return payload

        await request_handler(answer, timeout=0.01)(client)

    async def impatient(self, client: Client) -> None:
        while True:
            with trio.move_on_after(self.random.uniform(0, 0.1)):
                await self.answer(client, await client.receive())


# The run.


@attrs.frozen
class Life:
    """The settings of one life of the server, and how it ends."""

    when_full: Literal["refuse", "evict_idle"]
    end: Literal["stop", "cancel"]


LIVES = (
    Life("refuse", "stop"),
    Life("evict_idle", "stop"),
    Life("evict_idle", "cancel"),
)


async def until(what: str, is_so: Callable[[], bool]) -> None:
    with trio.move_on_after(PATIENCE):
        while not is_so():  # noqa: ASYNC110
            await trio.sleep(0.01)
    if not is_so():
        raise TimeoutError(f"it does not come about that {what}")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def living_tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


class Soak:
    """One server after the other, on the same port, while the traffic goes on."""

    def __init__(self, pipe: Pipe, port: int, peers: int, forged: int, seed: int) -> None:
        self.pipe = pipe
        self.port = port
        self.peers = peers
        self.forged = forged
        self.random = random.Random(seed)
        self.phases = itertools.count(1)
        self.last_taken: dict[int, int] = {}
        self.failures: list[str] = []

    def expect(self, what: str, holds: bool) -> None:
        if not holds:
            self.failures.append(what)
            print("FAILED", what)

    async def run(self, rounds: int, seconds: float) -> None:
        """Run all lives this many times; memory must not grow after the first life."""
        blocks = []
        for life in LIVES * rounds:
            await self.live(life, seconds / rounds / len(LIVES))
            blocks.append(sys.getallocatedblocks())
        print("memory blocks after each life:", *blocks)
        # That is far less than one for each forged address.
        self.expect("memory has grown", blocks[-1] < blocks[0] + 5_000)

    async def command(self, *command: Any) -> Report:
        self.pipe.send(command)
        with trio.fail_after(PATIENCE):
            await trio.lowlevel.wait_readable(self.pipe.fileno())
        report: Report = self.pipe.recv()
        self.expect(f"complaints of the peers: {report.complaints[:3]}", not report.complaints)
        return report

    async def live(self, life: Life, seconds: float) -> None:
        """Run one life of the server, and check that it leaves no file, task or client behind."""
        files, tasks = open_files(), living_tasks()
        await self.serve(life, seconds)
        gc.collect()
        clients = sum(isinstance(thing, Client) for thing in gc.get_objects())
        self.expect(f"{clients} clients are left", not clients)
        self.expect(f"{open_files()} open files, {files} before", open_files() == files)
        self.expect(f"{living_tasks()} living tasks, {tasks} before", living_tasks() == tasks)

    async def serve(self, life: Life, seconds: float) -> None:
        handlers = Handlers(self.last_taken, self.random)
        calm, flood = next(self.phases), next(self.phases)
        regulars = sum(kind_of(number) == "regular" for number in range(self.peers))
        async with trio.open_nursery() as nursery:
            server: Server = await nursery.start(
                partial(
                    serve,
                    handlers.handle,
                    self.port,
                    host=SERVER,
                    max_datagram_size=MAX_DATAGRAM_SIZE,
                    idle_timeout=0.5,
                    limits=Limits(max_clients=self.peers + 50, when_full=life.when_full, inbox_datagrams=32),
                    accept=handlers.accept,
                    on_error=handlers.failed,
                    drain_timeout=PATIENCE,
                )
            )
            await self.command("resume", 0)
            await until("regulars are served", lambda: len(handlers.regulars) == regulars)
            sent_before, arrived_before = await self.quiet(server)
            await self.command("resume", calm)
            await trio.sleep(seconds / 3)
            await until("regulars reach the server", lambda: handlers.reached[calm] >= regulars)
            await self.command("resume", flood)
            await self.command("flood", self.forged)
            await trio.sleep(seconds / 3)
            await until("regulars reach the server in the flood", lambda: handlers.reached[flood] >= regulars)
            sent_after, arrived_after = await self.quiet(server)
            sent, arrived = sent_after - sent_before, arrived_after - arrived_before
            self.expect(f"{sent} were sent; received or dropped by the kernel are {arrived}", arrived == sent)
            await self.command("resume", 0)
            await trio.sleep(seconds / 3)
            if life.end == "stop":
                server.stop()
            else:
                nursery.cancel_scope.cancel()
        self.check(life, server.statistics(), handlers)
        self.check_answers((await self.command("report")).answers, handlers, calm, flood)

    async def quiet(self, server: Server) -> tuple[int, int]:
        """Pause the traffic until the server has read everything; return how many were sent and how many received."""
        sent = (await self.command("pause")).sent
        (endpoint,) = server.endpoints
        await until("all is read", lambda: not endpoint.statistics().kernel_queued)
        s = server.statistics()
        return sent, s.received + s.kernel_dropped

    def check(self, life: Life, s: ServerStatistics, handlers: Handlers) -> None:
        """Check the counters of a server that has ended."""
        print(f"{life.when_full}, then {life.end}:", *(f"{k}={v}" for k, v in attrs.asdict(s).items() if v))
        self.expect("received is not delivered and all drops", s.received == s.accounted_for)
        self.expect("a client or a datagram still waits", s.waiting == s.clients == 0)
        self.expect(f"handlers have taken {handlers.taken}", s.delivered == handlers.taken)
        self.expect(f"handlers have seen {handlers.clients} clients", s.clients_started == handlers.clients)
        self.expect(f"handlers have raised {handlers.errors} times", s.handler_errors == handlers.errors)
        self.expect(f"complaints: {handlers.complaints[:3]}", not handlers.complaints)
        self.expect("errors of the network, of which there is none", not s.errors)
        if life.end == "stop":
            self.expect(f"handlers have sent {handlers.sent}", s.sent == handlers.sent)
            self.expect(f"{handlers.cancelled} handlers were cancelled in the drain", not handlers.cancelled)
        if life.when_full == "refuse":
            self.expect("no stranger was refused", s.refused_full > 0)
            self.expect("clients were evicted", not s.clients_evicted)
        else:
            self.expect("no client was evicted", s.clients_evicted > 0)

    def check_answers(self, answers: Counter[int], handlers: Handlers, calm: int, flood: int) -> None:
        """Check that a flood does not lower the share of answers to datagrams of regular peers that arrived."""
        reached = handlers.reached
        before, during = (answers[phase] / max(1, reached[phase]) for phase in (calm, flood))
        print(f"    regulars answered: {before:.1%} of {reached[calm]}, in the flood {during:.1%} of {reached[flood]}")
        self.expect("too few answers", during >= 0.95 * before > 0)


# Backpressure.


async def back_pressure(seed: int) -> list[str]:
    """Serve readers behind Unix-domain sockets, which hold few datagrams, so that sending waits again and again.

    A reader that stays gets everything, in order; some leave in the middle.
    """
    random_ = random.Random(seed)
    failures: list[str] = []
    handed_over = 0

    async def count(client: Client) -> None:
        nonlocal handed_over
        await client.receive()
        for number in range(500):
            await client.send(b"%d" % number)
            handed_over += 1

    def open_socket() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sock.bind("")  # a name of the kernel's choice
        return sock

    async def read(name: bytes, wanted: int) -> None:
        with trio.socket.from_stdlib_socket(open_socket()) as sock:
            await sock.sendto(b"go", name)
            for number in range(wanted):
                if random_.random() < 0.01:
                    await trio.sleep(0.01)
                if (found := await sock.recv(100)) != b"%d" % number:
                    failures.append(f"{found!r} came, not {number}")

    async with trio.open_nursery() as nursery:
        sock = open_socket()
        endpoint = Endpoint.from_socket(sock)
        server: Server = await nursery.start(partial(serve_endpoints, count, [endpoint], drain_timeout=PATIENCE))
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as readers:
                for _ in range(20):
                    readers.start_soon(read, sock.getsockname(), random_.choice((500, 500, 100)))
        server.stop()
    s = server.statistics()
    print(f"back-pressure: {s.sent} sent, {s.errors}")
    if s.sent + s.send_errors != handed_over or handed_over != 20 * 500:
        failures.append(f"{handed_over} were handed over, {s.sent} sent, {s.send_errors} not")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=10, help="of traffic; checks and stops come on top")
    parser.add_argument("--clients", type=int, default=300)
    parser.add_argument("--forged", type=int, default=100_000, help="addresses that flood each life of the server")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--engine", choices=["linux", "portable"], default="linux")
    options = parser.parse_args()
    # The random choices are then the same. The kernel and the scheduler may still act differently.
    print("repeat it with", *(f"--{name} {value}" for name, value in vars(options).items()), flush=True)
    os.environ["TRIO_UDP_ENGINE"] = options.engine if options.engine == "portable" else ""

    address = (SERVER, FIRST_PORT + 2 * (os.getpid() % 6_000))  # runs at the same time have other ports
    failures = trio.run(back_pressure, options.seed)
    spawn = multiprocessing.get_context("spawn")
    pipe, far_end = spawn.Pipe()
    process = spawn.Process(target=traffic, args=(far_end, address, options.clients, options.seed), daemon=True)
    process.start()
    far_end.close()
    with pipe:
        soak = Soak(pipe, address[1], options.clients, options.forged, options.seed)
        trio.run(soak.run, max(1, round(options.seconds / 30)), options.seconds)
    process.join(PATIENCE)
    failures += soak.failures
    print(f"{len(failures)} failures", *failures, sep="\n")
    return bool(failures) or process.exitcode != 0


# The warning that a flood has filled the table of clients is expected here.
logging.getLogger("trio_udp").setLevel(logging.ERROR)

if __name__ == "__main__":
    sys.exit(main())
