"""Handlers of the examples, unchanged on a Unix-domain socket, and real programs that talk to it."""

from __future__ import annotations

import logging
import logging.handlers
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, strategies as st

import trio_udp
from tests.conftest import check_adds_up, echo, free_port
from trio_udp import Datagram, Server

from ..project.conftest import EXAMPLES
from .conftest import load, program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract names and credentials are Linux's")


@pytest.fixture
def path() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:  # a path has at most 107 bytes
        yield os.path.join(folder, "server")


Start = Callable[..., Awaitable[Server]]


@pytest.fixture
async def start(path: str, nursery: trio.Nursery) -> AsyncIterator[Start]:
    servers = []

    async def start(handler: Any, **options: Any) -> Server:
        endpoint = await trio_udp.open_unix_endpoint(path, **options)
        server: Server = await nursery.start(partial(trio_udp.serve_endpoints, handler, [endpoint]))
        servers.append(server)
        return server

    yield start
    for server in servers:
        check_adds_up(server)


async def ask(path: str, *payloads: bytes) -> list[bytes]:
    """Send payloads over a connection, each after the answer to the last one."""
    answers = []
    with trio.fail_after(10):
        async with await trio_udp.connect_unix(path) as connection:
            for payload in payloads:
                await connection.send(payload)
                answers.append(await connection.receive())
    return answers


# Handlers of the examples


async def test_uppercase(start: Start, path: str) -> None:
    """The handler of uppercase.py works on a Unix-domain socket."""
    await start(load("uppercase").uppercase)
    assert await ask(path, b"hello", b"", b"world") == [b"HELLO", b"", b"WORLD"]


async def test_login(start: Start, path: str) -> None:
    """The handler of login.py works on a Unix-domain socket: several steps, with time limits."""
    await start(load("login").handler)
    answers = await ask(path, b"", b"ada", b"lovelace", b"hello", b"quit")
    assert answers == [b"user name? ", b"password? ", b"welcome, ada\n", b"ada: hello", b"goodbye\n"]


async def test_errors(start: Start, path: str) -> None:
    """The handler of errors.py works on a Unix-domain socket: it answers malformed payloads."""
    await start(load("errors").handler)
    assert await ask(path, b'{"add": 5}', b"[") == [
        b'{"total": 5.0}\n',
        b'{"error": "Expecting value: line 1 column 2 (char 1)"}\n',
    ]


async def test_a_request_handler(start: Start, path: str) -> None:
    """A ``request_handler`` works on a Unix-domain socket."""

    @trio_udp.request_handler
    async def reverse(payload: bytes, client: trio_udp.Client) -> bytes:
        return payload[::-1]

    await start(reverse)
    assert await ask(path, b"abc", b"de") == [b"cba", b"ed"]


async def test_a_datagram_handler(start: Start, path: str) -> None:
    """A ``datagram_handler`` works on a Unix-domain socket."""
    await start(load("time_server").tell_time)
    (answer,) = await ask(path, b"")
    assert len(answer) == 24


async def test_dns(start: Start, path: str, nursery: trio.Nursery) -> None:
    """The DNS example on a Unix-domain socket answers dig, through a relay from UDP."""
    socat, dig = program("socat", "socat"), program("dig", "bind9-dnsutils")
    module = load("dns_server")
    zone = module.load_zone(str(EXAMPLES / "example.zone"))

    @trio_udp.datagram_handler
    def handler(datagram: Datagram) -> bytes | None:
        answer: bytes | None = module.answer(zone, datagram.payload)
        return answer

    server = await start(handler)
    port = free_port()
    relay = [socat, f"UDP4-LISTEN:{port},bind=127.0.0.1,fork", f"UNIX-CLIENT:{path},type=2,bind={path}.relay"]
    run = partial(trio.run_process, relay, check=False, start_new_session=True)
    process: trio.Process = await nursery.start(run)
    try:
        command = [dig, "-r", "+short", "+notcp", "+tries=5", "+time=2", "@127.0.0.1", "-p", str(port)]
        with trio.fail_after(15):
            result = await trio.run_process([*command, "www.example.com", "CNAME"], capture_stdout=True)
        assert result.stdout == b"web.example.com.\n"
        assert server.statistics().sent >= 1
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # socat has children


# Programs that log


