"""A TFTP server (RFC 1350, with the options of RFC 2347, 2348, 2349 and 7440) for the files below one directory.

A client is the address and port of one transfer, so the handler runs once for each transfer, even if the request is
repeated. TFTP requires that it answers from a new port. ``connect``, from the address to which the request was sent,
returns a :class:`trio_udp.Connection`, which receives from this client only. To others the port looks closed.

    python examples/tftp_server.py --root /srv/tftp --write 6969
    curl -T big.iso tftp://127.0.0.1:6969/
    curl tftp://127.0.0.1:6969/big.iso -o copy.iso

TFTP has no users: anyone may read every file below the directory. With --write, anyone may add files. No file is ever
replaced, and a file appears only when it is complete. Threads read and write the disk.
"""

import argparse
import errno
import math
import os
import secrets
import signal
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from struct import pack, unpack
from typing import IO, TypeVar

import attrs
import trio

import trio_udp

READ, WRITE, DATA, ACK, ERROR, OPTIONS = range(1, 7)
UNDEFINED, NOT_FOUND, NOT_ALLOWED, DISK_FULL, ILLEGAL, _, EXISTS = range(7)  # codes of an ERROR

FIRST_WAIT = 1.0  # seconds to wait for an answer, before the first round trip is measured
LEAST_WAIT = 0.02
MOST_WAIT = 8.0  # some clients only repeat a packet after 5 seconds without any packet, even one that they ignore
ATTEMPTS = 12  # the last one about half a minute after the first
ATTEMPTS_AT_FIRST = 5  # while there is only a request, whose address may be forged
LINGER = 6.0  # seconds after the last ACK in which the client may need it again
DRAIN = 30.0  # seconds for transfers to finish when the server stops
CHUNK = 262_144  # bytes to read and write at a time
WINDOW = 1_048_576  # most bytes in transit to one client

T = TypeVar("T")


