"""Compare the HTTP/3 example with aioquic's own server: megabytes for each second of the server's CPU time.

    python benchmarks/http3.py [--megabytes 20] [--clients 4] [--rounds 5]

The servers are examples/http3_server.py and ``aioquic.asyncio.serve``, each a process of its own, with the same
certificate (ECDSA P-256), the same settings of QUIC, and Retry. The load is ngtcp2's ``gtlsclient`` (Debian's
ngtcp2-client): each client downloads or uploads once. Rounds are interleaved, so that other work on the machine affects
both servers alike. The output has the medians, and the median of the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import subprocess
import sys
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from statistics import median

import trio
from aioquic.asyncio import QuicConnectionProtocol, serve as serve_with_asyncio
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ProtocolNegotiated, QuicEvent

import trio_udp

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("benchmarks", "examples")]

import http3_server
from dtls import make_certificate

HOST = "127.0.0.1"


class Protocol(QuicConnectionProtocol):
    """HTTP/3 on aioquic's own network code. It answers like ``http3_server.application``."""

    http: H3Connection | None = None

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, ProtocolNegotiated):
            self.http = H3Connection(self._quic, enable_webtransport=True)
        for it in self.http.handle_event(event) if self.http else ():
            if isinstance(it, HeadersReceived) and (path := dict(it.headers)[b":path"]).startswith(b"/bytes/"):
                assert self.http is not None
                self.http.send_headers(it.stream_id, [(b":status", b"200")])
                self.http.send_data(it.stream_id, bytes(int(path[7:])), end_stream=True)
            elif isinstance(it, DataReceived) and it.stream_ended:
                assert self.http is not None
                self.http.send_headers(it.stream_id, [(b":status", b"200")], end_stream=True)


async def run_aioquic(certificate: str, key: str, pipe: Pipe) -> None:
    configuration = QuicConfiguration(alpn_protocols=H3_ALPN, is_client=False, max_datagram_frame_size=65_536)
    configuration.load_cert_chain(certificate, key)
    server = await serve_with_asyncio(HOST, 0, configuration=configuration, create_protocol=Protocol, retry=True)
    assert server._transport is not None
    pipe.send(server._transport.get_extra_info("sockname")[1])
    while await asyncio.to_thread(pipe.recv):
        pipe.send(time.process_time())
    server.close()


async def run_trio_udp(certificate: str, key: str, pipe: Pipe) -> None:
    serve_udp = partial(trio_udp.serve, port=0, host=HOST)
    async with trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(
            http3_server.serve_http3, http3_server.application, certificate, key, serve_udp
        )
        pipe.send(server.endpoints[0].local_address[1])
        while await trio.to_thread.run_sync(pipe.recv):
            pipe.send(time.process_time())
        nursery.cancel_scope.cancel()


def run_server(which: str, certificate: str, key: str, pipe: Pipe) -> None:
    if which == "aioquic":
        asyncio.run(run_aioquic(certificate, key, pipe))
    else:
        trio.run(run_trio_udp, certificate, key, pipe)


def load(port: int, clients: int, *arguments: str) -> None:
    command = ["gtlsclient", "--quiet", "--exit-on-all-streams-close", *arguments[1:], HOST, str(port), arguments[0]]
    running = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(clients)]
    assert [process.wait(120) for process in running] == [0] * clients


def main(megabytes: int, clients: int, rounds: int) -> None:
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        certificate, key = make_certificate(folder)
        (folder / "body").write_bytes(bytes(megabytes * 1_000_000))
        ways = {
            "down": [f"https://localhost/bytes/{megabytes}000000"],
            "up": ["https://localhost/length", "--http-method=POST", f"--data={folder / 'body'}"],
        }
        servers = {}
        for which in ("trio_udp", "aioquic"):
            near, far = spawn.Pipe()
            process = spawn.Process(target=run_server, args=(which, certificate, key, far), daemon=True)
            process.start()
            servers[which] = process, near, near.recv()
        rates: dict[tuple[str, str], list[float]] = {(way, which): [] for way in ways for which in servers}
        for number in range(rounds):
            for way, which in list(rates)[:: 1 if number % 2 else -1]:
                _, pipe, port = servers[which]
                pipe.send(True)
                before = pipe.recv()
                load(port, clients, *ways[way])
                pipe.send(True)
                rates[way, which].append(clients * megabytes / (pipe.recv() - before))
        for process, pipe, _ in servers.values():
            pipe.send(None)
            process.join()
    for way in ways:
        ours, theirs = rates[way, "trio_udp"], rates[way, "aioquic"]
        ratio = median(one / other for one, other in zip(ours, theirs, strict=True))
        rates_of_both = f"trio_udp {median(ours):.1f}, aioquic {median(theirs):.1f}, ratio {ratio:.2f}"
        print(f"{way:4} MB for each CPU second: {rates_of_both}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=20, help="for each client, in one request")
    parser.add_argument("--clients", type=int, default=4, help="at once")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    main(arguments.megabytes, arguments.clients, arguments.rounds)
