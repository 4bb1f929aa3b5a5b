"""Every example script, run as a user would run it, and talked to over real sockets."""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from typing import TypeAlias

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SERVERS = ["uppercase", "echo_options", "time_server", "slow_work", "refusing", "errors", "login", "service"]

TIMEOUT = 20.0  # seconds for anything that a test waits for; nothing comes near it unless it has failed

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send SIGTERM to be handled")


class Example:
    """A running example server. Its sockets, and those of its peers, are closed at the end of the test."""

    def __init__(self, process: subprocess.Popen[str], cleanup: ExitStack) -> None:
        assert process.stdout is not None
        self._process = process
        self._stdout = process.stdout
        self._cleanup = cleanup
        self.listening = self.next_line()
        self.port = int(self.listening.rpartition(":")[2])

    def peer(self, host: str = "127.0.0.1") -> socket.socket:
        """A new client: a socket connected to the server."""
        sock = self._cleanup.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.settimeout(TIMEOUT)
        sock.bind((host, 0))
        sock.connect(("127.0.0.1", self.port))
        return sock

    def next_line(self) -> str:
        """The next line on standard output; empty when the process has ended."""
        return self._stdout.readline().rstrip("\n")

    def signal(self, signal_number: Signals) -> None:
        self._process.send_signal(signal_number)

    def stop(self, signal_number: Signals = SIGTERM) -> list[str]:
        """Send a signal, and return what the server prints from now on. It must exit with status 0."""
        self.signal(signal_number)
        return self.wait()

    def wait(self) -> list[str]:
        """Wait until the server has ended with exit status 0, and return what it prints until then."""
        lines = self._stdout.read().splitlines()
        assert self._process.wait() == 0
        return lines

    def finish(self) -> None:
        """Stop the server if the test has not. That it has ended by itself does not pass for a success."""
        if self._process.poll() is None:
            self.signal(SIGTERM)
        self.wait()


Start: TypeAlias = Callable[..., Example]


@pytest.fixture
def start(capfd: pytest.CaptureFixture[str]) -> Iterator[Start]:
    """Start example servers: ``start("uppercase", "--host", "127.0.0.1")``. At the end of the test each must exit with
    status 0, and must not have written to standard error what the test has not read from ``capfd``."""
    with ExitStack() as cleanup:

        def start(name: str, *arguments: str, port: int = 0) -> Example:
            # -u: its lines are read here while it runs. -W error: an example has no warnings.
            command = [sys.executable, "-u", "-W", "error", str(EXAMPLES / f"{name}.py"), str(port), *arguments]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            cleanup.enter_context(process)
            # Reading a pipe has no timeout: whatever a test waits for ends when the process does.
            watchdog = threading.Timer(TIMEOUT, process.kill)
            watchdog.start()
            cleanup.callback(watchdog.cancel)
            try:
                example = Example(process, cleanup)
            except BaseException:
                process.kill()
                raise
            cleanup.callback(example.finish)
            return example

        yield start
    assert capfd.readouterr().err == ""


def ask(peer: socket.socket, payload: bytes) -> bytes:
    """Send a datagram and return the next one that arrives."""
    peer.send(payload)
    return peer.recv(65_535)


def waiting(peer: socket.socket) -> list[bytes]:
    """What has arrived at a socket and was not received yet."""
    peer.setblocking(False)
    payloads = []
    try:
        while True:
            payloads.append(peer.recv(65_535))
    except BlockingIOError:
        return payloads
    finally:
        peer.settimeout(TIMEOUT)


@pytest.mark.parametrize("name", SERVERS)
def test_listens_on_all_interfaces_and_stops_at_sigint(start: Start, name: str) -> None:
    """Without options an example listens on every interface, and ends well when interrupted."""
    example = start(name)
    printed = [example.listening, *example.stop(SIGINT)]
    hosts = ["0.0.0.0", "::"] if socket.has_dualstack_ipv6() else ["0.0.0.0"]
    listening = [line for line in printed if line.startswith("listening")]
    assert sorted(listening) == [f"listening on {host}:{example.port}" for host in hosts]


def test_uppercase(start: Start) -> None:
    """The uppercase server shouts back what two clients send, each to its sender, and prints it."""
    example = start("uppercase", "--host", "127.0.0.1")
    assert example.listening == f"listening on 127.0.0.1:{example.port}"
    one, two = example.peer(), example.peer()
    assert ask(one, b"hello world\n") == b"HELLO WORLD\n"
    assert ask(two, b"") == b""
    assert ask(one, b"\xff\x00z") == b"\xff\x00Z"
    assert example.stop() == [
        r"127.0.0.1 wrote b'hello world\n'",
        "127.0.0.1 wrote b''",
        r"127.0.0.1 wrote b'\xff\x00z'",
    ]


