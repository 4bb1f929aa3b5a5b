"""Send what one says to all: a lobby that people join late and leave by falling silent.

``server.send_to_all`` sends one payload to many clients in few system calls. A task beside the server tells everyone
every few seconds who is there.

    python examples/lobby.py        (or: trio-udp --max-clients 100 --factory examples/lobby.py:lobby)
    nc -u 127.0.0.1 9999        (in two or three terminals: your first line is your name, an empty one says that you
                                 are still there, "quit" leaves)

A datagram makes the lobby send many, and its source may be forged. On the internet, let people in only once they have
sent back a token, and call ``client.validate()`` then; see docs/guarantees.md.
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

IDLE_TIME = float(os.environ.get("IDLE_TIME", "60"))  # seconds of silence until one leaves
EVERY = float(os.environ.get("EVERY", "10"))  # seconds between lists of who is there


class Lobby:
    """Who is there, and the last lines, for those who come late."""

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
                        pass  # still there
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
            for server in {client.server for client in self.names}:  # one, or none while nobody is there
                await server.send_to_all(b"here: %b\n" % b", ".join(self.names.values()), self.names)


@asynccontextmanager
async def lobby() -> AsyncIterator[trio_udp.Handler]:
    """Give the handler, and run a task beside the server."""
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
