"""Workers: a server on several processes, which are supervised, replaced and stopped together."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import attrs
import pytest
import trio

import trio_udp
from trio_udp import Limits, RateLimit, ServerStatistics, Supervisor, WorkerError

from .conftest import APPS, ROOT, TIMEOUT, Workers, port_of

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere the kernel does not spread clients over sockets"
)


@attrs.define(eq=False)
class Talker:
    """A client that numbers its datagrams and checks the answers."""

    connection: trio_udp.Connection
    sent: int = 0
    answers: list[int] = attrs.field(factory=list)
    pids: list[int] = attrs.field(factory=list)  # of the workers that have answered, without repetitions

    async def ask(self) -> int:
        """Send the next number, wait for its answer, and return the pid of the worker."""
        await self.send()
        with trio.fail_after(TIMEOUT):
            while len(self.answers) < self.sent:
                self.take(await self.connection.receive())
        return self.pids[-1]

    async def send(self) -> None:
        await self.connection.send(b"%d" % self.sent)
        self.sent += 1

    def take(self, answer: bytes) -> None:
        pid, number = map(int, answer.split())
        self.answers.append(number)
        if self.pids[-1:] != [pid]:
            self.pids.append(pid)

    async def talk(self) -> None:
        """Send a datagram every few milliseconds, and receive the answers."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.listen)
            while True:
                await self.send()
                await trio.sleep(0.005)

    async def listen(self) -> None:
        async for answer in self.connection:
            self.take(answer)


@attrs.define(eq=False)
class Clients:
    """Opens clients, and closes them at the end of the test."""

    opened: list[trio_udp.Connection] = attrs.field(factory=list)

    async def open(self, supervisor: Supervisor) -> Talker:
        connection = await trio_udp.connect("127.0.0.1", port_of(supervisor))
        self.opened.append(connection)
        return Talker(connection)

    async def of_each_worker(self, supervisor: Supervisor) -> list[Talker]:
        """Open clients until every worker has answered five."""
        found: list[Talker] = []
        served: Counter[int] = Counter()
        while len(served) < len(supervisor.workers) or min(served.values()) < 5:
            found.append(await self.open(supervisor))
            served[await found[-1].ask()] += 1
        return found


@pytest.fixture
async def clients() -> AsyncIterator[Clients]:
    clients = Clients()
    yield clients
    for connection in clients.opened:
        connection.close()


async def test_clients_are_spread_over_workers(workers: Workers, clients: Clients) -> None:
    """Each client is served by one worker, and the statistics are those of all workers together."""
    supervisor = await workers.start()
    found = await clients.of_each_worker(supervisor)
    for talker in found:
        await talker.ask()
    assert {len(talker.pids) for talker in found} == {1}
    assert [(worker.number, worker.state, worker.restarts) for worker in supervisor.workers] == [
        (1, "serving", 0),
        (2, "serving", 0),
    ]
    served = Counter(talker.pids[0] for talker in found)
    pids = [worker.pid for worker in supervisor.workers]
    statistics = await workers.stop(supervisor)
    assert (statistics.received, statistics.delivered, statistics.sent) == (2 * len(found),) * 3
    assert (statistics.clients_started, statistics.clients) == (len(found), 0)
    assert [worker.statistics.clients_started for worker in supervisor.workers] == [served[pid] for pid in pids]


async def test_a_killed_worker_is_replaced(workers: Workers, clients: Clients) -> None:
    """Datagrams that arrive after a worker was killed wait for its successor, and its clients stay with it.

    Other clients notice nothing. No counter falls, and every datagram is accounted for.
    """
    supervisor = await workers.start()
    found = await clients.of_each_worker(supervisor)
    victim, other = (worker.pid for worker in supervisor.workers)
    before = supervisor.statistics()
    os.kill(victim, signal.SIGKILL)
    for talker in found:
        await talker.ask()
    after = supervisor.statistics()
    successors = {talker.pids[-1] for talker in found if talker.pids[0] == victim}
    assert successors == {supervisor.workers[0].pid}
    assert {talker.pids[-1] for talker in found if talker.pids[0] == other} == {other}
    assert [worker.restarts for worker in supervisor.workers] == [1, 0]
    gauges = {"waiting", "clients", "errors"}
    names = [field.name for field in attrs.fields(ServerStatistics) if field.name not in gauges]
    assert [name for name in names if getattr(after, name) < getattr(before, name)] == []
    statistics = await workers.stop(supervisor)
    assert statistics.received == statistics.accounted_for


