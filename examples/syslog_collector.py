"""Collect syslog messages (RFC 5424 and RFC 3164, over UDP: RFC 5426) in an SQLite database, in arrival order.

One task reads an endpoint without a server. While the disk is slow, the task waits for room in its queue, and datagrams
wait in the kernel. If the kernel has no room either, it drops and counts them (``kernel_dropped``). So memory is
bounded. Each commit, in a thread, stores all messages that have arrived during the commit before it. On SIGTERM the
collector stores all messages that have reached the machine, and then ends.

    python examples/syslog_collector.py --file syslog.db 5514
    logger -d -n 127.0.0.1 -P 5514 --rfc5424 "hello"
    sqlite3 syslog.db "select datetime(arrived, 'unixepoch'), source, severity, app, message from messages"
"""

import argparse
import re
import signal
import socket
import sqlite3
import sys
import time
from contextlib import ExitStack, closing, suppress
from functools import partial
from itertools import chain

import trio

import trio_udp

LONGEST = 8_192  # bytes of a message; RFC 5424 requires at least 2,048
QUEUE = 20_000  # messages that wait for a commit; together with LONGEST this bounds the memory to 160 MB
BATCH = 2_000  # most messages in a commit: a statement of SQLite takes at most 32,766 values

BUFFER = 2**25  # bytes of receive buffer in the kernel: enough for a burst of 80,000 short messages
LOCKED = 60  # seconds to wait while another program locks the database

SCHEMA = """
create table if not exists messages (
    id integer primary key,  -- in arrival order
    arrived real not null,   -- seconds since 1970, by our own clock
    source text not null,    -- IP address
    facility integer not null,
    severity integer not null,
    time text,               -- as sent, like all columns below
    host text,
    app text,
    process text,
    type text,
    data text,
    message text not null
)
"""
Row = tuple[float | int | str | None, ...]

# Both have the groups priority, time, host, app, process, type, data and message. Many senders of the old format use
# the time format of the new one.
RFC_5424 = re.compile(
    rb"<(\d{1,3})>1 (\S+) (\S+) (\S+) (\S+) (\S+) (-|(?:\[(?:[^]\\]|\\.)*\])+)(?: (?:\xef\xbb\xbf)?(.*))?", re.DOTALL
)
RFC_3164 = re.compile(
    rb"<(\d{1,3})>(?:([A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d|\d{4}-\d\d-\d\dT\S+) (?:([^\s[]*[^\s[:]) )?)?"
    rb"(?:([^\s:[]{1,48})(?:\[([^]\s]*)\])?: ?)?()()(.*)",
    re.DOTALL,
)


def parse(payload: bytes) -> Row:
    """Return facility, severity and the other fields. Any other payload is a user's notice (RFC 3164, 4.3.3)."""
    payload = payload.rstrip(b"\r\n\0")
    found = RFC_5424.fullmatch(payload) or RFC_3164.fullmatch(payload)
    if found is None or int(found[1]) > 191:
        return (1, 5, None, None, None, None, None, None, payload.decode(errors="replace"))
    fields = found.groups(b"")
    header = (None if field in (b"", b"-") else field.decode(errors="replace") for field in fields[1:-1])
    return (*divmod(int(fields[0]), 8), *header, fields[-1].decode(errors="replace"))


def store(database: sqlite3.Connection, rows: list[Row]) -> None:
    """Commit rows. One statement inserts all rows, so it needs Python's global lock only once."""
    places = ", ".join(["(null, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"] * len(rows))
    with database:
        database.execute(f"insert into messages values {places}", list(chain.from_iterable(rows)))


async def write(database: sqlite3.Connection, queue: trio.MemoryReceiveChannel[Row]) -> int:
    """Store all messages from the queue until it is closed; return their number."""
    stored = 0
    async for row in queue:
        batch = [row]
        with suppress(trio.WouldBlock, trio.EndOfChannel):
            while len(batch) < BATCH:
                batch.append(queue.receive_nowait())
        await trio.to_thread.run_sync(store, database, batch)
        stored += len(batch)
    return stored


async def put(queue: trio.MemorySendChannel[Row], datagram: trio_udp.Datagram) -> None:
    row = (time.time(), datagram.peer_address[0], *parse(datagram.payload))
    try:
        queue.send_nowait(row)
    except trio.WouldBlock:
        with trio.CancelScope(shield=True):  # the kernel no longer has the message, so do not drop it
            await queue.send(row)


async def read(endpoint: trio_udp.Endpoint, queue: trio.MemorySendChannel[Row]) -> None:
    async for datagram in endpoint:
        await put(queue, datagram)


async def catch_up(endpoint: trio_udp.Endpoint, queue: trio.MemorySendChannel[Row]) -> None:
    """Read all datagrams that have arrived, but no more than the kernel can hold, so that a flood cannot go on here."""
    with suppress(trio.WouldBlock):
        for _ in range(endpoint.statistics().receive_buffer // 512 + 64):
            await put(queue, endpoint.receive_nowait())


def enlarge(sock: socket.socket) -> None:
    """Request a larger receive buffer than net.core.rmem_max allows. On Linux, only root gets it."""
    with suppress(OSError):
        if sys.platform == "linux":
            sock.setsockopt(socket.SOL_SOCKET, 33, BUFFER)  # SO_RCVBUFFORCE


async def collect(endpoints: list[trio_udp.Endpoint], database: sqlite3.Connection) -> int:
    """Collect messages until SIGINT or SIGTERM; return the number of stored messages."""
    stored = 0
    inlet, outlet = trio.open_memory_channel[Row](QUEUE)

    async def count() -> None:
        nonlocal stored
        stored = await write(database, outlet)

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        for endpoint in endpoints:
            print("listening on {}:{}".format(*endpoint.local_address), flush=True)
        async with trio.open_nursery() as nursery, inlet:
            nursery.start_soon(count)
            async with trio.open_nursery() as readers:
                for endpoint in endpoints:
                    readers.start_soon(read, endpoint, inlet)
                await anext(signals)
                readers.cancel_scope.cancel()
            for endpoint in endpoints:
                await catch_up(endpoint, inlet)
                endpoint.close()
    return stored


async def main(host: str | None, port: int, path: str) -> None:
    with ExitStack() as stack:
        connect = partial(sqlite3.connect, path, timeout=LOCKED, check_same_thread=False)
        database = stack.enter_context(closing(await trio.to_thread.run_sync(connect)))
        database.execute("pragma journal_mode = wal")  # other programs can read meanwhile
        database.execute("pragma synchronous = full")  # stored messages survive a power cut
        database.execute(SCHEMA)
        endpoints = await trio_udp.open_endpoints(port, host=host, max_datagram_size=LONGEST, configure=enlarge)
        for endpoint in endpoints:
            stack.callback(endpoint.close)
        stored = await collect(endpoints, database)
    statistics = [endpoint.statistics() for endpoint in endpoints]
    print(f"stored: {stored}")
    print(f"too long: {sum(s.truncated for s in statistics)}")
    print(f"dropped by the kernel: {sum(s.kernel_dropped for s in statistics)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", nargs="?", type=int, default=514)
    parser.add_argument("--host", help="name or address to bind; all interfaces by default")
    parser.add_argument("--file", default="syslog.db", metavar="PATH", help="the database")
    arguments = parser.parse_args()
    trio.run(main, arguments.host, arguments.port, arguments.file)
