"""Statistics for Prometheus: a collector for a registry of prometheus-client. Needs the extra ``metrics``.

It opens no port for Prometheus to read; :func:`prometheus_client.start_http_server` or ``trio-udp --metrics`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import (
    Future,
    TimeoutError as FutureTimeoutError,  # another class before Python 3.11
)

import attrs
import trio

from . import Server, ServerStatistics, Supervisor, WorkerStatus, __version__

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError:
    raise ImportError("metrics need prometheus-client: pip install 'trio-udp[metrics]'") from None

__all__ = ["ServerCollector"]

# Seconds that a scrape waits for Trio's thread, which may be busy. After that it gets the counts of the last scrape.
PATIENCE = 1.0

# Name without _total, help, field of ServerStatistics.
COUNTERS = [
    ("received_datagrams", "Datagrams read from the kernel.", "received"),
    ("received_bytes", "Payload bytes read from the kernel.", "bytes_received"),
    ("sent_datagrams", "Datagrams that the kernel has taken.", "sent"),
    ("sent_bytes", "Payload bytes that the kernel has taken.", "bytes_sent"),
    ("delivered_datagrams", "Datagrams taken by handlers.", "delivered"),
    ("answered_by_accept_datagrams", "Datagrams of strangers that accept answered.", "answered_by_accept"),
    ("clients_started", "Clients so far.", "clients_started"),
    ("clients_expired", "Clients ended by their idle timeout.", "clients_expired"),
    ("clients_evicted", "Clients ended to make room for a stranger.", "clients_evicted"),
    ("handler_errors", "Handlers that raised.", "handler_errors"),
    ("handlers_cancelled", "Handlers that still ran at the end of a drain.", "handlers_cancelled"),
    ("requests_timed_out", "Requests cancelled after their timeout.", "requests_timed_out"),
]
GAUGES = [
    ("clients", "Clients now.", "clients"),
    ("waiting_datagrams", "Datagrams in inboxes now.", "waiting"),
]
WORKER_COUNTERS: list[tuple[str, str, Callable[[WorkerStatus], int]]] = [
    ("worker_restarts", "How often the process of this worker was replaced.", lambda worker: worker.restarts),
    ("worker_kills", "How many processes of this worker had to be killed.", lambda worker: worker.killed),
]

Source = Server | Supervisor


@attrs.frozen
class Row:
    """One server, or one worker of a supervisor, at one time."""

    labels: dict[str, str]
    statistics: ServerStatistics
    worker: WorkerStatus | None = None


@attrs.frozen
class Snapshot:
    rows: list[Row]
    ready: list[tuple[dict[str, str], bool]]


class ServerCollector(Collector):
    """Exports the statistics of a server to Prometheus, through any registry of prometheus-client::

        registry.register(trio_udp.metrics.ServerCollector(server))

    Make it inside Trio. Any thread may collect from it: statistics are read in Trio's thread, in about 0.1
    milliseconds. If that thread is busy for longer than 1 second, the scrape gets the counts of the last one; so it
    never hangs, and no counter ever falls. After Trio has ended, a scrape gets the final counts.

    Args:
      source: A :class:`Server`; a :class:`Supervisor`, whose workers get a label ``worker``; or a mapping from names to
        these, which get a label ``server``. The mapping may change later.

    Errors:
      ``TypeError`` for any other ``source``; ``RuntimeError`` outside of Trio.
    """

    def __init__(self, source: Server | Supervisor | Mapping[str, Server | Supervisor]) -> None:
        sources = source.values() if isinstance(source, Mapping) else [source]
        for one in sources:
            if not isinstance(one, (Server, Supervisor)):
                raise TypeError(f"expected a Server, a Supervisor, or a mapping from names to these, not {one!r}")
        self._source = source
        self._token = trio.lowlevel.current_trio_token()
        self._last = Snapshot([], [])

    def describe(self) -> Iterable[Metric]:
        """Return all metrics without counts, for their names."""
        return _metrics(Snapshot([], []))

    def collect(self) -> Iterable[Metric]:
        """Return all metrics with their counts now."""
        self._last = self._snapshot_from_any_thread()
        return _metrics(self._last)

    def _snapshot_from_any_thread(self) -> Snapshot:
        try:
            if trio.lowlevel.current_trio_token() is self._token:
                return self._snapshot()
        except RuntimeError:
            pass  # another thread
        future: Future[Snapshot] = Future()

        def take() -> None:
            try:
                future.set_result(self._snapshot())
            except Exception as error:  # would end Trio
                future.set_exception(error)

        try:
            self._token.run_sync_soon(take)
            return future.result(PATIENCE)
        except trio.RunFinishedError:
            return self._snapshot()
        except FutureTimeoutError:
            return self._last

    def _snapshot(self) -> Snapshot:
        named = self._source if isinstance(self._source, Mapping) else {"": self._source}
        snapshot = Snapshot([], [])
        for name, source in named.items():
            labels = {"server": name} if name else {}
            if isinstance(source, Server):
                snapshot.rows.append(Row(labels, source.statistics()))
                snapshot.ready.append((labels, not source.stopping))
            else:
                workers = source.workers
                snapshot.rows.extend(
                    Row(labels | {"worker": str(worker.number)}, worker.statistics, worker) for worker in workers
                )
                snapshot.ready.append((labels, source.ready))
        return snapshot


def _metrics(snapshot: Snapshot) -> Iterator[Metric]:
    build = GaugeMetricFamily("trio_udp_build_info", "The version of trio_udp; always 1.", labels=["version"])
    build.add_metric([__version__], 1)
    yield build

    ready = GaugeMetricFamily("trio_udp_ready", "1 while new clients are welcome, 0 once the server begins to stop.")
    for labels, is_ready in snapshot.ready:
        ready.add_sample("trio_udp_ready", labels, int(is_ready))
    yield ready

    for name, text, field in COUNTERS:
        yield _counter(name, text, [(row.labels, getattr(row.statistics, field)) for row in snapshot.rows])

    yield _counter(
        "lost_datagrams",
        "Datagrams received and not handled, or not sent, by the field of ServerStatistics that counts them.",
        [
            (row.labels | {"reason": reason}, count)
            for row in snapshot.rows
            for reason, count in row.statistics.lost.items()
        ],
    )
    yield _counter(
        "socket_errors",
        "Errors of receiving and of sending.",
        [
            (row.labels | {"errno": name}, count)
            for row in snapshot.rows
            for name, count in row.statistics.errors.items()
        ],
    )
    for name, text, field in GAUGES:
        gauge = GaugeMetricFamily(f"trio_udp_{name}", text)
        for row in snapshot.rows:
            gauge.add_sample(gauge.name, row.labels, getattr(row.statistics, field))
        yield gauge

    workers = [(row.labels, row.worker) for row in snapshot.rows if row.worker is not None]
    for name, text, count_of in WORKER_COUNTERS:
        yield _counter(name, text, [(labels, count_of(worker)) for labels, worker in workers])
    serving = GaugeMetricFamily("trio_udp_worker_serving", "1 while a process reads the sockets of this worker.")
    for labels, worker in workers:
        serving.add_sample(serving.name, labels, int(worker.state in ("serving", "leaving")))
    yield serving


def _counter(name: str, text: str, samples: list[tuple[dict[str, str], int]]) -> Metric:
    counter = CounterMetricFamily(f"trio_udp_{name}", text)
    for labels, count in samples:
        counter.add_sample(f"{counter.name}_total", labels, count)
    return counter
