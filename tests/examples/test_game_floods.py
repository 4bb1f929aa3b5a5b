"""Attacks on the game: forged addresses, forged messages, and arbitrary bytes."""

from __future__ import annotations

import random
from functools import partial

import game_server
import trio
import trio.testing
from game_bots import run_for_coins
from game_server import CHALLENGE, GOODBYE, HELLO, JOIN, LEAVE, WELCOME, Game
from hypothesis import given, settings, strategies as st
from trio.testing import MockClock

import trio_udp
from trio_udp.testing import SimulatedNetwork, deterministic_scheduling

from ..conftest import SERVER, check_adds_up
from .arena import Open, joining, open_arena as open_arena, run_right, steering

KEY = b"8 random"
FORGED_KEY = b"8 forged"


async def test_a_flood_of_forged_addresses(open_arena: Open, autojump_clock: MockClock) -> None:
    """100,000 datagrams of every kind, from as many addresses, cost 20 players no snapshot and no input.

    They make no client, and are answered with less than they have brought.
    """
    arena = await open_arena(rate_limit=game_server.LIMITS.rate_limit)
    pilots = await arena.joined(*[f"bot {number}" for number in range(20)], decide=run_for_coins)
    kinds = [
        HELLO,
        steering(FORGED_KEY, 1, 100),
        JOIN + bytes(8) + FORGED_KEY + b"\x05lobbyeve",
        LEAVE + FORGED_KEY,
        b"\xff" * 40,
    ]
    rng = random.Random(1)
    sources = rng.sample(range(0x0B000000, 0x7F000000), 100_000)
    await trio.sleep(0.01)
    before = arena.server.statistics()
    inputs = [pilot.last_input for pilot in pilots]
    for number, source in enumerate(sources):
        address = ".".join(map(str, source.to_bytes(4, "big"))), 1 + source % 65_535
        arena.network.inject(kinds[number % 5], address, SERVER)
        if number % 1_000 == 999:
            await trio.sleep(0.05)
            arena.network.events[:] = []  # they would use much memory
    after = arena.server.statistics()
    assert [pilot.shown for pilot in pilots] == [101] * 20
    assert [pilot.last_input - before for pilot, before in zip(pilots, inputs, strict=True)] == [50] * 20
    assert all(arena.player(pilot).last_input == pilot.last_input for pilot in pilots)
    assert after.received - before.received == 101_000
    assert after.answered_by_accept - before.answered_by_accept == 40_000
    assert after.refused_by_accept - before.refused_by_accept == 60_000
    assert (after.clients, after.clients_started, after.clients_evicted) == (20, 20, 0)
    check_adds_up(arena.server)


async def test_a_flood_that_claims_to_come_from_a_player(open_arena: Open, autojump_clock: MockClock) -> None:
    """Datagrams that forge a player's address can neither steer it, nor make it leave, nor replace it.

    Nor have it flooded: a player does not answer each CHALLENGE that others have asked for.
    """
    arena = await open_arena()
    ada, bob = await arena.joined("ada", "bob", decide=run_right)
    player, address = arena.player(ada), ada.connection.local_address
    await trio.sleep(0.01)
    for _ in range(1_000):
        for payload in (
            LEAVE + FORGED_KEY,
            steering(FORGED_KEY, 2**32 - 1, -100),
            JOIN + bytes(8) + FORGED_KEY + b"\x05lobbyeve",
            HELLO,
            b"",
            GOODBYE + FORGED_KEY,
        ):
            arena.network.inject(payload, address, SERVER)
        await trio.sleep(0.01)
    assert arena.player(ada) is player
    assert (player.x, player.last_input, ada.goodbye) == (1_000, ada.last_input, None)
    assert (ada.shown, bob.shown) == (201, 201)
    welcomes = [event for event in arena.network.events if event.fate == "arrived" and event.payload[:1] == WELCOME]
    assert 2 < len(welcomes) <= 2 + 201
    assert len(arena.game.players) == 2
    check_adds_up(arena.server)


