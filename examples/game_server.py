"""A game: dots in rooms collect coins, and every player in a room receives its whole state 20 times a second.

The server may be open to the internet: a stranger receives only a short token until it has sent it back, and datagrams
with a forged address can neither steer a player nor make it leave. game_bots.py is the other end.

    python examples/game_server.py      (or: trio-udp --accept examples/game_server.py:accept --max-clients 2000
                                         --factory examples/game_server.py:game)
    python examples/game_bots.py 127.0.0.1 --bots 5     (in another terminal)

Each datagram is one message. Its first byte is the kind; numbers are unsigned and in network byte order. After each
field is its length in bytes::

    HELLO      1, "dots1", zeros up to 20 bytes     asks to play
    CHALLENGE  2, token 8                           JOIN needs this token
    JOIN       3, token 8, key 8, length of the room's name 1, the room's name, the player's name
    WELCOME    4, key 8, room 4, player 1           the numbers of the room and the player in SNAPSHOT
    INPUT      5, key 8, number 4, right 1, down 1  the direction, signed, in hundredths of the full speed
    SNAPSHOT   6, room 4, number 4, coins 1, players 1, (x 2, y 2) for each coin,
               (player 1, number of the last INPUT 4, score 4, x 2, y 2, length 1, name) for each player
    LEAVE      7, key 8
    GOODBYE    8, key 8, reason

*Any message may be lost, duplicated or late.* INPUT is a direction and SNAPSHOT the whole state, so each one makes up
for lost ones, and late joiners need nothing else. Receivers drop an INPUT or SNAPSHOT whose number is not greater than
the last one's (a JOIN restarts the numbers of INPUT); other messages may arrive twice. A player sends HELLO until it
receives WELCOME, then INPUT at least once a second. It answers a CHALLENGE with JOIN, at most 20 times a second.

*The key identifies the player*: 8 random bytes that it chooses. INPUT from an address that has not joined gets a
CHALLENGE (for example, because a phone has changed networks, or the server has restarted). JOIN with the same key takes
over the same player, with its score. An eavesdropper could do that too; see docs/howto/encryption.md.
"""

from __future__ import annotations

import argparse
import hmac
import logging
import math
import random
import secrets
import signal
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Protocol

import attrs
import trio

import trio_udp

RATE = 20  # snapshots a second
FIELD = 1_000  # width and height
SPEED = 12.0  # the farthest that a player moves between two snapshots
REACH = 30  # the distance from which a player takes a coin
COINS = 8  # in a room
CATCH_UP = 5  # the most late snapshots that are still sent
HOLD = RATE  # snapshots for which a direction is valid
MAX_PLAYERS = 40  # in a room: a snapshot is then at most 1,083 bytes, which every network carries unfragmented
MAX_ROOMS = 200
MAX_NAME = 12  # bytes
IDLE_TIME = 10.0  # seconds of silence after which a player leaves

HELLO = b"\x01dots1".ljust(20, b"\0")  # padded to be longer than the answer
CHALLENGE, JOIN, WELCOME, INPUT, SNAPSHOT, LEAVE, GOODBYE = (bytes([kind]) for kind in range(2, 9))
JOIN_HEAD = struct.Struct("!c8s8sB")
WELCOME_LAYOUT = struct.Struct("!c8s4sB")
INPUT_LAYOUT = struct.Struct("!c8sIbb")
SNAPSHOT_HEAD = struct.Struct("!c4sIBB")
COIN = struct.Struct("!HH")
PLAYER = struct.Struct("!BIIHHB")

SECRET = secrets.token_bytes(32)


def token(address: trio_udp.Address, age: int = 0) -> bytes:
    """Return the token that proves an address. It changes every half minute; age 1 gives the previous one."""
    text = f"{address} {trio.current_time() // 30 - age}"
    return hmac.digest(SECRET, text.encode(), "sha256")[:8]


def is_input(payload: bytes) -> bool:
    return payload[:1] == INPUT and len(payload) == INPUT_LAYOUT.size


def accept(datagram: trio_udp.Datagram) -> bool | bytes:
    """Admit only peers that return a token, which proves that they receive at their address."""
    if datagram.payload == HELLO or is_input(datagram.payload):
        return CHALLENGE + token(datagram.peer_address)
    return Joining.read(datagram.payload, datagram.peer_address) is not None