async def test_a_rolling_restart_loses_nothing(workers: Workers, clients: Clients) -> None:
    """During a restart, each client gets all answers in order, from two workers one after the other.

    Afterwards the counters of both generations add up to the number of sent datagrams.
    """
    supervisor = await workers.start()
    found = await clients.of_each_worker(supervisor)
    old = [worker.pid for worker in supervisor.workers]
    async with trio.open_nursery() as talking:
        for talker in found:
            talking.start_soon(talker.talk)
        with trio.fail_after(TIMEOUT):
            await supervisor.restart()
        talking.cancel_scope.cancel()
    for talker in found:
        while len(talker.answers) < talker.sent:
            with trio.fail_after(TIMEOUT):
                talker.take(await talker.connection.receive())
        await talker.ask()
    new = [worker.pid for worker in supervisor.workers]
    assert {tuple(talker.pids) for talker in found} == set(zip(old, new, strict=True))
    assert all(talker.answers == list(range(talker.sent)) for talker in found)
    assert [worker.restarts for worker in supervisor.workers] == [1, 1]
    statistics = await workers.stop(supervisor)
    assert statistics.received == statistics.delivered == sum(talker.sent for talker in found)


async def test_a_restart_by_signal(workers: Workers, clients: Clients) -> None:
    """One of ``restart_signals`` replaces the workers, as ``restart`` does."""
    supervisor = await workers.start(restart_signals={signal.SIGUSR2})
    found = await clients.of_each_worker(supervisor)
    os.kill(os.getpid(), signal.SIGUSR2)
    with trio.fail_after(TIMEOUT):
        for talker in found:
            while len(talker.pids) == 1:
                await talker.ask()
    await workers.stop(supervisor)


async def test_a_restart_onto_a_broken_module_changes_nothing(
    workers: Workers, clients: Clients, tmp_path: Path
) -> None:
    """If new workers cannot import the handler, the old ones go on, and the error has the traceback."""
    module = tmp_path / "changing.py"
    module.write_text("from tests.operate.apps import tell_pid\n")
    supervisor = await workers.start(f"{module}:tell_pid")
    found = await clients.of_each_worker(supervisor)
    module.write_text("import a_module_that_is_not_there\n")
    with trio.fail_after(TIMEOUT), pytest.raises(WorkerError, match="No module named 'a_module_that_is_not_there'"):
        await supervisor.restart()
    for talker in found:
        await talker.ask()
    assert {len(talker.pids) for talker in found} == {1}
    await workers.stop(supervisor)


