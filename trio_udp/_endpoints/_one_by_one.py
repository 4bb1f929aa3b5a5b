"""The way in from a socket that no server runs on: one task takes one datagram at a time."""

from __future__ import annotations

import attrs
import trio

from ._reader import PAUSE, Reader
from .engines import Received


@attrs.define(eq=False)
class OneByOne:
    """Hands out what a :class:`Reader` reads.

    Attributes:
      tells_refusals: Raise ``ConnectionRefusedError`` where the peer of a connected socket refused something, once.
    """

    reader: Reader
    tells_refusals: bool = False

    async def next(self) -> Received:
        """Wait for the next datagram and return it.

        Always notices cancellation, and then loses nothing. Other tasks run at least once in a batch of 64.

        Raises:
          trio.ClosedResourceError: The endpoint is closed.
          trio.BusyResourceError: A server, or another task, receives from it.
          ConnectionRefusedError: Where refusals are told: the peer refused something that was sent earlier.
        """
        reader = self.reader
        reader.outbox.check_open()
        if reader.ahead and not reader.awaited and not reader.served:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await self._read_ahead()
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
        """Raise the refusal by the peer that nobody was told of, if there is one and it is to be told."""
        refusal, self.reader.refusal = self.reader.refusal, None
        if refusal is not None and self.tells_refusals:
            raise refusal

    async def _read_ahead(self) -> None:
        """Let other tasks run, until a batch has arrived."""
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
                    # Not to be cancelled: what was read is received, even if the caller has just given up.
                    await trio.lowlevel.cancel_shielded_checkpoint()
                    return
                if reader.back_off.persists() and reader.engine.is_readable():
                    await trio.sleep(PAUSE)
                await reader.engine.wait_readable()
                self._read_ahead_nowait()
        finally:
            reader.awaited = False

    def _read_ahead_nowait(self) -> bool:
        """Read a batch, if one has arrived; tell whether there is something to hand out."""
        self.raise_refusal()
        batch: list[Received] = []
        self.reader.read(batch)
        self.reader.ahead.extend(batch)
        if batch:
            self.reader.back_off.read_something()
        else:
            self.reader.back_off.read_nothing()
            self.raise_refusal()
        return bool(batch)

    def _check_not_served(self) -> None:
        if self.reader.served:
            raise trio.BusyResourceError("a server is receiving from this endpoint")
