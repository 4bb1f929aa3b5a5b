"""What clients cost in memory, beside what ``Limits.worst_case_memory()`` assumes, and what is left once they are gone.

    python benchmarks/memory.py                # five minutes; prints two tables
    python benchmarks/memory.py --quick        # half a minute, with fewer clients

Needs Linux. Every measurement is a server in a new process, because a process that has freed memory uses it again
before it asks for more. Its clients are one socket, which sends from any address of 127.0.0.0/8.

The figures are differences of the resident set (RSS): what the machine has to have, with the gaps that allocators leave
and the memory of OpenSSL, which ``tracemalloc`` does not see. "objects" is what ``tracemalloc`` counts in one more
process. It is the same in every run, so it shows which change of the code has changed the other figure.

For other programs: ``measure_all(quick)`` returns all figures, ``as_markdown`` makes the tables of them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import trio
from trio.testing import MockClock

import trio_udp
from trio_udp._limits import BUCKET, CLIENT, DATAGRAM, REQUEST

WINDOW = 100  # datagrams sent before the server is asked whether it has read them; fit into any receive buffer
IDLE_TIMEOUT = 3_600.0  # seconds, by a clock that is put forward
MANY = 1_000_000


class Row(NamedTuple):
    title: str
    server: str
    assumed: int  # bytes
    clients: int
    each: int = 1  # datagrams from each client
    size: int = 1  # bytes of each payload, which do not count
    step: int = 1  # between two clients' addresses; 256: each has a /24, and so a bucket, of its own


class Each(NamedTuple):
    assumed: int
    resident: float
    objects: float


class Figures(NamedTuple):
    each: dict[str, Each]  # by the title of a row; bytes
    clients: int
    departure: dict[str, tuple[float, float]]  # by moment; bytes resident, and of objects


DTLS = 75_000  # what worst_case_memory(handler_bytes=...) is to be told for trio_udp.dtls.secure

ROWS = [
    Row("idle client", "echo", CLIENT, 20_000),
    Row("idle client, under every limit", "echo under limits", CLIENT, 20_000, step=256),
    Row("the same, with a datagram waiting", "stuck under limits", CLIENT, 20_000, step=256),
    Row("waiting datagram of 2 bytes", "stuck", DATAGRAM, 500, each=200, size=2),
    Row("waiting datagram of 64 bytes", "stuck", DATAGRAM, 500, each=200, size=64),
    Row("waiting datagram of 1,200 bytes", "stuck", DATAGRAM, 500, each=200, size=1_200),
    Row("bucket of a rate limit", "buckets", BUCKET, 60_000, step=256),
    Row("running request of a request_handler", "requests", REQUEST, 500, each=50),
    Row("idle DTLS client", "dtls", CLIENT + DTLS, 1_000),
]


# ---- in the process of the server ----


async def echo(client: trio_udp.Client) -> None:
    async for payload in client:
        await client.send(payload)


async def stuck(client: trio_udp.Client) -> None:
    await trio.sleep_forever()


async def answer_never(payload: bytes, client: trio_udp.Client) -> None:
    await trio.sleep_forever()


def handler_of(which: str) -> trio_udp.Handler:
    if which == "dtls":
        from OpenSSL import SSL

        from trio_udp.dtls import secure

        context = SSL.Context(SSL.DTLS_METHOD)
        context.use_certificate_chain_file(os.environ["CERTIFICATE"])
        context.use_privatekey_file(os.environ["KEY"])
        return secure(echo, context)
    if which == "requests":
        return trio_udp.request_handler(answer_never, concurrency=MANY)
    return stuck if "stuck" in which else echo


def serve_in_this_process(which: str, traced: bool) -> None:
    """Serve; answer each word on stdin with a line of JSON."""
    if traced:
        tracemalloc.start()
    clock = MockClock(rate=1.0)
    limits = trio_udp.Limits(max_clients=MANY, inbox_datagrams=MANY, total_bytes=MANY * 1_200)
    options: dict[str, Any] = {"host": "127.0.0.1"}
    rate_limit = trio_udp.RateLimit(per_second=1e9, burst=MANY, buckets=2 * MANY)
    if "under limits" in which:
        limits = trio_udp.Limits(
            max_clients=MANY, when_full="evict_idle", clients_per_host=2, rate_limit=rate_limit, amplification=3
        )
        options = {"host": "0.0.0.0"}  # so that a client's local address is kept too
    elif which == "buckets":
        limits = trio_udp.Limits(rate_limit=rate_limit)
        options["accept"] = lambda datagram: False

    async def main() -> None:
        async with trio.open_nursery() as nursery, trio.lowlevel.FdStream(os.dup(0)) as orders:
            serve = partial(trio_udp.serve, limits=limits, idle_timeout=IDLE_TIMEOUT, **options)
            server: trio_udp.Server = await nursery.start(serve, handler_of(which), 0)
            print(server.endpoints[0].local_address[1], flush=True)
            async for order in orders:
                figures: dict[str, float] = {}
                if order == b"read\n":
                    statistics = server.statistics()
                    figures = {"read": statistics.received, "clients": statistics.clients}
                elif order == b"weigh\n":
                    gc.collect()
                    figures["bytes"] = tracemalloc.get_traced_memory()[0] if traced else resident_bytes()
                elif order == b"expire\n":
                    clock.jump(2 * IDLE_TIMEOUT)
                elif order == b"stop\n":
                    server.stop()
                elif order == b"trim\n":
                    ctypes.CDLL(None).malloc_trim(0)
                print(json.dumps(figures), flush=True)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=clock)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- in this process ----


class Crowd:
    """A server in a process of its own, and the socket that all its clients are."""

    def __init__(self, process: subprocess.Popen[str], sock: socket.socket) -> None:
        self._process, self._sock, self._sent = process, sock, 0
        self.port = int(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit("The server has ended while it was measured.")
        return line

    def tell(self, order: str) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()
        figures: dict[str, float] = json.loads(self._answer())
        return figures

    def go(self, order: str) -> None:
        """Let all clients expire, or the server stop; wait until none is left."""
        while self.tell("read")["clients"]:
            self.tell(order)  # again, for a handler that had not yet begun to wait

    def weigh(self) -> float:
        return self.tell("weigh")["bytes"]

    def come(self, row: Row, count: int) -> None:
        """Let ``count`` clients send their datagrams, no faster than the server reads them."""
        payload = bytes(row.size)
        for _ in range(row.each):
            for number in range(count):
                source = struct.pack("!I", 0x7F_01_00_01 + number * row.step)
                control = (socket.IPPROTO_IP, IP_PKTINFO, struct.pack("=i4s4x", 0, source))
                self._sock.sendmsg([payload], [control], 0, ("127.0.0.1", self.port))
                self._sent += 1
                if self._sent % WINDOW == 0:
                    self._wait()
        self._wait()

    def _wait(self) -> None:
        with suppress(BlockingIOError):  # what the server has answered
            while True:
                self._sock.recv(1, socket.MSG_DONTWAIT)
        while self.tell("read")["read"] < self._sent:
            pass


IP_PKTINFO = 8  # <bits/in.h>; the source that sendmsg() shall use


@contextmanager
def crowd(which: str, *, traced: bool = False) -> Iterator[Crowd]:
    command = [sys.executable, __file__, "--serve", which, *(["--traced"] if traced else [])]
    pipe = subprocess.PIPE
    with (
        socket.socket(type=socket.SOCK_DGRAM) as sock,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process,
    ):
        try:
            sock.bind(("0.0.0.0", 0))
            yield Crowd(process, sock)
        finally:
            process.kill()


def measure_row(row: Row, count: int, *, traced: bool) -> float:
    """Return bytes for each client, datagram, bucket or request."""
    with crowd(row.server, traced=traced) as it:
        if row.server == "dtls":
            return trio.run(_measure_dtls, it, count)
        # What exists once does not count, such as modules that are imported late. Nor do clients, where it is about
        # what they have.
        it.come(row._replace(each=1), count if row.each > 1 else 1)
        before = it.weigh()
        it.come(row, count)
        new = count * row.each if row.each > 1 else count - 1
        return (it.weigh() - before) / new - (row.size if row.each > 1 else 0)


async def _measure_dtls(it: Crowd, count: int) -> float:
    from OpenSSL import SSL

    from trio_udp.dtls import connect

    context = SSL.Context(SSL.DTLS_METHOD)
    context.load_verify_locations(os.environ["CERTIFICATE"])

    async def come(number: int) -> None:
        for _ in range(number):
            channel = await connect("127.0.0.1", it.port, context, receive_buffer=50_000)
            await channel.send(b"x")
            await channel.receive()
            channels.append(channel)

    channels: list[Any] = []
    await come(20)
    before = it.weigh()
    await come(count)
    return (it.weigh() - before) / count


def measure_departure(count: int, *, traced: bool) -> dict[str, float]:
    """Return the bytes that a server has before ``count`` clients, with them, and after they have gone."""
    row = ROWS[0]
    with crowd(row.server, traced=traced) as it:
        it.come(row, 1)
        found = {"before they come": it.weigh()}
        it.come(row, count)
        found["with all of them"] = it.weigh()
        it.go("expire")
        found["after all have expired"] = it.weigh()
        it.tell("trim")
        found["after malloc_trim(0)"] = it.weigh()
        for _ in range(3):
            it.come(row, count)
            it.go("expire")
        found["after three more such crowds"] = it.weigh()
        for _ in range(200):
            it.come(row, count // 100)
            it.go("expire")
        found["after 200 small crowds, 1 % as large"] = it.weigh()
        it.come(row, count)
        it.go("stop")
        found["after one more large one, and stop()"] = it.weigh()
    return found


def measure_all(quick: bool) -> Figures:
    """Measure everything, which prints each step to stderr."""
    each = {}
    with ExitStack() as stack:
        rows = list(ROWS)
        try:
            from dtls import make_certificate
        except ImportError as missing:
            print(f"Left out: {rows.pop().title} ({missing})", file=sys.stderr)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            os.environ["CERTIFICATE"], os.environ["KEY"] = make_certificate(folder)
        for row in rows:
            print(row.title, file=sys.stderr)
            count = row.clients // 10 if quick else row.clients
            each[row.title] = Each(
                assumed=row.assumed,
                resident=measure_row(row, count, traced=False),
                objects=measure_row(row, count, traced=True),
            )
            print(f"  {each[row.title]}", file=sys.stderr)
    clients = 10_000 if quick else 100_000
    print(f"{clients:,} clients that go", file=sys.stderr)
    resident, objects = (measure_departure(clients, traced=traced) for traced in (False, True))
    return Figures(each, clients, {moment: (resident[moment], objects[moment]) for moment in resident})


def as_markdown(figures: Figures) -> str:
    lines = ["| bytes for each | assumed | measured (RSS) | objects |", "|---|---|---|---|"]
    for title, it in figures.each.items():
        too_little = " **more than assumed**" if it.resident > it.assumed else ""
        lines.append(f"| {title} | {it.assumed:,} | {it.resident:,.0f}{too_little} | {it.objects:,.0f} |")
    lines += ["", f"| the server's memory with {figures.clients:,} clients | MB (RSS) | objects |", "|---|---|---|"]
    for moment, (resident, objects) in figures.departure.items():
        lines.append(f"| {moment} | {resident / 1e6:.0f} | {objects / 1e6:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--traced", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve_in_this_process(arguments.serve, arguments.traced)
    else:
        print(as_markdown(measure_all(arguments.quick)))


if __name__ == "__main__":
    main()
