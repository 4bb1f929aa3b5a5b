"""The DNS forwarder: dig and dnsperf in front of the zone server; its cache, in virtual time."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import attrs
import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
import trio
from hypothesis import given, settings, strategies as st
from trio.testing import MockClock

import trio_udp
from trio_udp.testing import SimulatedNetwork

from ..conftest import SERVER, check_adds_up
from ..project.conftest import EXAMPLES, Start, without_signals
from .conftest import load, program

dns_forwarder = load("dns_forwarder")

UPSTREAM = ("192.0.2.80", 53)
SOA = ("example.com.", 900, "IN", "SOA", "ns.example.com. hostmaster.example.com. 1 2 3 4 300")


@attrs.define
class Upstream:
    """A server that knows one name, and records its questions."""

    ttl: int = 60
    delay: float = 0
    silent: bool = False
    asked: list[trio_udp.Datagram] = attrs.field(factory=list)

    async def run(self, endpoint: trio_udp.Endpoint) -> None:
        async with trio.open_nursery() as nursery:
            async for datagram in endpoint:
                self.asked.append(datagram)
                if not self.silent:
                    nursery.start_soon(self.answer, datagram)

    async def answer(self, datagram: trio_udp.Datagram) -> None:
        await trio.sleep(self.delay)
        query = dns.message.from_wire(datagram.payload)
        reply = dns.message.make_response(query)
        name = query.question[0].name
        if name == dns.name.from_text("www.example.com"):
            reply.answer.append(dns.rrset.from_text(name, self.ttl, "IN", "A", "192.0.2.1"))
        else:
            reply.set_rcode(dns.rcode.NXDOMAIN)
            reply.authority.append(dns.rrset.from_text(*SOA))
        await datagram.reply(reply.to_wire())

    def names(self) -> list[str]:
        return [dns.message.from_wire(datagram.payload).question[0].name.to_text() for datagram in self.asked]


@attrs.define
class Setting:
    network: SimulatedNetwork
    upstream: Upstream
    server: trio_udp.Server

    async def ask(self, name: str = "www.example.com") -> dns.message.Message:
        query = dns.message.make_query(name, "A")
        async with await self.network.connect(*SERVER) as connection:
            await connection.send(query.to_wire())
            with trio.fail_after(10):
                reply = dns.message.from_wire(await connection.receive())
        assert query.is_response(reply)
        return reply


Forward = Callable[[], Awaitable[Setting]]


@pytest.fixture
def forward(simulated_network: SimulatedNetwork, nursery: trio.Nursery) -> Forward:
    """Start a forwarder, and the server behind it, on the simulated network."""

    async def forward() -> Setting:
        upstream = Upstream()
        nursery.start_soon(upstream.run, simulated_network.endpoint(*UPSTREAM))
        forwarder = dns_forwarder.Forwarder(partial(simulated_network.connect, *UPSTREAM), nursery)
        handler = trio_udp.request_handler(concurrency=100)(forwarder.handler)
        serve = partial(trio_udp.serve_endpoints, handler, [simulated_network.endpoint(*SERVER)])
        server = await nursery.start(partial(serve, on_error=trio_udp.raise_error))
        return Setting(simulated_network, upstream, server)

    return forward


async def test_answers_are_remembered(forward: Forward, autojump_clock: MockClock) -> None:
    """A second client gets the cached answer with the rest of its TTL; then the other server is asked again."""
    setting = await forward()
    first = await setting.ask()
    await trio.sleep(45)
    second = await setting.ask("WWW.example.com")
    assert [answer.answer[0].ttl for answer in (first, second)] == [60, 15]
    assert second.answer[0].name.to_text() == "WWW.example.com."
    assert bool(second.flags & dns.flags.RA)
    assert len(setting.upstream.asked) == 1
    await trio.sleep(15)
    assert (await setting.ask()).answer[0].ttl == 60
    assert len(setting.upstream.asked) == 2
    check_adds_up(setting.server)


async def test_absence_is_remembered(forward: Forward, autojump_clock: MockClock) -> None:
    """The absence of a name is kept for the minimum of the SOA record."""
    setting = await forward()
    for pause, ttl, asked in ((0, 300, 1), (299, 1, 1), (1, 300, 2)):
        await trio.sleep(pause)
        reply = await setting.ask("none.example.com")
        assert (reply.rcode(), reply.authority[0].ttl) == (dns.rcode.NXDOMAIN, ttl)
        assert len(setting.upstream.asked) == asked


async def test_equal_questions_are_asked_once(forward: Forward, autojump_clock: MockClock) -> None:
    """A hundred clients with the same question at the same time share one answer, even if it cannot be cached."""
    setting = await forward()
    setting.upstream.delay, setting.upstream.ttl = 0.2, 0
    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(setting.ask)
    assert len(setting.upstream.asked) == 1
    await setting.ask()
    assert len(setting.upstream.asked) == 2


async def test_the_first_client_may_go(forward: Forward, autojump_clock: MockClock) -> None:
    """All waiting clients get an answer, even if the client that asked first is gone."""
    setting = await forward()
    setting.upstream.delay = 0.3
    async with await setting.network.connect(*SERVER) as hasty:
        await hasty.send(dns.message.make_query("www.example.com", "A").to_wire())
        await trio.sleep(0.1)
    for client in setting.server.clients:
        client.close()
    assert (await setting.ask()).answer
    assert len(setting.upstream.asked) == 1


async def test_dead_and_back(forward: Forward, autojump_clock: MockClock) -> None:
    """While the other server is silent, clients get SERVFAIL, and for one second it is not asked again."""
    setting = await forward()
    setting.upstream.silent = True
    for _ in range(2):
        assert (await setting.ask()).rcode() == dns.rcode.SERVFAIL
    assert len(setting.upstream.asked) == len(dns_forwarder.WAITS)
    setting.upstream.silent = False
    await trio.sleep(1)
    assert (await setting.ask()).answer
    with setting.network.partition([UPSTREAM]):
        assert (await setting.ask()).answer  # from the cache
        assert (await setting.ask("none.example.com")).rcode() == dns.rcode.SERVFAIL


async def test_questions_are_hard_to_guess(forward: Forward, autojump_clock: MockClock) -> None:
    """Each question has its own port, ID and case; any other payload is not taken for its answer."""
    setting = await forward()
    setting.upstream.silent = True
    names = [f"name{number}.example.com" for number in range(30)]
    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(setting.ask, name)
        await trio.sleep(0.1)
        asked = list(setting.upstream.asked)
        written = setting.upstream.names()
        for datagram in asked:
            query = dns.message.from_wire(datagram.payload)
            right = query.question[0].name
            for wrong_id, wrong in ((query.id ^ 1, right), (query.id, dns.name.from_text(right.to_text().swapcase()))):
                forged = dns.message.make_query(wrong, "A", id=wrong_id)
                forged.flags |= dns.flags.QR
                forged.answer.append(dns.rrset.from_text(wrong, 60, "IN", "A", "203.0.113.66"))
                setting.network.inject(forged.to_wire(), UPSTREAM, datagram.peer_address)
        await trio.sleep(0.1)
        for datagram in asked:
            await setting.upstream.answer(datagram)
    assert sorted(label.lower() for label in written) == sorted(f"{name}." for name in names)
    assert len(set(written) & {f"{name}." for name in names}) < 3
    assert len({datagram.peer_address for datagram in asked}) == len(names)
    assert len({datagram.payload[:2] for datagram in asked}) > 25
    assert len(setting.upstream.asked) == len(names)  # no client got a wrong answer, and no question was repeated


async def test_odd_queries(forward: Forward, autojump_clock: MockClock) -> None:
    """Queries that a forwarder cannot answer get an error; responses, and junk without a header, get no reply."""
    setting = await forward()
    query = bytearray(dns.message.make_query("www.example.com", "A").to_wire())
    notify, answer = query.copy(), query.copy()
    notify[2] |= 0x20
    answer[2] |= 0x80
    transfer = dns.message.make_query("example.com", "AXFR").to_wire()
    cases = {bytes(notify): 4, transfer: 5, bytes(query[:12]): 1, bytes(query[:4]) + bytes(8): 1}
    async with await setting.network.connect(*SERVER) as connection:
        for payload in (b"", b"x" * 11, bytes(answer)):
            await connection.send(payload)
        for payload, rcode in cases.items():
            await connection.send(payload)
            assert (await connection.receive())[3] & 15 == rcode
    assert setting.upstream.asked == []


def start_both(start: Start) -> tuple[int, int]:
    """Start the zone server and a forwarder; return their ports."""
    zone = start("dns_server", "--port", "0", str(EXAMPLES / "example.zone"), port=None)
    forwarder = start("dns_forwarder", "--port", "0", "--to", "127.0.0.1", str(zone.port), port=None)
    return zone.port, forwarder.port


@without_signals
def test_dig(start: Start) -> None:
    """Through the forwarder, dig gets the zone server's answers, twice."""
    ports = start_both(start)
    questions = [
        "www.example.com A",
        "example.com MX",
        "nothing.example.com A",
        "example.com TXT",
        "web.example.com AAAA",
    ]
    answers = []
    for port in (*ports, ports[1]):
        for question in questions:
            command = [program("dig", "bind9-dnsutils"), "-r", "@127.0.0.1", "-p", str(port), *question.split()]
            done = subprocess.run(
                [*command, "+noall", "+answer", "+comments"], capture_output=True, text=True, timeout=20
            )
            status = re.search(r"status: (\w+)", done.stdout)
            assert status
            records = sorted(line.split(None, 2)[2] for line in done.stdout.splitlines() if line and line[0] != ";")
            answers.append((question, status[1], records))
    assert answers[:5] == answers[5:10] == answers[10:]
    assert {status for _, status, _ in answers} == {"NOERROR", "NXDOMAIN"}


