"""A game: dots in rooms collect coins, and everyone in a room sees all of it 20 times a second.

Open to the internet: a stranger gets nothing but a short token until it has sent that back, and a forged address can
neither steer a player nor make it leave. See game_bots.py for the other end.

    python examples/game_server.py      (or: trio-udp --accept examples/game_server.py:accept --max-clients 2000
                                         --factory examples/game_server.py:game)
    python examples/game_bots.py 127.0.0.1 --bots 5     (in another terminal)

Each datagram is one message. Its first byte says which; numbers are unsigned and in network byte order::

    HELLO      1, "dots1", zeros up to 20 bytes     may I play?
    CHALLENGE  2, token 8                           only with this, in JOIN
    JOIN       3, token 8, key 8, length of the room's name 1, the room's name, the player's name
    WELCOME    4, key 8, room 4, player 1           the numbers of this room and player in SNAPSHOT
    INPUT      5, key 8, number 4, right 1, down 1  the direction, signed, in hundredths of the full speed
    SNAPSHOT   6, room 4, number 4, coins 1, players 1, (x 2, y 2) for each coin,
               (player 1, number of the last INPUT 4, score 4, x 2, y 2, length 1, name) for each player
    LEAVE      7, key 8
    GOODBYE    8, key 8, reason

*Any of them may be lost, doubled or late.* INPUT is a direction and SNAPSHOT the whole state, so the next one makes up
for those that were lost, and late joiners need nothing else. Receivers drop those whose number is not greater than the
last one's (after JOIN, INPUT is numbered anew); the others may come twice. A player sends HELLO until there is a
WELCOME, then INPUT at least each second, and answers a CHALLENGE with JOIN, at most 20 times a second.

*The key is the player*: 8 random bytes that it chooses. INPUT from an address that has not joined gets a CHALLENGE (a
phone has left the house, or the server has restarted), and JOIN with the same key takes over the same player, with its
score. An eavesdropper could do that too; see docs/howto/encryption.md.
"""

from __future__ import annotations

import hmac
import logging
import math
import random
import secrets
import signal
import struct
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Protocol

import attrs
import trio

import trio_udp

RATE = 20  # snapshots a second
FIELD = 1_000  # width and height
SPEED = 12.0  # the most that a player moves between two snapshots
REACH = 30  # how near a player takes a coin
COINS = 8  # in a room
CATCH_UP = 5  # snapshots that may be shown late
HOLD = RATE  # snapshots after which a direction no longer counts
MAX_PLAYERS = 40  # in a room: a snapshot is at most 1,083 bytes, which fit into a packet everywhere
MAX_ROOMS = 200
MAX_NAME = 12  # bytes
IDLE_TIME = 10.0  # seconds of silence after which a player is out

HELLO = b"\x01dots1".ljust(20, b"\0")  # longer than its answer
CHALLENGE, JOIN, WELCOME, INPUT, SNAPSHOT, LEAVE, GOODBYE = (bytes([kind]) for kind in range(2, 9))
JOIN_HEAD = struct.Struct("!c8s8sB")
WELCOME_LAYOUT = struct.Struct("!c8s4sB")
INPUT_LAYOUT = struct.Struct("!c8sIbb")
SNAPSHOT_HEAD = struct.Struct("!c4sIBB")
COIN = struct.Struct("!HH")
PLAYER = struct.Struct("!BIIHHB")

SECRET = secrets.token_bytes(32)


def token(address: trio_udp.Address, age: int = 0) -> bytes:
    """What only the owner of an address can know: the same for half a minute, and the one before that with age 1."""
    text = f"{address} {trio.current_time() // 30 - age}"
    return hmac.digest(SECRET, text.encode(), "sha256")[:8]


def is_input(payload: bytes) -> bool:
    return payload[:1] == INPUT and len(payload) == INPUT_LAYOUT.size


def accept(datagram: trio_udp.Datagram) -> bool | bytes:
    """Make clients only of those that have shown that they receive at their address."""
    if datagram.payload == HELLO or is_input(datagram.payload):
        return CHALLENGE + token(datagram.peer_address)
    return Joining.read(datagram.payload, datagram.peer_address) is not None


@attrs.frozen
class Joining:
    """A JOIN whose token is right for its address."""

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
        return cls(key, shown(names[:length]), shown(names[length:]))


def shown(name: bytes) -> str:
    """What others may be shown of a name."""
    return "".join(filter(str.isprintable, name[:MAX_NAME].decode(errors="ignore")))


class Peer(Protocol):
    """What the game needs of a client: a ``trio_udp.Client`` has it, and a browser's session in game_web.py."""

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
    """Sends to many of its clients at once, as a ``trio_udp.Server`` does."""

    async def send_to_all(self, payload: bytes, clients: Any, /) -> None: ...


class Refused(Exception):
    """A player cannot join; the text says why."""


