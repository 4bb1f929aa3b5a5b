"""The supervisor at work: it starts a slot for each worker, restarts them in turn, and stops them together.

The first start differs from later ones: no worker reads before all are ready, and an error ends everything.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Collection
from contextlib import suppress

import attrs
import trio

from .. import Endpoint
from ._messages import Settings
from ._process import Patience, WorkerError, WorkerProcess
from ._reload import Watch
from ._slot import Slot

LOGGER = logging.getLogger("trio_udp")


@attrs.define(eq=False)
class Supervision:
    """Starts, restarts and stops the slots of a supervisor.

    Attributes:
      bound: The sockets of each worker.
      settings: The settings of every worker, except its number and its sockets.
      slots: The slots in the order of ``bound``; empty until :meth:`run` runs.
      stop_requested: Set by ``Supervisor.stop`` or a signal.
      restart_wanted: A restart was requested and has not begun.
      is_drained: All workers have ended, and none was killed by a second signal.
    """

    bound: list[list[Endpoint]]
    settings: Settings
    patience: Patience
    lame_duck: float
    slots: list[Slot] = attrs.field(factory=list, init=False)
    stop_requested: trio.Event = attrs.field(factory=trio.Event, init=False)
    restart_wanted: trio.Event = attrs.field(factory=trio.Event, init=False)
    is_drained: bool = attrs.field(default=False, init=False)
    _restarting: trio.Lock = attrs.field(factory=trio.Lock, init=False)
    _failure: WorkerError | None = attrs.field(default=None, init=False)

    async def run(
        self,
        stop_signals: Collection[signal.Signals],
        restart_signals: Collection[signal.Signals],
        watch: Watch | None,
        started: Callable[[], None],
    ) -> None:
        """Start the workers and keep them going; return when they have been stopped and have ended."""
        async with trio.open_nursery() as helpers:
            async with trio.open_nursery() as processes:
                self.slots += [
                    Slot(number, endpoints, self._new_process, processes)
                    for number, endpoints in enumerate(self.bound, 1)
                ]
                if stop_signals:
                    await helpers.start(self._stop_at_signals, stop_signals, processes.cancel_scope)
                if restart_signals:  # until the end, or a signal would kill this process
                    await helpers.start(self._restart_at_signals, restart_signals)
                async with trio.open_nursery() as keepers:
                    keepers.start_soon(self._end_keepers, keepers.cancel_scope)
                    await self._start_all()
                    if self._failure is not None:
                        processes.cancel_scope.cancel()
                        await trio.lowlevel.checkpoint()
                    started()
                    for slot in self.slots:
                        keepers.start_soon(slot.keep_serving)
                    keepers.start_soon(self._restart_when_wanted)
                    if watch is not None:
                        keepers.start_soon(watch, self._file_has_changed)
                for slot in self.slots:
                    await slot.stop()
            self.is_drained = not processes.cancel_scope.cancel_called
            helpers.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    async def restart(self) -> None:
        """Replace the workers one after the other, and log how that ended."""
        async with self._restarting:
            LOGGER.info("restarting")
            try:
                for slot in self.slots:
                    if not self.stop_requested.is_set():
                        await slot.replace()
            except WorkerError as error:
                if not self.stop_requested.is_set():
                    LOGGER.error("restart failed, the old workers continue: %s", error)
                    raise
            if not self.stop_requested.is_set():
                LOGGER.info("restarted")

    def _new_process(self, slot: Slot) -> WorkerProcess:
        descriptors = [endpoint.socket.fileno() for endpoint in slot.endpoints]
        settings = attrs.evolve(self.settings, number=slot.number, descriptors=descriptors)
        return WorkerProcess(settings, self.patience)

    async def _start_all(self) -> None:
        """Start a process for each slot; let them read once all are ready. The first failure ends the wait."""
        ready: dict[Slot, WorkerProcess] = {}

        async def start(slot: Slot) -> None:
            try:
                ready[slot] = await slot.start_process()
            except WorkerError as error:
                self._failure = self._failure or error
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for slot in self.slots:
                nursery.start_soon(start, slot)
        if self._failure is None:
            for slot, process in ready.items():
                await slot.let_read(process)

    async def _end_keepers(self, keepers: trio.CancelScope) -> None:
        """End the tasks that keep the workers running, once the workers may drain."""
        await self.stop_requested.wait()
        if self.lame_duck:
            LOGGER.info("stopping in %g s", self.lame_duck)
            await trio.sleep(self.lame_duck)
        LOGGER.info("stopping: the workers drain")
        keepers.cancel()

    async def _restart_when_wanted(self) -> None:
        while True:
            await self.restart_wanted.wait()
            self.restart_wanted = trio.Event()
            with suppress(WorkerError):  # it is in the log
                await self.restart()

    def _file_has_changed(self) -> None:
        LOGGER.info("a file has changed")
        self.restart_wanted.set()

    async def _stop_at_signals(
        self,
        signals: Collection[signal.Signals],
        processes: trio.CancelScope,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        with trio.open_signal_receiver(*signals) as arriving:
            task_status.started()
            await anext(arriving)
            self.stop_requested.set()
            await anext(arriving)
            LOGGER.warning("stopped at once by a second signal")
            processes.cancel()

    async def _restart_at_signals(
        self, signals: Collection[signal.Signals], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(*signals) as arriving:
            task_status.started()
            async for _ in arriving:
                self.restart_wanted.set()
