"""A relay: carries the datagrams of each client to a server and back, as a NAT or a load balancer does.

Each client has a task and a connection to the server, so that answers find their way. Traffic in either direction keeps
them alive: the client's own silence ends nothing (``idle_timeout = inf``), instead both ways move one deadline.

    python examples/dns_server.py examples/example.zone                 (listens on port 5353)
    python examples/relay.py --to 127.0.0.1 5353 9999                   (or: trio-udp examples/relay.py:to_dns)
    dig @127.0.0.1 -p 9999 www.example.com

A client costs a socket: let the limit of open files (ulimit -n) be higher than --most.
"""

import argparse
import math
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import trio

import trio_udp

LAST_ANSWERS = 1.0  # seconds that the server has for them, once a client's own datagrams end because the relay stops


async def relay(connect: Callable[[], Awaitable[trio_udp.Connection]], silence: float, client: trio_udp.Client) -> None:
    """Carry datagrams both ways, until for ``silence`` seconds there were none."""
    client.idle_timeout = math.inf
    async with await connect() as server, trio.open_nursery() as nursery:
        alive = nursery.cancel_scope
        alive.deadline = trio.current_time() + silence

        async def back() -> None:
            while True:
                try:
                    payload = await server.receive()
                except ConnectionRefusedError:
                    continue  # nobody listens there now: that is the client's to find out, as without a relay
                if client.ended is None:
                    alive.deadline = trio.current_time() + silence
                with suppress(OSError):  # longer than the client's version of IP allows
                    await client.send(payload)

        nursery.start_soon(back)
        async for payload in client:
            alive.deadline = trio.current_time() + silence
            with suppress(OSError):  # refused, too long, no route: it is lost, as on any network
                await server.send(payload)
        alive.deadline = trio.current_time() + LAST_ANSWERS


# By default a connection asks for 4 MiB of kernel memory, which is much for one client.
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
    parser.add_argument("--silence", type=float, default=60.0, metavar="SECONDS", help="in both directions")
    parser.add_argument("--most", type=int, default=500, metavar="CLIENTS", help="at once")
    arguments = parser.parse_args()
    to = arguments.to[0], int(arguments.to[1])
    trio.run(main, arguments.host, arguments.port, to, arguments.silence, arguments.most)
