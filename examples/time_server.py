"""Tell the time to whoever sends a datagram, even an empty one.

``request_handler`` makes a handler of a function that returns the answer to one datagram.

    python examples/time_server.py
    nc -u 127.0.0.1 9999        (in another terminal: press Enter)
"""

import argparse
import signal
import time
from functools import partial

import trio

import trio_udp


@trio_udp.request_handler
async def tell_time(payload: bytes, client: trio_udp.Client) -> bytes:
    return time.ctime().encode()


async def main(host: str | None, port: int) -> None:
    stop_signals = {signal.SIGINT, signal.SIGTERM}
    async with trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(
            partial(trio_udp.serve, tell_time, port, host=host, stop_signals=stop_signals)
        )
        for endpoint in server.endpoints:
            print("listening on {}:{}".format(*endpoint.local_address), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", nargs="?", type=int, default=9999)
    parser.add_argument("--host", help="name or address to bind; all interfaces by default")
    arguments = parser.parse_args()
    trio.run(main, arguments.host, arguments.port)
