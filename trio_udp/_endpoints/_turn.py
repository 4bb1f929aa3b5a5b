"""Fairness: how much a task may do before other tasks run."""

import attrs
import trio

# Sending and receiving do not let other tasks run each time: that would cost more than the datagram itself. A task that
# only sends, or only takes datagrams that wait, lets other tasks run once in this many calls.
YIELD_EVERY = 64


@attrs.define(eq=False)
class Turn:
    """Datagrams taken and sent since other tasks last ran for certain, and the time of the current batch.

    A server has one Turn for all its clients; a connection has its own. The receive loop renews it at each batch. No
    handler runs while the loop runs, so a handler that sees a renewed Turn has let other tasks run.

    Attributes:
      taken: Datagrams taken from inboxes without a pause.
      sent: Datagrams sent without a pause, and without taking one in between.
      time: When the current batch arrived, on Trio's clock; 0 while the loop sleeps. It saves handlers a reading of the
        clock at each wait.
    """

    taken: int = 0
    sent: int = 0
    time: float = 0.0

    def begin_batch(self) -> None:
        """Renew the turn: a batch has arrived, and other tasks have run since the one before."""
        self.taken = 1  # put() hands one datagram to a waiting task without counting it
        self.sent = 0
        self.time = trio.current_time()

    def now(self) -> float:
        """Return the time of the current batch, or the current time if there is no batch."""
        return self.time or trio.current_time()
