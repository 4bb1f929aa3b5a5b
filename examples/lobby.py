"""Send what one says to all: a lobby that people join late and leave by falling silent.

``server.send_to_all`` sends one payload to many clients in few system calls. A task beside the server tells everyone
every few seconds who is there, until the server stops.

    python examples/lobby.py
    nc -u 127.0.0.1 9999        (in two or three terminals: your first line is your name, an empty one says that you
                                 are still there, "quit" leaves)

A datagram makes the lobby send many, and its source may be forged. On the internet, let people in only once they have
sent back a token, and call ``client.validate()`` then; see docs/guarantees.md.
"""

import argparse
import signal
from collections import deque
from functools import partial

import trio

import trio_udp


class Lobby:
    """Who is there, and the last lines, for those who come late."""

    def __init__(self) -> None:
        self.names: dict[trio_udp.Client, bytes] = {}
        self.lines: deque[bytes] = deque(maxlen=10)

    async def say(self, server: trio_udp.Server, line: bytes) -> None:
        self.lines.append(line)
        await server.send_to_all(line, self.names)

    async def handler(self, client: trio_udp.Client) -> None:
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

    async def tell_who_is_here(self, server: trio_udp.Server, seconds: float) -> None:
        """Do something every so many seconds, until the server stops."""
        while True:
            with trio.move_on_after(seconds):
                await server.wait_stopping()
                return
            await server.send_to_all(b"here: %b\n" % b", ".join(self.names.values()), self.names)


async def main(host: str | None, port: int, idle_time: float, seconds: float) -> None:
    lobby = Lobby()
    async with trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(
            partial(
                trio_udp.serve,
                lobby.handler,
                port,
                host=host,
                max_datagram_size=500,
                idle_timeout=idle_time,
                limits=trio_udp.Limits(max_clients=100),
                stop_signals={signal.SIGINT, signal.SIGTERM},
            )
        )
        for endpoint in server.endpoints:
            print("listening on {}:{}".format(*endpoint.local_address), flush=True)
        nursery.start_soon(lobby.tell_who_is_here, server, seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", nargs="?", type=int, default=9999)
    parser.add_argument("--host", help="name or address to bind; all interfaces by default")
    parser.add_argument("--idle-time", type=float, default=60.0, metavar="SECONDS", help="of silence until one leaves")
    parser.add_argument("--every", type=float, default=10.0, metavar="SECONDS", help="between lists of who is there")
    arguments = parser.parse_args()
    trio.run(main, arguments.host, arguments.port, arguments.idle_time, arguments.every)