async def test_a_worker_that_cannot_be_started_is_tried_again(
    workers: Workers, clients: Clients, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A dead worker whose successors fail is started again until one is ready; the other worker goes on serving."""
    module = tmp_path / "changing.py"
    module.write_text("from tests.operate.apps import tell_pid\n")
    supervisor = await workers.start(f"{module}:tell_pid")
    found = await clients.of_each_worker(supervisor)
    victim, other = (worker.pid for worker in supervisor.workers)
    module.write_text("raise SystemExit('not yet')\n")
    os.kill(victim, signal.SIGKILL)
    for talker in found:
        if talker.pids == [other]:
            assert await talker.ask() == other
    with trio.fail_after(TIMEOUT):
        while caplog.text.count("worker 1 cannot be started: Traceback") < 2:
            await next(talker for talker in found if talker.pids == [other]).ask()
    module.write_text("from tests.operate.apps import tell_pid\n")
    for talker in found:
        await talker.ask()
    assert {tuple(talker.pids) for talker in found} == {(victim, supervisor.workers[0].pid), (other,)}
    await workers.stop(supervisor)


async def test_sockets_of_others(workers: Workers, clients: Clients) -> None:
    """Workers can serve bound sockets that another program also holds; after a stop it gets unread datagrams."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(TIMEOUT)
        with pytest.raises(ValueError, match=r"2 workers need 2 sockets for 127\.0\.0\.1:[0-9]+, not 1: "):
            await trio_udp.serve_workers("module:handler", 0, workers=2, sockets=[sock])
        supervisor = await workers.start(sockets=[sock.dup()], workers=1)
        assert supervisor.addresses == (sock.getsockname(),)
        talker = await clients.open(supervisor)
        await talker.ask()
        await workers.stop(supervisor)
        await talker.connection.send(b"for the next")
        assert await trio.to_thread.run_sync(sock.recv, 100) == b"for the next"


async def test_a_stopped_process_is_replaced(workers: Workers, clients: Clients) -> None:
    """A worker that does not answer for ``watchdog`` seconds is killed, and its successor serves its clients."""
    supervisor = await workers.start(watchdog=2)
    found = await clients.of_each_worker(supervisor)
    victim = supervisor.workers[0].pid
    os.kill(victim, signal.SIGSTOP)
    for talker in found:
        await talker.ask()
    moved = {tuple(talker.pids) for talker in found if talker.pids[0] == victim}
    assert moved == {(victim, supervisor.workers[0].pid)}
    assert [worker.killed for worker in supervisor.workers] == [1, 0]
    await workers.stop(supervisor)


async def test_a_worker_that_gets_sigterm_is_replaced_first(workers: Workers, clients: Clients) -> None:
    """A worker process that gets a SIGTERM serves until its successor is ready."""
    supervisor = await workers.start(workers=1)
    talker = await clients.open(supervisor)
    await talker.ask()
    [worker] = supervisor.workers
    os.kill(worker.pid, signal.SIGTERM)
    with trio.fail_after(TIMEOUT):
        while await talker.ask() == worker.pid:
            pass
    assert talker.answers == list(range(talker.sent))
    statistics = await workers.stop(supervisor)
    assert statistics.received == talker.sent


async def test_a_worker_that_ignores_its_drain_is_killed(workers: Workers) -> None:
    """A handler that cannot be cancelled ends with its worker, and is counted once."""
    supervisor = await workers.start("ignore_the_drain", drain_timeout=0.1)
    async with await trio_udp.connect("127.0.0.1", port_of(supervisor)) as connection:
        await connection.send(b"")
        pid = int(await connection.receive())
    statistics = await workers.stop(supervisor)
    assert statistics.handlers_cancelled == 1
    assert [worker.killed for worker in supervisor.workers] == [worker.pid == pid for worker in supervisor.workers]


async def test_a_stop_lets_transactions_finish(workers: Workers) -> None:
    """When all workers stop, a conversation inside ``transaction()`` still gets its datagrams."""
    supervisor = await workers.start("answer_in_two_steps", workers=1)
    async with await trio_udp.connect("127.0.0.1", port_of(supervisor)) as connection:
        await connection.send(b"begin")
        with trio.fail_after(TIMEOUT):
            assert await connection.receive() == b"go on"
            supervisor.stop()
            await connection.send(b"end")
            assert await connection.receive() == b"done: end"
    await workers.stop(supervisor)


async def test_lame_duck(workers: Workers, clients: Clients) -> None:
    """After a stop the supervisor is not ready, but new clients are served for ``lame_duck`` seconds."""
    supervisor = await workers.start(workers=1, lame_duck=1)
    assert supervisor.ready
    supervisor.stop()
    assert not supervisor.ready
    talker = await clients.open(supervisor)
    await talker.ask()
    statistics = await workers.stop(supervisor)
    assert statistics.received == talker.sent


async def test_a_factory_is_entered_and_left(
    workers: Workers,
    clients: Clients,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each worker enters the context manager of a factory before it serves, and leaves it after its drain."""
    monkeypatch.chdir(tmp_path)
    supervisor = await workers.start("with_a_file", factory=True)
    await (await clients.open(supervisor)).ask()
    assert set(os.listdir(tmp_path)) == {f"open.{worker.pid}" for worker in supervisor.workers}
    await workers.stop(supervisor)
    assert os.listdir(tmp_path) == []


async def test_the_rate_is_exact_when_steered_by_address(workers: Workers, clients: Clients) -> None:
    """With ``steer="address"``, a rate limit holds for all workers together, for any ports of a host."""
    limits = Limits(rate_limit=RateLimit(0.001, 10))
    supervisor = await workers.start("tell_pid_of_datagram", steer="address", limits=limits)
    for _ in range(40):
        await (await clients.open(supervisor)).send()
    statistics = await workers.stop(supervisor)
    assert (statistics.received, statistics.delivered, statistics.refused_by_rate) == (40, 10, 30)


async def test_accept(workers: Workers, clients: Clients) -> None:
    """``accept`` names the function that is called for strangers; it shares the state of the handler's module."""
    supervisor = await workers.start("tell_greetings", workers=1, accept=f"{APPS}:accept_greetings")
    connection = (await clients.open(supervisor)).connection
    answers = []
    for payload in (b"who?", b"hello", b"hello"):
        await connection.send(payload)
        with trio.fail_after(TIMEOUT):
            answers.append(await connection.receive())
    assert answers == [b"?", b"2", b"2"]
    statistics = await workers.stop(supervisor)
    assert (statistics.answered_by_accept, statistics.delivered) == (1, 2)


async def test_limits_are_those_of_all_workers(workers: Workers, clients: Clients) -> None:
    """Each worker gets its share of ``max_clients``."""
    supervisor = await workers.start(limits=Limits(max_clients=6))
    for _ in range(60):
        await (await clients.open(supervisor)).send()
    statistics = await workers.stop(supervisor)
    assert (statistics.clients_started, statistics.refused_full) == (6, 54)


async def test_cancelling_kills_the_workers() -> None:
    """A cancelled ``serve_workers`` leaves no process."""
    async with trio.open_nursery() as nursery:
        workers = Workers(nursery)
        supervisor = await workers.start()
        pids = [worker.pid for worker in supervisor.workers]
        nursery.cancel_scope.cancel()
    assert not supervisor.drained
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, not 0"),
        ({"steer": "port"}, "steer must be 'address' or None, not 'port'"),
        ({"drain_timeout": -1}, "drain_timeout must be at least 0, not -1"),
        ({"watchdog": 1}, "watchdog must be at least 2, not 1"),
        ({"idle_timeout": float("nan")}, "idle_timeout must be at least 0.001, not nan"),
        ({"target": "no colon"}, "'no colon' is not a target: write module:handler or path/file.py:handler"),
        ({"accept": "no colon"}, "'no colon' is not a target: write module:handler or path/file.py:handler"),
        ({"host": []}, "host must not be an empty list; None stands for every interface"),
        ({"sockets": []}, "sockets must not be an empty list"),
        ({"log_format": "xml"}, "log_format must be one of ('text', 'json', 'none'), not 'xml'"),
        ({"max_datagram_size": 0}, "max_datagram_size must be at least 1, not 0"),
        ({"busiest_clients": -1}, "busiest_clients must be at least 0, not -1"),
    ],
)
async def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    """An invalid argument raises before anything is bound or started."""
    call: Callable[..., Awaitable[None]] = trio_udp.serve_workers
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        await call(**{"target": "module:handler", "port": 0, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 5}, "target and accept must be strings such as 'module:handler', not 5"),
        ({"host": [5]}, "host must be a string, None or a list of them, not [5]"),
        ({"workers": True}, "workers must be an int, not True"),
        ({"log_level": "info"}, "log_level must be an int, not 'info'"),
        ({"lame_duck": None}, "lame_duck must be a number of seconds, not None"),
    ],
)
async def test_arguments_of_a_wrong_type(arguments: dict[str, object], message: str) -> None:
    """An argument of a wrong type raises before anything is bound or started."""
    call: Callable[..., Awaitable[None]] = trio_udp.serve_workers
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        await call(**{"target": "module:handler", "port": 0, **arguments})


def test_workers_import_from_where_the_supervisor_does(tmp_path: Path) -> None:
    """If a program extends ``sys.path``, its workers import from there too, including trio_udp."""
    (tmp_path / "only_here.py").write_text("NUMBER = 5\n")
    (tmp_path / "app.py").write_text("from only_here import NUMBER\nasync def handler(client): ...\n")
    program = f"""if True:
        import sys
        sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]
        import trio, trio_udp
        async def main():
            async with trio.open_nursery() as nursery:
                serve = trio_udp.serve_workers
                supervisor = await nursery.start(lambda **status: serve("app:handler", 0, host="127.0.0.1", **status))
                supervisor.stop()
        trio.run(main)
    """
    done = subprocess.run(
        [sys.executable, "-c", program], cwd="/", capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