async def test_logger(start: Start, path: str) -> None:
    """The server receives from ``logger`` of util-linux, and the kernel reports its process."""
    logger = program("logger", "bsdutils")
    seen: list[Datagram] = []
    await start(trio_udp.datagram_handler(seen.append), credentials=True)
    await trio.run_process([logger, "-u", path, "-p", "daemon.warning", "-t", "tag", "hello"])
    await trio.run_process([logger, "-u", path, "--rfc5424=notime,nohost", "-p", "local7.debug", "five"])
    await trio.run_process([logger, "-u", path, "-i", "-t", "tag"], stdin=b"one\ntwo\n")
    await trio.testing.wait_all_tasks_blocked()
    payloads = [datagram.payload for datagram in seen]
    assert payloads[0].startswith(b"<28>")
    assert payloads[0].endswith(b" tag: hello")
    assert payloads[1].startswith(b"<191>1 ")
    assert [payload[-3:] for payload in payloads[2:]] == [b"one", b"two"]
    credentials = [datagram.credentials for datagram in seen]
    assert all(found is not None and found.uid == os.geteuid() for found in credentials)
    assert credentials[2] is not None
    assert b"tag[%d]: one" % credentials[2].pid in payloads[2]


async def test_python_s_own_handler(start: Start, path: str) -> None:
    """The server receives from ``logging.handlers.SysLogHandler`` of the standard library."""
    seen: list[bytes] = []
    await start(trio_udp.datagram_handler(lambda datagram: seen.append(datagram.payload)))
    handler = logging.handlers.SysLogHandler(path, facility="auth")
    try:
        handler.emit(logging.LogRecord("x", logging.ERROR, "", 0, "it is %s", ("late",), None))
    finally:
        handler.close()
    await trio.testing.wait_all_tasks_blocked()
    assert seen == [b"<35>it is late\0"]


@pytest.mark.parametrize(
    "address", ["UNIX-SENDTO:{path},bind={path}.socat", "UNIX-CLIENT:{path},type=2,bind={path}.socat"]
)
async def test_socat(start: Start, path: str, address: str) -> None:
    """Each line of socat is answered, from a connected socket and from another."""
    socat = program("socat", "socat")
    server = await start(load("uppercase").uppercase)
    command = [socat, "-t", "0.2", "-", address.format(path=path)]
    with trio.fail_after(10):
        result = await trio.run_process(command, stdin=b"hello\n", capture_stdout=True)
    assert result.stdout == b"HELLO\n"
    assert server.statistics().send_errors == 0


async def test_socat_without_a_name(start: Start, path: str) -> None:
    """A datagram of a socat without a name arrives, and its answer counts as a send error."""
    socat = program("socat", "socat")
    server = await start(echo)
    await trio.run_process([socat, "-u", "-", f"UNIX-SENDTO:{path}"], stdin=b"hello\n")
    await trio.testing.wait_all_tasks_blocked()
    assert (server.statistics().delivered, server.statistics().errors) == (1, {"EDESTADDRREQ": 1})


# The syslog server


@pytest.fixture
def syslog(path: str, capfd: pytest.CaptureFixture[str]) -> Iterator[subprocess.Popen[str]]:
    """The running syslog example."""
    command = [sys.executable, "-u", "-W", "error", str(EXAMPLES / "syslog_unix.py"), path, "--mode", "620"]
    with ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        stack.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline() == f"listening on {path}\n"
        yield process
    assert capfd.readouterr().err == ""


@given(st.binary(max_size=50) | st.from_regex(rb"<[0-9]{1,4}>.*", fullmatch=True))
def test_syslog_messages(message: bytes) -> None:
    """The syslog example turns any payload into one printable line with a facility and a severity."""
    module = load("syslog_unix")
    priority, text = module.parse(message)
    facility, severity = priority.split(".")
    assert facility in module.FACILITIES
    assert severity in module.SEVERITIES
    assert text.isprintable()


def test_syslog_load(path: str, syslog: subprocess.Popen[str]) -> None:
    """The syslog example prints priority, process and text, one line each, and removes its file at SIGTERM."""
    logger = program("logger", "bsdutils")
    assert os.stat(path).st_mode & 0o777 == 0o620
    subprocess.run([logger, "-u", path, "-p", "daemon.warning", "-t", "tag", "hello"], check=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(path)
        sock.send(b"<34>crit\n")
        sock.send("no priority: \n<0>forged \x1b[31m \xff é".encode("latin-1"))
        sock.send(b"<192>no such facility")
        sock.send(b"")
        sock.send(b"<191>last\0")
    assert syslog.stdout is not None
    lines = [syslog.stdout.readline().rstrip("\n") for _ in range(6)]
    ours = f"pid={os.getpid()} uid={os.geteuid()}: "
    assert lines[0].startswith("daemon.warning pid=")
    assert lines[0].endswith(" tag: hello")
    assert lines[1:] == [
        f"auth.crit {ours}crit",
        rf"user.notice {ours}no priority: \n<0>forged \x1b[31m \xff \xe9",
        f"user.notice {ours}<192>no such facility",
        f"user.notice {ours}",
        f"local7.debug {ours}last",
    ]
    syslog.send_signal(signal.SIGTERM)
    assert syslog.wait(10) == 0
    assert not os.path.exists(path)
