"""Tell the time to anyone who sends a datagram, even an empty one.

``datagram_handler`` makes a handler of a plain function that returns the answer to one datagram: no clients, no tasks.

    python examples/time_server.py
    nc -u 127.0.0.1 9999        (in another terminal: press Enter)

A protocol of your own should answer only requests, and with something that is no request. This server answers
anything: a forged datagram could make two of its kind answer each other for ever (CVE-2024-2169).
"""

import argparse
import signal
import time
from functools import partial

import trio

import trio_udp


@trio_udp.datagram_handler
def tell_time(datagram: trio_udp.Datagram) -> bytes:
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
