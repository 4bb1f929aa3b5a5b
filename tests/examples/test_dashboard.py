"""The Grafana dashboard, with a real Prometheus that scrapes a real server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import free_port, plain_socket
from tests.operate.watched import ROOT, SECONDS, service

pytest.importorskip("prometheus_client")
pytestmark = [
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux"),
]

DASHBOARD = json.loads((ROOT / "examples" / "grafana" / "dashboard.json").read_text())

# Not useful on a dashboard: nearly the same as another metric.
NOT_SHOWN = {"trio_udp_delivered_datagrams_total", "trio_udp_answered_by_accept_datagrams_total"}


class Prometheus:
    """A running Prometheus."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1/query"

    def ask(self, expression: str) -> list[Any]:
        """Return the answer to an expression, after Prometheus has started."""
        query = urllib.parse.urlencode({"query": expression})
        for _ in range(int(SECONDS * 20)):
            try:
                with urllib.request.urlopen(f"{self._url}?{query}", timeout=SECONDS) as answer:
                    result: list[Any] = json.load(answer)["data"]["result"]
                    return result
            except urllib.error.HTTPError as error:
                with error:
                    if error.code != 503:  # it starts
                        raise AssertionError(error.read().decode()) from None
            except OSError:
                pass
            time.sleep(0.05)
        raise AssertionError("Prometheus does not start")


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Any]:
    """Return a function that runs a Prometheus, which scrapes an address five times a second."""
    processes = []

    def run(target: str) -> Prometheus:
        configuration = {"global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"}}
        job = {"job_name": "trio_udp", "static_configs": [{"targets": [target]}]}
        (tmp_path / "prometheus.yml").write_text(json.dumps({**configuration, "scrape_configs": [job]}))
        port = free_port()
        options = [f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}"]
        options += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
        processes.append(subprocess.Popen(["prometheus", *options], stderr=subprocess.DEVNULL))
        return Prometheus(port)

    yield run
    for process in processes:
        process.terminate()
        process.wait(SECONDS)


def test_every_panel_has_data_and_no_counter_falls(prometheus: Any) -> None:
    """Each expression of the dashboard has a result, and no counter falls when workers are restarted."""
    with service("--workers", "2") as running, plain_socket("127.0.0.1") as sock:
        server = prometheus(running.http.removeprefix("http://"))
        sock.connect(("127.0.0.1", running.port))

        def wait_until(expression: str) -> None:
            for _ in range(int(SECONDS * 10)):
                sock.send(b"hello")
                assert sock.recv(100) == b"hello"
                if server.ask(expression):
                    return
                time.sleep(0.1)
            raise AssertionError(f"never true: {expression}")

        wait_until("sum(trio_udp_received_datagrams_total) > 0")
        running.process.send_signal(1)  # SIGHUP: restart both
        wait_until("sum(trio_udp_worker_restarts_total) == 2")
        before = server.ask("sum(trio_udp_received_datagrams_total)")[0]["value"][1]
        wait_until(f"sum(trio_udp_received_datagrams_total) > {before} + 3")

        expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
        assert len(expressions) > 10
        assert [expression for expression in expressions if not server.ask(expression)] == []

        names = {sample["metric"]["__name__"] for sample in server.ask('{__name__=~"trio_udp_.+"}')}
        counters = {name for name in names if name.endswith("_total")}
        assert len(counters) > 10
        assert [name for name in counters if server.ask(f"resets({name}[5m]) > 0")] == []
        used = " ".join(expressions)
        assert {name for name in names if name not in used} == NOT_SHOWN
