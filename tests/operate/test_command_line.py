"""The command line, in processes of its own: its messages, how it ends, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

import trio_udp
from trio_udp.operate._command_line import main
from trio_udp.operate._options import make_parser

from .conftest import APPS, ROOT, TIMEOUT, Process, RunCommand

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="workers need a POSIX system")
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def ask(peer: socket.socket, payload: bytes = b"hello") -> bytes:
    peer.send(payload)
    return peer.recv(1_000)


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, suppress(OSError):
        sock.bind(("0.0.0.0", port))
        return True
    return False


def wait_until_gone(pids: list[int]) -> None:
    """Wait until processes that are not children of this one have ended."""
    for pid in pids:
        with suppress(ProcessLookupError), open(os.pidfd_open(pid)) as descriptor:
            assert select.select([descriptor], [], [], TIMEOUT)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["app"], "'app' is not a target: write module:handler or path/file.py:handler"),
        (["--workers", "0", "a:b"], "argument --workers: must be a whole number, at least 1, not '0'"),
        (["--port", "65536", "a:b"], "argument --port: must be a number from 0 to 65535, not '65536'"),
        (["--rate", "5/", "a:b"], None),
        (["--rate", "0", "a:b"], None),
        (["--rate", "nan/5", "a:b"], None),
        (["--drain", "-1", "a:b"], "argument --drain: must be at least 0 s, not -1"),
        (["--watchdog", "1", "a:b"], "argument --watchdog: must be at least 2 s, not 1"),
        (["--idle-timeout", "soon", "a:b"], "argument --idle-timeout: 'soon' is not a number"),
        (["--amplification", "0", "a:b"], "argument --amplification: must be greater than 0, not 0"),
        (["--when-full", "wait", "a:b"], None),
        (["--unknown", "a:b"], "unrecognized arguments: --unknown"),
        (["a:b", "c:d"], "unrecognized arguments: c:d"),
        (["@no such file"], "[Errno 2] No such file or directory: 'no such file'"),
        (["--systemd", "--port", "1", "a:b"], "with --systemd, leave --host and --port out: the .socket unit has them"),
        (["--factory"], "--factory and --accept need a target: module:handler"),
        (["--app-dir", "/no/such/folder", "a:b"], "--app-dir /no/such/folder: no such folder"),
        (
            ["--host", "0.0.0.0"],
            "without a handler, an echo is served, and on 127.0.0.1 and ::1 only: name a handler, or use these",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line(arguments: list[str], message: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong command line prints one line, and ends with status 2."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    output, error = capsys.readouterr()
    assert (ended.value.code, output, error.count("\n")) == (2, "", 1)
    assert error.startswith("trio-udp: " if message is None else f"trio-udp: {message} (see trio-udp --help)\n")


def test_files_of_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of options is split as in a shell, with comments; a file that is not text prints one line."""
    (tmp_path / "options").write_text(
        "# how\n--workers 3 --rate 200/50   # each\n--app-dir 'two words'\n\napp:handler\n"
    )
    options = make_parser().parse_args([f"@{tmp_path}/options"])
    assert (options.workers, options.rate, options.app_dir) == (3, trio_udp.RateLimit(200, 50), "two words")
    for content in (b"\xff\xfe", b"--host 'a\n", f"@{tmp_path}/bad\n".encode()):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(SystemExit) as ended:
            main([f"@{tmp_path}/bad"])
        error = capsys.readouterr().err
        assert (ended.value.code, error.count("\n")) == (2, 1), error


def test_the_help_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """The help fits into 80 columns, and says where the rate is exact."""
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert max(map(len, text.splitlines())) < 80
    assert "exact only with --steer address" in " ".join(text.split())


