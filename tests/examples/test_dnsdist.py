"""dnsdist in front of a server: a real sender of the PROXY protocol, with a header in front of every query."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import dns.message
import dns.rcode
import dns.rrset
import pytest
import trio

import trio_udp
from trio_udp import Datagram, Limits, RateLimit, Server

from ..conftest import StartServer, check_adds_up, free_port, port_of
from ..project.conftest import EXAMPLES, Start, without_signals
from .conftest import program

ZONE_FILE = EXAMPLES / "example.zone"
PROXY_HOST = "127.0.0.9"  # the address from which dnsdist sends queries
LOOPBACK, LOOPBACK6 = "127.0.0.1", "::1"

CONFIGURATION = """
{listen}
setACL({{"127.0.0.0/8", "::1/128"}})
newServer{{address="{backend}", source="{source}", useProxyProtocol=true, checkName="example.com.",
           checkTimeout=5000}}
"""


@pytest.fixture
def dnsdist() -> str:
    return program("dnsdist", "dnsdist")


def speaks_https(dnsdist: str) -> bool:
    return "dns-over-https" in subprocess.run([dnsdist, "--version"], capture_output=True, text=True).stdout


@asynccontextmanager
async def running(dnsdist: str, backend: str, folder: Path, more: str = "") -> AsyncIterator[int]:
    """Run dnsdist in front of a server until the block ends; yield its port, for IPv4 and IPv6."""
    port = free_port()
    listen = f'setLocal("{LOOPBACK}:{port}")\naddLocal("[{LOOPBACK6}]:{port}")\n' + more
    configuration = folder / "dnsdist.conf"
    configuration.write_text(CONFIGURATION.format(listen=listen, backend=backend, source=PROXY_HOST))
    command = [dnsdist, "-C", str(configuration), "--supervised", "--disable-syslog"]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    try:
        said = b""
        with trio.fail_after(20):
            # By then it has sent the server a health check of its own.
            while b"as 'up'" not in said:
                said += (line := await process.stdout.receive_some())
                assert line, said
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain, process.stdout)
            yield port
            nursery.cancel_scope.cancel()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stdout.aclose()


async def drain(stream: trio.abc.ReceiveStream) -> None:
    async for _ in stream:
        pass


async def ask(name: str, rdtype: str, source: str, port: int) -> dns.message.Message:
    """Send a query to dnsdist from an address."""
    query = dns.message.make_query(name, rdtype)
    family = trio.socket.AF_INET6 if ":" in source else trio.socket.AF_INET
    with trio.socket.socket(family, trio.socket.SOCK_DGRAM) as sock:
        await sock.bind((source, 0))
        await sock.connect((LOOPBACK6 if ":" in source else LOOPBACK, port))
        await sock.send(query.to_wire())
        with trio.fail_after(5):
            reply = dns.message.from_wire(await sock.recv(4096))
    assert query.is_response(reply)
    return reply


@trio_udp.datagram_handler
def who_asks(datagram: Datagram) -> bytes:
    """Answer a query with its source and its destination."""
    query = dns.message.from_wire(datagram.payload)
    reply = dns.message.make_response(query)
    peer, local = datagram.peer_address, datagram.local_address
    text = f'"{peer[0]} {local[0]} {local[1]}"'
    reply.answer.append(dns.rrset.from_text(query.question[0].name, 1, "IN", "TXT", text))
    return reply.to_wire()


def told(reply: dns.message.Message) -> str:
    text: str = reply.answer[0][0].to_text()
    return text.strip('"')


async def test_every_client_has_its_own_address(dnsdist: str, start_on_loopback: StartServer, tmp_path: Path) -> None:
    """The server sees the addresses of a hundred IPv4 and IPv6 clients, and answers each with its own."""
    server: Server = await start_on_loopback(who_asks, proxies=[PROXY_HOST])
    answers: dict[str, str] = {}

    async def client(host: str, port: int) -> None:
        answers[host] = told(await ask("example.com", "TXT", host, port))

    hosts = [*(f"127.1.{i}.{i}" for i in range(1, 100)), LOOPBACK6]
    async with running(dnsdist, f"{LOOPBACK}:{port_of(server)}", tmp_path) as port:
        async with trio.open_nursery() as nursery:
            for host in hosts:
                nursery.start_soon(client, host, port)
    assert answers == {host: f"{host} {LOOPBACK6 if ':' in host else LOOPBACK} {port}" for host in hosts}
    s = server.statistics()
    assert (s.refused_malformed, s.delivered >= 101) == (0, True)  # dnsdist has sent one too
    check_adds_up(server)


async def test_rate_limit_counts_the_real_client(dnsdist: str, start_on_loopback: StartServer, tmp_path: Path) -> None:
    """A client behind dnsdist that exceeds the rate limit gets no answers, and its neighbour gets all of its own."""
    limit = RateLimit(0.01, burst=5, ipv4_prefix=32)
    server: Server = await start_on_loopback(who_asks, proxies=[PROXY_HOST], limits=Limits(rate_limit=limit))
    answered = dict.fromkeys(["127.1.0.1", "127.1.0.2"], 0)

    async def client(host: str, port: int) -> None:
        with trio.move_on_after(1):
            await ask("example.com", "TXT", host, port)
            answered[host] += 1

    async with running(dnsdist, f"{LOOPBACK}:{port_of(server)}", tmp_path) as port:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(client, "127.1.0.1", port)
            for _ in range(5):
                nursery.start_soon(client, "127.1.0.2", port)
    assert answered == {"127.1.0.1": 5, "127.1.0.2": 5}
    assert server.statistics().refused_by_rate == 15
    check_adds_up(server)


async def test_clients_over_https(dnsdist: str, start_on_loopback: StartServer, tmp_path: Path) -> None:
    """dnsdist forwards queries over HTTPS by UDP; their header names the client, and says "stream"."""
    curl = program("curl", "curl")
    if not speaks_https(dnsdist):
        pytest.skip("this dnsdist was built without DNS over HTTPS")
    server: Server = await start_on_loopback(who_asks, proxies=[PROXY_HOST])
    query = tmp_path / "query"
    query.write_bytes(dns.message.make_query("example.com", "TXT").to_wire())
    http = free_port()
    more = f'addDOHLocal("{LOOPBACK}:{http}", nil, nil, "/dns-query")'  # without TLS
    async with running(dnsdist, f"{LOOPBACK}:{port_of(server)}", tmp_path, more):
        command = [
            *(curl, "-s", "--max-time", "20", "--http2-prior-knowledge", "--interface", "127.1.0.1"),
            *("-H", "content-type: application/dns-message", "--data-binary", f"@{query}"),
            f"http://{LOOPBACK}:{http}/dns-query",
        ]
        done = await trio.run_process(command, capture_stdout=True)
    assert told(dns.message.from_wire(done.stdout)).startswith(f"127.1.0.1 {LOOPBACK} ")
    assert server.statistics().refused_malformed == 0


async def test_without_proxies_it_is_all_payload(start_on_loopback: StartServer, dnsdist: str, tmp_path: Path) -> None:
    """A server without ``proxies`` sees the header as part of the payload, and dnsdist as the client."""
    seen = []
    asked = trio.Event()

    @trio_udp.datagram_handler
    def handler(datagram: Datagram) -> None:
        seen.append((datagram.peer_address[0], datagram.payload[:12]))
        asked.set()

    server: Server = await start_on_loopback(handler, proxies=["127.0.0.10"])
    async with trio.open_nursery() as nursery:
        # It waits for an answer that never arrives.
        nursery.start_soon(run_until_cancelled, dnsdist, f"{LOOPBACK}:{port_of(server)}", tmp_path)
        with trio.fail_after(20):
            await asked.wait()
        nursery.cancel_scope.cancel()
    assert set(seen) == {(PROXY_HOST, b"\r\n\r\n\0\r\nQUIT\n")}


async def run_until_cancelled(dnsdist: str, backend: str, folder: Path) -> None:
    async with running(dnsdist, backend, folder):
        await trio.sleep_forever()


# The DNS example.


def start_example(start: Start) -> str:
    """Start the DNS example behind a proxy; return its address in dnsdist's form."""
    example = start("dns_server", "--port", "0", "--proxy", f"{PROXY_HOST}/32", str(ZONE_FILE), port=None)
    return f"{example.host}:{example.port}"


