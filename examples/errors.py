"""Handle three kinds of errors: those of the peer, of the handler and of the server.

The server keeps a total for each client. A malformed payload gets an error message as its answer, and the conversation
goes on. An exception that leaves the handler goes to ``on_error``, and ends only that client. An exception that leaves
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
    """Return the new total. A malformed payload raises ``ValueError``. A division by 0 is the bug of this example."""
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
        except (ValueError, RecursionError) as error:  # json raises RecursionError for a long "[[[[[..."
            await client.send(encode(error=str(error)))
        else:
            await client.send(encode(total=total))


def on_error(client: trio_udp.Client, error: Exception) -> None:
    trio_udp.log_error(client, error)  # the default of on_error: at most 10 tracebacks a second
    failures[type(error).__name__] += 1
    # on_error is not async, so it cannot wait for room in the send buffer. An answer may get lost on the way anyhow.
    with suppress(trio.WouldBlock, trio.ClosedResourceError):
        client.send_nowait(encode(error="internal"))


async def main(port: int) -> None:
    stop_signals = {signal.SIGINT, signal.SIGTERM}
    await trio_udp.serve(handler, port, on_error=on_error, stop_signals=stop_signals)
    print(f"failures: {dict(failures)}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    trio.run(main, int(sys.argv[1]) if sys.argv[1:] else 9999)
