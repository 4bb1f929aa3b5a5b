"""The collector for Prometheus: its metrics, and the threads that may use it."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import threading
from typing import Any

import attrs
import pytest
import trio

from tests.conftest import ALICE, BOB, StartInMemory, echo, free_port
from tests.operate.watched import ROOT, ask

pytest.importorskip("prometheus_client")
from prometheus_client import CollectorRegistry, generate_latest

from trio_udp import Client, Limits, Server, ServerStatistics, connect, metrics, request, serve
from trio_udp.metrics import ServerCollector


def registry_of(source: Any) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(ServerCollector(source))
    return registry


async def test_counts_of_a_server(start_in_memory: StartInMemory) -> None:
    """A server's counters have names as Prometheus recommends, and losses are one metric with a reason."""

    async def fail_at_x(client: Client) -> None:
        async for payload in client:
            assert payload != b"x"
            await client.send(payload)

    running = await start_in_memory(fail_at_x, limits=Limits(max_clients=1))
    running.put(b"abc", ALICE)
    running.put(b"refused", BOB)
    running.put(b"x", ALICE)
    await running.settle()
    registry = registry_of(running.server)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"trio_udp_{name}", labels)

    assert value("received_datagrams_total") == 3
    assert value("received_bytes_total") == 11
    assert value("sent_datagrams_total") == 1
    assert value("sent_bytes_total") == 3
    assert value("clients_started_total") == 1
    assert value("clients") == 0
    assert value("handler_errors_total") == 1
    assert value("lost_datagrams_total", reason="refused_full") == 1
    assert value("lost_datagrams_total", reason="truncated") == 0
    assert value("ready") == 1
    running.server.stop()
    assert value("ready") == 0


async def test_the_code_in_the_documentation() -> None:
    """The code in docs/watching.md serves datagrams and metrics, and closes both ports when the server stops."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "watching.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    port, udp_port = free_port(), free_port()
    servers = []

    async def tell_server(client: Client) -> None:
        servers.append(client.server)
        await echo(client)

    with trio.fail_after(20):
        async with trio.open_nursery() as serving, await connect("127.0.0.1", udp_port) as connection:
            serving.start_soon(names["serve_with_metrics"], tell_server, udp_port, port)
            await request(connection, b"abc", lambda answer: answer == b"abc")
            status, text = await trio.to_thread.run_sync(ask, f"http://127.0.0.1:{port}/metrics")
            assert (status, 'trio_udp_lost_datagrams_total{reason="refused_full"} 0.0' in text) == (200, True)
            servers[0].stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_every_count_is_in_a_metric() -> None:
    """Every field of ServerStatistics is in a metric; receive_errors are in the errors by name."""
    shown = {field for _, _, field in metrics.COUNTERS + metrics.GAUGES}
    names = [field.name for field in attrs.fields(ServerStatistics)]
    nothing = ServerStatistics(**{name: {} if name == "errors" else 0 for name in names})  # type: ignore[arg-type]
    assert shown | set(nothing.lost) | {"errors", "receive_errors"} == set(names)


async def test_errors_have_their_errno(start_in_memory: StartInMemory) -> None:
    """Socket errors are one metric, with the name of the errno as a label."""
    running = await start_in_memory(echo)
    running.put(b"from port 0, which cannot be answered", ("192.0.2.9", 0))
    await running.settle()
    [(name, count)] = running.server.statistics().errors.items()
    registry = registry_of(running.server)
    assert registry.get_sample_value("trio_udp_socket_errors_total", {"errno": name}) == count == 1


async def test_several_servers(nursery: trio.Nursery, start_in_memory: StartInMemory) -> None:
    """Each server in a mapping has a label, and may be added later."""
    one, other = await start_in_memory(echo), await start_in_memory(echo)
    servers = {"one": one.server}
    registry = registry_of(servers)
    servers["other"] = other.server
    other.put(b"abc")
    await other.settle()
    values = [registry.get_sample_value("trio_udp_received_bytes_total", {"server": name}) for name in servers]
    assert values == [0, 3]


async def test_statistics_are_read_in_the_thread_of_trio(
    start_in_memory: StartInMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scrape in another thread waits until Trio's thread has read the statistics."""
    running = await start_in_memory(echo)
    readers = []
    original = Server.statistics

    def statistics(self: Server) -> ServerStatistics:
        readers.append(threading.current_thread())
        return original(self)

    monkeypatch.setattr(Server, "statistics", statistics)
    registry = registry_of(running.server)
    assert readers == []  # registering reads nothing
    text = await trio.to_thread.run_sync(generate_latest, registry)
    assert b"trio_udp_received_datagrams_total 0.0\n" in text
    assert generate_latest(registry) == text
    assert readers == [threading.current_thread()] * 2


async def test_a_busy_loop_does_not_hang_a_scrape(
    start_in_memory: StartInMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While Trio's thread is busy for too long, a scrape returns the counts of the last scrape."""
    monkeypatch.setattr(metrics, "PATIENCE", 0.05)
    running = await start_in_memory(echo)
    registry = registry_of(running.server)
    before = generate_latest(registry)
    running.put(b"abc")
    await running.settle()
    texts: list[bytes] = []
    scrape = threading.Thread(target=lambda: texts.append(generate_latest(registry)))
    scrape.start()
    scrape.join()  # Trio's thread waits here
    assert texts == [before]
    assert generate_latest(registry) != before


def test_after_the_end_of_trio() -> None:
    """After Trio has ended, a scrape returns the last counts."""

    async def serve_one() -> CollectorRegistry:
        async with trio.open_nursery() as nursery:
            server: Server = await nursery.start(serve, echo, 0)
            registry = registry_of(server)
            with trio.fail_after(5):
                async with await connect("127.0.0.1", server.endpoints[0].local_address[1]) as connection:
                    await connection.send(b"abc")
                    await connection.receive()
            server.stop()
        return registry

    registry = trio.run(serve_one)
    assert registry.get_sample_value("trio_udp_received_datagrams_total") == 1
    assert registry.get_sample_value("trio_udp_ready") == 0


async def test_wrong_sources(start_in_memory: StartInMemory) -> None:
    """The collector refuses objects that are not servers, and must be made inside Trio."""
    for wrong in (None, "server", {"one": 1}):
        with pytest.raises(TypeError, match="expected a Server, a Supervisor"):
            ServerCollector(wrong)  # type: ignore[arg-type]
    server = (await start_in_memory(echo)).server
    with pytest.raises(RuntimeError, match="async context"):
        await trio.to_thread.run_sync(ServerCollector, server)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
async def test_promtool_finds_nothing(start_in_memory: StartInMemory) -> None:
    """promtool, which checks names, units and help, reports nothing."""
    running = await start_in_memory(echo)
    running.put(b"abc", ("192.0.2.9", 0))
    await running.settle()
    text = generate_latest(registry_of(running.server))
    check = await trio.run_process(
        ["promtool", "check", "metrics"], stdin=text, capture_stdout=True, stderr=subprocess.STDOUT, check=False
    )
    assert (check.returncode, check.stdout) == (0, b"")
