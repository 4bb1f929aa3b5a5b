"""Send each line as a datagram to a UDP server, and print the answers. Use it to try the other examples.

UDP promises no delivery, so the client sends a line up to three times until an answer arrives. The server may see the
line more than once.

    python examples/client.py hello "two words"
    python examples/client.py --port 9998               (type lines; an empty line sends an empty datagram)
"""

import argparse
import sys
from collections.abc import Iterable
from contextlib import suppress

import trio

import trio_udp

TRIES = 3


def show(answer: bytes) -> None:
    print(answer.decode(errors="backslashreplace").rstrip("\n"), flush=True)


async def ask(connection: trio_udp.Connection, payload: bytes, seconds: float) -> bytes | None:
    """Return the answer, or None if no answer has arrived after all tries."""
    for _ in range(TRIES):
        await connection.send(payload)
        with trio.move_on_after(seconds):
            return await connection.receive()
    return None


async def main(host: str, port: int, seconds: float, lines: Iterable[str]) -> str | None:
    """Return an error message, or None if all lines were answered."""
    async with await trio_udp.connect(host, port) as connection:
        try:
            for line in lines:  # reading the keyboard blocks, but there is no other task
                with suppress(trio.WouldBlock):
                    while True:  # a late or unrequested datagram is not the answer to this line
                        show(connection.receive_nowait())
                answer = await ask(connection, line.encode(), seconds)
                if answer is None:
                    return f"no answer to {line!r} after {TRIES} tries"
                show(answer)
        except ConnectionRefusedError:
            return f"nothing listens on {host} port {port}"
    return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("lines", nargs="*", metavar="LINE", help="standard input by default")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9999)
    parser.add_argument("--timeout", type=float, default=1.0, metavar="SECONDS", help="for each try")
    arguments = parser.parse_args()
    lines = arguments.lines or (line.rstrip("\n") for line in sys.stdin)
    sys.exit(trio.run(main, arguments.host, arguments.port, arguments.timeout, lines))
