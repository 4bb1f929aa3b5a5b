"""The game, played by bots on the simulated network in virtual time: pace, loss, joining, leaving, new addresses."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections import Counter, defaultdict
from functools import partial

import game_server
import trio
import trio.testing
from game_bots import Dot, View, run_for_coins
from game_server import CHALLENGE, GOODBYE, HELLO, SNAPSHOT, SPEED, WELCOME
from trio.testing import MockClock

from ..conftest import SERVER, check_adds_up
from ..project.conftest import EXAMPLES, Serve, without_signals
from .arena import Open, joining, open_arena as open_arena, run_right, stand, steering
from .conftest import received

KEY = b"8 random"


# The pace


async def test_twenty_snapshots_a_second_without_drift(open_arena: Open, autojump_clock: MockClock) -> None:
    """In one minute, a player receives the snapshots of exactly 1,200 ticks, each on time."""
    arena = await open_arena()
    [ada] = await arena.joined("ada")
    await trio.sleep(60.01)
    assert arena.snapshots_to(ada) == [(tick * 50_000, tick) for tick in range(1_201)]
    assert (ada.shown, ada.stale) == (1_201, 0)
    check_adds_up(arena.server)


async def test_the_pace_after_a_pause(open_arena: Open, autojump_clock: MockClock) -> None:
    """After a 5-second pause of the program, the last few snapshots follow immediately, and the next is on time."""
    arena = await open_arena()
    [ada] = await arena.joined("ada", decide=run_right)
    await trio.sleep(1.02)
    autojump_clock.jump(5)
    await trio.sleep(0.1)
    assert arena.snapshots_to(ada)[-9:] == [
        (1_000_000, 20),
        *[(6_020_000, tick) for tick in range(115, 121)],
        (6_050_000, 121),
        (6_100_000, 122),
    ]
    check_adds_up(arena.server)


# Playing


async def test_a_player_moves_as_it_steers(open_arena: Open, autojump_clock: MockClock) -> None:
    """A direction moves a dot by its share of the speed each tick, no faster diagonally, and not beyond the field."""
    arena = await open_arena()
    async with await arena.network.connect(*SERVER) as connection:
        await connection.send(joining(connection, KEY))
        await trio.sleep(0.01)
        player = arena.game.players[KEY]
        player.x, player.y = 100.0, 900.0
        slant = 5 * SPEED / math.sqrt(2)
        directions = [(100, 0), (0, -50), (100, 100), (-127, 0), (-128, 0)]
        for number, direction in enumerate(directions, 1):
            await connection.send(steering(KEY, number, *direction))
            await trio.sleep(0.25)
        views = [View.read(payload) for payload in await received(connection) if payload[:1] == SNAPSHOT]
    places = [(dot.x, dot.y) for view in views[5::5] for dot in view.dots.values()]
    right = 100 + 5 * SPEED
    assert places == [
        (right, 900),
        (right, 900 - 2.5 * SPEED),
        (round(right + slant), round(900 - 2.5 * SPEED + slant)),
        (round(right + slant - 5 * SPEED), round(900 - 2.5 * SPEED + slant)),
        (round(right + slant - 10 * SPEED), round(900 - 2.5 * SPEED + slant)),
    ]
    player.x = 3.0
    player.steer(steering(KEY, 100, -100, 0))
    await trio.sleep(0.1)
    assert player.x == 0
    check_adds_up(arena.server)


async def test_old_input_is_dropped(open_arena: Open, autojump_clock: MockClock) -> None:
    """A late or duplicate input changes nothing; the snapshot has the number of the last input that counted."""
    arena = await open_arena()
    async with await arena.network.connect(*SERVER) as connection:
        await connection.send(joining(connection, KEY))
        welcome, first = await connection.receive(), await connection.receive()
        player = arena.game.players[KEY]
        player.x = player.y = 500.0
        for number, right in [(7, 100), (6, -100), (7, -100)]:
            await connection.send(steering(KEY, number, right))
        await trio.sleep(0.51)
        assert (player.x, player.y) == (500 + 10 * SPEED, 500)
        views = [View.read(await connection.receive()) for _ in range(10)]
    assert [view.dots[welcome[-1]].last_input for view in views] == [7] * 10
    assert View.read(first).dots[welcome[-1]].last_input == 0
    check_adds_up(arena.server)


async def test_a_direction_holds_for_a_second(open_arena: Open, autojump_clock: MockClock) -> None:
    """A player whose inputs stop arriving moves on for a second, and then stands still."""
    arena = await open_arena()
    [ada] = await arena.joined("ada")
    player = arena.player(ada)
    player.x = 0.0
    with arena.network.partition([ada.connection.local_address]):
        player.steer(steering(ada.key, 1_000, 100))
        await trio.sleep(5)
    assert player.x == 20 * SPEED
    check_adds_up(arena.server)


async def test_coins(open_arena: Open, autojump_clock: MockClock) -> None:
    """A player within reach of a coin takes it, and a new coin appears elsewhere."""
    arena = await open_arena()
    ada, bob = await arena.joined("ada", "bob")
    room, player = arena.game.rooms["lobby"], arena.player(ada)
    others = [(0, 1000)] * 7
    room.coins = [(500, 500), *others]
    player.x, player.y = 400.0, 500.0
    arena.player(bob).x = arena.player(bob).y = 0.0
    ada.decide = run_right
    await trio.sleep(0.51)  # from 0.1 on, 8 ticks: at 496
    assert bob.view
    assert bob.view.coins[1:] == others
    assert bob.view.coins[0] != (500, 500)
    assert bob.view.dots[ada.number].score == 1
    check_adds_up(arena.server)


# Loss


async def test_two_hundred_bots_through_a_bad_network(open_arena: Open, autojump_clock: MockClock) -> None:
    """200 bots play in 8 rooms while datagrams are lost, duplicated, reordered and late; no bot goes back in time.

    Once the network is perfect again, all in a room see the same at the same time.
    """
    arena = await open_arena()
    network = arena.network
    network.loss = network.duplicate = network.reorder = 0.2
    network.latency = (0.02, 0.12)
    ticks = defaultdict[str, list[int]](list)

    def run_and_note(name: str, view: View, me: Dot) -> tuple[int, int]:
        ticks[name].append(view.tick)
        return run_for_coins(view, me)

    for number in range(200):
        name = f"bot {number}"
        await arena.join(name, f"room {number % 8}", partial(run_and_note, name))
        await trio.sleep(0.005)
    await trio.sleep(2)
    network.loss = network.duplicate = network.reorder = 0
    network.latency = (0, 0)
    for pilot in arena.pilots:
        pilot.decide = stand
    await trio.sleep(0.51)  # all datagrams in transit have arrived, and all players stand still

    assert len(arena.server.clients) == 200
    views: dict[str, View] = {}
    for name, room in arena.game.rooms.items():
        [views[name], *others] = [pilot.view for pilot in arena.pilots if pilot.view and pilot.room == name]
        assert others == [views[name]] * 24
        assert views[name].tick == room.tick
        assert {dot.name: dot.score for dot in views[name].dots.values()} == {
            player.name.decode(): player.score for player in room.players.values()
        }
    assert len(views) == 8
    dots = [dot for view in views.values() for dot in view.dots.values()]
    assert len({dot.name for dot in dots}) == 200
    assert sum(dot.score for dot in dots) > 50
    assert len(ticks) == 200
    assert all(noted == sorted(noted) for noted in ticks.values())
    welcome, fates = set(), Counter[str]()
    for event in network.events:
        if event.fate == "arrived" and event.payload[:1] == WELCOME:
            welcome.add(event.destination)
        elif event.payload[:1] == SNAPSHOT and (event.fate != "arrived" or event.destination in welcome):
            fates[event.fate] += 1
    stale = sum(pilot.stale for pilot in arena.pilots)
    assert sum(pilot.shown for pilot in arena.pilots) + stale == fates["arrived"]
    assert stale > fates["duplicated"] > 0  # duplicates, and snapshots that were overtaken
    assert 0.15 < fates["lost"] / (fates["lost"] + fates["sent"] + fates["held back"]) < 0.25
    check_adds_up(arena.server)


# Joining and leaving


async def test_late_joiners_get_the_state(open_arena: Open, autojump_clock: MockClock) -> None:
    """A player that joins receives the whole room, with the scores so far, before the next tick."""
    arena = await open_arena()
    ada, _bob = await arena.joined("ada", "bob", decide=stand)
    arena.player(ada).score = 41
    await trio.sleep(30.02)
    [eve] = await arena.joined("eve")
    assert eve.view
    assert trio.current_time() == 30.02
    assert (eve.shown, eve.view) == (1, View.read(arena.game.rooms["lobby"].snapshot()))
    assert eve.view.tick == 600
    assert {dot.name: dot.score for dot in eve.view.dots.values()} == {"ada": 41, "bob": 0, "eve": 0}
    assert len(eve.view.coins) == 8
    check_adds_up(arena.server)


async def test_leaving(open_arena: Open, autojump_clock: MockClock) -> None:
    """A player that leaves gets a goodbye and is gone at the next tick; a room ends with its last player."""
    arena = await open_arena()
    ada, bob = await arena.joined("ada", "bob")
    await bob.leave()
    await trio.sleep(0.06)
    assert bob.goodbye == "left"
    assert ada.view
    assert [dot.name for dot in ada.view.dots.values()] == ["ada"]
    await ada.leave()
    await trio.testing.wait_all_tasks_blocked()
    assert (ada.goodbye, arena.game.rooms, arena.game.players) == ("left", {}, {})
    assert len(arena.server.clients) == 0
    check_adds_up(arena.server)


async def test_silence(open_arena: Open, autojump_clock: MockClock) -> None:
    """A player that is silent for 10 seconds leaves, with a goodbye; until then it stays in the snapshots."""
    arena = await open_arena()
    [ada] = await arena.joined("ada")
    async with await arena.network.connect(*SERVER) as connection:
        await connection.send(joining(connection, KEY))
        with trio.fail_after(12.51):
            async for payload in connection:
                if payload[:1] == GOODBYE:
                    break
        assert payload == GOODBYE + KEY + b"idle"
        assert trio.current_time() >= 10
    assert ada.view
    assert [dot.name for dot in ada.view.dots.values()] == ["ada", "raw"]
    await trio.sleep(0.06)
    assert [dot.name for dot in ada.view.dots.values()] == ["ada"]
    check_adds_up(arena.server)


async def test_a_player_that_does_not_read(open_arena: Open, autojump_clock: MockClock) -> None:
    """A player that reads nothing loses only what its own buffer cannot hold; others receive everything on time."""
    arena = await open_arena()
    [ada] = await arena.joined("ada")
    async with await arena.network.connect(*SERVER) as connection:
        await connection.send(joining(connection, KEY))
        for number in range(1, 61):
            await trio.sleep(1)
            await connection.send(steering(KEY, number, 0))
        await trio.sleep(0.01)
        assert arena.snapshots_to(ada) == [(tick * 50_000, tick) for tick in range(1_201)]
        assert KEY in arena.game.players
        assert connection.statistics().kernel_dropped > 900
    check_adds_up(arena.server)


async def test_a_full_room(open_arena: Open, autojump_clock: MockClock) -> None:
    """A room and an unfragmented snapshot hold 40 players; one more is refused with a reason, and is no client."""
    arena = await open_arena()
    pilots = await arena.joined(*[f"bot {number:08}" for number in range(40)])
    await trio.sleep(1)
    assert all(pilot.view == pilots[0].view for pilot in pilots)
    assert {len(event.payload) for event in arena.network.events[-100:] if event.payload[:1] == SNAPSHOT} == {1_083}
    [late] = await arena.joined("late")
    assert late.goodbye == "the room is full"
    assert len(arena.server.clients) == 40
    free = pilots[3].number
    await pilots[3].leave()
    [next_one] = await arena.joined("next")
    assert (next_one.goodbye, next_one.number) == (None, free)
    check_adds_up(arena.server)


async def test_too_many_rooms(open_arena: Open, autojump_clock: MockClock) -> None:
    """There are at most 200 rooms. When the last player of one leaves, there is room for another."""
    arena = await open_arena()
    for number in range(200):
        await arena.join("bot", f"room {number}")
    await trio.testing.wait_all_tasks_blocked()
    late = await arena.join("late", "room 200")
    await trio.testing.wait_all_tasks_blocked()
    assert (late.goodbye, len(arena.game.rooms)) == ("there are too many rooms", 200)
    await list(arena.pilots)[7].leave()
    again = await arena.join("again", "room 200")
    await trio.testing.wait_all_tasks_blocked()
    assert (again.goodbye, len(arena.game.rooms)) == (None, 200)
    check_adds_up(arena.server)


async def test_another_room(open_arena: Open, autojump_clock: MockClock) -> None:
    """A player that joins another room leaves its previous one."""
    arena = await open_arena()
    ada, bob = await arena.joined("ada", "bob")
    bob.room = "garden"
    await trio.sleep(0.06)
    await bob.connection.send(HELLO)
    await trio.sleep(0.06)
    assert ada.view
    assert bob.view
    assert [dot.name for dot in ada.view.dots.values()] == ["ada"]
    assert [dot.name for dot in bob.view.dots.values()] == ["bob"]
    assert (bob.view.tick, len(arena.game.players)) == (1, 2)
    check_adds_up(arena.server)


# New addresses


async def test_the_same_player_from_another_address(open_arena: Open, autojump_clock: MockClock) -> None:
    """A player whose address changes continues after one round trip, with its place and score."""
    arena = await open_arena()
    arena.network.latency = (0.05, 0.05)
    ada, _bob = await arena.joined("ada", "bob")
    await trio.sleep(3)
    player = arena.player(ada)
    player.score = 5
    [before] = [client for client in arena.server.clients if client.peer_address == ada.connection.local_address]
    arena.pilots[ada].cancel()
    old, ada.connection = ada.connection, await arena.network.connect(*SERVER)
    ada.last_input = 0  # like a new program with the same key
    assert ada.view
    last = ada.view.tick
    arena.play(ada)  # INPUT and CHALLENGE, JOIN and WELCOME with a snapshot
    await trio.sleep(0.21)
    assert ada.view.tick == last + 5
    await trio.sleep(0.15)
    assert 0 < player.last_input <= ada.last_input < 10
    assert (arena.player(ada), player.client.peer_address) == (player, ada.connection.local_address)
    assert ada.view.dots[ada.number].score == 5
    assert before not in arena.server.clients
    assert len(arena.server.clients) == 2
    await old.send(steering(ada.key, 9_999, 100))  # late, from the old address
    await trio.sleep(0.11)
    assert player.last_input < 9_999
    old.close()
    check_adds_up(arena.server)


async def test_another_program_at_the_same_address(open_arena: Open, autojump_clock: MockClock) -> None:
    """A program that starts again at the same address is a new player, and the previous player has left."""
    arena = await open_arena()
    async with await arena.network.connect(*SERVER) as connection:
        await connection.send(joining(connection, KEY))
        await connection.send(HELLO)
        await connection.send(joining(connection, b"another!"))
        payloads = [await connection.receive() for _ in range(5)]
        kinds = [payload[:1] for payload in payloads]
        assert kinds == [WELCOME, SNAPSHOT, CHALLENGE, WELCOME, SNAPSHOT]
        assert set(arena.game.players) == {b"another!"}
    check_adds_up(arena.server)


async def test_a_restart_of_the_server(open_arena: Open, autojump_clock: MockClock) -> None:
    """All players get a goodbye when the server stops. Those that continue join the new server in one round trip."""
    arena = await open_arena()
    pilots = await arena.joined("ada", "bob", "eve")
    await trio.sleep(10)
    arena.server.stop()
    await arena.ended.wait()
    assert [pilot.goodbye for pilot in pilots] == ["stopping"] * 3
    assert trio.current_time() == 10
    assert (arena.game.players, arena.game.rooms) == ({}, {})
    after = await open_arena()
    for pilot in pilots:
        pilot.goodbye = None
        after.play(pilot)
    await trio.sleep(0.12)
    for pilot in pilots:
        assert pilot.view
        assert (pilot.view.tick, len(pilot.view.dots)) == (2, 3)
    check_adds_up(after.server)


# As processes


@without_signals
def test_bots_from_a_terminal(serve: Serve) -> None:
    """Bots run as a program join and leave; the server says goodbye to the others when it stops."""
    example = serve("game_server:game", "--factory", "--accept", f"{EXAMPLES}/game_server.py:accept")
    command = [sys.executable, "-W", "error", str(EXAMPLES / "game_bots.py"), "127.0.0.1", str(example.port)]
    done = subprocess.run([*command, "--bots", "3", "--seconds", "1"], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(re.findall(r"(bot \d): \d+ coins, \d\d snapshots\n", done.stdout)) == ["bot 0", "bot 1", "bot 2"]
    with example.peer() as peer:
        peer.send(HELLO)
        token = peer.recv(100)[1:]
        peer.send(game_server.JOIN_HEAD.pack(game_server.JOIN, token, KEY, 5) + b"lobbyraw")
        assert peer.recv(100)[:9] == WELCOME + KEY
        example.stop()
        payloads: list[bytes] = []
        while not payloads or payloads[-1][:1] == SNAPSHOT:
            payloads.append(peer.recv(2_000))
        assert payloads[-1] == GOODBYE + KEY + b"stopping"