def run_to_the_end(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run a command line that ends by itself; return its status, standard output and error."""
    command = [sys.executable, "-m", "trio_udp", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT, env=os.environ | environment, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_a_target_that_cannot_be_served() -> None:
    """A mistake that only workers find is printed once, in one line, for any number of workers."""
    assert run_to_the_end("--port", "0", "--workers", "3", f"{APPS}:number") == (
        2,
        "",
        f"trio-udp: '{APPS}:number' is not a function but int 5: a handler is an async function with one argument: "
        "async def handler(client)\n",
    )


def test_an_error_inside_the_module(tmp_path: Path) -> None:
    """An exception in the user's module has its traceback, which begins in that module; the status is 1."""
    (tmp_path / "broken.py").write_text("1 / 0\n")
    status, output, error = run_to_the_end("--port", "0", f"{tmp_path}/broken.py:handler")
    assert (status, output) == (1, "")
    lines = error.splitlines()
    assert lines[:2] == ["Traceback (most recent call last):", f'  File "{tmp_path}/broken.py", line 1, in <module>']
    assert lines[-1] == "ZeroDivisionError: division by zero"


def test_a_module_that_does_not_parse(tmp_path: Path) -> None:
    """A syntax error is printed with its line, without frames of this package; the status is 1."""
    (tmp_path / "unfinished.py").write_text("def handler(:\n")
    status, output, error = run_to_the_end("--port", "0", f"{tmp_path}/unfinished.py:handler")
    assert (status, output) == (1, "")
    lines = error.splitlines()
    assert lines[:2] == [f'  File "{tmp_path}/unfinished.py", line 1', "    def handler(:"]
    assert lines[-1] == "SyntaxError: invalid syntax"


def test_a_worker_that_exits_at_its_start() -> None:
    """A module that ends the process ends the command, and the reason is printed."""
    status, _, error = run_to_the_end("--port", "0", f"{APPS}:tell_pid", TRIO_UDP_TEST_EXIT="1")
    assert (status, error.splitlines()[-1]) == (1, "SystemExit: 3")


def test_addresses_that_cannot_be_bound() -> None:
    """A port in use, even by a program that would share it, or a foreign address prints one line; the status is 1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        if hasattr(socket, "SO_REUSEPORT"):
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        status, _, error = run_to_the_end("--host", "127.0.0.1", "--port", port, "--workers", "2", f"{APPS}:tell_pid")
    assert (status, error.count("\n")) == (1, 1)
    assert error.startswith(
        f"trio-udp: Address already in use: cannot bind 127.0.0.1 port {port}; choose another --port"
    )
    status, _, error = run_to_the_end("--host", "192.0.2.1", "--port", "0", f"{APPS}:tell_pid")
    assert (status, error.count("\n")) == (1, 1)
    assert "cannot bind 192.0.2.1 port 0; use an address of this machine as --host" in error
    status, _, error = run_to_the_end("--host", "fe80::1%nowhere", "--port", "0", f"{APPS}:tell_pid")
    assert (status, error.count("\n")) == (1, 1)
    assert "'fe80::1%nowhere'" in error
    assert error.endswith("; is the name right?\n")


def test_systemd_without_systemd() -> None:
    """--systemd without sockets from systemd prints one line."""
    status, _, error = run_to_the_end("--systemd", f"{APPS}:tell_pid", LISTEN_FDS="")
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith("trio-udp: no sockets from systemd: ")


def test_the_first_minute() -> None:
    """Without a handler, the command serves an echo on the loopback addresses, and one line says how to try it."""
    command = [sys.executable, "-m", "trio_udp", "--port", "0", "--log-level", "error"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        *words, port = line.split()
        assert words == "Serving an echo. Try it: nc -u 127.0.0.1".split()
        peer = Process(process, int(port)).peer()
        with peer:
            assert ask(peer) == b"hello"
        process.terminate()
        assert process.communicate(timeout=TIMEOUT) == ("", "")
        assert process.returncode == 0


@pytest.mark.parametrize("moment", [("import", "trio_udp.operate._options"), ("socket.bind",)], ids=" ".join)
def test_ctrl_c_before_it_serves(moment: tuple[str, ...]) -> None:
    """Ctrl-C while the command line is being imported, or binds its sockets, ends it without a word and status 130."""
    source = f"""
        import signal, sys
        import trio_udp.__main__ as command

        def interrupt(event, arguments):
            if (event, *arguments)[:{len(moment)}] == {moment!r}:
                signal.raise_signal(signal.SIGINT)

        sys.addaudithook(interrupt)
        sys.exit(command.main())
    """
    command = [sys.executable, "-c", textwrap.dedent(source), "--port", "0", f"{APPS}:tell_pid"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@needs_proc
def test_ctrl_c_reaches_the_whole_group(run_command: RunCommand) -> None:
    """A signal to the whole process group, as from a terminal, lets the workers drain; the status is 0."""
    command = run_command("--workers", "2", "--host", "127.0.0.1", f"{APPS}:answer_in_two_steps")
    with command.peer() as peer:
        assert ask(peer) == b"go on"
        os.killpg(command.pid, signal.SIGINT)
        assert ask(peer, b"end") == b"done: end"
    status, lines = command.wait()
    assert status == 0
    assert [line.partition("] ")[2] for line in lines] == [
        "stopping: the workers drain",
        "stopped: 2 datagrams received in all, 0 handlers cancelled",
    ]
    assert is_free(command.port)


@needs_proc
def test_ctrl_c_spares_a_worker_that_starts(run_command: RunCommand) -> None:
    """Ctrl-C does not reach a worker whose interpreter is still starting, because workers have their own groups."""
    command = run_command("--workers", "2", "--host", "127.0.0.1", f"{APPS}:tell_pid")
    workers = command.children()
    assert [os.getpgid(pid) for pid in workers] == workers
    command.end(signal.SIGTERM)


@needs_proc
def test_systemd_learns_that_a_long_stop_goes_on(run_command: RunCommand, tmp_path: Path) -> None:
    """Notices to systemd name the serving workers, and the watchdog is fed until the end of the drain."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{tmp_path}/notify")
        manager.settimeout(TIMEOUT)
        command = run_command(
            *("--drain", "600", "--host", "127.0.0.1", f"{APPS}:ignore_the_drain"),
            NOTIFY_SOCKET=f"{tmp_path}/notify",
            WATCHDOG_USEC="100000",
        )
        assert manager.recv(1000) == b"READY=1\nSTATUS=1 worker serves"
        with command.peer() as peer:
            ask(peer)
        os.kill(command.pid, signal.SIGTERM)
        while (notice := manager.recv(1000)) == b"WATCHDOG=1":
            pass
        assert notice == b"STOPPING=1\nSTATUS=stopping"
        assert [manager.recv(1000), manager.recv(1000)] == [b"WATCHDOG=1", b"WATCHDOG=1"]
    command.end(signal.SIGTERM)


