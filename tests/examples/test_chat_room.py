"""The chat rooms: over real sockets with a program like netcat, and through a bad network in virtual time."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from functools import partial

import pytest
import trio
from trio.testing import MockClock

import trio_udp
from trio_udp.testing import SimulatedNetwork

from ..conftest import SERVER, check_adds_up
from ..project.conftest import Start, ask, waiting, without_signals
from .conftest import load, received

chat_room = load("chat_room")


def join(peer: socket.socket, room: bytes, name: bytes) -> None:
    """Join a room as a user would: say hello, and send the token back."""
    word, token = ask(peer, b"hello\n").split()
    assert word == b"token"
    peer.send(b"join %b %b %b\n" % (token, room, name))


@without_signals
def test_conversation(start: Start) -> None:
    """Lines reach only their room, late joiners get the last lines, and the room learns of joins and leaves."""
    example = start("chat_room", "--host", "127.0.0.1")
    ada, bob, eve = example.peer(), example.peer(), example.peer()
    join(ada, b"tea", b"ada")
    assert ada.recv(100) == b"ada joins\n"
    assert ask(ada, b"hello all\n") == b"ada: hello all\n"
    join(eve, b"coffee", b"eve")
    assert eve.recv(100) == b"eve joins\n"
    join(bob, b"tea", b"bob")
    assert [bob.recv(100) for _ in range(3)] == [b"ada joins\n", b"ada: hello all\n", b"bob joins\n"]
    assert ada.recv(100) == b"bob joins\n"
    assert ask(bob, b"join us\n") == ada.recv(100) == b"bob: join us\n"
    assert ask(bob, b"\x1b[2Jgone?\xff\n") == ada.recv(100) == "bob: [2Jgone?\ufffd\n".encode()
    assert ask(bob, b"/quit\n") == b"goodbye: quit\n"
    assert ada.recv(100) == b"bob leaves\n"
    join(bob, b"tea", b"bob")  # at once, from the same address
    assert [bob.recv(100) for _ in range(7)][-2:] == [b"bob leaves\n", b"bob joins\n"]
    assert ada.recv(100) == b"bob joins\n"
    assert example.stop() == []
    assert [waiting(peer) for peer in (ada, bob, eve)] == [[b"goodbye: stopping\n"]] * 3


@without_signals
def test_strangers_get_only_a_token(start: Start) -> None:
    """A stranger gets only a token; without the token of its own address it gets no other answer."""
    example = start("chat_room", "--host", "127.0.0.1")
    ada, eve = example.peer(), example.peer()
    token = ask(ada, b"hello").split()[1]
    for payload in (b"", b"hi", b"join", b"join 00000000 tea eve", b"join %b tea eve" % token, b"token %b" % token):
        eve.send(payload)
    join(ada, b"tea", b"ada")
    assert ada.recv(100) == b"ada joins\n"
    assert waiting(eve) == []


@without_signals
@pytest.mark.skipif(shutil.which("socat") is None, reason="needs socat")
def test_with_socat(start: Start) -> None:
    """A user with socat in a terminal can take part."""
    example = start("chat_room", "--host", "127.0.0.1")
    ada = example.peer()
    join(ada, b"tea", b"ada")
    assert ada.recv(100) == b"ada joins\n"
    command = ["socat", "-T", "10", "-", f"udp:127.0.0.1:{example.port}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as terminal:
        assert terminal.stdin is not None
        assert terminal.stdout is not None
        terminal.stdin.write("hello\n")
        token = re.fullmatch(r"token (\w{8})\n", terminal.stdout.readline())
        assert token
        terminal.stdin.write(f"join {token[1]} tea bob\n")
        assert [terminal.stdout.readline() for _ in range(2)] == ["ada joins\n", "bob joins\n"]
        terminal.stdin.write("good morning\n")
        assert [ada.recv(100) for _ in range(2)] == [b"bob joins\n", b"bob: good morning\n"]
        terminal.stdin.write("/quit\n")
        assert [terminal.stdout.readline() for _ in range(2)] == ["bob: good morning\n", "goodbye: quit\n"]
        assert ada.recv(100) == b"bob leaves\n"
        terminal.stdin.close()


async def enter(network: SimulatedNetwork, name: str) -> trio_udp.Connection:
    connection = await network.connect(*SERVER)
    await connection.send(b"hello")
    token = (await connection.receive()).split()[1]
    await connection.send(b"join %b tea %b" % (token, name.encode()))
    return connection


async def test_leave_on_silence(
    simulated_network: SimulatedNetwork, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """After half the idle time, a silent member is asked once; an answer keeps it in the room, silence ends it."""
    endpoint = simulated_network.endpoint(*SERVER)
    serve = partial(
        trio_udp.serve_endpoints,
        partial(chat_room.handler, {}),
        [endpoint],
        accept=chat_room.accept,
        idle_timeout=60,
        limits=trio_udp.Limits(amplification=3),
    )
    server: trio_udp.Server = await nursery.start(serve)
    ada, bob = await enter(simulated_network, "ada"), await enter(simulated_network, "bob")
    assert await received(ada) == [b"ada joins\n", b"bob joins\n"]
    await trio.sleep(31)
    assert await received(ada) == [b"still there?\n"]
    assert await received(bob) == [b"ada joins\n", b"bob joins\n", b"still there?\n"]
    await ada.send(b"")
    await trio.sleep(44)
    assert await received(bob) == [b"goodbye: idle\n"]
    assert await received(ada) == [b"bob leaves\n", b"still there?\n"]
    assert len(server.clients) == 1
    assert server.statistics().sends_withheld == 0
    check_adds_up(server)
    nursery.cancel_scope.cancel()


async def test_crowd_through_loss(
    simulated_network: SimulatedNetwork, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """Thirty members join through a bad network, each repeating its requests, and all leave by silence."""
    endpoint = simulated_network.endpoint(*SERVER)
    rooms: dict[str, object] = {}
    handler = partial(chat_room.handler, rooms)
    server: trio_udp.Server = await nursery.start(
        partial(trio_udp.serve_endpoints, handler, [endpoint], accept=chat_room.accept, idle_timeout=60)
    )
    simulated_network.loss = simulated_network.duplicate = 0.3
    simulated_network.latency = (0.01, 0.3)
    heard: list[bytes] = []

    async def person(number: int) -> None:
        name = b"p%d" % number
        connection = await simulated_network.connect(*SERVER)
        waits = trio_udp.backoff(attempts=20, most=2)
        answer = await trio_udp.request(
            connection, b"hello", lambda payload: payload.startswith(b"token "), waits=waits
        )
        joining = b"join %b tea %b" % (answer.split()[1], name)
        await trio_udp.request(connection, joining, lambda payload: payload == name + b" joins\n", waits=waits)
        line = b"%b: good morning\n" % name
        heard.append(await trio_udp.request(connection, b"good morning", line.__eq__, waits=waits))

    async with trio.open_nursery() as people:
        for number in range(30):
            people.start_soon(person, number)
    assert sorted(heard) == sorted(b"p%d: good morning\n" % number for number in range(30))
    assert len(server.clients) == 30
    await trio.sleep(120)
    assert (len(server.clients), rooms) == (0, {})
    check_adds_up(server)
    nursery.cancel_scope.cancel()
