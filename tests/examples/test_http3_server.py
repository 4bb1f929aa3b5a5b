"""The HTTP/3 server: Chromium, ngtcp2 and niquests on loopback; aioquic's client on a network that loses packets."""

from __future__ import annotations

import base64
import hashlib
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

pytest.importorskip("aioquic", minversion="1.7")
from aioquic.buffer import Buffer, encode_uint_var
from aioquic.h3.connection import FrameType
from aioquic.quic.packet import QuicPacketType, pull_quic_header
from aioquic.quic.rangeset import RangeSet
from trio.testing import MockClock, wait_all_tasks_blocked

import trio_udp
from trio_udp.testing import SimulatedNetwork

from ..conftest import SERVER, check_adds_up
from ..project.conftest import EXAMPLES, TIMEOUT, Start, without_signals
from .conftest import load, program
from .http3_client import Certificate, HTTP3Client, certificate as certificate

http3_server = load("http3_server")

STRANGER = ("203.0.113.66", 666)


@attrs.define
class Setting:
    """A server on the simulated network."""

    network: SimulatedNetwork
    certificate: Certificate
    nursery: trio.Nursery
    server: trio_udp.Server
    ended: trio.Event

    async def connect(self, sharing: HTTP3Client | None = None) -> HTTP3Client:
        client = HTTP3Client(self.network, SERVER, self.certificate, self.nursery)
        await client.connect(sharing)
        return client

    async def answers(self, packet: bytes, source: tuple[str, int] = STRANGER) -> list[bytes]:
        """Let a packet arrive, and return the payloads sent immediately to its source."""
        before = len(self.network.events)
        self.network.inject(packet, source, SERVER)
        await wait_all_tasks_blocked()
        return self.sent_to(source, since=before)

    def sent_to(self, address: trio_udp.Address, since: int = 0) -> list[bytes]:
        events = self.network.events[since:]
        return [event.payload for event in events if (event.fate, event.destination) == ("sent", address)]

    def sent_by(self, client: HTTP3Client) -> list[bytes]:
        source = client.connection.local_address
        return [event.payload for event in self.network.events if (event.fate, event.source) == ("sent", source)]


Serve = Callable[..., Awaitable[Setting]]


@pytest.fixture
async def serve(
    simulated_network: SimulatedNetwork, certificate: Certificate, nursery: trio.Nursery
) -> AsyncIterator[Serve]:
    """Serve an application on the simulated network. At the end, stop it and check that every datagram is counted."""
    settings = []

    async def serve(application: Any = http3_server.application, **options: Any) -> Setting:
        ended = trio.Event()
        endpoint = simulated_network.endpoint(*SERVER)
        options = {"endpoints": [endpoint], "on_error": trio_udp.raise_error, **options}
        serve_udp = partial(trio_udp.serve_endpoints, **options)
        paths = str(certificate.certificate), str(certificate.key)

        async def run(*, task_status: trio.TaskStatus[trio_udp.Server]) -> None:
            await http3_server.serve_http3(application, *paths, serve_udp, task_status=task_status)
            ended.set()

        server: trio_udp.Server = await nursery.start(run)
        settings.append(Setting(simulated_network, certificate, nursery, server, ended))
        return settings[-1]

    yield serve
    for setting in settings:
        setting.server.stop()
        await setting.ended.wait()
        check_adds_up(setting.server)
        assert setting.server.statistics().handlers_cancelled == 0


async def test_loss_of_a_fifth_of_all_packets(serve: Serve, autojump_clock: MockClock) -> None:
    """Simultaneous downloads and an upload arrive complete although a fifth of all packets is lost."""
    setting = await serve()
    setting.network.loss, setting.network.latency = 0.2, (0.02, 0.05)
    client = await setting.connect()
    sizes = [0, 1, 3_000, 20_000, 60_000]
    streams = [client.begin("GET", f"/bytes/{size}") for size in sizes]
    upload = client.begin("POST", "/length", end=False)
    client.send(upload, bytes(60_000))
    for stream, size in zip(streams, sizes, strict=True):
        answer = await client.answer(stream)
        assert (answer.status, answer.body) == (200, bytes(size))
    assert (await client.answer(upload)).body == b"60000\n"


