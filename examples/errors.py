"""Tell three kinds of error apart: the peer's, the handler's and the server's own.

The server keeps a total for each client. A malformed payload gets an error as its answer, and the conversation goes
on. An exception that leaves the handler ends that client only, by way of ``on_error``. An exception that leaves
``on_error`` ends the server.

    python examples/errors.py       (or, where errors are only logged: trio-udp examples/errors.py:handler)
    nc -u 127.0.0.1 9999        (in another terminal: type {"add": 6}, {"divide": 2}, rubbish, {"divide": 0})
"""

import json
import logging
import signal
import sys
from collections import Counter
from contextlib import suppress

import trio

import trio_udp

failures: Counter[str] = Counter()


def calculate(total: float, payload: bytes) -> float:
    """Return the new total. A malformed payload is a ``ValueError``; nobody has thought of dividing by 0."""
    match json.loads(payload):
        case {"add": int() | float() as operand}:
            return total + operand
        case {"divide": int() | float() as operand}:
            return total / operand
        case _:
            raise ValueError("expected add or divide, and a number")


def encode(**reply: object) -> bytes:
    return json.dumps(reply).encode() + b"\n"


async def handler(client: trio_udp.Client) -> None:
    total = 0.0
    async for payload in client:
        try:
            total = calculate(total, payload)
        except (ValueError, RecursionError) as error:  # the latter for "[[[[[" and so on
            await client.send(encode(error=str(error)))
        else:
            await client.send(encode(total=total))


def on_error(client: trio_udp.Client, error: Exception) -> None:
    trio_udp.log_error(client, error)  # what the server does by itself: at most 10 tracebacks a second
    failures[type(error).__name__] += 1
    # Not an async function, so it cannot wait until there is room to send. An answer may be lost on the way anyhow.
    with suppress(trio.WouldBlock, trio.ClosedResourceError):
        client.send_nowait(encode(error="internal"))


async def main(port: int) -> None:
    stop_signals = {signal.SIGINT, signal.SIGTERM}
    await trio_udp.serve(handler, port, on_error=on_error, stop_signals=stop_signals)
    print(f"failures: {dict(failures)}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    trio.run(main, int(sys.argv[1]) if sys.argv[1:] else 9999)
