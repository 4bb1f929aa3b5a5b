"""What HTTP/3 costs the server: megabytes for each second of its CPU time, down and up, beside aioquic's own server.

    python benchmarks/http3.py [--megabytes 20] [--rounds 5]

The servers are examples/http3_server.py and ``aioquic.asyncio.serve``, each a process of its own, with the same
certificate (ECDSA P-256) and the same configuration of QUIC. The load is aioquic's client in this process. Rounds are
interleaved, so that what else the machine does meets both; the figures are of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import trio
from aioquic.asyncio import QuicConnectionProtocol, connect, serve as serve_with_aioquic
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, H3Event, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ProtocolNegotiated, QuicEvent

import trio_udp

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("benchmarks", "examples")]

import http3_server
from dtls import make_certificate

HOST = "127.0.0.1"
CHUNK = 65_536


def configuration_of_server(certificate: str, key: str) -> QuicConfiguration:
    configuration = QuicConfiguration(alpn_protocols=H3_ALPN, is_client=False, max_datagram_frame_size=65_536)
    configuration.load_cert_chain(certificate, key)
    return configuration


class Protocol(QuicConnectionProtocol):
    """HTTP/3 on aioquic's own network code."""

    http: H3Connection

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, ProtocolNegotiated):
            self.http = H3Connection(self._quic, enable_webtransport=True)
        for http_event in self.http.handle_event(event) if hasattr(self, "http") else ():
            self.http_event_received(http_event)

    def http_event_received(self, event: H3Event) -> None:
        raise NotImplementedError


class Answers(Protocol):
    """What ``http3_server.application`` does that is measured."""

    def http_event_received(self, event: H3Event) -> None:
        if isinstance(event, HeadersReceived):
            path = dict(event.headers)[b":path"].decode()
            if path.startswith("/bytes/"):
                self.http.send_headers(event.stream_id, [(b":status", b"200")])
                self.http.send_data(event.stream_id, bytes(int(path.removeprefix("/bytes/"))), end_stream=True)
        elif isinstance(event, DataReceived) and event.stream_ended:
            self.http.send_headers(event.stream_id, [(b":status", b"200")], end_stream=True)


async def run_aioquic(certificate: str, key: str, pipe: Pipe) -> None:
    configuration = configuration_of_server(certificate, key)
    server = await serve_with_aioquic(HOST, 0, configuration=configuration, create_protocol=Answers, retry=True)
    assert server._transport is not None
    pipe.send(server._transport.get_extra_info("sockname")[1])
    while await asyncio.to_thread(pipe.recv):
        pipe.send(time.process_time())
    server.close()


async def run_trio_udp(certificate: str, key: str, pipe: Pipe) -> None:
    async with trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(
            http3_server.serve_http3,
            http3_server.application,
            certificate,
            key,
            partial(trio_udp.serve, port=0, host=HOST),
        )
        pipe.send(server.endpoints[0].local_address[1])
        while await trio.to_thread.run_sync(pipe.recv):
            pipe.send(time.process_time())
        nursery.cancel_scope.cancel()


SERVERS: dict[str, Callable[..., Any]] = {
    "trio_udp": lambda *arguments: trio.run(run_trio_udp, *arguments),
    "aioquic": lambda *arguments: asyncio.run(run_aioquic(*arguments)),
}


def run_server(which: str, certificate: str, key: str, pipe: Pipe) -> None:
    SERVERS[which](certificate, key, pipe)


class Load(Protocol):
    """A client that sends one request, and is done at the end of the answer."""

    received = 0

    def http_event_received(self, event: H3Event) -> None:
        if isinstance(event, DataReceived):
            self.received += len(event.data)
        if isinstance(event, (DataReceived, HeadersReceived)) and event.stream_ended:
            self.done.set()

    async def ask(self, method: bytes, path: str, body: bytes) -> int:
        self.done = asyncio.Event()
        headers = [(b":method", method), (b":scheme", b"https"), (b":authority", HOST.encode())]
        stream = self._quic.get_next_available_stream_id()
        self.http.send_headers(stream, [*headers, (b":path", path.encode())], end_stream=not body)
        if body:
            self.http.send_data(stream, body, end_stream=True)
        self.transmit()
        await asyncio.wait_for(self.done.wait(), 120)
        return self.received


async def load(port: int, certificate: str, size: int, *, upload: bool) -> None:
    configuration = QuicConfiguration(
        alpn_protocols=H3_ALPN, max_data=8_000_000, max_stream_data=8_000_000, max_datagram_frame_size=65_536
    )
    configuration.load_verify_locations(certificate)
    async with connect(HOST, port, configuration=configuration, create_protocol=Load) as client:
        assert isinstance(client, Load)
        if upload:
            await client.ask(b"POST", "/length", bytes(size))
        else:
            assert await client.ask(b"GET", f"/bytes/{size}", b"") == size


def main(megabytes: int, rounds: int) -> None:
    spawn = multiprocessing.get_context("spawn")
    seconds: dict[tuple[str, bool], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        certificate, key = make_certificate(Path(folder))
        running = {}
        for which in SERVERS:
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=run_server, args=(which, certificate, key, theirs), daemon=True)
            process.start()
            running[which] = process, ours, ours.recv()
        for _ in range(rounds):
            for which, (_, pipe, port) in running.items():
                for upload in (False, True):
                    pipe.send(True)
                    before = pipe.recv()
                    asyncio.run(load(port, certificate, megabytes * 1_000_000, upload=upload))
                    pipe.send(True)
                    seconds.setdefault((which, upload), []).append(pipe.recv() - before)
        for process, pipe, _ in running.values():
            pipe.send(None)
            process.join()
    for (which, upload), measured in sorted(seconds.items()):
        direction = "up" if upload else "down"
        print(f"{which:8} {direction:4} {megabytes / statistics.median(measured):6.1f} MB for each CPU second")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=20, help="in each request")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    main(arguments.megabytes, arguments.rounds)
