"""A service of systemd: its sockets, its notices, and the unit files. systemd itself never runs."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import trio

from tests.conftest import free_port, plain_socket
from trio_udp import Connection, connect, endpoints_from_systemd
from trio_udp.operate.systemd import ServiceManager

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "examples" / "systemd"
RESTARTS = Path(__file__).parent / "restarts.py"

SERVICE = """
import logging, os, signal, trio, trio_udp

async def count(client):
    number = 0
    async for payload in client:
        number += 1
        await client.send(b"%d %s" % (number, payload))

async def main():
    print("blocking:", os.get_blocking(3))
    endpoints = trio_udp.endpoints_from_systemd()
    print("left over:", [name for name in os.environ if name.startswith("LISTEN")])
    print("inherited by children:", [os.get_inheritable(endpoint.socket.fileno()) for endpoint in endpoints])
    await trio_udp.serve_endpoints(count, endpoints, stop_signals={signal.SIGTERM})

logging.basicConfig(format="%(message)s", level=logging.WARNING)
trio.run(main)
"""


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"needs {program}")


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program until the block ends."""
    # Standard error goes where standard output does: the order of their lines is part of the behaviour.
    # A session of its own, to end what the program has started too.
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def socket_activated(*addresses: str) -> Iterator[subprocess.Popen[str]]:
    """Run the service as systemd does: its sockets are bound now, and it starts at the first datagram."""
    listen = [option for address in addresses for option in ("-l", address)]
    options = ["-d", *listen, "-E", f"PYTHONPATH={ROOT}", "--fdname=" + ":".join("ab"[: len(addresses)])]
    with running("systemd-socket-activate", *options, sys.executable, "-u", "-W", "error", "-c", SERVICE) as process:
        assert process.stdout is not None
        for address in addresses:
            assert process.stdout.readline() == f"Listening on {address} as {3 + addresses.index(address)}.\n"
        yield process


def stop(process: subprocess.Popen[str]) -> list[str]:
    """End the service by SIGTERM, and return its output without that of systemd-socket-activate."""
    process.terminate()
    printed, _ = process.communicate(timeout=10)
    assert process.returncode == 0
    lines = printed.splitlines()
    return lines[[line.startswith("blocking:") for line in lines].index(True) :]


@needs("systemd-socket-activate")
def test_the_first_datagram_is_answered() -> None:
    """The datagram that starts the service is answered, and the next one belongs to the same client.

    Replies leave from the address the client sent to. The variables are removed, no child process inherits the sockets,
    and the log warns that they have the kernel's default receive buffer.
    """
    port = free_port()
    addresses = [f"127.0.0.1:{port}", f"127.0.0.2:{port}"]
    with socket_activated(*addresses) as process, plain_socket() as one, plain_socket() as other:
        one.connect(("127.0.0.1", port))
        other.connect(("127.0.0.2", port))
        for peer in (one, other):
            peer.send(b"hello")
        for peer in (one, other):
            assert peer.recv(100) == b"1 hello"
            peer.send(b"again")
            assert peer.recv(100) == b"2 again"
        assert stop(process) == [
            "blocking: True",
            "2 of 2 sockets from systemd have the kernel's default receive buffer of 212992 bytes: datagrams of "
            "bursts, and those that arrive during a restart, may be lost. Write ReceiveBuffer=4M in the .socket unit",
            "left over: []",
            "inherited by children: [False, False]",
        ]


@needs("systemd-socket-activate")
@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_one_socket_for_both_families() -> None:
    """A port without an address makes one socket for IPv4 and IPv6, whose clients are both answered."""
    port = free_port()
    with ExitStack() as stack:
        process = stack.enter_context(socket_activated(f"[::]:{port}"))
        peers = [stack.enter_context(plain_socket(host)) for host in ("127.0.0.9", "::1")]
        for peer, host in zip(peers, ("127.0.0.5", "::1"), strict=True):
            peer.connect((host, port))  # so that it only receives replies from this address
            peer.send(b"hello")
        for peer in peers:
            assert peer.recv(100) == b"1 hello"
            peer.send(b"again")
            assert peer.recv(100) == b"2 again"
        stop(process)


@needs("systemd-socket-activate")
def test_unix_socket(tmp_path: Path) -> None:
    """A Unix datagram socket from systemd is served too."""
    with (
        socket_activated(str(tmp_path / "server")) as process,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer,
    ):
        peer.bind(str(tmp_path / "peer"))
        peer.settimeout(10)
        peer.connect(str(tmp_path / "server"))
        peer.send(b"hello")
        assert peer.recv(100) == b"1 hello"
        stop(process)


