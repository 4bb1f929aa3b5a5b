"""Share a resource between all handlers: open it before serving, close it when the last handler is done.

The server stores every datagram as a note in an SQLite database, and answers with the number of the note. A signal
stops the server. It still stores and answers the notes that have arrived by then, and then closes the database.

    DATABASE=notes.db python examples/service.py
    DATABASE=notes.db trio-udp --workers 2 --factory examples/service.py:service    (each worker opens the database)
    nc -u 127.0.0.1 9999        (in another terminal: type a line)
"""

import logging
import os
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio

import trio_udp


class Notes:
    """An open database that any number of tasks may use."""

    def __init__(self, path: str) -> None:
        # Many threads use the connection, but the limiter allows only one at a time.
        self.connection = sqlite3.connect(path, check_same_thread=False)
        self._limiter = trio.CapacityLimiter(1)
        self.connection.execute("CREATE TABLE IF NOT EXISTS notes (number INTEGER PRIMARY KEY, note BLOB)")

    async def add(self, note: bytes) -> int | None:
        # A cancelled task waits for its thread (abandon_on_cancel is off), so no thread uses a closed connection.
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
        with trio.CancelScope(shield=True):  # close the database also when the program is cancelled
            await trio.to_thread.run_sync(notes.connection.close)
        print("database closed")


async def handler(notes: Notes, client: trio_udp.Client) -> None:
    async for payload in client:
        number = await notes.add(payload)
        await client.send(f"note {number}\n".encode())


@asynccontextmanager
async def service() -> AsyncIterator[trio_udp.Handler]:
    """Yield the handler. The database is open until the last handler is done."""
    async with open_notes(os.environ.get("DATABASE", ":memory:")) as notes:
        yield partial(handler, notes)


async def main(port: int) -> None:
    async with service() as handler:
        await trio_udp.serve(handler, port, stop_signals={signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    trio.run(main, int(sys.argv[1]) if sys.argv[1:] else 9999)
