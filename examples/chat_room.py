"""Chat rooms that may be open to the internet: a stranger gets only a token until it has sent the token back.

A forged address never becomes a client: ``accept`` answers "hello" with a token, keeps nothing, and admits a stranger
that sends its token back. Late joiners get the last lines. The server asks a silent member whether it is still there,
and the member leaves if it does not answer.

    python examples/chat_room.py        (or: trio-udp --accept examples/chat_room.py:accept examples/chat_room.py:chat)
    nc -u 127.0.0.1 9999        (in two or three terminals: "hello", then "join TOKEN ROOM NAME" with the token you get;
                                 then lines for the room: an empty line keeps you in it, "/quit" leaves)
"""

import argparse
import hmac
import math
import secrets
import signal
from collections import deque
from functools import partial

import trio

import trio_udp

SECRET = secrets.token_bytes(32)


def token(address: trio_udp.Address, age: int = 0) -> bytes:
    """Return a token that only the owner of an address can know. It changes every 30 seconds; age 1 is the last one."""
    text = f"{address} {trio.current_time() // 30 - age}"
    return hmac.digest(SECRET, text.encode(), "sha256").hex()[:8].encode()


def accept(datagram: trio_udp.Datagram) -> bool | bytes:
    match datagram.payload.split():
        case [b"hello"]:
            return b"token %b\n" % token(datagram.peer_address)
        case [b"join", given, _, _]:
            return any(hmac.compare_digest(given, token(datagram.peer_address, age)) for age in (0, 1))
    return False


def text(payload: bytes) -> str:
    """Return the characters that are safe to show on other terminals."""
    return "".join(filter(str.isprintable, payload.decode(errors="replace")))


class Room:
    """The members, and the last lines, which late joiners get."""

    def __init__(self) -> None:
        self.members: dict[trio_udp.Client, str] = {}
        self.lines: deque[bytes] = deque(maxlen=10)

    async def say(self, server: trio_udp.Server, line: str) -> None:
        self.lines.append(f"{line}\n".encode())
        await server.send_to_all(self.lines[-1], self.members)

    async def listen(self, client: trio_udp.Client, joining: bytes) -> None:
        """Send a member's lines to the room, until the member quits or its conversation ends."""
        asked = False
        while True:
            with trio.move_on_after(math.inf if asked else client.idle_timeout / 2) as patience:
                payload = (await client.receive()).strip()
            if asked := patience.cancelled_caught:
                await client.send(b"still there?\n")
            elif payload == b"/quit":
                return
            elif payload == joining:  # repeated, because our answer was lost
                await client.send_many([*self.lines, f"{self.members[client]} joins\n".encode()])
            elif payload:
                await self.say(client.server, f"{self.members[client]}: {text(payload)}")


async def handler(rooms: dict[str, Room], client: trio_udp.Client) -> None:
    joining = (await client.receive()).strip()
    _, _, room_name, name = map(text, joining.split())  # accept has checked the form
    client.validate()
    room = rooms.setdefault(room_name, Room())
    room.members[client] = name
    try:
        await client.send_many(room.lines)
        await room.say(client.server, f"{name} joins")
        await room.listen(client, joining)
    except trio.EndOfChannel:
        pass  # client.ended says why
    finally:
        del room.members[client]
        if not room.members:
            del rooms[room_name]
    await client.send(f"goodbye: {client.ended or 'quit'}\n".encode())  # else "idle" or "stopping"
    if client.ended != "stopping":
        await room.say(client.server, f"{name} leaves")
    client.close()


chat = partial(handler, {})


async def main(host: str | None, port: int, idle_time: float) -> None:
    serve = partial(
        trio_udp.serve,
        chat,
        port,
        host=host,
        max_datagram_size=500,
        accept=accept,
        idle_timeout=idle_time,
        limits=trio_udp.Limits(clients_per_host=50, rate_limit=trio_udp.RateLimit(50), amplification=3),
        stop_signals={signal.SIGINT, signal.SIGTERM},
    )
    async with trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(serve)
        for endpoint in server.endpoints:
            print("listening on {}:{}".format(*endpoint.local_address), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", nargs="?", type=int, default=9999)
    parser.add_argument("--host", help="name or address to bind; all interfaces by default")
    parser.add_argument("--idle-time", type=float, default=60.0, metavar="SECONDS", help="of silence until one leaves")
    arguments = parser.parse_args()
    trio.run(main, arguments.host, arguments.port, arguments.idle_time)
