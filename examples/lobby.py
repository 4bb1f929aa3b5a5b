"""A lobby: it sends each line to all its members. Members may join late, and leave by falling silent.

``server.send_to_all`` sends one payload to many clients with few system calls. A task beside the server sends a list of
the members every few seconds.

    python examples/lobby.py        (or: trio-udp --max-clients 100 --factory examples/lobby.py:lobby)
    nc -u 127.0.0.1 9999        (in two or three terminals: the first line is your name, an empty line keeps you in
                                 the lobby, "quit" leaves)

One datagram makes the lobby send many, and its source may be forged. On the internet, admit a client only after it has
sent back a token, and then call ``client.validate()``: see examples/chat_room.py.
"""

import logging
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

import trio_udp

IDLE_TIME = float(os.environ.get("IDLE_TIME", "60"))  # seconds of silence after which a member leaves
EVERY = float(os.environ.get("EVERY", "10"))  # seconds between lists of the members


class Lobby:
    """The members, and the last lines, which late joiners get."""

    def __init__(self) -> None:
        self.names: dict[trio_udp.Client, bytes] = {}
        self.lines: deque[bytes] = deque(maxlen=10)

    async def say(self, server: trio_udp.Server, line: bytes) -> None:
        self.lines.append(line)
        await server.send_to_all(line, self.names)

    async def handler(self, client: trio_udp.Client) -> None:
        client.idle_timeout = IDLE_TIME
        name = (await client.receive()).strip() or b"nobody"
        self.names[client] = name
        try:
            await client.send_many(self.lines)
            await self.say(client.server, b"%b joins\n" % name)
            async for payload in client:
                match payload.strip():
                    case b"":
                        pass  # only keeps the member alive
                    case b"quit":
                        client.close()
                        break
                    case line:
                        await self.say(client.server, b"%b: %b\n" % (name, line))
        finally:
            del self.names[client]
        if client.ended:  # not after close()
            await client.send(f"goodbye: {client.ended}\n".encode())  # "idle" or "stopping"
        if client.ended != "stopping":
            await self.say(client.server, b"%b leaves\n" % name)

    async def tell_who_is_here(self) -> None:
        while True:
            await trio.sleep(EVERY)
            for server in {client.server for client in self.names}:  # one, or none if the lobby is empty
                await server.send_to_all(b"here: %b\n" % b", ".join(self.names.values()), self.names)


@asynccontextmanager
async def lobby() -> AsyncIterator[trio_udp.Handler]:
    """Yield the handler, and run a task beside the server."""
    here = Lobby()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.tell_who_is_here)
        yield here.handler
        nursery.cancel_scope.cancel()


async def main(port: int) -> None:
    limits = trio_udp.Limits(max_clients=100)
    async with lobby() as handler:
        await trio_udp.serve(
            handler, port, max_datagram_size=500, limits=limits, stop_signals={signal.SIGINT, signal.SIGTERM}
        )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    trio.run(main, int(sys.argv[1]) if sys.argv[1:] else 9999)
