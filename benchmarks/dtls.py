"""Measure the cost of DTLS for a server, in CPU time and memory. The server is a child process, the load is this one.

    python benchmarks/dtls.py [--scale 0.1] [--server trio] [--json]    (run.py measures the same)

It prints kilobytes for each idle client, and microseconds of the server's CPU time for each full handshake, echo of 64
bytes and forged ClientHello. The certificate is for ECDSA P-256. With ``--server trio`` the server is
``trio.DTLSEndpoint``, with the same load.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import ipaddress
import json
import multiprocessing
import os
import resource
import socket
import tempfile
import time
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL

import trio_udp
from trio_udp.dtls import DTLSChannel, connect, secure

HOST = "127.0.0.1"
CHUNK = 50  # ClientHellos sent between two pauses


def make_certificate(folder: Path) -> tuple[str, str]:
    """Write a certificate for ``HOST`` and its key; return their paths."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "benchmark")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "key.pem").write_bytes(key.private_bytes(pem, private, serialization.NoEncryption()))
    return str(folder / "cert.pem"), str(folder / "key.pem")


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def dropped_at(port: int) -> int:
    """Return how many datagrams the kernel has dropped because a receive buffer was full: proc(5), /proc/net/udp."""
    sockets = [line.split() for line in Path("/proc/net/udp").read_text().splitlines()[1:]]
    return sum(int(fields[-1]) for fields in sockets if fields[1].endswith(f":{port:04X}"))


async def echo(client: trio.abc.Channel[bytes]) -> None:
    with suppress(SSL.ZeroReturnError, trio.BrokenResourceError):  # this is how conversations end with trio
        async for payload in client:
            await client.send(payload)


async def serve_with_trio_udp(context: SSL.Context, *, task_status: trio.TaskStatus[int]) -> None:
    limits = trio_udp.Limits(max_clients=100_000)
    async with trio.open_nursery() as nursery:
        serve = partial(trio_udp.serve, secure(echo, context), 0, host=HOST, limits=limits)
        server: trio_udp.Server = await nursery.start(serve)
        task_status.started(server.endpoints[0].local_address[1])


async def serve_with_trio(context: SSL.Context, *, task_status: trio.TaskStatus[int]) -> None:
    with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as sock:
        await sock.bind((HOST, 0))
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.DTLSEndpoint(sock).serve, context, echo)
            task_status.started(sock.getsockname()[1])


SERVERS = {"trio_udp": serve_with_trio_udp, "trio": serve_with_trio}


def run_server(which: str, certificate: str, key: str, pipe: Pipe, core: int) -> None:
    """Serve an echo until the load is done. Answer each line from the pipe with the resources used so far."""
    os.sched_setaffinity(0, {core})

    async def main() -> None:
        context = SSL.Context(SSL.DTLS_METHOD)
        context.use_certificate_chain_file(certificate)
        context.use_privatekey_file(key)
        async with trio.open_nursery() as nursery:
            pipe.send(await nursery.start(SERVERS[which], context))
            while await trio.to_thread.run_sync(pipe.recv):
                pipe.send((time.process_time(), resident_bytes()))
            nursery.cancel_scope.cancel()

    trio.run(main)


class Load:
    """The clients, and the resources that the server has used."""

    def __init__(self, port: int, certificate: str, pipe: Pipe) -> None:
        self.port, self.pipe = port, pipe
        self.context = SSL.Context(SSL.DTLS_METHOD)
        self.context.load_verify_locations(certificate)

    def used(self) -> tuple[float, int]:
        """Return the server's CPU seconds and bytes of memory."""
        self.pipe.send(True)
        seconds, resident = self.pipe.recv()
        return seconds, resident

    async def connect(self) -> DTLSChannel:
        return await connect(HOST, self.port, self.context, receive_buffer=50_000)

    async def handshakes(self, count: int) -> float:
        before, places = self.used(), trio.Semaphore(20)

        async def one() -> None:
            async with places, await self.connect():
                pass

        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(one)
        return (self.used()[0] - before[0]) / count * 1e6

    async def echoes(self, count: int, *, clients: int = 16, in_flight: int = 4) -> float:
        channels = [await self.connect() for _ in range(clients)]
        before = self.used()

        async def talk(channel: DTLSChannel) -> None:
            await channel.send_many([bytes(64)] * in_flight)
            for _ in range(count // clients - in_flight):
                await channel.receive()
                await channel.send(bytes(64))
            for _ in range(in_flight):
                await channel.receive()

        async with trio.open_nursery() as nursery:
            for channel in channels:
                nursery.start_soon(talk, channel)
        used = self.used()
        for channel in channels:
            channel.close()
        return (used[0] - before[0]) / count * 1e6

    async def hello(self, count: int) -> float:
        connection = SSL.Connection(self.context)
        connection.set_ciphertext_mtu(1_232)
        connection.set_connect_state()
        try:
            connection.do_handshake()
        except SSL.WantReadError:
            hello = connection.bio_read(2_000)
        before, dropped = self.used(), dropped_at(self.port)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((HOST, 0))
            for _ in range(count // CHUNK):
                for _ in range(CHUNK):
                    sock.sendto(hello, (HOST, self.port))
                await trio.sleep(0.001)
            await trio.sleep(0.2)
            used = self.used()
        return (used[0] - before[0]) / (count - (dropped_at(self.port) - dropped)) * 1e6

    async def memory(self, count: int) -> float:
        before, channels = self.used(), []
        for _ in range(count):
            channels.append(await self.connect())
            await channels[-1].send(b"x")
            await channels[-1].receive()
        used = self.used()
        for channel in channels:
            channel.close()
        return (used[1] - before[1]) / count / 1_000


async def measure(load: Load, scale: float) -> dict[str, float]:
    for _ in range(20):  # warm up
        await (await load.connect()).aclose()
    return {
        # First, while the server has no freed memory that it could reuse.
        "KB for each idle client": await load.memory(int(1_000 * scale)),
        "µs for each handshake": await load.handshakes(int(1_000 * scale)),
        "µs for each echo": await load.echoes(int(30_000 * scale)),
        "µs for each forged ClientHello": await load.hello(int(30_000 * scale)),
    }


def main(which: str, scale: float) -> dict[str, float]:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})  # so that the load does not slow the server down
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        certificate, key = make_certificate(Path(folder))
        server = spawn.Process(target=run_server, args=(which, certificate, key, theirs, min(cores)), daemon=True)
        server.start()
        figures = trio.run(measure, Load(ours.recv(), certificate, ours), scale)
        ours.send(None)
        server.join()
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=float, default=1.0, help="of all counts")
    parser.add_argument("--server", choices=SERVERS, default="trio_udp")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = main(arguments.server, arguments.scale)
    if arguments.json:
        print(json.dumps(result))
    else:
        print(*(f"{figure:.1f} {what}" for what, figure in result.items()), sep="\n")
