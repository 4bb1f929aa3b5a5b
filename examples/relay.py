"""A relay forwards the datagrams of each client to a server, and the answers back, as a NAT or a load balancer does.

Each client has a task and its own connection to the server, so that each answer goes to the right client. Traffic in
either direction keeps both alive: the client has no idle timeout (``idle_timeout = inf``), and traffic in both
directions extends one deadline.

    python examples/dns_server.py examples/example.zone                 (listens on port 5353)
    python examples/relay.py --to 127.0.0.1 5353 9999                   (or: trio-udp examples/relay.py:to_dns)
    dig @127.0.0.1 -p 9999 www.example.com

Each client takes a socket: set the limit of open files (ulimit -n) higher than --most.
"""

import argparse
import math
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import trio

import trio_udp

LAST_ANSWERS = 1.0  # seconds in which the server may still answer when the relay stops


async def relay(connect: Callable[[], Awaitable[trio_udp.Connection]], silence: float, client: trio_udp.Client) -> None:
    """Forward datagrams in both directions, until there have been none for ``silence`` seconds."""
    client.idle_timeout = math.inf
    async with await connect() as server, trio.open_nursery() as nursery:
        alive = nursery.cancel_scope
        alive.deadline = trio.current_time() + silence

        async def back() -> None:
            while True:
                try:
                    payload = await server.receive()
                except ConnectionRefusedError:
                    continue  # nothing listens there now; the client gets no answer, as without a relay
                if client.ended is None:
                    alive.deadline = trio.current_time() + silence
                with suppress(OSError):  # the payload is longer than the client's version of IP allows
                    await client.send(payload)

        nursery.start_soon(back)
        async for payload in client:
            alive.deadline = trio.current_time() + silence
            with suppress(OSError):  # refused, too long, no route: the datagram is lost, as on any network
                await server.send(payload)
        alive.deadline = trio.current_time() + LAST_ANSWERS


# The default receive buffer of a connection is 4 MiB, which is a lot for one client.
connect_to = partial(trio_udp.connect, receive_buffer=262_144)
to_dns = partial(relay, partial(connect_to, "127.0.0.1", 5353), 60.0)


async def main(host: str | None, port: int, to: tuple[str, int], silence: float, most: int) -> None:
    connect = partial(connect_to, *to)
    async with trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(
            partial(
                trio_udp.serve,
                partial(relay, connect, silence),
                port,
                host=host,
                limits=trio_udp.Limits(max_clients=most),
                stop_signals={signal.SIGINT, signal.SIGTERM},
            )
        )
        for endpoint in server.endpoints:
            print("listening on {}:{}".format(*endpoint.local_address), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", nargs="?", type=int, default=9999)
    parser.add_argument("--host", help="name or address to bind; all interfaces by default")
    parser.add_argument("--to", nargs=2, default=["127.0.0.1", "5353"], metavar=("HOST", "PORT"), help="the server")
    parser.add_argument("--silence", type=float, default=60.0, metavar="SECONDS", help="after which a client ends")
    parser.add_argument("--most", type=int, default=500, metavar="CLIENTS", help="at a time")
    arguments = parser.parse_args()
    to = arguments.to[0], int(arguments.to[1])
    trio.run(main, arguments.host, arguments.port, to, arguments.silence, arguments.most)
