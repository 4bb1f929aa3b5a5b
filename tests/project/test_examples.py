"""Every example, run as a user would run it, by the command line or as a script, over real sockets."""

from __future__ import annotations

import calendar
import json
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from signal import SIGINT, SIGTERM

import pytest

from .conftest import EXAMPLES, TIMEOUT, Serve, Start, ask, waiting, without_signals

SCRIPTS = [
    "uppercase",
    "time_server",
    "slow_work",
    "refusing",
    "errors",
    "login",
    "service",
    "lobby",
    "game_server",
    "collector",
]
SCRIPTS_THAT_PRINT = [
    "echo_options",
    "chat_room",
    "reliable",
    "relay",
    "sntp_server",
    "stun_server",
    "tftp_server",
    "syslog_collector",
    "coap_server",
]

pytestmark = without_signals


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_serves_until_sigint(serve: Serve, name: str) -> None:
    """An example that runs as a script serves on every interface, and exits with status 0 when interrupted."""
    example = serve(name)
    assert example.host == "0.0.0.0"
    example.stop(SIGINT)


@pytest.mark.parametrize(
    "arguments",
    [
        ["chat_room:chat", "--accept", f"{EXAMPLES}/chat_room.py:accept"],
        ["reliable:handler"],
        ["relay:to_dns"],
        ["dns_server:handler"],
        ["refusing:handler", "--accept", f"{EXAMPLES}/refusing.py:gate.accept"],
        ["errors:handler"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_runs_with_the_command_line(serve: Serve, arguments: list[str]) -> None:
    """An example that is tested as a script runs with the command line too."""
    serve(*arguments).stop()


@pytest.mark.parametrize("name", SCRIPTS_THAT_PRINT)
def test_listens_on_all_interfaces_and_stops_at_sigint(start: Start, name: str) -> None:
    """An example that prints its addresses listens on every interface, and exits with status 0 when interrupted."""
    example = start(name)
    printed = [example.listening, *example.stop(SIGINT)]
    hosts = ["0.0.0.0", "::"] if socket.has_dualstack_ipv6() else ["0.0.0.0"]
    listening = [line for line in printed if line.startswith("listening")]
    assert sorted(listening) == [f"listening on {host}:{example.port}" for host in hosts]


def test_uppercase(serve: Serve) -> None:
    """The uppercase server answers each of two clients with its own datagram in upper case, and prints it."""
    example = serve("uppercase:uppercase")
    one, two = example.peer(), example.peer()
    assert ask(one, b"hello world\n") == b"HELLO WORLD\n"
    assert ask(two, b"") == b""
    assert ask(one, b"\xff\x00z") == b"\xff\x00Z"
    assert example.stop() == [
        rf"{one.getsockname()} wrote b'hello world\n'",
        f"{two.getsockname()} wrote b''",
        rf"{one.getsockname()} wrote b'\xff\x00z'",
    ]


def test_echo_options_sets_and_prints_options(start: Start) -> None:
    """The echo server prints the actual options of its sockets, and every datagram in both directions."""
    example = start("echo_options")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as twin:
        twin.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100_000)
        twin.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        names = ["SO_RCVBUF", "SO_SNDBUF", "SO_REUSEADDR", "SO_REUSEPORT", "SO_BROADCAST"]
        expected = [f"  {name} = {twin.getsockopt(socket.SOL_SOCKET, getattr(socket, name))}" for name in names]
    assert [example.next_line() for _ in names] == expected
    if socket.has_dualstack_ipv6():
        assert example.next_line() == f"listening on :::{example.port}"
        assert [example.next_line() for _ in names] == expected

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.settimeout(TIMEOUT)
        peer.connect(("127.0.0.1", example.port))
        assert ask(peer, b"hello") == b"hello"
        address = peer.getsockname()
    assert example.stop() == [f"received b'hello' from {address}", f"sent b'hello' to {address}"]


def test_echo_on_two_workers(serve: Serve) -> None:
    """The echo runs unchanged on two workers, and each client is answered by one of them."""
    example = serve("echo_options:echo", "--workers", "2")
    peers = [example.peer() for _ in range(8)]
    for peer in peers:
        peer.send(b"hello")
    assert [peer.recv(100) for peer in peers] == [b"hello"] * 8
    # Two processes write to one pipe, so a line may begin before the other process has ended its own.
    received = re.findall(r"received b'hello' from (\(.*?\))", "\n".join(example.stop()))
    assert sorted(received) == sorted(str(peer.getsockname()) for peer in peers)


@pytest.mark.parametrize("payload", [b"", b"what time is it?", bytes(range(256))], ids=["empty", "text", "garbage"])
def test_time_server(serve: Serve, payload: bytes) -> None:
    """The time server answers every datagram with the time."""

    def seconds(text: str) -> int:
        # Of the clock that the example reads: time.ctime() may lag behind time.time().
        return calendar.timegm(time.strptime(text))

    example = serve("time_server:tell_time")
    peer = example.peer()
    for _ in range(2):
        before = seconds(time.ctime())
        assert before <= seconds(ask(peer, payload).decode()) <= seconds(time.ctime())


@pytest.mark.parametrize(
    ("request_", "answer"),
    [(b"sleep 0.5", b"slept 0.5 s\n"), (b"prime 100000000000031", b"100000000000031 is prime\n")],
    ids=["in a thread", "in a process"],
)
def test_slow_work_lets_others_pass(serve: Serve, request_: bytes, answer: bytes) -> None:
    """During one client's slow work another client gets its answers; each client's answers stay in order."""
    example = serve("slow_work:handler")
    slow, quick = example.peer(), example.peer()
    slow.send(request_)
    slow.send(b"ping")
    assert ask(quick, b"ping") == b"ping"
    assert waiting(slow) == []
    assert [slow.recv(100), slow.recv(100)] == [answer, b"ping"]


def test_slow_work_gives_up(serve: Serve) -> None:
    """Work in a thread or a process that exceeds the timeout is not answered; the next datagram is."""
    example = serve("slow_work:handler", TIMEOUT="0.3")
    in_thread, in_process = example.peer(), example.peer()
    in_thread.send(b"sleep 60")
    in_process.send(b"prime 2305843009213693951")  # this one would take minutes
    assert ask(in_thread, b"ping") == b"ping"
    assert ask(in_process, b"ping") == b"ping"


def test_slow_work_answers_with_an_error(serve: Serve) -> None:
    """A payload that is not a number gets an error message as its answer."""
    example = serve("slow_work:handler")
    peer = example.peer()
    assert ask(peer, b"sleep long") == b"could not convert string to float: b'long'\n"
    assert ask(peer, b"prime \xff") == b"invalid literal for int() with base 10: b'\\xff'\n"
    assert ask(peer, b"sleep") == b"sleep"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the loopback interface has only 127.0.0.1")
def test_refusing_counts_refused_datagrams(serve: Serve) -> None:
    """Strangers without the prefix get no answer, those from other networks a refusal; all are counted."""
    example = serve("refusing", ALLOW="127.0.0.2/32 ::1/128")
    stranger, friend = example.peer(), example.peer("127.0.0.2")
    stranger.send(b"")
    friend.send(b"no prefix")
    assert ask(stranger, b"EX1 let me in") == b"not here\n"
    # When the answer arrives, all earlier datagrams to the same socket have been handled.
    assert ask(friend, b"EX1 hello") == b"hello"
    assert waiting(stranger) == waiting(friend) == []
    assert example.stop() == [
        "received: 4",
        "refused by accept: 2",
        "answered by accept: 1",
        "turned out by the handler: 0",
    ]


def test_refusing_turns_a_known_client_out(serve: Serve) -> None:
    """A client that stops using the prefix gets one refusal, and is a stranger from then on."""
    example = serve("refusing")
    peer, other = example.peer(), example.peer()
    assert ask(peer, b"EX1 hello") == b"hello"
    assert ask(peer, b"hello") == b"refused\n"
    peer.send(b"hello")
    assert ask(other, b"EX1 me too") == b"me too"
    assert waiting(peer) == []
    assert ask(peer, b"EX1 sorry") == b"sorry"
    assert example.stop() == [
        "received: 5",
        "refused by accept: 1",
        "answered by accept: 0",
        "turned out by the handler: 1",
    ]


def test_refusing_turns_a_burst_out_once(serve: Serve) -> None:
    """A client that sends a burst without the prefix gets one refusal."""
    example = serve("refusing")
    peer, other = example.peer(), example.peer()
    assert ask(peer, b"EX1 hello") == b"hello"
    for _ in range(10):
        peer.send(b"hello")
    assert ask(other, b"EX1 me too") == b"me too"
    lines = example.stop()
    assert waiting(peer) == [b"refused\n"]
    assert (lines[0], lines[3]) == ("received: 12", "turned out by the handler: 1")


def test_errors_of_the_peer_do_not_end_the_conversation(serve: Serve) -> None:
    """A malformed payload gets an error as its answer, and the client's total does not change."""
    example = serve("errors")
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


def test_errors_of_the_handler_end_one_client(serve: Serve) -> None:
    """An exception in the handler is logged, counted and answered, and only that client starts again."""
    example = serve("errors")
    peer, other = example.peer(), example.peer()
    assert ask(peer, b'{"add": 6}') == ask(other, b'{"add": 6}') == b'{"total": 6.0}\n'
    assert ask(peer, b'{"divide": 0}') == b'{"error": "internal"}\n'
    assert ask(peer, b'{"add": 1}') == b'{"total": 1.0}\n'
    assert ask(other, b'{"add": 1}') == b'{"total": 7.0}\n'
    assert example.stop() == ["failures: {'ZeroDivisionError': 1}"]
    assert example.errors[0] == f"ERROR:trio_udp:Handler of client {peer.getsockname()} failed"
    assert example.errors[1].startswith("Traceback")
    assert [line for line in example.errors if line.startswith("ZeroDivisionError")] == example.errors[-1:]
    example.errors.clear()


def log_in(peer: socket.socket) -> None:
    assert ask(peer, b"hello\n") == b"user name? "
    assert ask(peer, b"ada\n") == b"password? "
    assert ask(peer, b"lovelace\n") == b"welcome, ada\n"


def test_login(serve: Serve) -> None:
    """After the login, lines are echoed until "quit" ends the conversation; the next one starts with a login again."""
    example = serve("login:handler")
    peer = example.peer()
    for _ in range(2):
        log_in(peer)
        assert ask(peer, b"look\n") == b"ada: look\n"
        assert ask(peer, b"") == b"ada: "
        assert ask(peer, b"quit\n") == b"goodbye\n"


def test_login_allows_three_tries(serve: Serve) -> None:
    """Wrong names and wrong passwords look the same, and after three of them the conversation ends."""
    example = serve("login:handler")
    peer, other = example.peer(), example.peer()
    assert ask(peer, b"hello") == b"user name? "
    for user, password in [(b"ada", b"Lovelace"), (b"bob", b"")]:
        assert ask(peer, user) == b"password? "
        assert ask(peer, password) == b"wrong\nuser name? "
    log_in(other)  # meanwhile
    assert ask(peer, b"\xff") == b"password? "
    assert ask(peer, b"lovelace") == b"goodbye: wrong three times\n"
    log_in(peer)


def test_login_has_a_time_limit(serve: Serve) -> None:
    """A question that is not answered in time ends the login."""
    example = serve("login:handler", ANSWER_TIME="0.2")
    peer = example.peer()
    assert ask(peer, b"hello") == b"user name? "
    assert peer.recv(100) == b"goodbye: that took too long\n"


def test_login_changes_the_idle_timeout(serve: Serve) -> None:
    """A client that has logged in may be silent for IDLE_TIME seconds, and then gets a goodbye."""
    example = serve("login:handler", IDLE_TIME="0.2")
    peer = example.peer()
    log_in(peer)
    assert peer.recv(100) == b"goodbye: idle\n"


def test_login_may_be_finished_while_the_server_stops(serve: Serve) -> None:
    """A stopping server says goodbye to logged-in clients, and lets a login in progress finish."""
    example = serve("login:handler")
    logged_in, logging_in = example.peer(), example.peer()
    log_in(logged_in)
    assert ask(logging_in, b"hello") == b"user name? "
    example.signal(SIGTERM)
    assert logged_in.recv(100) == b"goodbye: stopping\n"  # so the server is already stopping
    assert ask(logging_in, b"ada") == b"password? "
    assert ask(logging_in, b"lovelace") == b"welcome, ada\n"
    assert logging_in.recv(100) == b"goodbye: stopping\n"
    assert example.wait() == []


def test_service_closes_its_resource_after_the_drain(serve: Serve, tmp_path: Path) -> None:
    """A stopping service stores and answers every datagram that has arrived, and then closes the database."""
    path = tmp_path / "notes.db"
    example = serve("service:service", "--factory", DATABASE=str(path))
    peer = example.peer()
    notes = [b"note %d" % number for number in range(1, 101)]
    for note in notes:
        peer.send(note)
    first = peer.recv(100)
    # The other notes wait in the client's inbox, except those that arrive after the signal.
    assert example.stop() == ["database closed"]
    answers = [first, *waiting(peer)]
    assert answers == [b"note %d\n" % number for number in range(1, len(answers) + 1)]
    with closing(sqlite3.connect(path)) as database:
        stored = [note for (note,) in database.execute("SELECT note FROM notes ORDER BY number")]
    assert stored == notes[: len(answers)]


def test_service_shares_its_resource(serve: Serve) -> None:
    """Two clients write into the same database."""
    example = serve("service:service", "--factory")
    one, two = example.peer(), example.peer()
    answers = [ask(one, b"a"), ask(two, b""), ask(one, b"\xff")]
    assert answers == [b"note 1\n", b"note 2\n", b"note 3\n"]
    assert example.stop() == ["database closed"]


def test_lobby(serve: Serve) -> None:
    """A line reaches all members, late joiners get the last lines first, and all members learn that one quits."""
    example = serve("lobby:lobby", "--factory", EVERY="3600")
    ada, bob = example.peer(), example.peer()
    assert ask(ada, b"ada\n") == b"ada joins\n"
    assert ask(ada, b"hello\n") == b"ada: hello\n"
    bob.send(b"bob\n")
    assert [bob.recv(100) for _ in range(3)] == [b"ada joins\n", b"ada: hello\n", b"bob joins\n"]
    assert ada.recv(100) == b"bob joins\n"
    assert ask(bob, b"welcome\n") == ada.recv(100) == b"bob: welcome\n"
    bob.send(b"quit\n")
    assert ada.recv(100) == b"bob leaves\n"
    assert example.stop() == []
    assert waiting(ada) == [b"goodbye: stopping\n"]
    assert waiting(bob) == []


def test_lobby_notices_silence(serve: Serve) -> None:
    """The lobby sends its members a list at intervals; silent members get a goodbye and are removed."""
    example = serve("lobby:lobby", "--factory", EVERY="0.02", IDLE_TIME="1")
    ada, bob = example.peer(), example.peer()
    ada.send(b"ada")
    bob.send(b"bob")
    heard = [bob.recv(100)]
    while heard[-1] != b"here: bob\n":
        if heard[-1].startswith(b"here"):
            bob.send(b"\n")
        heard.append(bob.recv(100))
    assert b"ada leaves\n" in heard
    assert [line for line in waiting(ada) if not line.startswith(b"here")][-1] == b"goodbye: idle\n"


def test_collector_loses_nothing_when_stopped(serve: Serve, tmp_path: Path) -> None:
    """Datagrams that had arrived when the collector is stopped are in its file, in arrival order."""
    example = serve("collector", FILE=str(tmp_path / "log"))
    peers = [example.peer() for _ in range(3)]
    # While the process is stopped, datagrams wait in the kernel.
    example.signal(signal.SIGSTOP)
    for number in range(300):
        peers[number % 3].send(b"line %d\n" % number)
    example.signal(SIGTERM)
    example.signal(signal.SIGCONT)
    assert example.wait()[-2:] == ["collected: 300", "dropped by the kernel: 0"]
    assert (tmp_path / "log").read_text().splitlines() == [f"127.0.0.1 line {number}" for number in range(300)]


def test_collector_writes_now_and_then(serve: Serve, tmp_path: Path) -> None:
    """Lines are in the file after the time between writes; a line feed inside a line does not make it two."""
    example = serve("collector:collector", "--factory", EVERY="0.01")
    example.peer().send(b"one\nand a half\r\n")
    assert example.next_line() == "lines: 1"
    assert (tmp_path / "collected.log").read_bytes() == b"127.0.0.1 one\\nand a half\n"
    example.peer().send(b"")
    assert example.next_line() == "lines: 2"
    assert (tmp_path / "collected.log").read_bytes() == b"127.0.0.1 one\\nand a half\n127.0.0.1 \n"
    assert example.stop() == ["collected: 2"]


def run_client(port: int, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / "client.py"), "--port", str(port), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def test_client_sends_its_arguments(serve: Serve) -> None:
    """The client sends each argument as a datagram and prints the answers."""
    result = run_client(serve("uppercase:uppercase").port, "hello", "two words")
    assert (result.stdout, result.stderr, result.returncode) == ("HELLO\nTWO WORDS\n", "", 0)


def test_client_sends_its_input(serve: Serve) -> None:
    """Without arguments, the client sends each line of its input, including empty ones."""
    result = run_client(serve("uppercase:uppercase").port, stdin="hello\n\nworld\n")
    assert (result.stdout, result.stderr, result.returncode) == ("HELLO\n\nWORLD\n", "", 0)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A socket for a test that plays the server."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(TIMEOUT)
        yield sock


def test_client_tries_again(server: socket.socket) -> None:
    """The client sends a line again if no answer arrives."""
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
    """After three tries the client prints that there was no answer, and does not go on to the next line."""
    result = run_client(server.getsockname()[1], "--timeout", "0.05", "hello", "world")
    assert (result.stdout, result.stderr, result.returncode) == ("", "no answer to 'hello' after 3 tries\n", 1)
    assert waiting(server) == [b"hello"] * 3


def test_client_says_that_nothing_listens(server: socket.socket) -> None:
    """A refusal by the server's machine is reported at once."""
    port = server.getsockname()[1]
    server.close()
    result = run_client(port, "--timeout", "60", "hello")
    assert (result.stdout, result.stderr, result.returncode) == ("", f"nothing listens on 127.0.0.1 port {port}\n", 1)
