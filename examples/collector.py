"""Collect log lines from many senders in one file, in arrival order, and lose none when the collector is stopped.

``datagram_handler`` sees every datagram in arrival order, over all senders. Lines collect in the buffer of the file; a
task beside the server writes them out every few seconds. At SIGTERM the server first catches up: what had reached the
machine by then is written too. While the disk is slow, datagrams wait in the kernel; those that find its buffer full
are counted (``kernel_dropped``).

    python examples/collector.py --file collected.log
    nc -u 127.0.0.1 9999        (in several terminals: type lines; then stop the collector with Ctrl-C)
"""

import argparse
import signal
from functools import partial
from typing import BinaryIO

import trio

import trio_udp

BUFFER = 2**20  # bytes to collect until they are written; a full buffer is written at once


class Collector:
    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.lines = 0

    def handler(self, datagram: trio_udp.Datagram) -> None:
        line = datagram.payload.rstrip(b"\r\n").replace(b"\n", b"\\n")  # or one sender could write another's lines
        self.file.write(b"%b %b\n" % (datagram.peer_address[0].encode(), line))
        self.lines += 1

    async def write_out(self, server: trio_udp.Server, seconds: float) -> None:
        """Do something every so many seconds, until the server stops."""
        written = 0
        while True:
            with trio.move_on_after(seconds):
                await server.wait_stopping()
                return
            if self.lines > written:
                written = self.lines
                self.file.flush()
                print(f"lines: {written}", flush=True)


async def main(host: str | None, port: int, path: str, seconds: float) -> None:
    with open(path, "ab", buffering=BUFFER) as file:  # noqa: ASYNC230  # all writing is done right here, see above
        collector = Collector(file)
        async with trio.open_nursery() as nursery:
            server: trio_udp.Server = await nursery.start(
                partial(
                    trio_udp.serve,
                    trio_udp.datagram_handler(collector.handler),
                    port,
                    host=host,
                    on_error=trio_udp.raise_error,  # a disk that is full ends the collector
                    stop_signals={signal.SIGINT, signal.SIGTERM},
                )
            )
            for endpoint in server.endpoints:
                print("listening on {}:{}".format(*endpoint.local_address), flush=True)
            nursery.start_soon(collector.write_out, server, seconds)
    print(f"collected: {collector.lines}")
    print(f"dropped by the kernel: {server.statistics().kernel_dropped}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", nargs="?", type=int, default=9999)
    parser.add_argument("--host", help="name or address to bind; all interfaces by default")
    parser.add_argument("--file", default="collected.log", metavar="PATH", help="to append to")
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="between writes")
    arguments = parser.parse_args()
    trio.run(main, arguments.host, arguments.port, arguments.file, arguments.every)