def test_echo_options_reports_what_the_kernel_granted(start: Start) -> None:
    """The echo server prints the options of its socket as they are in force, and every datagram both ways."""
    example = start("echo_options", "--host", "127.0.0.1", "--receive-buffer", "8192", "--reuse-port")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as twin:
        twin.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        twin.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        names = ["SO_RCVBUF", "SO_SNDBUF", "SO_REUSEADDR", "SO_REUSEPORT", "SO_BROADCAST"]
        expected = [f"  {name} = {twin.getsockopt(socket.SOL_SOCKET, getattr(socket, name))}" for name in names]
    assert [example.next_line() for _ in names] == expected

    peer = example.peer()
    assert ask(peer, b"hello") == b"hello"
    address = peer.getsockname()
    assert example.stop() == [f"received b'hello' from {address}", f"sent b'hello' to {address}"]


def test_echo_options_shares_its_port(start: Start) -> None:
    """Two echo servers with --reuse-port listen on one port, and each client is answered by one of them."""
    first = start("echo_options", "--host", "127.0.0.1", "--reuse-port")
    second = start("echo_options", "--host", "127.0.0.1", "--reuse-port", port=first.port)
    assert second.listening == first.listening
    peers = [first.peer() for _ in range(8)]
    for peer in peers:
        peer.send(b"hello")
    assert [peer.recv(100) for peer in peers] == [b"hello"] * 8
    printed = first.stop() + second.stop()
    received = [line for line in printed if line.startswith("received")]
    assert sorted(received) == sorted(f"received b'hello' from {peer.getsockname()}" for peer in peers)


@pytest.mark.parametrize("payload", [b"", b"what time is it?", bytes(range(256))], ids=["empty", "text", "garbage"])
def test_time_server(start: Start, payload: bytes) -> None:
    """The time server answers any datagram with the time, and so the next one."""
    example = start("time_server", "--host", "127.0.0.1")
    peer = example.peer()
    for _ in range(2):
        before = time.time()
        reply = ask(peer, payload)
        assert reply.decode() in [time.ctime(second) for second in range(int(before), int(time.time()) + 1)]


@pytest.mark.parametrize(
    ("request_", "answer"),
    [(b"sleep 0.5", b"slept 0.5 s\n"), (b"prime 100000000000031", b"100000000000031 is prime\n")],
    ids=["in a thread", "in a process"],
)
def test_slow_work_lets_others_pass(start: Start, request_: bytes, answer: bytes) -> None:
    """While slow work goes on for one client another is answered; the slow one's answers come in order."""
    example = start("slow_work", "--host", "127.0.0.1")
    slow, quick = example.peer(), example.peer()
    slow.send(request_)
    slow.send(b"ping")
    assert ask(quick, b"ping") == b"ping"
    assert waiting(slow) == []
    assert [slow.recv(100), slow.recv(100)] == [answer, b"ping"]


def test_slow_work_gives_up(start: Start) -> None:
    """Work that takes longer than the timeout is not answered, in a thread or in a process; what follows it is."""
    example = start("slow_work", "--host", "127.0.0.1", "--timeout", "0.3")
    in_thread, in_process = example.peer(), example.peer()
    in_thread.send(b"sleep 60")
    in_process.send(b"prime 2305843009213693951")  # this one would take minutes
    assert ask(in_thread, b"ping") == b"ping"
    assert ask(in_process, b"ping") == b"ping"


def test_slow_work_says_what_is_wrong(start: Start) -> None:
    """Numbers that are none get an error as their answer."""
    example = start("slow_work", "--host", "127.0.0.1")
    peer = example.peer()
    assert ask(peer, b"sleep long") == b"could not convert string to float: b'long'\n"
    assert ask(peer, b"prime \xff") == b"invalid literal for int() with base 10: b'\\xff'\n"
    assert ask(peer, b"sleep") == b"sleep"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the loopback interface has only 127.0.0.1")
def test_refusing_counts_what_it_turns_away(start: Start) -> None:
    """Strangers from other networks, and those without the prefix, get no answer and are counted."""
    example = start("refusing", "--host", "127.0.0.1", "--allow", "127.0.0.2/32", "--allow", "::1/128")
    stranger, friend = example.peer(), example.peer("127.0.0.2")
    stranger.send(b"EX1 let me in")
    stranger.send(b"")
    friend.send(b"no prefix")
    # Whatever was sent before this to the same socket has been dealt with when the answer comes.
    assert ask(friend, b"EX1 hello") == b"hello"
    assert waiting(stranger) == waiting(friend) == []
    assert example.stop() == ["received: 4", "refused by accept: 3", "turned out by the handler: 0"]


