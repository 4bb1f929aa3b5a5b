"""One worker's place: its sockets, the process that reads them, and the processes that read them before.

At most one process of a slot reads at any time. To replace it, the new process starts and gets ready, the old one stops
reading and says so, and then the new one reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import attrs
import trio

from .. import Endpoint, ServerStatistics
from ._process import State, WorkerError, WorkerProcess

LOGGER = logging.getLogger("trio_udp")

# If a worker dies within this many seconds, each restart waits longer: 0, 0.25, 0.5, 1, ... seconds.
SOON = 10.0
FIRST_DELAY = 0.25
LONGEST_DELAY = 30.0

STOPPED = "the workers were told to stop"

NOTHING = ServerStatistics(errors={}, **{f.name: 0 for f in attrs.fields(ServerStatistics) if f.name != "errors"})


@attrs.define(eq=False)
class Slot:
    """Starts, replaces and stops the processes of one worker.

    Attributes:
      number: The worker's number, from 1.
      endpoints: Its bound sockets. The supervisor does not read them; the processes have the same sockets.
      worker: The process that reads, or the last that did.
      restarts: How often ``worker`` was replaced.
      killed: How many processes had to be killed.
    """

    number: int
    endpoints: list[Endpoint]
    _new_process: Callable[[Slot], WorkerProcess]
    _nursery: trio.Nursery
    worker: WorkerProcess | None = attrs.field(default=None, init=False)
    restarts: int = attrs.field(default=0, init=False)
    killed: int = attrs.field(default=0, init=False)
    _processes: list[WorkerProcess] = attrs.field(factory=list, init=False)  # alive
    _past: ServerStatistics = attrs.field(default=NOTHING, init=False)  # of dead processes
    _kernel_dropped_before: int = attrs.field(init=False)
    _replacing: trio.Lock = attrs.field(factory=trio.Lock, init=False)
    _handing_over: trio.Lock = attrs.field(factory=trio.Lock, init=False)
    _is_stopped: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._kernel_dropped_before = self._kernel_drops()

    async def start_process(self) -> WorkerProcess:
        """Start a process, and return it when it is ready to read.

        Raises:
          WorkerError: It does not become ready, and is dead.
        """
        if self._is_stopped:
            raise WorkerError(STOPPED)
        process = self._new_process(self)
        self._processes.append(process)
        self._nursery.start_soon(self._run, process)
        try:
            state = await process.wait_for(State.READY)
        except trio.Cancelled:
            process.stop(last=False)
            raise
        if self._is_stopped:
            raise WorkerError(STOPPED)
        if state is State.DEAD:
            raise process.failure or WorkerError(f"{process.name} ended before it was ready")
        return process

    async def let_read(self, new: WorkerProcess) -> None:
        """Let a process read, once the one that reads now has stopped reading."""
        with trio.CancelScope(shield=True):  # the sockets must not be left without a reader
            async with self._handing_over:
                if (old := self.worker) is not None:
                    old.stop(last=False)
                    await old.wait_for(State.DRAINING)
                    self.restarts += 1
                self.worker = new
                new.serve()

    async def replace(self) -> None:
        """Replace the worker. If the new one does not become ready, the old one continues: ``WorkerError``."""
        async with self._replacing:
            await self.let_read(await self.start_process())

    async def keep_serving(self) -> None:
        """Replace the worker whenever it dies, or asks for it."""
        attempts, last = 0, None
        while True:
            worker = self.worker
            assert worker is not None
            await worker.wait_for(State.LEAVING, State.STOPPING, State.DRAINING)
            async with self._replacing:
                pass  # it may be stopping because it is being replaced
            if self.worker is not worker:
                continue
            if worker is not last and worker.age > SOON:
                attempts = 0
            if attempts:
                delay = min(FIRST_DELAY * 2 ** (attempts - 1), LONGEST_DELAY)
                LOGGER.info("worker %d starts again in %g s", self.number, delay)
                await trio.sleep(delay)
            attempts, last = attempts + 1, worker
            try:
                async with self._replacing:
                    if self.worker is worker:
                        await self.let_read(await self.start_process())
            except WorkerError as error:
                LOGGER.error("worker %d cannot be started: %s", self.number, error)

    async def stop(self) -> None:
        """Let all processes of the slot drain and end."""
        async with self._handing_over:
            self._is_stopped = True
            for process in self._processes:
                process.stop(last=process is self.worker)

    def statistics(self) -> ServerStatistics:
        """Return the counts of all processes of the slot, including dead ones."""
        living = [process.statistics for process in self._processes if process.statistics is not None]
        dropped = self._kernel_drops() - self._kernel_dropped_before
        # Two processes with the same socket both report its total.
        return attrs.evolve(sum(living, self._past), kernel_dropped=dropped)

    def _kernel_drops(self) -> int:
        return sum(endpoint.statistics().kernel_dropped for endpoint in self.endpoints)

    async def _run(self, process: WorkerProcess) -> None:
        await process.run()
        self._processes.remove(process)
        self.killed += process.killed
        if (last := process.statistics) is not None:
            # After a drain nothing waits and no handler is left. After a sudden death, count those as lost.
            cancelled = last.handlers_cancelled or (last.clients if process.killed else 0)
            dropped = last.dropped_at_end + last.waiting
            self._past += attrs.evolve(last, waiting=0, clients=0, dropped_at_end=dropped, handlers_cancelled=cancelled)