class Refusal(Exception):
    """Ends a transfer, and sends the reason to the client."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.packet = pack("!HH", ERROR, code) + text.encode() + b"\0"


class Aborted(Exception):
    """The client has ended the transfer, or is gone."""


# Requests and options.


@attrs.frozen
class Request:
    kind: int
    name: bytes
    netascii: bool
    options: dict[bytes, bytes]

    @classmethod
    def parse(cls, payload: bytes) -> "Request":
        fields = payload[2:].split(b"\0")
        if len(fields) < 3 or len(fields) % 2 == 0 or not fields[0]:
            raise Refusal(ILLEGAL, "malformed request")
        name, mode, *options = fields[:-1]
        if mode.lower() not in (b"octet", b"netascii"):
            raise Refusal(ILLEGAL, "unknown mode")
        pairs = zip(options[::2], options[1::2], strict=True)
        return cls(payload[1], name, mode.lower() == b"netascii", {key.lower(): value for key, value in pairs})

    def number(self, option: bytes, least: int, most: int | None = None) -> int | None:
        """Return the value of an option, or ``None`` to ignore a missing or invalid one."""
        value = self.options.get(option, b"")
        if not value.isdigit() or len(value) > 18 or int(value) < least or (most is not None and int(value) > most):
            return None
        return int(value)


@attrs.frozen
class Terms:
    """The parameters of a transfer. ``accepted`` are the options to confirm."""

    block: int
    window: int
    timeout: int | None
    accepted: dict[bytes, int]

    @classmethod
    def agree(cls, request: Request, size: int | None) -> "Terms":
        accepted = {}
        if (block := request.number(b"blksize", 8, 65_464)) is not None:
            accepted[b"blksize"] = block
        if (timeout := request.number(b"timeout", 1, 255)) is not None:
            accepted[b"timeout"] = timeout
        if size is not None and request.number(b"tsize", 0) is not None:
            accepted[b"tsize"] = size
        if (window := request.number(b"windowsize", 1, 65_535)) is not None:
            window = accepted[b"windowsize"] = min(window, max(1, WINDOW // (block or 512)))
        return cls(block or 512, window or 1, timeout, accepted)

    def confirmation(self) -> bytes | None:
        fields = (b"%b\0%d\0" % option for option in self.accepted.items())
        return pack("!H", OPTIONS) + b"".join(fields) if self.accepted else None


# Transfers.


@attrs.define
class Transfer:
    """The conversation with one client about one file.

    Ignore duplicates, and repeat packets only after a timeout. If each side answered each duplicate with another one,
    the rest of the file would be sent twice (the Sorcerer's Apprentice Syndrome).
    """

    connection: trio_udp.Connection
    terms: Terms
    netascii: bool = False
    size: int = 0  # bytes so far, as sent on the network
    _confirmed: int = 0  # blocks
    _arrived: list[bytes] = attrs.field(factory=list)  # blocks after those
    _linger: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    _round_trip: float | None = None

    async def send(self, read: Callable[[int], Awaitable[bytes]]) -> None:
        """Send a file: one window of blocks at a time, which starts with the first unconfirmed block (RFC 7440)."""
        if (confirmation := self.terms.confirmation()) is not None:
            await self._exchange(lambda: [confirmation], lambda kind, number, _: (kind, number) == (ACK, 0) or None)
        window: deque[bytes] = deque()  # the blocks after the confirmed ones

        def count_arrived(kind: int, number: int, _: bytes) -> int | None:
            arrived = (number - self._confirmed) % 65_536
            return arrived if kind == ACK and 1 <= arrived <= len(window) else None

        async with aclosing(self._blocks(read)) as blocks:
            is_last = False
            while window or not is_last:
                while len(window) < self.terms.window and not is_last:
                    block = await anext(blocks)
                    self.size += len(block)
                    window.append(pack("!HH", DATA, (self._confirmed + len(window) + 1) % 65_536) + block)
                    is_last = len(block) < self.terms.block
                arrived = await self._exchange(lambda: list(window), count_arrived)
                self._confirmed += arrived
                for _ in range(arrived):
                    window.popleft()

    async def receive(self, write: Callable[[bytearray], Awaitable[object]], most: int) -> None:
        """Receive a file of at most ``most`` bytes. Then :meth:`confirm` must confirm the last block."""
        await self._begin()
        is_last, unwritten = False, bytearray()
        while not is_last:
            blocks = await self._exchange(self._confirmation, self._fill_window)
            self._confirmed += len(blocks)
            self._arrived = []
            self.size += sum(map(len, blocks))
            if self.size > most:
                raise Refusal(DISK_FULL, "too long")
            is_last = len(blocks[-1]) < self.terms.block
            unwritten += b"".join(blocks)
            if is_last or len(unwritten) >= CHUNK:
                data, rest = from_netascii(unwritten, is_last) if self.netascii else (unwritten, b"")
                await write(data)
                unwritten = bytearray(rest)

    async def confirm(self) -> None:
        """Confirm the last block, and again each time that the client repeats the block, for ``LINGER`` seconds."""
        await self.connection.send_many(self._confirmation())
        with self._linger as linger, suppress(ConnectionRefusedError):  # usually the client has closed its port
            linger.deadline = trio.current_time() + LINGER
            async for packet in self.connection:
                if packet[:2] == pack("!H", DATA):
                    await self.connection.send_many(self._confirmation())

    async def begin_again(self, client: trio_udp.Client) -> None:
        """Repeat our first answer each time the client repeats its request, until the server stops.

        No timer repeats that answer: if curl (7.88) gets the options twice, it sends its second block as the first.
        """
        with suppress(ConnectionRefusedError):
            async for _ in client:
                if self._confirmed + len(self._arrived) == 0:
                    await self._begin()
        self._linger.cancel()

    async def _begin(self) -> None:
        await self.connection.send(self.terms.confirmation() or pack("!HH", ACK, 0))

    def _confirmation(self) -> list[bytes]:
        number = self._confirmed + len(self._arrived)
        return [pack("!HH", ACK, number % 65_536)] if number else []

    def _fill_window(self, kind: int, number: int, block: bytes) -> list[bytes] | None:
        ahead = (number - self._confirmed - len(self._arrived) - 1) % 65_536
        if kind != DATA or len(block) > self.terms.block or ahead >= self.terms.window:
            return None
        if ahead:  # a block is missing: confirm the blocks before it immediately
            return self._arrived or None
        self._arrived.append(block)
        is_full = len(block) < self.terms.block or len(self._arrived) == self.terms.window
        return self._arrived if is_full else None

    async def _exchange(self, packets: Callable[[], list[bytes]], take: Callable[[int, int, bytes], T | None]) -> T:
        """Send packets, and again after each wait, until ``take(kind, number, rest)`` accepts an answer."""
        if self._round_trip is not None:
            waits = trio_udp.backoff(max(4 * self._round_trip, LEAST_WAIT), attempts=ATTEMPTS, most=MOST_WAIT)
        elif self.terms.timeout is not None:
            waits = trio_udp.backoff(self.terms.timeout, attempts=ATTEMPTS, factor=1, jitter=0)
        else:
            waits = trio_udp.backoff(FIRST_WAIT, attempts=ATTEMPTS_AT_FIRST, most=MOST_WAIT)
        for attempt, wait in enumerate(waits):
            await self.connection.send_many(packets())
            sent = trio.current_time()
            with trio.move_on_after(wait):
                async for answer in self.connection:
                    if len(answer) < 4:
                        continue
                    kind, number = unpack("!HH", answer[:4])
                    if kind == ERROR:
                        raise Aborted(f"the client says {answer[4:-1]!r}")
                    if (taken := take(kind, number, answer[4:])) is None:
                        continue
                    if attempt == 0:  # otherwise it is unknown which attempt was answered (Karn's algorithm)
                        sample = trio.current_time() - sent
                        before = sample if self._round_trip is None else self._round_trip
                        self._round_trip = before + (sample - before) / 8
                    elif self._round_trip is None:
                        self._round_trip = FIRST_WAIT / 4  # a guess
                    return taken
        raise Aborted("no answer")

    async def _blocks(self, read: Callable[[int], Awaitable[bytes]]) -> AsyncGenerator[bytes, None]:
        """Read a file in blocks. The last block is shorter than the others, and may be empty."""
        ahead = b""
        while chunk := await read(CHUNK):
            ahead += to_netascii(chunk) if self.netascii else chunk
            whole = len(ahead) - len(ahead) % self.terms.block
            for start in range(0, whole, self.terms.block):
                yield ahead[start : start + self.terms.block]
            ahead = ahead[whole:]
        yield ahead


def to_netascii(data: bytes) -> bytes:
    return data.replace(b"\r", b"\r\0").replace(b"\n", b"\r\n")


def from_netascii(data: bytearray, is_last: bool) -> tuple[bytearray, bytes]:
    """Return the original data, and a CR at the end if the character after it has not arrived yet."""
    rest = b"\r" if data.endswith(b"\r") and not is_last else b""
    return data[: len(data) - len(rest)].replace(b"\r\n", b"\n").replace(b"\r\0", b"\r"), rest


# Files.


async def in_thread(function: Callable[..., T], *arguments: object) -> T:
    """Call a function for files in a thread. Turn an error of the system into a refusal, in our own words."""
    try:
        return await trio.to_thread.run_sync(function, *arguments)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Refusal(NOT_FOUND, "no such file") from error
    except FileExistsError as error:
        raise Refusal(EXISTS, "the file exists") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise Refusal(DISK_FULL, "disk full") from error
        raise Refusal(NOT_ALLOWED, "the file cannot be accessed") from error


def find(root: str, name: bytes) -> str:
    """Return the path of a file below the root. Refuse a path that leaves the root by ``..`` or by a link."""
    path = os.path.realpath(os.path.join(root, os.fsdecode(name.lstrip(b"/"))))
    if not Path(path).is_relative_to(root):
        raise Refusal(NOT_ALLOWED, "not below the served directory")
    return path


def open_to_read(root: str, name: bytes) -> IO[bytes]:
    path = find(root, name)
    if os.path.exists(path) and not os.path.isfile(path):  # opening a FIFO would wait for a writer
        raise Refusal(NOT_ALLOWED, "not a file")
    return open(path, "rb")


def open_to_write(root: str, name: bytes) -> tuple[IO[bytes], str]:
    """Open a temporary file in the target directory; return it with the final path."""
    path = find(root, name)
    if os.path.exists(path):
        raise FileExistsError(path)
    return open(os.path.join(os.path.dirname(path), f".{secrets.token_hex(8)}.part"), "xb"), path


def publish(file: IO[bytes], path: str) -> None:
    file.close()
    os.link(file.name, path)  # unlike a rename, this does not replace a file that was created meanwhile


def remove(file: IO[bytes]) -> None:
    file.close()
    os.unlink(file.name)


# The server.


def accept(datagram: trio_udp.Datagram) -> bool:
    """Accept only requests, and none from port 0, because nothing can be sent there."""
    return datagram.payload[:2] in (pack("!H", READ), pack("!H", WRITE)) and datagram.peer_address[1] != 0


@attrs.frozen
class Server:
    root: str
    writable: bool
    most: int  # bytes of a file that a client sends

    async def handler(self, client: trio_udp.Client) -> None:
        request = await client.receive()
        local, peer = client.local_address, client.peer_address
        own = (local[0], 0, *local[2:])
        connection = await trio_udp.connect(*peer, local_address=own, receive_buffer=CHUNK)
        async with connection, trio.open_nursery() as nursery:
            try:
                await self.answer(Request.parse(request), connection, client, nursery)
            except Refusal as refused:
                print(f"{peer[0]}: refused: {refused}", flush=True)
                await connection.send(refused.packet)
            except (Aborted, ConnectionRefusedError) as error:
                print(f"{peer[0]}: ended: {error}", flush=True)
            except trio.Cancelled:
                with suppress(OSError, trio.WouldBlock):
                    connection.send_nowait(Refusal(UNDEFINED, "the server is stopping").packet)
                raise
            nursery.cancel_scope.cancel()
        client.close()  # drop repetitions of the same request

    async def answer(
        self, request: Request, connection: trio_udp.Connection, client: trio_udp.Client, nursery: trio.Nursery
    ) -> None:
        if request.kind == READ:
            file = await in_thread(open_to_read, self.root, request.name)
            with file:
                size = None if request.netascii else os.fstat(file.fileno()).st_size
                transfer = Transfer(connection, Terms.agree(request, size), request.netascii)
                await transfer.send(partial(in_thread, file.read))
                print(f"{connection.peer_address[0]}: read {request.name!r}, {transfer.size} bytes", flush=True)
            return

        size = request.number(b"tsize", 0)
        if not self.writable:
            raise Refusal(NOT_ALLOWED, "nothing may be written here")
        if size is not None and size > self.most:
            raise Refusal(DISK_FULL, "too long")
        file, path = await in_thread(open_to_write, self.root, request.name)
        try:
            transfer = Transfer(connection, Terms.agree(request, size), request.netascii)
            client.idle_timeout = math.inf  # the client now sends to the connection
            nursery.start_soon(transfer.begin_again, client)
            await transfer.receive(partial(in_thread, file.write), self.most)
            await in_thread(publish, file, path)
        finally:
            with trio.CancelScope(shield=True):
                await in_thread(remove, file)
        print(f"{connection.peer_address[0]}: wrote {request.name!r}, {transfer.size} bytes", flush=True)
        await transfer.confirm()


async def main(root: str, host: str | None, port: int, writable: bool, most: int) -> None:
    async with trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(
            partial(
                trio_udp.serve,
                Server(root, writable, most).handler,
                port,
                host=host,
                accept=accept,
                limits=trio_udp.Limits(max_clients=200, clients_per_host=50),
                drain_timeout=DRAIN,
                stop_signals={signal.SIGINT, signal.SIGTERM},
            )
        )
        for endpoint in server.endpoints:
            print("listening on {}:{}".format(*endpoint.local_address), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", nargs="?", type=int, default=69)
    parser.add_argument("--host", help="name or address to bind; all interfaces by default")
    parser.add_argument("--root", default=".", metavar="DIRECTORY", help="directory to serve (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="let anyone add files")
    parser.add_argument("--most", type=int, default=10**9, metavar="BYTES", help="largest file that may be added")
    arguments = parser.parse_args()
    if not os.path.isdir(arguments.root):
        parser.error(f"{arguments.root} is not a directory")
    trio.run(main, os.path.realpath(arguments.root), arguments.host, arguments.port, arguments.write, arguments.most)
