"""Whose turn it is: how much a task may do before other tasks run."""

import attrs
import trio

# Sending and receiving do not let other tasks run each time: that would cost more than the datagram itself. A task that
# only sends, or only takes what waits, lets them run once in so many calls.
YIELD_EVERY = 64


@attrs.define(eq=False)
class Turn:
    """What tasks have done since it was certain that other tasks had run, and the time of the current batch.

    A server has one Turn for all its clients, and a connection one of its own. The receive loop renews it at each
    batch. While the loop runs no handler runs, so a handler that sees a renewed Turn has itself let others run.

    Attributes:
      taken: Datagrams taken from inboxes without a pause.
      sent: Datagrams sent without a pause, and without taking one in between.
      time: When the current batch arrived, on Trio's clock; 0 while the loop sleeps. It spares handlers a look at the
        clock each time they begin to wait.
    """

    taken: int = 0
    sent: int = 0
    time: float = 0.0

    def begin_batch(self) -> None:
        """Renew the turn: a batch has arrived, and other tasks have run since the one before."""
        self.taken = 1  # what is handed to a waiting task straight away is not counted there
        self.sent = 0
        self.time = trio.current_time()

    def now(self) -> float:
        """Return the time of the current batch, or without one the time."""
        return self.time or trio.current_time()
