"""The game, served on the simulated network in virtual time, for the tests of the game."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from functools import partial

import attrs
import game_server
import pytest
import trio
import trio.testing
from game_bots import Dot, Pilot, View, run_for_coins
from game_server import INPUT, INPUT_LAYOUT, JOIN, JOIN_HEAD, SNAPSHOT, Game, Player

import trio_udp
from trio_udp.testing import SimulatedNetwork

from ..conftest import SERVER

Decide = Callable[[View, Dot], tuple[int, int]]


def stand(view: View, me: Dot) -> tuple[int, int]:
    return 0, 0


def run_right(view: View, me: Dot) -> tuple[int, int]:
    return 100, 0


@attrs.define(eq=False)
class Arena:
    """A running game, and its bots."""

    network: SimulatedNetwork
    nursery: trio.Nursery
    game: Game
    server: trio_udp.Server
    pilots: dict[Pilot, trio.CancelScope] = attrs.field(factory=dict)
    ended: trio.Event = attrs.field(factory=trio.Event)

    async def join(self, name: str, room: str = "lobby", decide: Decide = run_for_coins) -> Pilot:
        """Let a new bot play, from an address of its own."""
        pilot = Pilot(await self.network.connect(*SERVER), room, name, decide)
        self.play(pilot)
        return pilot

    def play(self, pilot: Pilot) -> None:
        """Let a bot play until its scope in ``pilots`` is cancelled."""

        async def play() -> None:
            with self.pilots[pilot]:
                await pilot.play()

        self.pilots[pilot] = trio.CancelScope()
        self.nursery.start_soon(play)

    async def joined(self, *names: str, decide: Decide = stand) -> list[Pilot]:
        """Let new bots join one room, and wait until they have; on a perfect network no time passes."""
        pilots = [await self.join(name, decide=decide) for name in names]
        await trio.testing.wait_all_tasks_blocked()
        return pilots

    def player(self, pilot: Pilot) -> Player:
        """Return the server's record of a bot."""
        return self.game.players[pilot.key]

    def snapshots_to(self, pilot: Pilot) -> list[tuple[float, int]]:
        """Return the time and the tick of each snapshot that arrived at a bot; times are in microseconds."""
        return [
            (round(event.time * 1e6), View.read(event.payload).tick)
            for event in self.network.events
            if event.fate == "arrived"
            and event.destination == pilot.connection.local_address
            and event.payload[:1] == SNAPSHOT
        ]


Open = Callable[..., Awaitable[Arena]]


@pytest.fixture
def open_arena(simulated_network: SimulatedNetwork, nursery: trio.Nursery) -> Open:
    """Serve a new game as game_server.py does; keywords are limits. An earlier game must have ended.

    Tests that use it also ask for ``autojump_clock``.
    """

    async def open_arena(**limits: object) -> Arena:
        game = Game(random.Random(0))
        endpoint = simulated_network.endpoint(*SERVER, max_datagram_size=128, receive_buffer=4 * 2**20)
        serve = partial(
            trio_udp.serve_endpoints,
            game.handler,
            [endpoint],
            accept=game_server.accept,
            # All connections on the simulated network come from one host.
            limits=attrs.evolve(
                game_server.LIMITS,
                **{"clients_per_host": None, "rate_limit": None, **limits},  # type: ignore[arg-type]
            ),
            on_error=trio_udp.raise_error,
        )

        async def run(task_status: trio.TaskStatus[Arena]) -> None:
            async with trio.open_nursery() as beside:
                beside.start_soon(game.run)
                async with trio.open_nursery() as inner:
                    server: trio_udp.Server = await inner.start(serve)
                    arena = Arena(simulated_network, nursery, game, server)
                    task_status.started(arena)
                beside.cancel_scope.cancel()
            arena.ended.set()

        arena: Arena = await nursery.start(run)
        return arena

    return open_arena


def joining(connection: trio_udp.Connection, key: bytes, room: bytes = b"lobby", name: bytes = b"raw") -> bytes:
    """Return a JOIN with the right token."""
    return JOIN_HEAD.pack(JOIN, game_server.token(connection.local_address), key, len(room)) + room + name


def steering(key: bytes, number: int, right: int, down: int = 0) -> bytes:
    """Return an INPUT."""
    return INPUT_LAYOUT.pack(INPUT, key, number, right, down)
