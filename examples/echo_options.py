"""Set options of the server's sockets, and print them when the server starts. The handler echoes every datagram.

The server calls ``configure`` with each socket right before it binds it. ``nursery.start`` returns the running server,
and ``endpoint.socket`` is the socket with all its options.

    python examples/echo_options.py     (or, with options of the command line: trio-udp examples/echo_options.py:echo)
    nc -u 127.0.0.1 9999        (in another terminal: type a line)
"""

import signal
import socket
import sys
from functools import partial

import trio

import trio_udp

OPTIONS = ("SO_RCVBUF", "SO_SNDBUF", "SO_REUSEADDR", "SO_REUSEPORT", "SO_BROADCAST")


async def echo(client: trio_udp.Client) -> None:
    async for payload in client:
        print(f"received {payload!r} from {client.peer_address}")
        await client.send(payload)
        print(f"sent {payload!r} to {client.peer_address}")


def share_address(sock: socket.socket) -> None:
    """Let other processes bind this address too. ``configure`` is the place for options without an argument."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def print_options(endpoint: trio_udp.Endpoint) -> None:
    for name in OPTIONS:
        if hasattr(socket, name):  # Windows has no SO_REUSEPORT
            # Linux reports twice the requested buffer, because it adds room for its own bookkeeping, see socket(7).
            print(f"  {name} = {endpoint.socket.getsockopt(socket.SOL_SOCKET, getattr(socket, name))}")


async def main(port: int) -> None:
    serve = partial(
        trio_udp.serve,
        echo,
        port,
        receive_buffer=100_000,
        configure=share_address,
        stop_signals={signal.SIGINT, signal.SIGTERM},
    )
    async with trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(serve)
        for endpoint in server.endpoints:
            print("listening on {}:{}".format(*endpoint.local_address), flush=True)
            print_options(endpoint)


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]) if sys.argv[1:] else 9999)