@without_signals
async def test_dns_example(start: Start, dnsdist: str, tmp_path: Path) -> None:
    """The DNS example, started with ``--proxy``, answers the clients of dnsdist."""
    async with running(dnsdist, start_example(start), tmp_path) as port:
        for host in ("127.1.0.1", LOOPBACK6):
            reply = await ask("web.example.com", "A", host, port)
            assert sorted(rdata.to_text() for rdata in reply.answer[0]) == ["192.0.2.10", "192.0.2.11"]
            reply = await ask("nothing.example.com", "A", host, port)
            assert reply.rcode() == dns.rcode.NXDOMAIN


@without_signals
async def test_dnsperf(start: Start, dnsdist: str, tmp_path: Path) -> None:
    """None of thousands of queries through dnsdist is lost."""
    dnsperf = program("dnsperf", "dnsperf")
    queries = tmp_path / "queries"
    queries.write_text("web.example.com A\nexample.com MX\nnothing.example.com A\nftp.example.com AAAA\n")
    async with running(dnsdist, start_example(start), tmp_path) as port:
        command: Sequence[str] = [
            *(dnsperf, "-s", LOOPBACK, "-p", str(port), "-d", str(queries)),
            *("-n", "500", "-q", "50", "-c", "20"),
        ]
        with trio.fail_after(60):
            done = await trio.run_process(command, capture_stdout=True, capture_stderr=True)
    output = done.stdout.decode()
    figures = {name: re.search(rf"{name}: +(\d+)", output) for name in ("Queries sent", "Queries lost")}
    assert {name: found and found[1] for name, found in figures.items()} == {
        "Queries sent": "2000",
        "Queries lost": "0",
    }


def test_bad_network() -> None:
    """A bad ``--proxy`` is a usage error."""
    command = [sys.executable, str(EXAMPLES / "dns_server.py"), "--proxy", "10.0.0.1/8", "zone"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "argument --proxy: invalid ip_network value: '10.0.0.1/8'" in done.stderr) == (2, True)