def test_refusing_turns_a_known_client_out(start: Start) -> None:
    """A client that stops using the prefix is told, once, and from then on is a stranger again."""
    example = start("refusing", "--host", "127.0.0.1")
    peer, other = example.peer(), example.peer()
    assert ask(peer, b"EX1 hello") == b"hello"
    assert ask(peer, b"hello") == b"refused\n"
    peer.send(b"hello")
    assert ask(other, b"EX1 me too") == b"me too"
    assert waiting(peer) == []
    assert ask(peer, b"EX1 sorry") == b"sorry"
    assert example.stop() == ["received: 5", "refused by accept: 1", "turned out by the handler: 1"]


def test_refusing_turns_a_burst_out_once(start: Start) -> None:
    """However fast it goes on without the prefix, a client is told once."""
    example = start("refusing", "--host", "127.0.0.1")
    peer, other = example.peer(), example.peer()
    assert ask(peer, b"EX1 hello") == b"hello"
    for _ in range(10):
        peer.send(b"hello")
    assert ask(other, b"EX1 me too") == b"me too"
    lines = example.stop()
    assert waiting(peer) == [b"refused\n"]
    assert (lines[0], lines[2]) == ("received: 12", "turned out by the handler: 1")


def test_errors_of_the_peer_do_not_end_the_conversation(start: Start) -> None:
    """A malformed payload gets an error as its answer, and the client's total is what it was."""
    example = start("errors", "--host", "127.0.0.1")
    peer = example.peer()

    def exchange(payload: bytes) -> object:
        return json.loads(ask(peer, payload))

    assert exchange(b'{"add": 6}\n') == {"total": 6.0}
    assert exchange(b"rubbish") == {"error": "Expecting value: line 1 column 1 (char 0)"}
    assert exchange(b"") == {"error": "Expecting value: line 1 column 1 (char 0)"}
    assert exchange(b'{"add": "one"}') == {"error": "expected add or divide, and a number"}
    assert exchange(b"\xff\xff\xff\xff").keys() == {"error"}  # type: ignore[attr-defined]
    assert exchange(b"[" * 9_000).keys() == {"error"}  # type: ignore[attr-defined]
    assert exchange(b'{"divide": 4}') == {"total": 1.5}
    assert example.stop() == ["failures: {}"]