@attrs.define(eq=False)
class Player:
    """A dot. It belongs to the client that has joined with its key last."""

    key: bytes
    number: int
    name: bytes
    room: Room
    client: Peer
    x: float
    y: float
    right: float = 0
    down: float = 0
    hold: int = 0  # snapshots for which the direction still counts
    last_input: int = 0
    score: int = 0

    def steer(self, payload: bytes) -> None:
        """Take a direction, unless a later one has been taken."""
        _, _, number, right, down = INPUT_LAYOUT.unpack(payload)
        if number > self.last_input:
            share = SPEED / max(100.0, math.hypot(right, down))  # nobody is faster on a diagonal
            self.last_input, self.right, self.down, self.hold = number, right * share, down * share, HOLD

    def move(self, ticks: int) -> None:
        steps = min(ticks, self.hold)
        self.hold -= steps
        self.x = min(max(self.x + steps * self.right, 0.0), FIELD)
        self.y = min(max(self.y + steps * self.down, 0.0), FIELD)


class Room:
    """Players, by their numbers, and coins. It lives from the first player's coming to the last one's leaving."""

    def __init__(self, name: str, dice: random.Random) -> None:
        self.name = name
        self.number = secrets.token_bytes(4)  # not to be guessed: nobody forges a snapshot without having seen one
        self.dice = dice
        self.tick = 0
        self.players: dict[int, Player] = {}
        self.coins = [self.somewhere() for _ in range(COINS)]

    def somewhere(self) -> tuple[int, int]:
        return self.dice.randint(0, FIELD), self.dice.randint(0, FIELD)

    def advance(self, ticks: int) -> None:
        self.tick += ticks
        for player in self.players.values():
            player.move(ticks)
            for index, (x, y) in enumerate(self.coins):
                if math.hypot(player.x - x, player.y - y) <= REACH:
                    player.score += 1
                    self.coins[index] = self.somewhere()

    def snapshot(self) -> bytes:
        parts = [SNAPSHOT_HEAD.pack(SNAPSHOT, self.number, self.tick, len(self.coins), len(self.players))]
        parts += [COIN.pack(*coin) for coin in self.coins]
        for p in self.players.values():
            parts += PLAYER.pack(p.number, p.last_input, p.score, round(p.x), round(p.y), len(p.name)), p.name
        return b"".join(parts)

    async def show(self) -> None:
        """Send a snapshot to all players, in few system calls and without waiting for any of them."""
        snapshot = self.snapshot()
        clients = [player.client for player in self.players.values()]
        for server in {client.server for client in clients}:
            await server.send_to_all(snapshot, [client for client in clients if client.server is server])


class Game:
    """All rooms and players, and the conversations with them."""

    def __init__(self, dice: random.Random | None = None) -> None:
        self.rooms: dict[str, Room] = {}
        self.players: dict[bytes, Player] = {}
        self.dice = dice or random.Random()

    async def run(self) -> None:
        """Move and show all rooms, until cancelled.

        Each tick is due at a multiple of 1 / RATE since the start, however late the one before was, so the pace does
        not drift. After a hold-up of the program the late ticks follow at once, at most CATCH_UP of them; the players
        move for those before, too, but nobody is shown them.
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
        """Serve one address: let it join, steer, change rooms and leave, until it is silent or the server stops."""
        client.idle_timeout = IDLE_TIME
        player: Player | None = None
        key, reason = bytes(8), "left"
        try:
            async for payload in client:
                if player and payload[1:9] == player.key and is_input(payload):
                    player.steer(payload)
                elif payload == HELLO or is_input(payload):  # a WELCOME was lost, or it is another program by now
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
        """Return the player with this key, in this room, and let it belong to this client from now on."""
        player = self.players.get(joining.key)
        if player and player.client is not client:  # its address has changed: the old one is told nothing
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
            room = self.rooms[joining.room] = Room(joining.room, self.dice)
        number = next((number for number in range(MAX_PLAYERS) if number not in room.players), None)
        if number is None:
            raise Refused("the room is full")
        player = Player(joining.key, number, joining.name.encode(), room, client, *room.somewhere())
        room.players[number] = self.players[joining.key] = player
        return player

    def leave(self, player: Player, client: Peer) -> None:
        """Take a player out, unless it belongs to another client by now."""
        if self.players.get(player.key) is player and player.client is client:
            del self.players[player.key], player.room.players[player.number]
            if not player.room.players:
                del self.rooms[player.room.name]


@asynccontextmanager
async def game() -> AsyncIterator[trio_udp.Handler]:
    """Give the handler, and let the rooms run beside the server."""
    rooms = Game()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rooms.run)
        yield rooms.handler
        nursery.cancel_scope.cancel()


LIMITS = trio_udp.Limits(
    max_clients=2_000,
    clients_per_host=50,  # players behind one router
    inbox_datagrams=32,
    rate_limit=trio_udp.RateLimit(1_000, burst=1_000),  # of 50 players with 20 a second; each /24 or /56 alike
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
    trio.run(main, int(sys.argv[1]) if sys.argv[1:] else 9999)
