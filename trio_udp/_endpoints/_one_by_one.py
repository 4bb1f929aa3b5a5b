"""Receiving from a socket that no server runs on: one task takes one datagram at a time."""

from __future__ import annotations

import attrs
import trio

from ._back_off import PAUSE
from ._reader import Reader
from .engines import Received

# The most batches of nothing but truncated or malformed datagrams to read before other tasks run.
MOST_EMPTY_BATCHES = 16


@attrs.define(eq=False)
class OneByOne:
    """Returns the datagrams of a :class:`Reader` one at a time.

    Attributes:
      tells_refusals: Raise ``ConnectionRefusedError`` once for each refusal by the peer of a connected socket.
    """

    reader: Reader
    tells_refusals: bool = False

    async def next(self) -> Received:
        """Wait for the next datagram and return it.

        Always notices cancellation, and never loses a datagram. Other tasks run at least once in a batch of 64.

        Raises:
          trio.ClosedResourceError: The endpoint is closed.
          trio.BusyResourceError: A server, or another task, receives from it.
          ConnectionRefusedError: With ``tells_refusals``: the peer refused an earlier datagram.
        """
        reader = self.reader
        reader.outbox.check_open()
        if reader.ahead and not reader.awaited and not reader.served:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await self._read_ahead()
            if not reader.ahead:  # the batch was read, then the endpoint was closed and dropped it
                raise trio.ClosedResourceError("this endpoint is closed")
        reader.outbox.turn.sent = 0
        return reader.ahead.popleft()

    def next_nowait(self) -> Received:
        """Like :meth:`next`, without waiting.

        Raises:
          trio.WouldBlock: Nothing has arrived, or another task is about to take it.
        """
        reader = self.reader
        reader.outbox.check_open()
        self._check_not_served()
        if reader.awaited or not (reader.ahead or self._read_ahead_nowait()):
            raise trio.WouldBlock
        return reader.ahead.popleft()

    def raise_refusal(self) -> None:
        """Raise a pending refusal by the peer, if there is one; without ``tells_refusals`` discard it."""
        refusal, self.reader.refusal = self.reader.refusal, None
        if refusal is not None and self.tells_refusals:
            try:
                raise refusal
            finally:
                del refusal  # its traceback refers to this frame: avoid a reference cycle

    async def _read_ahead(self) -> None:
        """Wait until a batch has arrived, and read it ahead. Lets other tasks run."""
        reader = self.reader
        self._check_not_served()
        if reader.awaited:
            raise trio.BusyResourceError("another task is already receiving")
        reader.awaited = True
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            while not reader.ahead:
                reader.outbox.check_open()
                if self._read_ahead_nowait():
                    # Shielded: a datagram that was read is returned, even if the caller is cancelled now.
                    await trio.lowlevel.cancel_shielded_checkpoint()
                    return
                if reader.back_off.persists() and reader.engine.is_readable():
                    await trio.sleep(PAUSE)
                await reader.engine.wait_readable()
                self._read_ahead_nowait()
        finally:
            reader.awaited = False

    def _read_ahead_nowait(self) -> bool:
        """Read ahead the batch that has arrived, and return whether there was one."""
        self.raise_refusal()
        reader, counts = self.reader, self.reader.engine.counts
        batch: list[Received] = []
        for _ in range(MOST_EMPTY_BATCHES):
            received = counts.received
            may_have_more = reader.read(batch)
            if batch or not may_have_more or counts.received == received:  # nothing, or an error
                break
        reader.ahead.extend(batch)
        if not batch:
            self.raise_refusal()
        return bool(batch)

    def _check_not_served(self) -> None:
        if self.reader.served:
            raise trio.BusyResourceError("a server is receiving from this endpoint")
