"""Answer every datagram in upper case, and print its sender. Read this example first.

The handler runs once for each client, for as long as the conversation lasts.

    python examples/uppercase.py        (or, on two cores: trio-udp --workers 2 examples/uppercase.py:uppercase)
    nc -u 127.0.0.1 9999        (in another terminal: type a line)
"""

import logging
import signal
import sys
from functools import partial

import trio

import trio_udp


async def uppercase(client: trio_udp.Client) -> None:
    async for payload in client:
        print(f"{client.peer_address!r} wrote {payload!r}")
        await client.send(payload.upper())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    port = int(sys.argv[1]) if sys.argv[1:] else 9999
    trio.run(partial(trio_udp.serve, uppercase, port, stop_signals={signal.SIGINT, signal.SIGTERM}))
