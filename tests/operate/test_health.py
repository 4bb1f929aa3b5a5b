"""The supervisor's HTTP port: metrics, liveness and readiness."""

from __future__ import annotations

import logging
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import trio

pytest.importorskip("prometheus_client")
if sys.platform == "win32":
    pytest.skip("workers need a POSIX system", allow_module_level=True)

from tests.operate.watched import ROOT, SECONDS, ask, command, environment, service
from trio_udp import Supervisor, serve_workers
from trio_udp.operate import _health
from trio_udp.operate._command_line import main
from trio_udp.operate._health import Health

ECHO = "trio_udp.operate._echo:echo"


async def start(health: Health, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> str:
    """Open the HTTP port; return its address."""
    caplog.set_level(logging.INFO, "trio_udp")
    await nursery.start(health.serve, "127.0.0.1", 0)
    [url] = re.findall(r"metrics on (\S+)/metrics", caplog.text)
    return str(url)


async def ask_in_thread(url: str, method: str = "GET") -> tuple[int, str]:
    with trio.fail_after(SECONDS):
        return await trio.to_thread.run_sync(ask, url, method)


async def test_ready_only_while_serving(nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    """A service is alive all the time, and ready from when its workers serve until it is stopped."""
    health = Health()
    url = await start(health, nursery, caplog)
    assert await ask_in_thread(f"{url}/live") == (200, "alive\n")
    assert await ask_in_thread(f"{url}/ready") == (503, "not ready\n")
    assert await ask_in_thread(f"{url}/metrics") == (200, "")
    async with trio.open_nursery() as workers:
        serve = partial(serve_workers, ECHO, 0, host="127.0.0.1", app_dir=str(ROOT), lame_duck=60, log_format="none")
        supervisor: Supervisor = await workers.start(serve)
        health.begin(supervisor)
        assert await ask_in_thread(f"{url}/ready") == (200, "ready\n")
        assert await ask_in_thread(f"{url}/ready", "HEAD") == (200, "")
        status, metrics = await ask_in_thread(f"{url}/metrics")
        assert status == 200
        assert 'trio_udp_worker_serving{worker="1"} 1.0\n' in metrics
        assert "trio_udp_ready 1.0\n" in metrics
        supervisor.stop()  # the lame duck
        assert await ask_in_thread(f"{url}/ready") == (503, "not ready\n")
        assert await ask_in_thread(f"{url}/live") == (200, "alive\n")
        assert 'trio_udp_worker_serving{worker="1"} 1.0\n' in (await ask_in_thread(f"{url}/metrics"))[1]
        workers.cancel_scope.cancel()
    assert await ask_in_thread(f"{url}/ready") == (503, "not ready\n")
    assert 'trio_udp_worker_serving{worker="1"} 0.0\n' in (await ask_in_thread(f"{url}/metrics"))[1]
    nursery.cancel_scope.cancel()


async def test_other_paths(nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    """Other paths return "not found", not metrics."""
    url = await start(Health(), nursery, caplog)
    assert await ask_in_thread(f"{url}/metrics/") == (404, "try /metrics, /live or /ready\n")
    assert await ask_in_thread(f"{url}/metrics?name[]=x") == (200, "")
    assert (await ask_in_thread(f"{url}/ready", "POST"))[0] == 501
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("sent", [b"", b"GET /met", b"GET /metrics HTTP/1.1\r\n\r\n"])
async def test_a_scrape_does_not_outlive_the_server(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    """At the end the port and its connections close soon, whatever their other ends do."""
    async with trio.open_nursery() as serving:
        url = await start(Health(), serving, caplog)
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with trio.fail_after(SECONDS), socket.create_connection(address) as slow:
            slow.setblocking(False)
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(slow))
            await stream.send_all(sent)
            assert await ask_in_thread(f"{url}/live") == (200, "alive\n")  # so the first connection is accepted
            with trio.fail_after(_health.GRACE + 2):
                serving.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    async for _ in stream:
                        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


async def test_a_slow_request_is_cut_off(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request is cut off after some seconds, even if its bytes keep arriving."""
    monkeypatch.setattr(_health, "PATIENCE", 0.2)
    url = await start(Health(), nursery, caplog)
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    with trio.fail_after(SECONDS):
        async with await trio.open_tcp_stream(*address) as stream:
            with suppress(trio.BrokenResourceError):  # closed, then reset
                while True:
                    await stream.send_all(b"x")
                    await trio.sleep(0.05)
    nursery.cancel_scope.cancel()


async def test_strangers_cannot_use_up_descriptors(nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    """Connections beyond 16 are closed; after those have ended, requests are answered again."""
    url = await start(Health(), nursery, caplog)
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as closing:
            idle = [await trio.open_tcp_stream(*address) for _ in range(_health.MOST_CONNECTIONS)]
            async with await trio.open_tcp_stream(*address) as one_more:
                assert await one_more.receive_some() == b""
            for stream in idle:
                closing.start_soon(stream.aclose)
        while True:
            try:
                assert await ask_in_thread(f"{url}/live") == (200, "alive\n")
                break
            except OSError:
                pass  # the server has not seen all of them end
    nursery.cancel_scope.cancel()


async def test_a_port_that_is_taken() -> None:
    """The error for a port that cannot be bound names the port."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot serve metrics on 127.0.0.1:{port}: Address already in use"):
            await Health().serve("127.0.0.1", port)


def test_the_command_line_with_a_port_that_is_taken() -> None:
    """The command ends with one line and status 1 if the port for metrics is taken; no worker was started."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = subprocess.run(
            command("--metrics", str(port)), capture_output=True, text=True, env=environment(), timeout=SECONDS
        )
    line = f"trio-udp: cannot serve metrics on 127.0.0.1:{port}: Address already in use; choose another address\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", line)


@pytest.mark.parametrize("address", ["", ":1", "x:", "65536", "127.0.0.1:-1"])
def test_a_wrong_address(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong address for metrics ends the command with one line and status 2."""
    with pytest.raises(SystemExit) as ended:
        main(["--metrics", address])
    line = capsys.readouterr().err
    assert (ended.value.code, line.count("\n")) == (2, 1)
    assert "argument --metrics: must be" in line


@pytest.mark.parametrize(
    ("options", "package", "line"),
    [
        (["--live"], "rich", "--live needs rich: pip install 'trio-udp[cli]'"),
        (["--metrics", "0"], "prometheus_client", "--metrics needs prometheus-client: pip install 'trio-udp[metrics]'"),
    ],
)
def test_without_the_extra(tmp_path: Path, options: list[str], package: str, line: str) -> None:
    """Without the package that an option needs, the command names the extra on one line, and ends with status 2."""
    (tmp_path / f"{package}.py").write_text("raise ImportError")
    ended = subprocess.run(
        command(*options), capture_output=True, text=True, env=environment(tmp_path), timeout=SECONDS
    )
    assert (ended.returncode, ended.stderr) == (2, f"trio-udp: {line} (see trio-udp --help)\n")


def test_scrapes_during_the_stop() -> None:
    """Scrapes are answered until the drain is over, then refused; the command ends with status 0."""
    with service("--lame-duck", "0.3") as running:
        assert ask(f"{running.http}/ready") == (200, "ready\n")
        running.process.send_signal(signal.SIGTERM)
        answers = []
        try:
            while True:
                answers.append((ask(f"{running.http}/metrics")[0], ask(f"{running.http}/ready")[0]))
        except OSError:
            pass
        assert running.process.wait(SECONDS) == 0
        assert {metrics for metrics, _ in answers} == {200}
        assert answers[-1][1] == 503
