"""Echo benchmark: processor time per datagram of trio_udp and its peers, under the same load.

    python benchmarks/echo.py [--clients 64] [--in-flight 4] [--seconds 2] [--rounds 5] [SERVER ...]

Each server runs in a process of its own on one processor; the load, a closed loop of ``clients`` sockets with
``in-flight`` datagrams of 64 bytes each, on another. Rounds are interleaved, so that a machine whose speed drifts
slows all servers alike: compare the ratios, not the absolute figures. What they are ratios to is the least that a
Python program can do, a blocking loop around recvfrom and sendto. Peers that are not installed are left out.

asyncio allocates 256 KiB for each datagram that it reads. Depending on what else a process has done, glibc takes that
from the system and gives it back each time, or keeps it. That makes a factor of almost three, so both are measured.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import multiprocessing
import os
import socket
import socketserver
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple, cast

import trio

import trio_udp

Ready = Callable[[int], None]


class Figures(NamedTuple):
    micros: float  # of processor time, for each datagram
    rate: float  # datagrams a second
    lost: int
    out_of_order: int


def serve_trio_udp(ready: Ready, host: str | None = "127.0.0.1") -> None:
    async def echo(client: trio_udp.Client) -> None:
        async for payload in client:
            await client.send(payload)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            server = await nursery.start(lambda **kw: trio_udp.serve(echo, 0, host=host, **kw))
            ready(server.endpoints[0].local_address[1])

    trio.run(main)


def serve_trio_udp_wildcard(ready: Ready) -> None:
    serve_trio_udp(ready, host=None)


def serve_trio_udp_requests(ready: Ready) -> None:
    @trio_udp.request_handler
    async def echo(payload: bytes, client: trio_udp.Client) -> bytes:
        return payload

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            server = await nursery.start(lambda **kw: trio_udp.serve(echo, 0, host="127.0.0.1", **kw))
            ready(server.endpoints[0].local_address[1])

    trio.run(main)


async def _asyncio_echo(ready: Ready) -> None:
    class Echo(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast("asyncio.DatagramTransport", transport)

        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            self.transport.sendto(data, addr)

    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(Echo, local_addr=("127.0.0.1", 0))
    ready(transport.get_extra_info("sockname")[1])
    await asyncio.sleep(3600)


def serve_asyncio(ready: Ready) -> None:
    asyncio.run(_asyncio_echo(ready))


def serve_uvloop(ready: Ready) -> None:
    import uvloop

    uvloop.run(_asyncio_echo(ready))


def serve_socketserver(ready: Ready) -> None:
    class Echo(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            data, sock = self.request
            sock.sendto(data, self.client_address)

    with socketserver.UDPServer(("127.0.0.1", 0), Echo) as server:
        ready(server.server_address[1])
        server.serve_forever()


def serve_blocking(ready: Ready) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        ready(sock.getsockname()[1])
        while True:
            payload, address = sock.recvfrom(65_536)
            sock.sendto(payload, address)


SERVERS: dict[str, Callable[[Ready], None]] = {
    "trio_udp": serve_trio_udp,
    "trio_udp-wildcard": serve_trio_udp_wildcard,
    "trio_udp-request_handler": serve_trio_udp_requests,
    "asyncio": serve_asyncio,
    "asyncio-keeping-memory": serve_asyncio,
    "uvloop": serve_uvloop,
    "socketserver": serve_socketserver,
    "blocking": serve_blocking,
}


# See mallopt(3). Elsewhere than on glibc these have no effect.
ENVIRONMENT = {
    "asyncio": {"MALLOC_MMAP_THRESHOLD_": "131072"},
    "asyncio-keeping-memory": {
        "MALLOC_MMAP_THRESHOLD_": "1000000000",
        "MALLOC_TRIM_THRESHOLD_": "1000000000",
        "MALLOC_TOP_PAD_": "4000000",
    },
}


def _run_server(name: str, pipe: Connection) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    SERVERS[name](pipe.send)


def _processor_seconds(pid: int) -> float:
    """Processor time of a process's main thread so far: in nanoseconds, the first figure of its schedstat."""
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[0]) / 1e9


def _build_load(folder: str) -> str:
    """Compile the load generator: one in Python would be slower than the servers it is to load."""
    program = os.path.join(folder, "load")
    source = os.path.join(os.path.dirname(__file__), "load.c")
    subprocess.run([os.environ.get("CC", "cc"), "-O2", "-o", program, source], check=True)
    return program


def _load(program: str, port: int, clients: int, in_flight: int, seconds: float) -> list[int]:
    """Load a server; return how many datagrams were answered, were lost, and came out of order."""
    command = [program, str(port), str(clients), str(in_flight), str(seconds)]
    return [int(word) for word in subprocess.run(command, check=True, capture_output=True).stdout.split()]


def measure(program: str, name: str, clients: int, in_flight: int, seconds: float) -> Figures:
    """Load one server in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_run_server, args=(name, theirs), daemon=True)
    os.environ.update(ENVIRONMENT.get(name, {}))
    process.start()
    for variable in ENVIRONMENT.get(name, {}):
        del os.environ[variable]
    try:
        port = ours.recv()
        assert process.pid is not None
        _load(program, port, clients, in_flight, 0.3)
        time.sleep(0.1)  # for what the first load has left in the server's buffer
        before, start = _processor_seconds(process.pid), time.monotonic()
        answered, lost, out_of_order = _load(program, port, clients, in_flight, seconds)
        used, took = _processor_seconds(process.pid) - before, time.monotonic() - start
    finally:
        process.kill()
        process.join()
    return Figures(used / answered * 1e6, answered / took, lost, out_of_order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="*", metavar="SERVER", help=", ".join(SERVERS))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--in-flight", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    names = arguments.servers or [name for name in SERVERS if name != "uvloop" or importlib.util.find_spec("uvloop")]

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    figures: dict[str, list[Figures]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        program = _build_load(folder)
        for _ in range(arguments.rounds):
            for name in names:
                figures[name].append(measure(program, name, arguments.clients, arguments.in_flight, arguments.seconds))

    print(f"Python {sys.version.split()[0]}, {arguments.clients} clients with {arguments.in_flight} in flight")
    columns = f"{'server':26}{'µs/datagram':>12}{'min - max':>16}{'datagrams/s':>13}{'lost':>6}{'disordered':>11}"
    print(f"{columns}{'/ blocking':>12}")
    for name in names:
        micros = [f.micros for f in figures[name]]
        rate = statistics.median(f.rate for f in figures[name])
        lost = sum(f.lost for f in figures[name])
        out_of_order = sum(f.out_of_order for f in figures[name])
        ratio = ""
        if "blocking" in figures:
            pairs = zip(figures["blocking"], figures[name], strict=True)
            ratio = f"{statistics.median(it.micros / blocking.micros for blocking, it in pairs):.2f}"
        spread = f"{min(micros):.2f} - {max(micros):.2f}"
        print(
            f"{name:26}{statistics.median(micros):12.2f}{spread:>16}{rate:13,.0f}{lost:6}{out_of_order:11}{ratio:>12}"
        )


if __name__ == "__main__":
    main()