def test_errors_of_the_handler_end_one_client(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    """An exception in the handler is logged, counted and told to its client, who begins anew; others do not notice."""
    example = start("errors", "--host", "127.0.0.1")
    peer, other = example.peer(), example.peer()
    assert ask(peer, b'{"add": 6}') == ask(other, b'{"add": 6}') == b'{"total": 6.0}\n'
    assert ask(peer, b'{"divide": 0}') == b'{"error": "internal"}\n'
    assert ask(peer, b'{"add": 1}') == b'{"total": 1.0}\n'
    assert ask(other, b'{"add": 1}') == b'{"total": 7.0}\n'
    assert example.stop() == ["failures: {'ZeroDivisionError': 1}"]
    log = capfd.readouterr().err
    assert log.startswith(f"Handler of client {peer.getsockname()} failed\nTraceback")
    assert re.findall("^ZeroDivisionError", log, re.MULTILINE) == ["ZeroDivisionError"]


def log_in(peer: socket.socket) -> None:
    assert ask(peer, b"hello\n") == b"user name? "
    assert ask(peer, b"ada\n") == b"password? "
    assert ask(peer, b"lovelace\n") == b"welcome, ada\n"


def test_login(start: Start) -> None:
    """After the login commands are echoed until "quit" ends the conversation; the next begins with a login again."""
    example = start("login", "--host", "127.0.0.1")
    peer = example.peer()
    for _ in range(2):
        log_in(peer)
        assert ask(peer, b"look\n") == b"ada: look\n"
        assert ask(peer, b"") == b"ada: "
        assert ask(peer, b"quit\n") == b"goodbye\n"


def test_login_allows_three_tries(start: Start) -> None:
    """Wrong names and wrong passwords look the same, and after three of them the conversation ends."""
    example = start("login", "--host", "127.0.0.1")
    peer, other = example.peer(), example.peer()
    assert ask(peer, b"hello") == b"user name? "
    for user, password in [(b"ada", b"Lovelace"), (b"bob", b"")]:
        assert ask(peer, user) == b"password? "
        assert ask(peer, password) == b"wrong\nuser name? "
    log_in(other)  # meanwhile
    assert ask(peer, b"\xff") == b"password? "
    assert ask(peer, b"lovelace") == b"goodbye: wrong three times\n"
    log_in(peer)


def test_login_has_a_time_limit(start: Start) -> None:
    """A question that is not answered in time ends the login."""
    example = start("login", "--host", "127.0.0.1", "--answer-time", "0.2")
    peer = example.peer()
    assert ask(peer, b"hello") == b"user name? "
    assert peer.recv(100) == b"goodbye: that took too long\n"


def test_login_changes_the_idle_timeout(start: Start) -> None:
    """Who is logged in may be silent for as long as --idle-time says, and is told when that is over."""
    example = start("login", "--host", "127.0.0.1", "--idle-time", "0.2")
    peer = example.peer()
    log_in(peer)
    assert peer.recv(100) == b"goodbye: idle\n"


def test_login_may_be_finished_while_the_server_stops(start: Start) -> None:
    """A server told to stop says goodbye to who is logged in, and lets a login that has begun come to its end."""
    example = start("login", "--host", "127.0.0.1")
    logged_in, logging_in = example.peer(), example.peer()
    log_in(logged_in)
    assert ask(logging_in, b"hello") == b"user name? "
    example.signal(SIGTERM)
    assert logged_in.recv(100) == b"goodbye: stopping\n"  # so the server is stopping by now
    assert ask(logging_in, b"ada") == b"password? "
    assert ask(logging_in, b"lovelace") == b"welcome, ada\n"
    assert logging_in.recv(100) == b"goodbye: stopping\n"
    assert example.wait() == []


def test_service_closes_its_resource_after_the_drain(start: Start, tmp_path: Path) -> None:
    """What a stopping service has taken in is stored and answered before the database is closed."""
    path = tmp_path / "notes.db"
    example = start("service", "--host", "127.0.0.1", "--database", str(path))
    peer = example.peer()
    notes = [b"note %d" % number for number in range(1, 101)]
    for note in notes:
        peer.send(note)
    first = peer.recv(100)
    # The other notes wait in the client's inbox, except those that come later than the signal.
    assert example.stop() == ["database closed"]
    answers = [first, *waiting(peer)]
    assert answers == [b"note %d\n" % number for number in range(1, len(answers) + 1)]
    with closing(sqlite3.connect(path)) as database:
        stored = [note for (note,) in database.execute("SELECT note FROM notes ORDER BY number")]
    assert stored == notes[: len(answers)]


def test_service_shares_its_resource(start: Start) -> None:
    """Two clients write into the same database."""
    example = start("service", "--host", "127.0.0.1")
    one, two = example.peer(), example.peer()
    answers = [ask(one, b"a"), ask(two, b""), ask(one, b"\xff")]
    assert answers == [b"note 1\n", b"note 2\n", b"note 3\n"]
    assert example.stop() == ["database closed"]


def run_client(port: int, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / "client.py"), "--port", str(port), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def test_client_sends_its_arguments(start: Start) -> None:
    """The client sends every argument as one datagram and prints the answers."""
    result = run_client(start("uppercase", "--host", "127.0.0.1").port, "hello", "two words")
    assert (result.stdout, result.stderr, result.returncode) == ("HELLO\nTWO WORDS\n", "", 0)


def test_client_sends_its_input(start: Start) -> None:
    """Without arguments the client sends every line of its input, empty ones too."""
    result = run_client(start("uppercase", "--host", "127.0.0.1").port, stdin="hello\n\nworld\n")
    assert (result.stdout, result.stderr, result.returncode) == ("HELLO\n\nWORLD\n", "", 0)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A socket for a test that is the server itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(TIMEOUT)
        yield sock


def test_client_tries_again(server: socket.socket) -> None:
    """The client sends a line again when no answer comes."""
    received = []

    def answer_the_third() -> None:
        for _ in range(3):
            payload, address = server.recvfrom(100)
            received.append(payload)
        server.sendto(b"at last\n", address)

    thread = threading.Thread(target=answer_the_third)
    thread.start()
    result = run_client(server.getsockname()[1], "--timeout", "0.1", "hello")
    thread.join()
    assert received == [b"hello"] * 3
    assert (result.stdout, result.stderr, result.returncode) == ("at last\n", "", 0)


def test_client_gives_up(server: socket.socket) -> None:
    """After three tries the client says that there was no answer, and does not go on to the next line."""
    result = run_client(server.getsockname()[1], "--timeout", "0.05", "hello", "world")
    assert (result.stdout, result.stderr, result.returncode) == ("", "no answer to 'hello' after 3 tries\n", 1)
    assert waiting(server) == [b"hello"] * 3


def test_client_says_that_nobody_listens(server: socket.socket) -> None:
    """A refusal by the server's machine is reported at once."""
    port = server.getsockname()[1]
    server.close()
    result = run_client(port, "--timeout", "60", "hello")
    assert (result.stdout, result.stderr, result.returncode) == ("", f"nobody listens on 127.0.0.1 port {port}\n", 1)