@needs_proc
@pytest.mark.parametrize("is_broken", [False, True])
def test_systemd_is_told_of_a_restart(run_command: RunCommand, tmp_path: Path, is_broken: bool) -> None:
    """SIGHUP makes the notices that ``Type=notify-reload`` waits for: a restart begins; it is over, or has failed."""
    (tmp_path / "app.py").write_text("from tests.operate.apps import tell_pid\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{tmp_path}/notify")
        manager.settimeout(TIMEOUT)
        command = run_command(
            *("--workers", "2", "--host", "127.0.0.1", f"{tmp_path}/app.py:tell_pid"),
            NOTIFY_SOCKET=f"{tmp_path}/notify",
        )
        ready = b"READY=1\nSTATUS=2 workers serve"
        assert manager.recv(1000) == ready
        before = command.children()
        if is_broken:
            (tmp_path / "app.py").write_text("1 / 0\n")
        asked = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        os.kill(command.pid, signal.SIGHUP)
        *reloading, stamp = manager.recv(1000).split(b"\n")
        assert reloading == [b"RELOADING=1", b"STATUS=restarting the workers"]
        assert int(stamp.removeprefix(b"MONOTONIC_USEC=")) >= asked
        assert manager.recv(1000) == ready
        assert (command.children() == before) is is_broken
        status, lines = command.end(signal.SIGTERM)
    messages = [line.partition("] ")[2].partition(":")[0] for line in lines if "] " in line]
    assert status == 0
    ended = "restart failed, the old workers continue" if is_broken else "restarted"
    assert messages[:2] == ["restarting", ended]