async def test_streams_are_forgotten(serve: Serve, autojump_clock: MockClock) -> None:
    """The server keeps nothing about a request after its end, even if the client cancels it."""
    seen: list[Any] = []

    async def application(stream: Any) -> None:
        seen.append(stream)
        await http3_server.application(stream)

    setting = await serve(application)
    setting.network.latency = (0.02, 0.02)
    client = await setting.connect()
    download = client.begin("GET", "/bytes/9000000000")
    await client.until(lambda: len(client.answers[download].body) > 100_000)
    client.quic.stop_stream(download, 0x10C)
    client.flush()
    assert (await client.answer(download)).reset == 0x10C
    upload = client.begin("POST", "/length", end=False)
    client.send(upload, bytes(10_000), end=False)
    await trio.sleep(0.1)
    client.quic.reset_stream(upload, 0x10C)
    client.flush()
    assert (await client.answer(upload)).reset == 0x10C
    assert (await client.get("/number/5")).body == b"5"
    await trio.sleep(1)
    assert len(seen) == 3
    assert seen[0].connection.streams == {}


async def test_webtransport(serve: Serve, autojump_clock: MockClock) -> None:
    """A session's datagrams and streams are echoed until the client ends them; other paths have no sessions."""
    setting = await serve()
    setting.network.latency = (0.02, 0.02)
    client = await setting.connect()
    assert (await client.answer(client.begin("CONNECT", "/other", (b":protocol", b"webtransport")))).status == 404
    session = await client.open_session("/echo")
    assert client.answers[session].status == 200
    for number in range(100):
        client.h3.send_datagram(session, b"%d" % number)
    stream = client.h3.create_webtransport_stream(session)
    client.raw.add(stream)
    client.quic.send_stream_data(stream, bytes(10_000), end_stream=True)
    client.flush()
    assert (await client.answer(stream)).body == bytes(10_000)
    await client.until(lambda: len(client.datagrams[session]) == 100)
    assert client.datagrams[session] == [b"%d" % number for number in range(100)]
    client.send(session, b"")
    assert (await client.answer(session)).ended