@attrs.frozen
class Joining:
    """A JOIN with a valid token for its address."""

    key: bytes
    room: str
    name: str

    @classmethod
    def read(cls, payload: bytes, address: trio_udp.Address) -> Joining | None:
        if payload[:1] != JOIN or len(payload) < JOIN_HEAD.size:
            return None
        _, given, key, length = JOIN_HEAD.unpack_from(payload)
        if not any(hmac.compare_digest(given, token(address, age)) for age in (0, 1)):
            return None
        names = payload[JOIN_HEAD.size :]
        return cls(key, printable(names[:length]), printable(names[length:]))


def printable(name: bytes) -> str:
    """Return the part of a name that is safe to show to others."""
    return "".join(filter(str.isprintable, name[:MAX_NAME].decode(errors="ignore")))


class Peer(Protocol):
    """The part of ``trio_udp.Client`` that the game uses. A browser's session in game_web.py has it too."""

    idle_timeout: float

    @property
    def peer_address(self) -> trio_udp.Address: ...
    @property
    def ended(self) -> str | None: ...
    @property
    def server(self) -> Sender: ...
    def __aiter__(self) -> AsyncIterator[bytes]: ...
    async def send(self, payload: bytes, /) -> None: ...
    async def send_many(self, payloads: Iterable[bytes], /) -> None: ...
    def validate(self) -> None: ...
    def close(self) -> None: ...


class Sender(Protocol):
    """Sends one payload to many of its clients, like ``trio_udp.Server``."""

    async def send_to_all(self, payload: bytes, clients: Any, /) -> None: ...


class Refused(Exception):
    """A player cannot join. The text is the reason."""


@attrs.define(eq=False)
class Player:
    """A dot. It belongs to the client that last joined with its key."""

    key: bytes
    number: int
    name: bytes
    room: Room
    client: Peer
    x: float
    y: float
    right: float = 0
    down: float = 0
    hold: int = 0  # snapshots for which the direction is still valid
    last_input: int = 0
    score: int = 0

    def steer(self, payload: bytes) -> None:
        """Set the direction, unless a later one has been set."""
        _, _, number, right, down = INPUT_LAYOUT.unpack(payload)
        if number > self.last_input:
            share = SPEED / max(100.0, math.hypot(right, down))  # so that diagonal movement is not faster
            self.last_input, self.right, self.down, self.hold = number, right * share, down * share, HOLD

    def move(self, ticks: int) -> None:
        steps = min(ticks, self.hold)
        self.hold -= steps
        self.x = min(max(self.x + steps * self.right, 0.0), FIELD)
        self.y = min(max(self.y + steps * self.down, 0.0), FIELD)


class Room:
    """Players by their numbers, and coins. A room exists while it has players."""

    def __init__(self, name: str, rng: random.Random) -> None:
        self.name = name
        self.number = secrets.token_bytes(4)  # random, so that snapshots cannot be forged blindly
        self.rng = rng
        self.tick = 0
        self.players: dict[int, Player] = {}
        self.coins = [self.random_place() for _ in range(COINS)]

    def random_place(self) -> tuple[int, int]:
        return self.rng.randint(0, FIELD), self.rng.randint(0, FIELD)

    def advance(self, ticks: int) -> None:
        self.tick += ticks
        for player in self.players.values():
            player.move(ticks)
            for index, (x, y) in enumerate(self.coins):
                if math.hypot(player.x - x, player.y - y) <= REACH:
                    player.score += 1
                    self.coins[index] = self.random_place()

    def snapshot(self) -> bytes:
        parts = [SNAPSHOT_HEAD.pack(SNAPSHOT, self.number, self.tick, len(self.coins), len(self.players))]
        parts += [COIN.pack(*coin) for coin in self.coins]
        for p in self.players.values():
            parts += PLAYER.pack(p.number, p.last_input, p.score, round(p.x), round(p.y), len(p.name)), p.name
        return b"".join(parts)

    async def show(self) -> None:
        """Send a snapshot to all players in few system calls, without waiting for any of them."""
        snapshot = self.snapshot()
        clients = [player.client for player in self.players.values()]
        for server in {client.server for client in clients}:
            await server.send_to_all(snapshot, [client for client in clients if client.server is server])


