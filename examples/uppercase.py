"""Answer every datagram in upper case, and print who wrote what. Read this example first.

The handler is called once for each address that writes, and lives as long as that conversation.

    python examples/uppercase.py
    nc -u 127.0.0.1 9999        (in another terminal: type a line)
"""

import argparse
import signal
from functools import partial

import trio

import trio_udp


async def uppercase(client: trio_udp.Client) -> None:
    async for payload in client:
        print(f"{client.peer_address[0]} wrote {payload!r}")
        await client.send(payload.upper())


async def main(host: str | None, port: int) -> None:
    stop_signals = {signal.SIGINT, signal.SIGTERM}
    async with trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(
            partial(trio_udp.serve, uppercase, port, host=host, stop_signals=stop_signals)
        )
        for endpoint in server.endpoints:
            print("listening on {}:{}".format(*endpoint.local_address), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", nargs="?", type=int, default=9999)
    parser.add_argument("--host", help="name or address to bind; all interfaces by default")
    arguments = parser.parse_args()
    trio.run(main, arguments.host, arguments.port)