async def test_an_application_that_fails(
    serve: Serve, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """An error in the application is logged and resets its stream; other streams continue."""

    async def application(stream: Any) -> None:
        if stream.path == "/fail":
            raise RuntimeError("boom")
        await http3_server.application(stream)

    setting = await serve(application)
    client = await setting.connect()
    failed, other = client.begin("GET", "/fail"), client.begin("GET", "/number/7")
    assert (await client.answer(failed)).reset == 0x10C
    assert (await client.answer(other)).body == b"7"
    assert [record.getMessage() for record in caplog.records] == ["the application failed on '/fail'"]


async def test_a_request_that_is_given_up_as_it_is_sent(
    serve: Serve, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is logged, also if the packet says so before it has the request."""
    setting = await serve()
    client = await setting.connect()
    for _ in range(10):
        stream = client.begin("GET", "/number/1")
        client.quic.stop_stream(stream, 0x10C)
        assert (await client.answer(stream)).reset == 0x10C
    assert (await client.get("/number/7")).body == b"7"
    assert caplog.records == []


async def test_the_application_waits_for_the_client(
    serve: Serve, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nothing reaches the client, the server keeps only a bounded part of a long answer in memory."""
    monkeypatch.setattr("quic_connections.MAX_UNACKNOWLEDGED", 100_000)
    streams = []

    async def application(stream: Any) -> None:
        streams.append(stream)
        await http3_server.application(stream)

    setting = await serve(application)
    client = await setting.connect()
    download = client.begin("GET", "/bytes/500000")
    await client.until(lambda: client.answers[download].body)
    with setting.network.partition([client.connection.local_address]):
        await trio.sleep(10)
        assert 100_000 < streams[0].connection.unacknowledged() < 200_000
    assert (await client.answer(download)).body == bytes(500_000)


async def test_stopping_in_the_middle_of_a_download(serve: Serve, autojump_clock: MockClock) -> None:
    """A stopping server sends a GOAWAY, finishes the download that has begun, and closes the connection."""
    setting = await serve()
    setting.network.latency = (0.02, 0.02)
    client, idle = await setting.connect(), await setting.connect()
    download = client.begin("GET", "/bytes/500000")
    session = await client.open_session("/echo")
    await client.until(lambda: len(client.answers[download].body) > 100_000)
    setting.server.stop()
    await client.until(lambda: client.control.endswith(b"\x07\x01\x08"))
    assert len(client.answers[download].body) < 500_000
    refused = client.begin("GET", "/number/1")
    assert (await client.answer(refused)).reset == 0x10B
    assert (await client.answer(session)).ended
    assert (await client.answer(download)).body == bytes(500_000)
    await setting.ended.wait()
    await client.until(lambda: client.end is not None)
    await idle.until(lambda: idle.end is not None)
    assert {(each.end.error_code, each.end.frame_type) for each in (client, idle) if each.end} == {(0x100, None)}
    assert idle.control.endswith(b"\x07\x01\x00")


async def test_stopping_without_an_answer(serve: Serve, autojump_clock: MockClock) -> None:
    """A client that has disappeared delays the stop only briefly, and strangers are refused immediately."""
    setting = await serve()
    client = await setting.connect()
    client.begin("GET", "/bytes/5000000")
    await client.until(lambda: client.answers[0].body)
    with setting.network.partition([client.connection.local_address]):
        setting.server.stop()
        before = trio.current_time()
        late = await setting.connect()
        assert late.end is not None
        assert (late.end.error_code, trio.current_time() - before < 1) == (2, True)
        await setting.ended.wait()
    assert trio.current_time() - before < 12


async def test_strangers_are_answered_without_keeping_anything(serve: Serve, autojump_clock: MockClock) -> None:
    """An Initial packet gets a Retry, one with an unknown version gets the known versions, others get no answer."""
    setting = await serve()
    first = setting.sent_by(await setting.connect())[0]
    header = pull_quic_header(Buffer(data=first))
    (answer,) = await setting.answers(first)
    retry = pull_quic_header(Buffer(data=answer))
    assert (retry.packet_type, retry.destination_cid) == (QuicPacketType.RETRY, header.source_cid)

    (answer,) = await setting.answers(first[:1] + b"\x1a\x2a\x3a\x4a" + first[5:])
    versions = pull_quic_header(Buffer(data=answer))
    assert (versions.packet_type, versions.supported_versions) == (
        QuicPacketType.VERSION_NEGOTIATION,
        [1, 0x6B3343CF],
    )
    assert (versions.destination_cid, versions.source_cid) == (header.source_cid, header.destination_cid)

    before = setting.server.statistics()
    junk = [b"", b"\xc0", first[:1_199], answer.ljust(1_200, b"\0"), b"\x40" * 1_200, b"\xc0\0\0\0\x01\xff" * 250]
    for packet in junk:
        assert await setting.answers(packet) == []
    after = setting.server.statistics()
    assert after.refused_by_accept - before.refused_by_accept == len(junk)
    assert (after.clients, before.answered_by_accept, after.answered_by_accept) == (1, 3, 3)


async def test_a_token_is_valid_for_one_address_and_a_short_time(serve: Serve, autojump_clock: MockClock) -> None:
    """A packet with the token of another address, or an expired one, gets a short refusal and makes no client."""
    setting = await serve()
    client = await setting.connect()
    packet = setting.sent_by(client)[1]
    source = client.connection.local_address
    client.quic.close()
    client.flush()
    await client.until(lambda: client.end is not None)
    await trio.sleep(40)
    for address in (STRANGER, source):
        (answer,) = await setting.answers(packet, address)  # type: ignore[arg-type]
        assert pull_quic_header(Buffer(data=answer)).packet_type == QuicPacketType.INITIAL
        assert len(answer) < 100
    assert setting.server.statistics().clients == 0


async def test_packets_replayed_from_thousands_of_addresses(serve: Serve, autojump_clock: MockClock) -> None:
    """Replayed packets add at most three clients at a time, and three a second; the connection continues."""
    setting = await serve()
    setting.network.latency = (0.02, 0.02)
    client = await setting.connect()
    download = client.begin("GET", "/bytes/100000")
    await client.until(lambda: client.answers[download].body)
    packets = setting.sent_by(client)
    most = 0
    for number in range(2_000):
        source = ("203.0.113.66", 1_024 + number)
        setting.network.inject(random.choice((packets[1], packets[-1])), source, SERVER)
        if number % 50 == 0:
            await trio.sleep(0.05)
            most = max(most, setting.server.statistics().clients)
    assert most == 4
    assert setting.server.statistics().clients_started <= 1 + 3 * 3
    assert (await client.answer(download)).body == bytes(100_000)
    await client.change_address()
    await trio.sleep(2)
    assert (await client.get("/number/5")).body == b"5"


async def test_an_address_that_keeps_changing(serve: Serve, autojump_clock: MockClock) -> None:
    """A client behind a NAT that changes its port every 0.3 seconds receives the complete answer."""
    setting = await serve()
    setting.network.latency = (0.02, 0.02)
    client = await setting.connect()
    setting.network.bandwidth = 200_000
    download = client.begin("GET", "/bytes/400000")
    changes = 0
    while not client.answers[download].ended:
        await trio.sleep(0.3)
        await client.change_address()
        client.quic.send_ping(changes)
        client.flush()
        changes += 1
        assert setting.server.statistics().clients <= 5
    assert client.answers[download].body == bytes(400_000)
    assert changes > 5


async def test_connections_that_share_an_address(serve: Serve, autojump_clock: MockClock) -> None:
    """One address may have eight connections; when one ends, the others continue."""
    setting = await serve()
    clients = [await setting.connect()]
    clients += [await setting.connect(clients[0]) for _ in range(8)]
    assert [client.end.error_code for client in clients if client.end] == [2]
    assert setting.server.statistics().clients == 1
    clients[0].quic.close()
    clients[0].flush()
    await trio.sleep(5)
    for client in clients[1:8]:
        assert (await client.get("/number/5")).body == b"5"


async def test_a_forged_address_is_not_flooded(serve: Serve, autojump_clock: MockClock) -> None:
    """Until a new address has answered a challenge, it is sent at most three times the bytes that came from it."""
    setting = await serve()
    setting.network.latency = (0.02, 0.02)
    client = await setting.connect()
    download = client.begin("GET", "/bytes/400000")
    await client.until(lambda: len(client.answers[download].body) > 100_000)
    # A packet of the client arrives from the forged address, and never from the client's own.
    with setting.network.partition([client.connection.local_address]):
        client.quic.send_ping(1)
        before = len(setting.network.events)
        client.flush()
        await wait_all_tasks_blocked()
        cut_off = [event.payload for event in setting.network.events[before:] if event.destination == SERVER]
    (packet,) = set(cut_off)
    setting.network.inject(packet, STRANGER, SERVER)
    await trio.sleep(3)
    assert 0 < sum(map(len, setting.sent_to(STRANGER))) <= 3 * len(packet)
    assert (await client.answer(download)).body == bytes(400_000)


async def test_malformed_packets(serve: Serve, autojump_clock: MockClock) -> None:
    """Damaged packets, from strangers or within a connection, have no effect on connections."""
    setting = await serve()
    client = await setting.connect()
    assert (await client.get("/bytes/5000")).body == bytes(5_000)
    packets, rng = setting.sent_by(client), random.Random(7)
    for number in range(3_000):
        packet = bytearray(rng.choice(packets))
        for _ in range(rng.randint(1, 6)):
            packet[rng.randrange(len(packet))] = rng.randrange(256)
        source = rng.choice([STRANGER, client.connection.local_address])
        setting.network.inject(bytes(packet[: rng.choice([rng.randrange(1_300), 1_300])]), source, SERVER)
        if number % 50 == 0:
            await wait_all_tasks_blocked()
    await wait_all_tasks_blocked()
    assert (await client.get("/number/5")).body == b"5"
    assert setting.server.statistics().handler_errors == 0


async def test_one_player_for_each_connection(serve: Serve, autojump_clock: MockClock) -> None:
    """The game refuses a second session of a connection, or a stranger could fill all rooms from one address."""
    game_web = load("game_web")
    game = game_web.Game()
    setting = await serve(partial(game_web.application, game, game_web.Sessions()))
    client = await setting.connect()
    first, second = [await client.open_session("/game") for _ in range(2)]
    assert [client.answers[session].status for session in (first, second)] == [200, 404]
    client.h3.send_datagram(first, game_web.game_server.HELLO)
    client.flush()
    await client.until(lambda: client.datagrams[first])
    assert client.datagrams[first][0][:1] == game_web.game_server.CHALLENGE


def send_at(client: HTTP3Client, stream: int, offset: int, piece: bytes) -> None:
    """Send a piece of a stream at any offset, in a packet of its own."""
    sender = client.quic._streams[stream].sender
    sender._buffer_start = sender._buffer_stop = sender.highest_offset = offset
    sender._buffer, sender._pending, sender._acked = bytearray(), RangeSet(), RangeSet()
    client.quic._remote_max_data_used = 0
    client.quic.send_stream_data(stream, piece)
    client.flush()


async def test_gaps_in_a_stream(serve: Serve, autojump_clock: MockClock) -> None:
    """A client that skips ever more bytes, or has ever more gaps, loses its connection before it costs much."""
    receivers = []

    async def application(stream: Any) -> None:
        receivers.append(stream.connection.quic._streams[stream.number].receiver)
        await http3_server.application(stream)

    setting = await serve(application)
    skipping, gapped = await setting.connect(), await setting.connect()
    for client in (skipping, gapped):
        client.begin("POST", "/length", end=False)
    await trio.sleep(1)
    for _ in range(10):
        stream = skipping.quic._streams[0]
        send_at(skipping, 0, min(stream.max_stream_data_remote, skipping.quic._remote_max_data) - 100, b"x")
        await trio.sleep(1)
    for number in range(1_100):
        send_at(gapped, 0, 1_000 + 2 * number, b"x")
        await trio.sleep(0.01)
    assert [client.end.error_code for client in (skipping, gapped) if client.end] == [1, 1]
    assert max(len(receiver._buffer) for receiver in receivers) < 10_000_000
    assert max(len(receiver._ranges) for receiver in receivers) <= 1_001


async def test_excessive_headers(serve: Serve, autojump_clock: MockClock) -> None:
    """Long headers end the connection, also before they are complete; and so does the use of a dynamic table."""
    setting = await serve()
    complete, endless, table = [await setting.connect() for _ in range(3)]
    complete.begin("GET", "/number/5", (b"x-long", b"~" * 20_000))
    endless.quic.send_stream_data(0, encode_uint_var(FrameType.HEADERS) + encode_uint_var(1 << 40) + bytes(20_000))
    table.quic.send_stream_data(table.h3._local_encoder_stream_id or 0, b"\x3f\xe1\x1f")  # of 4096 bytes
    for client, error in ((complete, 0x107), (endless, 0x107), (table, 0x201)):
        client.flush()
        await client.until(partial(getattr, client, "end"))
        assert client.end is not None
        assert client.end.error_code == error
    assert (await (await setting.connect()).get("/number/5")).body == b"5"


async def test_the_client_sends_more_than_the_application_reads(serve: Serve, autojump_clock: MockClock) -> None:
    """A connection's streams together have a bound; datagrams beyond it are lost, and streams are reset."""
    streams = []

    async def application(stream: Any) -> None:
        streams.append(stream)
        if stream.kind == "session":
            await stream.respond(200)
        await trio.sleep_forever()

    setting = await serve(application)
    client = await setting.connect()
    session = await client.open_session("/")
    uploads = [client.begin("POST", "/length", end=False) for _ in range(10)]
    for upload in uploads:
        client.send(upload, bytes(500_000), end=False)
    await client.until(lambda: client.answers[uploads[-1]].reset)
    for _ in range(3_000):
        client.h3.send_datagram(session, bytes(1_000))
    client.flush()
    await trio.sleep(5)
    connection = streams[0].connection
    assert 0 < connection.unread < 4_100_000
    client.quic.close()
    client.flush()


Run = Callable[..., int]


@pytest.fixture
def run(start: Start, certificate: Certificate) -> Run:
    """Run the server as a process, and return its port."""

    def run() -> int:
        paths = "--cert", str(certificate.certificate), "--key", str(certificate.key)
        return start("http3_server", "--host", "127.0.0.1", *paths).port

    return run


@pytest.mark.parametrize("name", ["http3_server", "game_web"])
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["--cert", "none.pem"],
            "cannot read the certificate or the key, or they do not match: [Errno 2] No such file",
        ),
        (["--cert", "key.pem"], "cannot read the certificate or the key, or they do not match: [SSL] PEM lib"),
        (["65536"], "argument port: invalid port value: '65536'"),
        (["--host", "203.0.113.1"], "cannot bind 203.0.113.1 port"),
    ],
)
@without_signals
def test_wrong_command_lines(certificate: Certificate, name: str, arguments: list[str], error: str) -> None:
    """The last line says in one line what is wrong; the status is 2."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--cert", "cert.pem", "--key", "key.pem", *arguments]
    folder = certificate.certificate.parent
    run = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT, check=False)
    last = run.stderr.splitlines()[-1]
    assert (last.startswith(f"{name}.py: error: "), error in last) == (True, True)
    assert "Traceback" not in run.stderr
    assert run.returncode == 2


def gtlsclient(port: int, path: str, *options: str, folder: Path) -> str:
    """Run ngtcp2's client, which writes the answer into a folder; return its output."""
    command = [program("gtlsclient", "ngtcp2-client"), "--no-quic-dump", "--no-http-dump", f"--download={folder}"]
    asked = ["--exit-on-all-streams-close", *options, "127.0.0.1", str(port), f"https://localhost{path}"]
    done = subprocess.run([*command, *asked], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    return done.stderr


@without_signals
def test_ngtcp2_changes_its_address(run: Run, tmp_path: Path) -> None:
    """A download continues from another port, after the server has validated the new path."""
    told = gtlsclient(run(), "/bytes/3000000", "--change-local-addr=50ms", folder=tmp_path)
    assert (tmp_path / "3000000").read_bytes() == bytes(3_000_000)
    assert "path has been validated" in told


@without_signals
def test_ngtcp2_chooses_a_version_and_uploads(run: Run, tmp_path: Path) -> None:
    """A client that offers an unknown version connects with a known one, and uploads."""
    (tmp_path / "body").write_bytes(bytes(200_000))
    version = "-v0x1a2a3a4a", "--preferred-versions=v1", "--other-versions=v1"
    told = gtlsclient(run(), "/length", "-mPOST", f"-d{tmp_path / 'body'}", *version, folder=tmp_path)
    assert (tmp_path / "length").read_bytes() == b"200000\n"
    assert "ERR_RECV_VERSION_NEGOTIATION" in told
    assert "type=Retry" in told


@without_signals
def test_niquests(run: Run, certificate: Certificate) -> None:
    """A client on another implementation of QUIC, qh3, gets its answers."""
    niquests = pytest.importorskip("niquests")
    port = run()
    with niquests.Session(disable_http1=True, disable_http2=True) as session:
        session.quic_cache_layer.add_domain("localhost", port, port)
        answer = session.post(
            f"https://localhost:{port}/length",
            data=bytes(100_000),
            verify=str(certificate.certificate),
            timeout=TIMEOUT,
        )
    assert (answer.content, answer.http_version) == (b"100000\n", 30)


async def test_chromium(certificate: Certificate, tmp_path: Path, nursery: trio.Nursery) -> None:
    """A browser fetches the page and fifty numbers over HTTP/3; its WebTransport datagram and stream are echoed."""
    chromium = program("chromium", "chromium")
    reports = []
    reported = trio.Event()

    async def application(stream: Any) -> None:
        if stream.path == "/length":
            reports.extend([piece async for piece in stream])
            reported.set()
        await http3_server.application(stream)

    serve_udp = partial(trio_udp.serve, port=0, host="127.0.0.1")
    paths = str(certificate.certificate), str(certificate.key)
    server: trio_udp.Server = await nursery.start(http3_server.serve_http3, application, *paths, serve_udp)
    origin = f"localhost:{server.endpoints[0].local_address[1]}"
    command = [
        chromium,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-quic",
        f"--origin-to-force-quic-on={origin}",
        f"--ignore-certificate-errors-spki-list={base64.b64encode(hashlib.sha256(certificate.spki).digest()).decode()}",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        "--host-resolver-rules=MAP localhost 127.0.0.1",
        f"--user-data-dir={tmp_path}",
        f"https://{origin}/",
    ]
    with trio.fail_after(TIMEOUT):
        async with trio.open_nursery() as browsing:
            run = partial(trio.run_process, command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            browsing.start_soon(run)
            await reported.wait()
            browsing.cancel_scope.cancel()
    assert b"".join(reports) == b"sum 1225, 50 times over h3\necho hello\necho hello\n"
    nursery.cancel_scope.cancel()


async def test_a_full_server(serve: Serve, autojump_clock: MockClock) -> None:
    """While the table of clients is full, a connection cannot begin; it begins once there is room."""
    setting = await serve(limits=trio_udp.Limits(max_clients=1))
    first = await setting.connect()
    second: list[HTTP3Client] = []

    async def connect() -> None:
        second.append(await setting.connect())

    setting.nursery.start_soon(connect)
    await trio.sleep(4)
    assert second == []
    first.quic.close()
    first.flush()
    await trio.sleep(10)
    assert (await second[0].get("/number/5")).body == b"5"