class Game:
    """All rooms and players, and the handler of their clients."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self.rooms: dict[str, Room] = {}
        self.players: dict[bytes, Player] = {}
        self.rng = rng or random.Random()

    async def run(self) -> None:
        """Advance all rooms and send their snapshots, until cancelled.

        Each tick is due at a multiple of 1 / RATE since the start, even if the previous one was late, so the pace does
        not drift. After a pause of the program, at most CATCH_UP late snapshots follow immediately. For the ticks
        before those, players move but no snapshots are sent.
        """
        start, done = trio.current_time(), 0
        while True:
            await trio.sleep_until(start + (done + 1) / RATE)
            due = max(done + 1, int((trio.current_time() - start) * RATE) - CATCH_UP)
            for room in list(self.rooms.values()):
                room.advance(due - done)
                await room.show()
            done = due

    async def handler(self, client: Peer) -> None:
        """Serve a client: it may join, steer, change rooms and leave. Ends by silence or when the server stops."""
        client.idle_timeout = IDLE_TIME
        player: Player | None = None
        key, reason = bytes(8), "left"
        try:
            async for payload in client:
                if player and payload[1:9] == player.key and is_input(payload):
                    player.steer(payload)
                elif payload == HELLO or is_input(payload):  # WELCOME was lost, or another program has the address
                    await client.send(CHALLENGE + token(client.peer_address))
                elif joining := Joining.read(payload, client.peer_address):
                    client.validate()
                    if player and player.key != joining.key:
                        self.leave(player, client)
                    key = joining.key
                    player = self.join(joining, client)
                    welcome = WELCOME_LAYOUT.pack(WELCOME, key, player.room.number, player.number)
                    await client.send_many([welcome, player.room.snapshot()])
                elif player and payload == LEAVE + player.key:
                    break
            else:
                reason = client.ended or ""  # "idle" or "stopping"
        except Refused as refusal:
            reason = str(refusal)
        finally:
            if player:
                self.leave(player, client)
        await client.send(GOODBYE + key + reason.encode())
        client.close()

    def join(self, joining: Joining, client: Peer) -> Player:
        """Return the player with this key, in this room. From now on it belongs to this client."""
        player = self.players.get(joining.key)
        if player and player.client is not client:  # a new address: end the old client without a goodbye
            player.client.close()
            player.client = client
        if player:
            player.last_input = 0
        if player and player.room.name == joining.room:
            return player
        if player:
            self.leave(player, client)
        room = self.rooms.get(joining.room)
        if room is None:
            if len(self.rooms) == MAX_ROOMS:
                raise Refused("there are too many rooms")
            room = self.rooms[joining.room] = Room(joining.room, self.rng)
        number = next((number for number in range(MAX_PLAYERS) if number not in room.players), None)
        if number is None:
            raise Refused("the room is full")
        player = Player(joining.key, number, joining.name.encode(), room, client, *room.random_place())
        room.players[number] = self.players[joining.key] = player
        return player

    def leave(self, player: Player, client: Peer) -> None:
        """Remove a player, unless it belongs to another client by now."""
        if self.players.get(player.key) is player and player.client is client:
            del self.players[player.key], player.room.players[player.number]
            if not player.room.players:
                del self.rooms[player.room.name]


@asynccontextmanager
async def game() -> AsyncIterator[trio_udp.Handler]:
    """Yield the handler of a new game, and advance its rooms meanwhile."""
    rooms = Game()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rooms.run)
        yield rooms.handler
        nursery.cancel_scope.cancel()


LIMITS = trio_udp.Limits(
    max_clients=2_000,
    clients_per_host=50,  # players behind one router
    inbox_datagrams=32,
    rate_limit=trio_udp.RateLimit(1_000, burst=1_000),  # a second, from each /24 or /56: 50 players with 20 each
    amplification=3,
)


serve = partial(
    trio_udp.serve,
    accept=accept,
    max_datagram_size=128,
    limits=LIMITS,
    stop_signals={signal.SIGINT, signal.SIGTERM},
)


async def main(port: int) -> None:
    async with game() as handler:
        await serve(handler, port)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    parser = argparse.ArgumentParser()
    parser.add_argument("port", nargs="?", type=int, default=9999)
    trio.run(main, parser.parse_args().port)
