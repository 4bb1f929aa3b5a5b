"""Sending on a Unix-domain socket: in the order of the calls for each peer, and independently for different peers.

Unlike UDP, a Unix-domain socket makes datagrams wait for a receiver that does not read. Such a peer must not hold up
the others, so each peer has its own line of tasks that wait for room. The outbox queues no datagrams, since each costs
a system call anyway.
"""

from __future__ import annotations

import errno
import socket
import sys
from contextlib import suppress

import attrs
import trio

from .._statistics import Sender
from ._faults import Fault, fault_of
from ._outbox import Outbox
from ._unread import Unread
from .engines import Outgoing, Route

# Seconds between two attempts, where the kernel does not tell when there is room: the first pause, and the longest.
FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.05

# With more lines than this, pauses become longer, so that many silent peers cost no more than a few: 3 % of a CPU.
MANY_LINES = 32

# The most probes of one endpoint. Each takes a file descriptor.
MOST_PROBES = 64

# On BSD and macOS a receiver's full buffer gives ENOBUFS.
FULL = set() if sys.platform == "linux" else {errno.ENOBUFS}


@attrs.define(eq=False)
class Line:
    """The tasks that wait for room in one peer's queue.

    Attributes:
      lock: Held by the first of them.
      tasks: Their number.
      probe: A socket connected to the peer. It polls as writable when the peer's queue has room.
    """

    lock: trio.StrictFIFOLock = attrs.field(factory=trio.StrictFIFOLock, init=False)
    tasks: int = attrs.field(default=0, init=False)
    probe: socket.socket | None = attrs.field(default=None, init=False)

    def open_probe(self, name: object) -> None:
        with suppress(OSError):  # no more descriptors; or EPERM: the peer is connected to us, so a probe is useless
            self.probe = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self.probe.setblocking(False)
            self.probe.connect(name)  # type: ignore[arg-type]
            return
        self.close()

    def close(self) -> None:
        if self.probe is not None:
            self.probe.close()
            self.probe = None


@attrs.define(eq=False)
class UnixOutbox(Outbox):
    """Sends Unix-domain datagrams; see :class:`Outbox` for what each method promises.

    It holds nothing back, so ``queue`` is always empty.
    """

    _unread: Unread = attrs.field(default=attrs.Factory(lambda self: Unread(self.engine), takes_self=True), init=False)
    _lines: dict[Route, Line] = attrs.field(factory=dict, init=False)
    _waits: set[trio.CancelScope] = attrs.field(factory=set, init=False)  # cancelled when the endpoint closes

    def hold(self) -> None:
        pass

    def send(self, outgoing: list[Outgoing], *, raising: bool = False) -> int:
        self.check_open()
        for position, single in enumerate(outgoing):
            _, route, _ = single
            # Tasks that wait for this peer come first.
            if route in self._lines or not self._send_single(single, raising):
                return position
        return len(outgoing)

    def send_row(
        self, payloads: list[bytes], sizes: list[int], route: Route, sender: Sender, *, raising: bool = False
    ) -> int:
        return self.send([(payload, route, sender) for payload in payloads], raising=raising)

    def send_or_drop(self, outgoing: list[Outgoing]) -> list[Outgoing]:
        unsent: list[Outgoing] = []
        for single in outgoing:
            _, _, sender = single
            try:
                if not self.engine.closed and self.send([single]):
                    continue
            except OSError as too_long:
                self._count_send_error(sender, too_long)
            else:
                self._count_dropped(sender)
            unsent.append(single)
        return unsent

    def send_row_or_drop(self, payloads: list[bytes], sizes: list[int], route: Route, sender: Sender) -> None:
        self.send_or_drop([(payload, route, sender) for payload in payloads])

    def collect(self, replies: list[Outgoing], *, more_follow: bool) -> None:
        if replies:
            self.send_or_drop(replies)

    async def wait_for_room(self, outgoing: Outgoing, *, raising: bool = False) -> None:
        _, route, _ = outgoing
        line = self._lines.setdefault(route, Line())
        line.tasks += 1
        try:
            with trio.CancelScope() as scope:
                self._waits.add(scope)
                async with line.lock:
                    return await self._send_when_possible(line, outgoing, raising)
            self.check_open()
        finally:
            self._waits.discard(scope)
            line.tasks -= 1
            if not line.tasks:
                del self._lines[route]
                line.close()

    async def empty(self) -> None:
        """Return at once: nothing is queued, and the tasks that wait in a line belong to handlers."""

    async def empty_when_stuck(self) -> None:
        """Return at once: nothing is queued."""

    def close(self) -> None:
        super().close()
        self._end_waits()

    def abandon(self, error: OSError) -> None:
        super().abandon(error)
        self._end_waits()

    def _end_waits(self) -> None:
        for scope in self._waits:
            scope.cancel()

    async def _send_when_possible(self, line: Line, outgoing: Outgoing, raising: bool) -> None:
        pause = FIRST_PAUSE
        if line.probe is None and len(self._lines) <= MOST_PROBES:
            line.open_probe(self.engine.peer_address(outgoing[1]))
        while True:
            if line.probe is not None:
                await trio.lowlevel.wait_writable(line.probe)
            self.check_open()
            if self._send_single(outgoing, raising):
                return
            # The peer's queue has room, but our own buffer has none for it.
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE * max(1, len(self._lines) / MANY_LINES))

    def _send_single(self, outgoing: Outgoing, raising: bool) -> bool:
        """Send a datagram, or count why it cannot be sent; return False if there is no room.

        Raises:
          trio.ClosedResourceError: The endpoint is closed.
          OSError: ``EMSGSIZE``, which is not counted; with ``raising`` also any other error of this datagram.
        """
        payload, route, sender = outgoing
        size = len(payload)
        if not self._unread.has_room(route, payload):
            return False
        try:
            self.engine.send((payload,), (size,), (route,))
        except OSError as error:
            fault = fault_of(error)
            if fault is Fault.WAIT or error.errno in FULL:
                return False
            if error.errno == errno.EMSGSIZE:
                raise
            if fault is Fault.CLOSED:
                self.abandon(error)
                self.check_open()
            self._unread.forget(route)
            self._count_send_error(sender, error)
            if raising:
                raise
            return True
        self._count_sent((size,), (sender,))
        self._unread.sent(route, payload)
        return True
