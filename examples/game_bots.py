"""Bots for game_server.py: each runs for the nearest coin. ``Pilot`` shows everything that a client has to do.

python examples/game_bots.py 127.0.0.1 9999 --bots 5 --room tea --seconds 60
"""

from __future__ import annotations

import argparse
import math
import secrets
from collections.abc import Callable
from functools import partial

import attrs
import trio
from game_server import (
    CHALLENGE,
    COIN,
    GOODBYE,
    HELLO,
    INPUT,
    INPUT_LAYOUT,
    JOIN,
    JOIN_HEAD,
    LEAVE,
    PLAYER,
    SNAPSHOT,
    SNAPSHOT_HEAD,
    WELCOME,
    WELCOME_LAYOUT,
)

import trio_udp

PERIOD = 0.1  # seconds between two INPUTs


@attrs.frozen
class Dot:
    """A player in a snapshot."""

    last_input: int
    score: int
    x: int
    y: int
    name: str


@attrs.frozen
class View:
    """A snapshot."""

    room: bytes
    tick: int
    coins: list[tuple[int, int]]
    dots: dict[int, Dot]

    @classmethod
    def read(cls, payload: bytes) -> View:
        _, room, tick, coin_count, player_count = SNAPSHOT_HEAD.unpack_from(payload)
        place = SNAPSHOT_HEAD.size
        coins = [COIN.unpack_from(payload, place + index * COIN.size) for index in range(coin_count)]
        place += coin_count * COIN.size
        dots = {}
        for _ in range(player_count):
            number, last_input, score, x, y, length = PLAYER.unpack_from(payload, place)
            place += PLAYER.size + length
            dots[number] = Dot(last_input, score, x, y, payload[place - length : place].decode())
        return cls(room, tick, coins, dots)


def run_for_coins(view: View, me: Dot) -> tuple[int, int]:
    """Run straight to the nearest coin, but leave coins to players that are nearer to them."""

    def distance(coin: tuple[int, int], dot: Dot = me) -> float:
        return math.dist(coin, (dot.x, dot.y))

    mine = [coin for coin in view.coins if min(map(partial(distance, coin), view.dots.values())) == distance(coin)]
    x, y = min(mine or view.coins, key=distance)
    share = 100 / max(1.0, math.hypot(x - me.x, y - me.y))
    return round((x - me.x) * share), round((y - me.y) * share)


@attrs.define(eq=False)
class Pilot:
    """The client's end of a game: joins, joins again if the server asks, and steers by the newest snapshot.

    Attributes:
      connection: To the server. To continue as the same player, assign another one and call :meth:`play` again.
      decide: Returns the direction, given a view and our dot in it.
      key: Identifies our player.
      room_number, number: The numbers of our room and our dot, once the server has welcomed us.
      view: The newest snapshot.
      shown, stale: The number of snapshots that were newer than all earlier ones, and of those that were not.
      goodbye: Why the server ended the game.
    """

    connection: trio_udp.Connection
    room: str = "lobby"
    name: str = "bot"
    decide: Callable[[View, Dot], tuple[int, int]] = run_for_coins
    key: bytes = attrs.field(factory=lambda: secrets.token_bytes(8))
    room_number: bytes | None = None
    number: int = 0
    joined_at: float = -math.inf
    last_input: int = 0
    view: View | None = None
    shown: int = 0
    stale: int = 0
    goodbye: str | None = None

    async def play(self) -> None:
        """Play until the server says goodbye. If this is cancelled, the player falls silent; :meth:`leave` says so."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.steer)
            async for payload in self.connection:
                await self.take(payload)
                if self.goodbye is not None:
                    nursery.cancel_scope.cancel()

    async def steer(self) -> None:
        while True:
            if self.room_number is None:
                await self.connection.send(HELLO)
            else:
                me = self.view and self.view.dots.get(self.number)
                self.last_input += 1
                right, down = self.decide(self.view, me) if self.view and me else (0, 0)
                await self.connection.send(INPUT_LAYOUT.pack(INPUT, self.key, self.last_input, right, down))
            await trio.sleep(PERIOD)

    async def take(self, payload: bytes) -> None:
        """Handle a message from the server. Ignore messages for other players."""
        kind = payload[:1]
        if kind == CHALLENGE and trio.current_time() >= self.joined_at + PERIOD / 2:
            self.joined_at = trio.current_time()
            names = self.room.encode(), self.name.encode()
            head = JOIN_HEAD.pack(JOIN, payload[1:], self.key, len(names[0]))
            await self.connection.send(head + b"".join(names))
        elif kind == WELCOME and payload[1:9] == self.key:
            _, _, room_number, self.number = WELCOME_LAYOUT.unpack(payload)
            if room_number != self.room_number:
                self.room_number, self.view = room_number, None
        elif kind == SNAPSHOT and payload[1:5] == self.room_number:
            view = View.read(payload)
            if self.view is None or view.tick > self.view.tick:
                self.view = view
                self.shown += 1
            else:
                self.stale += 1
        elif kind == GOODBYE and payload[1:9] == self.key:
            self.goodbye = payload[9:].decode()

    async def leave(self) -> None:
        await self.connection.send(LEAVE + self.key)


async def main(host: str, port: int, bots: int, room: str, seconds: float) -> None:
    async def play(number: int) -> None:
        async with await trio_udp.connect(host, port) as connection:
            pilot = Pilot(connection, room, f"bot {number}")
            with trio.move_on_after(seconds):
                await pilot.play()
            await pilot.leave()
            dot = pilot.view and pilot.view.dots.get(pilot.number)
            print(f"{pilot.name}: {dot.score if dot else 0} coins, {pilot.shown} snapshots", flush=True)

    async with trio.open_nursery() as nursery:
        for number in range(bots):
            nursery.start_soon(play, number)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("port", nargs="?", type=int, default=9999)
    parser.add_argument("--bots", type=int, default=5)
    parser.add_argument("--room", default="lobby")
    parser.add_argument("--seconds", type=float, default=math.inf)
    arguments = parser.parse_args()
    trio.run(main, arguments.host, arguments.port, arguments.bots, arguments.room, arguments.seconds)
