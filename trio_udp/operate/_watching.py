"""Starting ``--live`` and ``--metrics`` from the command line; their packages are imported only then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import attrs
import trio

from ._supervisor import Supervisor

if TYPE_CHECKING:
    from ._health import Health
    from ._live import Terminal

BUSIEST_CLIENTS = 20  # of each worker; a screen has room for that many in all


@attrs.frozen(kw_only=True)
class Views:
    """The views of a supervisor that the command line asks for.

    Attributes:
      busiest_clients: How many clients each worker must report.
    """

    _live: bool
    _terminal: Terminal | None
    _health: Health | None
    _address: tuple[str, int]

    @property
    def busiest_clients(self) -> int:
        return BUSIEST_CLIENTS if self._terminal is not None else 0

    async def start(self, nursery: trio.Nursery) -> None:
        """Open the port for metrics and health; it reports not ready yet.

        Raises:
          OSError: The port cannot be bound.
        """
        if self._health is not None:
            await nursery.start(self._health.serve, *self._address)

    def show(self, nursery: trio.Nursery, supervisor: Supervisor) -> None:
        """Show a supervisor whose workers serve."""
        if self._health is not None:
            self._health.begin(supervisor)
        if self._live:
            from ._live import show_live
            from ._moments import look_at

            nursery.start_soon(show_live, partial(look_at, supervisor), self._terminal)


@contextmanager
def watching(*, live: bool, metrics: tuple[str, int] | None) -> Iterator[Views]:
    """Prepare the requested views; with ``live``, take the terminal until the block ends.

    Raises:
      ImportError: An extra is not installed; the message names it.
    """
    health = None
    if metrics is not None:
        try:
            from ._health import Health
        except ImportError:
            raise ImportError("--metrics needs prometheus-client: pip install 'trio-udp[metrics]'") from None
        health = Health()
    if not live:
        yield Views(live=False, terminal=None, health=health, address=metrics or ("", 0))
        return
    try:
        from ._live import take_terminal
    except ImportError:
        raise ImportError("--live needs rich: pip install 'trio-udp[cli]'") from None
    with take_terminal() as terminal:
        yield Views(live=True, terminal=terminal, health=health, address=metrics or ("", 0))