# Each case leaves the sockets it wants in `passed`, which become descriptors 3, 4, ..., and may change the variables.
MISTAKES = {
    "no systemd": (
        "del os.environ['LISTEN_PID']",
        "no sockets from systemd: LISTEN_PID is not set. Is there a .socket unit for this service?",
    ),
    "another process": (
        "os.environ['LISTEN_PID'] = '1'",
        "no sockets from systemd: they are for process 1, and this is process PID. A script that starts this program "
        "must exec it",
    ),
    "no number": ("os.environ['LISTEN_FDS'] = 'two'", "LISTEN_FDS must be a number, not 'two'"),
    "none": ("os.environ['LISTEN_FDS'] = '0'", "no sockets from systemd: LISTEN_FDS is 0"),
    "names": (
        "os.environ['LISTEN_FDNAMES'] = 'a:b'",
        "LISTEN_FDS is 1, but LISTEN_FDNAMES has 2 names: 'a:b'",
    ),
    "TCP": (
        "passed = [bind(AF_INET, SOCK_STREAM, ('127.0.0.1', 0))]",
        "web.socket has passed a socket that is not for datagrams (TCP 127.0.0.1:PORT): write ListenDatagram= in the "
        ".socket unit, in place of ListenStream= or another",
    ),
    "a stream": (
        "passed = [bind(AF_UNIX, SOCK_STREAM, '\\0stream-%d' % os.getpid())]",
        "web.socket has passed a socket that is not for datagrams (AF_UNIX SOCK_STREAM b'\\x00stream-PID'): write "
        "ListenDatagram= in the .socket unit, in place of ListenStream= or another",
    ),
    "no socket": (
        "passed = [open('/dev/null')]",
        "descriptor 3 (web.socket) from systemd is not a socket: [Errno 88] Socket operation on non-socket",
    ),
    "closed": (
        "os.close(3); passed = []",
        "descriptor 3 (web.socket) from systemd is not a socket: [Errno 9] Bad file descriptor",
    ),
    "Unix for workers": (
        "passed = [bind(AF_UNIX, SOCK_DGRAM, '\\0datagram-%d' % os.getpid())]; one_port = True",
        "web.socket has passed a socket that is not UDP (AF_UNIX SOCK_DGRAM b'\\x00datagram-PID'): write "
        "ListenDatagram=PORT or ListenDatagram=ADDRESS:PORT in the .socket unit",
    ),
    "two ports for workers": (
        "passed = [bind(AF_INET, SOCK_DGRAM, ('127.0.0.1', 0)), bind(AF_INET6, SOCK_DGRAM, ('::1', 0))]; "
        "one_port = True; os.environ.update(LISTEN_FDS='2', LISTEN_FDNAMES='web.socket:dns.socket')",
        "the sockets from systemd must all have one port, not UDP 127.0.0.1:PORT, UDP [::1]:PORT",
    ),
}

MAKE_MISTAKES = """
import os, re, sys
from socket import AF_INET, AF_INET6, AF_UNIX, SOCK_DGRAM, SOCK_STREAM, socket
from trio_udp.operate.systemd import sockets_from_systemd

def bind(family, kind, address):
    sock = socket(family, kind)
    sock.bind(address)
    return sock

null = os.dup2(os.open("/dev/null", os.O_RDONLY), 100)
for descriptor in range(3, 10):
    os.dup2(null, descriptor)  # what is opened below gets other descriptors
for setup in sys.stdin.read().splitlines():
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="web.socket")
    passed, one_port = [bind(AF_INET, SOCK_DGRAM, ("127.0.0.1", 0))], False
    exec(setup)
    keep = [os.dup2(each.fileno(), 3 + i) for i, each in enumerate(passed)]
    before = dict(os.environ)
    try:
        print("no error:", sockets_from_systemd(one_port=one_port))
    except ValueError as error:
        print(re.sub(r"(?<=:)\\d{4,5}(?!\\d)", "PORT", str(error)).replace(str(os.getpid()), "PID"))
    assert os.environ == before
    for descriptor in keep:
        os.fstat(descriptor)  # it is still open
    os.dup2(null, 3)
"""


def test_mistakes() -> None:
    """Without sockets to serve, the error says in one line what to do, and nothing has changed."""
    setups = "\n".join(setup for setup, _ in MISTAKES.values())
    command = [sys.executable, "-c", MAKE_MISTAKES]
    done = subprocess.run(command, input=setups, capture_output=True, text=True, timeout=30)
    assert done.stderr == ""
    assert dict(zip(MISTAKES, done.stdout.splitlines(), strict=True)) == {
        name: message for name, (_, message) in MISTAKES.items()
    }


def test_without_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called in a process that systemd has not started, endpoints_from_systemd raises ValueError."""
    monkeypatch.delenv("LISTEN_PID", raising=False)
    with pytest.raises(ValueError, match="no sockets from systemd"):
        endpoints_from_systemd()


@pytest.fixture(params=["path", "abstract"])
def manager_socket(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[socket.socket]:
    """The socket of a service manager, which receives notices."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@trio-udp-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address.replace("@", "\0", 1))
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        yield sock


