"""Share a resource between all handlers: open it before serving, close it when the last handler is done.

Every datagram is stored as a note in an SQLite database, and its number is the answer. A signal stops the server;
the notes that have arrived by then are still stored and answered, and only then the database is closed.

    python examples/service.py --database notes.db
    nc -u 127.0.0.1 9999        (in another terminal: type a line)
"""

import argparse
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio

import trio_udp


class Notes:
    """An open database, for any number of tasks."""

    def __init__(self, path: str) -> None:
        # The connection is used in many threads, but thanks to the limiter never in two at once.
        self.connection = sqlite3.connect(path, check_same_thread=False)
        self._limiter = trio.CapacityLimiter(1)
        self.connection.execute("CREATE TABLE IF NOT EXISTS notes (number INTEGER PRIMARY KEY, note BLOB)")

    async def add(self, note: bytes) -> int | None:
        # A cancelled task waits for its thread, as it cannot abandon it: nothing uses a connection that is closed.
        return await trio.to_thread.run_sync(self._add, note, limiter=self._limiter)

    def _add(self, note: bytes) -> int | None:
        with self.connection:  # a transaction
            return self.connection.execute("INSERT INTO notes (note) VALUES (?)", (note,)).lastrowid


@asynccontextmanager
async def open_notes(path: str) -> AsyncIterator[Notes]:
    notes = await trio.to_thread.run_sync(Notes, path)
    try:
        yield notes
    finally:
        with trio.CancelScope(shield=True):  # a program that is cancelled closes its database too
            await trio.to_thread.run_sync(notes.connection.close)
        print("database closed")


async def handler(notes: Notes, client: trio_udp.Client) -> None:
    async for payload in client:
        number = await notes.add(payload)
        await client.send(f"note {number}\n".encode())


async def main(host: str | None, port: int, path: str) -> None:
    stop_signals = {signal.SIGINT, signal.SIGTERM}
    # From right to left: the server drains, its nursery ends, the database is closed.
    async with open_notes(path) as notes, trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(
            partial(trio_udp.serve, partial(handler, notes), port, host=host, stop_signals=stop_signals)
        )
        for endpoint in server.endpoints:
            print("listening on {}:{}".format(*endpoint.local_address), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", nargs="?", type=int, default=9999)
    parser.add_argument("--host", help="name or address to bind; all interfaces by default")
    parser.add_argument("--database", default=":memory:", metavar="PATH", help="in memory by default")
    arguments = parser.parse_args()
    trio.run(main, arguments.host, arguments.port, arguments.database)
