"""The pipe between the supervisor and a worker, and its messages: JSON lines, one value each.

    supervisor            worker
    Settings  ------->                  once, at its start
              <-------    Ready         the worker has imported everything, and waits; or Failed
    Serve     ------->                  read the sockets from now on
              <-------    Report        ten times a second while counts change, otherwise once a second
              <-------    Busiest       once a second, if the settings say so
              <-------    Leave         the worker received SIGTERM and asks to be replaced
    Stop      ------->                  drain and end
              <-------    Released      the next worker may read: this one has stopped, and handlers have its datagrams
              <-------    Report        the last one, after the drain

When the pipe ends, the other process has ended.
"""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import TypeAlias

import attrs
import trio

from .. import Address, Limits, RateLimit, ServerStatistics


@attrs.frozen(kw_only=True)
class Settings:
    """The settings of a worker. The descriptors of its sockets are the same numbers in both processes.

    Attributes:
      number: The worker's number, from 1.
      descriptors: One bound socket for each address.
      inherited: Another program holds the sockets too (systemd), so there may be a reader after the last worker.
      busiest_clients: How many to report.
    """

    number: int
    descriptors: list[int]
    inherited: bool
    target: str
    factory: bool
    accept: str | None
    app_dir: str
    idle_timeout: float
    limits: Limits
    drain_timeout: float
    max_datagram_size: int
    log_level: int
    log_format: str
    busiest_clients: int


@attrs.frozen
class Ready:
    pass


@attrs.frozen
class Failed:
    """The worker cannot serve. ``text`` is one line or a traceback."""

    text: str
    exit_status: int


@attrs.frozen
class Serve:
    pass


@attrs.frozen
class Stop:
    """``last``: no worker reads the sockets after this one, so it also handles datagrams that wait in the kernel."""

    last: bool


@attrs.frozen
class Released:
    pass


@attrs.frozen
class Leave:
    pass


@attrs.frozen
class Report:
    statistics: ServerStatistics


@attrs.frozen
class Busiest:
    """Peer addresses of the busiest clients, and their datagrams a second."""

    clients: list[tuple[Address, float]]


Message: TypeAlias = Settings | Ready | Failed | Serve | Stop | Released | Leave | Report | Busiest
KINDS = {kind.__name__: kind for kind in (Settings, Ready, Failed, Serve, Stop, Released, Leave, Report, Busiest)}


def encode(message: Message) -> bytes:
    return json.dumps([type(message).__name__, attrs.asdict(message)], separators=(",", ":")).encode() + b"\n"


def decode(line: bytes | bytearray) -> Message:
    name, fields = json.loads(line)
    if name == "Settings":
        limits = fields["limits"]
        if limits["rate_limit"] is not None:
            limits["rate_limit"] = RateLimit(**limits["rate_limit"])
        fields["limits"] = Limits(**limits)
    elif name == "Report":
        fields["statistics"] = ServerStatistics(**fields["statistics"])
    elif name == "Busiest":
        fields["clients"] = [(tuple(address), rate) for address, rate in fields["clients"]]
    message: Message = KINDS[name](**fields)
    return message


class Pipe:
    """One end of the pipe. Any number of tasks may send; one receives."""

    def __init__(self, end: socket.socket) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(end))
        self._sending = trio.Lock()
        self._received = bytearray()

    async def send(self, message: Message) -> None:
        """Send a message, not interrupted by cancellation; do nothing if the other process has ended."""
        with trio.CancelScope(shield=True):  # so that no line is cut off
            async with self._sending:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await self._stream.send_all(encode(message))

    async def receive(self) -> Message | None:
        """Wait for the next message; ``None`` once the other process has ended.

        Raises:
          ValueError, TypeError, KeyError: The other process uses another version of this protocol.
        """
        while b"\n" not in self._received:
            try:
                more = await self._stream.receive_some()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return None
            if not more:
                return None
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return decode(line)

    def close(self) -> None:
        self._stream.socket.close()
