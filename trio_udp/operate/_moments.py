"""The state of a running server that the live view shows: a value, made in Trio's thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import trio

from .. import Address, ServerStatistics
from ._slot import NOTHING
from ._sockets import describe_address
from ._supervisor import Supervisor, WorkerStatus

# Seconds over which rates are averaged. Workers report at least once a second, so rates over less would jump.
WINDOW = 3.0


@attrs.frozen(kw_only=True)
class Moment:
    """A supervisor at one time.

    Attributes:
      time: Seconds, on Trio's clock.
      addresses: The addresses that are served, as text.
      ready: See :attr:`Supervisor.ready`.
      total: Counts of all workers.
      busiest: See :attr:`Supervisor.busiest_clients`.
    """

    time: float
    addresses: tuple[str, ...]
    ready: bool
    workers: tuple[WorkerStatus, ...]
    total: ServerStatistics
    busiest: tuple[tuple[Address, float], ...] = ()


def look_at(supervisor: Supervisor) -> Moment:
    workers = supervisor.workers
    return Moment(
        time=trio.current_time(),
        addresses=tuple(show_address(address) for address in supervisor.addresses),
        ready=supervisor.ready,
        workers=workers,
        busiest=supervisor.busiest_clients,
        total=sum((worker.statistics for worker in workers), NOTHING),
    )


def show_address(address: object) -> str:
    """Format an address for people, without characters that a terminal would interpret."""
    return printable(describe_address(address))


def printable(text: str) -> str:
    """Replace control characters: handlers may log payloads of strangers, and a terminal would interpret them."""
    return "".join(character if character.isprintable() else "\N{MIDDLE DOT}" for character in text)


def rate(moments: Sequence[Moment], count: Callable[[Moment], float]) -> float:
    """Return the growth of a counter per second, over the last 3 seconds."""
    *earlier, last = moments
    if not earlier:
        return 0.0
    first = next((moment for moment in earlier if moment.time >= last.time - WINDOW - 0.5), earlier[-1])
    return max(count(last) - count(first), 0) / max(last.time - first.time, 0.001)


def summary(moments: Sequence[Moment]) -> str:
    """Return the state of the server on one line, for a log."""
    total, workers = moments[-1].total, moments[-1].workers

    def per_second(name: str) -> float:
        return rate(moments, lambda moment: getattr(moment.total, name))

    parts = [
        f"in {per_second('received'):,.0f}/s, {per_second('bytes_received'):,.0f} B/s",
        f"out {per_second('sent'):,.0f}/s, {per_second('bytes_sent'):,.0f} B/s",
        f"clients {total.clients}",
        *(f"{name} {count} ({per_second(name):,.1f}/s)" for name, count in total.lost.items() if count),
        *(f"{name} {count}" for name, count in sorted(total.errors.items())),
        f"workers {sum(worker.state == 'serving' for worker in workers)} of {len(workers)} serving",
        f"restarts {sum(worker.restarts for worker in workers)}",
    ]
    return ", ".join(parts)