def test_notices(manager_socket: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each notice is one datagram with the assignments of sd_notify(3), in order; the variables are removed."""
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    manager = ServiceManager.from_environment()
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ)
    assert manager.watchdog_interval == 15
    manager.notify(READY=1, STATUS="serving\nSTOPPING=1", MAINPID=os.getpid())
    assert manager_socket.recv(1000) == f"READY=1\nSTATUS=serving STOPPING=1\nMAINPID={os.getpid()}".encode()
    manager.notify(WATCHDOG=1)
    manager.notify(STOPPING=1)
    assert [manager_socket.recv(1000), manager_socket.recv(1000)] == [b"WATCHDOG=1", b"STOPPING=1"]
    manager.notify()
    with pytest.raises(BlockingIOError):
        manager_socket.recv(1000)


def test_reloading_has_a_time_stamp(manager_socket: socket.socket) -> None:
    """RELOADING=1 has the monotonic time in microseconds, as Type=notify-reload requires."""
    manager = ServiceManager.from_environment()
    before = time.clock_gettime(time.CLOCK_MONOTONIC)
    manager.notify(RELOADING=1)
    first, second = manager_socket.recv(1000).decode().split("\n")
    assert first == "RELOADING=1"
    name, _, value = second.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before - 0.001 <= int(value) / 1_000_000 <= time.clock_gettime(time.CLOCK_MONOTONIC)


@pytest.mark.parametrize(
    ("microseconds", "pid", "interval"),
    [("3000000", None, 1.5), (None, None, None), ("3000000", "1", None), ("0", None, None), ("soon", None, None)],
)
def test_watchdog_interval(
    monkeypatch: pytest.MonkeyPatch, microseconds: str | None, pid: str | None, interval: float | None
) -> None:
    """The watchdog is fed twice as often as needed, and not if it is off or watches another process."""
    for name, value in (("WATCHDOG_USEC", microseconds), ("WATCHDOG_PID", pid)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert ServiceManager.from_environment().watchdog_interval == interval


def test_no_manager(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without a service manager, a program sends no notices, and logs nothing."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    ServiceManager.from_environment().notify(READY=1)
    assert caplog.messages == []


@pytest.mark.parametrize("address", ["/nowhere/notify", "@nobody-listens", "vsock:2:1234", "/" + 200 * "x"])
def test_manager_is_gone(address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Notices to a socket that is gone or unusable do no harm; the first one logs a warning."""
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    manager = ServiceManager.from_environment()
    manager.notify(READY=1)
    manager.notify(STATUS="well")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.messages[0].startswith(f"Cannot notify the service manager at {address}: ")


def test_manager_is_slow(manager_socket: socket.socket) -> None:
    """A notice that meets a full socket does not wait; the next notice includes its assignments."""
    manager = ServiceManager.from_environment()
    filled = 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other, suppress(BlockingIOError):
        other.setblocking(False)
        while True:
            other.sendto(b"X=1", manager_socket.getsockname())
            filled += 1
    manager.notify(READY=1, STATUS="starting")
    manager.notify(STATUS="serving")
    assert {manager_socket.recv(1000) for _ in range(filled)} == {b"X=1"}
    with pytest.raises(BlockingIOError):
        manager_socket.recv(1000)
    manager.notify()
    assert manager_socket.recv(1000) == b"READY=1\nSTATUS=serving"


async def test_restarts_lose_nothing() -> None:
    """A service that is restarted twenty times under load answers every datagram, in order."""
    clients, interval = 10, 0.02
    with running(sys.executable, "-W", "error", str(RESTARTS), "20") as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        sent, answered, restarted = Counter[int](), Counter[int](), trio.Event()

        async def talk(number: int, connection: Connection) -> None:
            async with connection, trio.open_nursery() as nursery:
                nursery.start_soon(listen, number, connection)
                while not restarted.is_set():
                    await connection.send(b"%d" % sent[number])
                    sent[number] += 1
                    await trio.sleep(interval)
                await connection.send(b"last")

        async def listen(number: int, connection: Connection) -> None:
            while (payload := await connection.receive()) != b"last":
                assert payload == b"%d" % answered[number]
                answered[number] += 1

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for number in range(clients):
                    nursery.start_soon(talk, number, await connect("127.0.0.1", port))
                line = await trio.to_thread.run_sync(process.stdout.readline, abandon_on_cancel=True)
                assert line == "restarted\n"
                restarted.set()
        assert answered == sent
        assert process.communicate(timeout=10)[0] == ""
        assert process.returncode == 0


@needs("systemd-analyze")
def test_unit_files() -> None:
    """systemd-analyze finds nothing wrong with the example's units."""
    units = sorted(map(str, UNITS.iterdir()))
    assert [Path(unit).name for unit in units] == ["uppercase.service", "uppercase.socket"]
    assert verify(*units) == ""


@needs("systemd-analyze")
def test_unknown_key_in_a_unit_is_noticed(tmp_path: Path) -> None:
    """The check of the unit files reports a key that systemd does not know, though its exit status is 0."""
    text = (UNITS / "uppercase.socket").read_text().replace("ReusePort", "ReusedPort")
    (tmp_path / "uppercase.socket").write_text(text)
    (tmp_path / "uppercase.service").write_text((UNITS / "uppercase.service").read_text())
    assert "Unknown key 'ReusedPort' in section [Socket]" in verify(str(tmp_path / "uppercase.socket"))


def verify(*units: str) -> str:
    command = ["systemd-analyze", "verify", *units]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30)
    assert done.returncode == 0
    return done.stdout
