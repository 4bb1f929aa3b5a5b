"""Echo every datagram; at the start, print the options of the server's sockets.

``nursery.start`` gives the running server, and ``endpoint.socket`` the socket with all its options.

    python examples/echo_options.py --receive-buffer 100000 --reuse-port
    nc -u 127.0.0.1 9999        (in another terminal: type a line)
"""

import argparse
import signal
import socket
from functools import partial

import trio

import trio_udp

OPTIONS = ("SO_RCVBUF", "SO_SNDBUF", "SO_REUSEADDR", "SO_REUSEPORT", "SO_BROADCAST")


async def echo(client: trio_udp.Client) -> None:
    async for payload in client:
        print(f"received {payload!r} from {client.peer_address}")
        await client.send(payload)
        print(f"sent {payload!r} to {client.peer_address}")


def print_options(endpoint: trio_udp.Endpoint) -> None:
    for name in OPTIONS:
        if hasattr(socket, name):  # Windows has no SO_REUSEPORT
            # Linux reports twice the buffer it was asked for: it counts its own bookkeeping too, see socket(7).
            print(f"  {name} = {endpoint.socket.getsockopt(socket.SOL_SOCKET, getattr(socket, name))}")


async def main(host: str | None, port: int, receive_buffer: int | None, reuse_port: bool) -> None:
    async with trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(
            partial(
                trio_udp.serve,
                echo,
                port,
                host=host,
                receive_buffer=receive_buffer,
                reuse_port=reuse_port,
                stop_signals={signal.SIGINT, signal.SIGTERM},
            )
        )
        for endpoint in server.endpoints:
            print("listening on {}:{}".format(*endpoint.local_address), flush=True)
            print_options(endpoint)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", nargs="?", type=int, default=9999)
    parser.add_argument("--host", help="name or address to bind; all interfaces by default")
    parser.add_argument("--receive-buffer", type=int, metavar="BYTES", help="kernel memory for datagrams not yet read")
    parser.add_argument("--reuse-port", action="store_true", help="let other processes bind the same port")
    arguments = parser.parse_args()
    trio.run(main, arguments.host, arguments.port, arguments.receive_buffer, arguments.reuse_port)
