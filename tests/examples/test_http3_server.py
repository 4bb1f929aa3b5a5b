"""The HTTP/3 server: Chromium, ngtcp2 and niquests on loopback; aioquic's client on a network that loses packets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

import trio_udp
from trio_udp.testing import SimulatedNetwork

from ..conftest import SERVER, check_adds_up
from .conftest import load
from .http3_client import Certificate, HTTP3Client

http3_server = load("http3_server")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Certificate.make(tmp_path_factory.mktemp("http3"))


@attrs.define
class Setting:
    """A server on the simulated network."""

    network: SimulatedNetwork
    certificate: Certificate
    nursery: trio.Nursery
    server: trio_udp.Server
    ended: trio.Event

    async def connect(self, **options: Any) -> HTTP3Client:
        client = HTTP3Client(self.network, SERVER, self.certificate, self.nursery)
        await client.connect(**options)
        return client


Serve = Callable[..., Awaitable[Setting]]


@pytest.fixture
async def serve(
    simulated_network: SimulatedNetwork, certificate: Certificate, nursery: trio.Nursery
) -> AsyncIterator[Serve]:
    """Serve an application on the simulated network; at the end, the server stops and every datagram is accounted for."""
    settings = []

    async def serve(application: Any = http3_server.application) -> Setting:
        ended = trio.Event()
        endpoint = simulated_network.endpoint(*SERVER)
        serve_udp = partial(trio_udp.serve_endpoints, endpoints=[endpoint], on_error=trio_udp.raise_error)
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


async def test_a_fifth_of_all_packets_is_lost(serve: Serve, autojump_clock: MockClock) -> None:
    """Downloads and an upload arrive whole, all at once."""
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
    """What the server keeps of a request ends with it, also if the client gives up in the middle."""
    seen: list[http3_server.Stream] = []

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
    """An error is logged and resets its stream; others go on."""

    async def application(stream: Any) -> None:
        if stream.path == "/fail":
            raise RuntimeError("boom")
        await http3_server.application(stream)

    setting = await serve(application)
    client = await setting.connect()
    failed, other = client.begin("GET", "/fail"), client.begin("GET", "/number/7")
    assert (await client.answer(failed)).reset == 0x10C
    assert (await client.answer(other)).body == b"7"
    assert [record.getMessage() for record in caplog.records] == ["the application has failed on '/fail'"]


async def test_the_application_waits_for_the_client(serve: Serve, autojump_clock: MockClock) -> None:
    """While nothing reaches the client the server holds little of a long answer."""
    streams = []

    async def application(stream: Any) -> None:
        streams.append(stream)
        await http3_server.application(stream)

    setting = await serve(application)
    client = await setting.connect()
    download = client.begin("GET", "/bytes/2000000")
    await client.until(lambda: client.answers[download].body)
    with setting.network.partition([client.connection.local_address]):
        await trio.sleep(10)
        (held,) = (
            len(each.sender._buffer) for each in streams[0].connection.quic._streams.values() if each.stream_id == 0
        )
        assert held <= http3_server.ON_THE_WAY + 70_000
    assert (await client.answer(download)).body == bytes(2_000_000)


async def test_stopping_in_the_middle_of_a_download(serve: Serve, autojump_clock: MockClock) -> None:
    """What has begun is finished, and a GOAWAY says that there will be no more; then the connection is closed."""
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
    """A client that is gone does not hold up the stop for long, and strangers are refused at once."""
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