async def test_a_token_is_valid_for_one_address_and_a_minute(open_arena: Open, autojump_clock: MockClock) -> None:
    """A token admits only its own address, for at most a minute; a CHALLENGE is no longer than the HELLO."""
    arena = await open_arena()
    async with await arena.network.connect(*SERVER) as connection, await arena.network.connect(*SERVER) as other:
        await connection.send(HELLO)
        challenge = await connection.receive()
        assert challenge[:1] == CHALLENGE
        assert len(challenge) <= len(HELLO)
        join = JOIN + challenge[1:] + KEY + b"\x05lobbyada"
        await other.send(join)
        await trio.sleep(60)
        await connection.send(join)
        await trio.testing.wait_all_tasks_blocked()
        assert (arena.server.statistics().refused_by_accept, arena.game.players) == (2, {})
        await connection.send(joining(connection, KEY))
        assert (await connection.receive())[:1] == WELCOME
    check_adds_up(arena.server)


async def test_names_are_safe_to_show(open_arena: Open, autojump_clock: MockClock) -> None:
    """Names are cut to 12 bytes, and contain no control characters for a terminal."""
    arena = await open_arena()
    for number, (name, shown) in enumerate(
        [(b"\x1b[2Jada\n\0", "[2Jada"), ("ä".encode() * 12, "ä" * 6), (b"\xff\xfe", ""), (b"x" * 20, "x" * 12)]
    ):
        async with await arena.network.connect(*SERVER) as connection:
            key = b"%08d" % number
            await connection.send(joining(connection, key, name, name))
            await trio.testing.wait_all_tasks_blocked()
            player = arena.game.players[key]
            assert (player.name.decode(), player.room.name) == (shown, shown)
    check_adds_up(arena.server)


heads = st.sampled_from([bytes([kind]) for kind in range(10)])
anything = st.one_of(
    st.binary(max_size=64),
    st.builds(lambda head, rest: head + KEY + rest, heads, st.binary(max_size=50)),
    st.builds(
        lambda number, right, down: steering(KEY, number, right, down),
        *[st.integers(0, 2**32 - 1)],
        *[st.integers(-128, 127)] * 2,
    ),
    st.sampled_from(["join", "join another room", "hello", "leave"]),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(anything, max_size=30))
def test_any_bytes(payloads: list[bytes | str]) -> None:
    """The server survives any payloads in any order, and its tables contain exactly the players in the game."""

    async def main() -> None:
        network = SimulatedNetwork()
        game = Game(random.Random(0))
        endpoint = network.endpoint(*SERVER, max_datagram_size=128)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(game.run)
            server: trio_udp.Server = await nursery.start(
                partial(
                    trio_udp.serve_endpoints,
                    game.handler,
                    [endpoint],
                    accept=game_server.accept,
                    on_error=trio_udp.raise_error,
                )
            )
            async with await network.connect(*SERVER) as connection:
                known = {
                    "join": joining(connection, KEY),
                    "join another room": joining(connection, KEY, b"garden"),
                    "hello": HELLO,
                    "leave": LEAVE + KEY,
                }
                for payload in payloads:
                    await connection.send(known[payload] if isinstance(payload, str) else payload)
                    await trio.sleep(0.03)
                    playing = list(game.players.values())
                    assert playing == [player for room in game.rooms.values() for player in room.players.values()]
                    assert all(player.client in server.clients for player in playing)
                    assert all(0 <= player.x <= 1_000 and 0 <= player.y <= 1_000 for player in playing)
            await trio.sleep(13)
            assert (game.players, game.rooms, len(server.clients)) == ({}, {}, 0)
            check_adds_up(server)
            nursery.cancel_scope.cancel()

    with deterministic_scheduling(0):
        trio.run(main, clock=MockClock(autojump_threshold=0))