@without_signals
def test_dnsperf(start: Start, tmp_path: Path) -> None:
    """dnsperf from 200 ports loses no query."""
    _, port = start_both(start)
    queries = tmp_path / "queries"
    names = ["web.example.com A", "example.com MX", *(f"nothing{number}.example.com A" for number in range(200))]
    queries.write_text("".join(f"{name}\n" for name in names))
    command = [program("dnsperf", "dnsperf"), "-s", "127.0.0.1", "-p", str(port), "-d", str(queries)]
    done = subprocess.run([*command, "-c", "200", "-q", "200", "-n", "15"], capture_output=True, text=True, timeout=60)
    figures = {name: re.search(rf"{name}: +(\d+)", done.stdout) for name in ("Queries sent", "Queries lost")}
    assert {name: found and found[1] for name, found in figures.items()} == {
        "Queries sent": "3030",
        "Queries lost": "0",
    }


@settings(max_examples=300, deadline=None, database=None)
@given(
    st.binary(max_size=60),
    st.sampled_from(
        [b"", b"\x12\x34\x01\x00\0\1\0\0\0\0\0\0", b"\x12\x34\x01\x00\0\1\0\0\0\0\0\1\3www\7example\3com\0"]
    ),
)
def test_garbage(body: bytes, header: bytes) -> None:
    """Any bytes get a reply that parses, or none."""

    async def no_connection() -> trio_udp.Connection:
        raise OSError

    async def main() -> bytes | None:
        async with trio.open_nursery() as nursery:
            reply: bytes | None = await dns_forwarder.Forwarder(no_connection, nursery).handler(header + body, None)
            return reply

    reply = trio.run(main)
    assert reply is None or dns.message.from_wire(reply).flags & dns.flags.QR
