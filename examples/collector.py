"""Collect log lines from many senders in one file, in arrival order, and lose none when the collector is stopped.

``datagram_handler`` sees the datagrams of all senders in arrival order. Lines collect in the buffer of the file, and a
task beside the server writes them to the disk every few seconds. On SIGTERM the server first catches up, so it also
writes the lines that have reached the machine by then. While the disk is slow, datagrams wait in the kernel. If its
buffer is full, the kernel drops and counts them (``kernel_dropped``).

    FILE=collected.log python examples/collector.py     (or: trio-udp --factory examples/collector.py:collector)
    nc -u 127.0.0.1 9999        (in several terminals: type lines; then stop the collector with Ctrl-C)
"""

import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import BinaryIO

import trio

import trio_udp

EVERY = float(os.environ.get("EVERY", "1"))  # seconds between writes
BUFFER = 2**20  # bytes to collect until they are written; a full buffer is written at once


class Collector:
    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.lines = 0

    def handler(self, datagram: trio_udp.Datagram) -> None:
        line = datagram.payload.rstrip(b"\r\n").replace(b"\n", b"\\n")  # or a sender could forge another's lines
        peer = datagram.peer_address
        sender = peer[0] if isinstance(peer, tuple) else repr(peer)  # on a Unix-domain socket: a name, or None
        self.file.write(b"%b %b\n" % (sender.encode(), line))
        self.lines += 1

    async def write_out(self) -> None:
        written = 0
        while True:
            await trio.sleep(EVERY)
            if self.lines > written:
                written = self.lines
                self.file.flush()
                print(f"lines: {written}", flush=True)


@asynccontextmanager
async def collector() -> AsyncIterator[trio_udp.Handler]:
    """Yield the handler. After the server has stopped, write all collected lines to the disk."""
    with open(os.environ.get("FILE", "collected.log"), "ab", buffering=BUFFER) as file:  # noqa: ASYNC230  # see above
        collector = Collector(file)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collector.write_out)
            yield trio_udp.datagram_handler(collector.handler)
            nursery.cancel_scope.cancel()
    print(f"collected: {collector.lines}", flush=True)


async def main(port: int) -> None:
    async with collector() as handler, trio.open_nursery() as nursery:
        # A full disk ends the collector.
        stop_signals = {signal.SIGINT, signal.SIGTERM}
        serve = partial(trio_udp.serve, handler, port, on_error=trio_udp.raise_error, stop_signals=stop_signals)
        server: trio_udp.Server = await nursery.start(serve)
    print(f"dropped by the kernel: {server.statistics().kernel_dropped}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    trio.run(main, int(sys.argv[1]) if sys.argv[1:] else 9999)