@needs_proc
def test_a_second_signal_ends_at_once(run_command: RunCommand) -> None:
    """A second SIGTERM kills the workers, whatever their handlers do; the status is 1."""
    command = run_command("--drain", "600", "--host", "127.0.0.1", f"{APPS}:ignore_the_drain")
    workers = command.children()
    with command.peer() as peer:
        ask(peer)
    os.kill(command.pid, signal.SIGTERM)
    assert command.process.stderr is not None
    assert command.process.stderr.readline().endswith("stopping: the workers drain\n")
    status, _ = command.end(signal.SIGTERM)
    assert status == 1
    assert is_free(command.port)
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@needs_proc
@pytest.mark.parametrize(("handler", "drain"), [("tell_pid", "inf"), ("block", "0.5")])
def test_workers_do_not_outlive_the_supervisor(run_command: RunCommand, handler: str, drain: str) -> None:
    """If the supervisor is killed, its workers end, even a blocked one, and the port is free."""
    command = run_command("--workers", "2", "--drain", drain, "--host", "127.0.0.1", f"{APPS}:{handler}")
    workers = command.children()
    assert len(workers) == 2
    with command.peer() as peer:
        ask(peer)
    os.kill(command.pid, signal.SIGKILL)
    wait_until_gone(workers)
    assert command.wait() == (-signal.SIGKILL, [])  # and nothing was logged
    assert is_free(command.port)


@needs_proc
def test_sighup_and_sigusr1(run_command: RunCommand) -> None:
    """SIGHUP replaces the workers, and SIGUSR1 logs statistics, as JSON on request."""
    command = run_command("--log-format", "json", "--host", "127.0.0.1", f"{APPS}:tell_pid")
    with command.peer() as peer:
        first, _ = ask(peer).split()
        os.killpg(command.pid, signal.SIGHUP)
        second = first
        while second == first:
            second, _ = ask(peer).split()
        os.killpg(command.pid, signal.SIGUSR1)
        # The supervisor handles signals and messages in one task after the other; wait for the line.
        assert command.process.stderr is not None
        messages: list[str] = []
        while not messages or not messages[-1].startswith("worker 1: "):
            messages.append(json.loads(command.process.stderr.readline())["message"])
    assert messages[0] == "restarting"
    assert messages[-1].startswith(f"worker 1: pid {int(second)}, serving, 1 restarts, 0 killed, received ")
    assert command.end(signal.SIGTERM)[0] == 0


@needs_proc
def test_a_crashed_worker_is_replaced_and_its_errors_are_logged(run_command: RunCommand) -> None:
    """A worker that ends under its clients is replaced, and the log says how it ended."""
    command = run_command("--host", "127.0.0.1", f"{APPS}:end_the_process")
    with command.peer() as peer:
        first = ask(peer)
        assert ask(peer) != first
    _, lines = command.end(signal.SIGTERM)
    assert any(line.endswith(f"worker 1 (pid {int(first)}) ended with status 5") for line in lines)


@needs_proc
def test_workers_have_only_their_own_sockets(run_command: RunCommand) -> None:
    """A worker inherits the socket that it reads, and no other."""
    command = run_command("--workers", "2", "--host", "127.0.0.1", f"{APPS}:tell_pid")
    bound = set(udp_sockets(command.pid))
    assert len(bound) == 2
    held = [udp_sockets(pid) for pid in command.children()]
    assert sorted(map(len, held)) == [1, 1]
    assert set(held[0]) | set(held[1]) == bound


def udp_sockets(pid: int) -> list[str]:
    """Return the inodes of the UDP sockets that a process holds."""
    table = Path("/proc/net/udp").read_text().splitlines()[1:]
    inodes = {line.split()[9] for line in table}
    links = [os.readlink(descriptor) for descriptor in Path(f"/proc/{pid}/fd").iterdir()]
    return [link[8:-1] for link in links if link.startswith("socket:[") and link[8:-1] in inodes]


def test_reload(run_command: RunCommand, tmp_path: Path) -> None:
    """With --reload, a change of the handler's file replaces the workers."""
    pytest.importorskip("watchfiles")
    file = tmp_path / "changing.py"
    program = "async def handler(client):\n    async for _ in client:\n        await client.send(b'{}')\n"
    file.write_text(program.format("old"))
    command = run_command("--reload", "--app-dir", str(tmp_path), "--host", "127.0.0.1", "changing.py:handler")
    with command.peer() as peer:
        assert ask(peer) == b"old"
        # The watcher starts beside the workers, so the first change may come too early for it.
        answer = b"old"
        while answer != b"new":
            file.write_text(program.format("new"))
            answer = ask(peer)
    assert command.end(signal.SIGTERM)[0] == 0
