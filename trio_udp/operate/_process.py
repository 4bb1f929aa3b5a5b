"""One worker process as the supervisor sees it: its start, its state, and its time limits.

STARTING -> READY -> SERVING -> [LEAVING ->] STOPPING -> DRAINING -> DEAD
    any of them may also go to DEAD, and any before STOPPING to STOPPING
"""

from __future__ import annotations

import logging
import math
import signal
import socket
import sys
from enum import Enum

import attrs
import trio

from .. import Address, ServerStatistics
from ._messages import Busiest, Failed, Leave, Message, Pipe, Ready, Released, Report, Serve, Settings, Stop

LOGGER = logging.getLogger("trio_udp")

# The arguments after the descriptor are sys.path of this process, so a worker imports the same packages.
WORKER = "import sys; sys.path[:] = sys.argv[2:]; from trio_udp.operate._worker import main; main()"

# The -W options of this process. (PYTHONWARNINGS is inherited.)
WARNINGS = [f"-W{option}" for option in sys.warnoptions]

# Seconds for a worker to end after its drain: to cancel handlers, and to exit the context manager of a factory.
GRACE = 2.0

# Seconds before a worker that was silent for too long is killed. This process itself may have been stopped (SIGSTOP, a
# debugger); the worker's reports then wait in the pipe, and are read in this time.
LAST_CHANCE = 0.2


class WorkerError(Exception):
    """A worker did not become ready; the message says why, with the traceback if the user's code raised.

    Attributes:
      exit_status: 2 if the target cannot be served, 1 after any other error.
    """

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class State(Enum):
    """The state of a worker.

    ======== ======================================================= ==========================
    state    meaning                                                 killed after
    ======== ======================================================= ==========================
    STARTING imports the handler, enters its factory                 ``ready_timeout``
    READY    waits for its turn to read                              never
    SERVING  reads its sockets                                       ``watchdog`` of silence
    LEAVING  reads, and asks to be replaced: it received SIGTERM     ``watchdog`` of silence
    STOPPING was told to stop                                        ``watchdog`` of silence
    DRAINING reads no more; its handlers finish                      the end of its drain
    DEAD     has ended
    ======== ======================================================= ==========================
    """

    STARTING = "starting"
    READY = "ready"
    SERVING = "serving"
    LEAVING = "leaving"
    STOPPING = "stopping"
    DRAINING = "draining"
    DEAD = "dead"


NEXT = {
    State.STARTING: {State.READY, State.STOPPING, State.DEAD},
    State.READY: {State.SERVING, State.STOPPING, State.DEAD},
    State.SERVING: {State.LEAVING, State.STOPPING, State.DEAD},
    State.LEAVING: {State.STOPPING, State.DEAD},
    State.STOPPING: {State.DRAINING, State.DEAD},
    State.DRAINING: {State.DEAD},
    State.DEAD: set[State](),
}


# Why a worker is killed.
OVERDUE = {
    State.STARTING: "was not ready in time",
    State.SERVING: "does not answer",
    State.LEAVING: "does not answer",
    State.STOPPING: "does not answer",
    State.DRAINING: "ignored its drain",
}


@attrs.frozen
class Patience:
    """Seconds that a worker may take."""

    ready: float
    silence: float
    drain: float


@attrs.define(eq=False)
class WorkerProcess:
    """One worker process, from before its start to its death.

    Attributes:
      settings: Settings that it receives at its start.
      pid: Its process ID; 0 before it runs.
      failure: Why it has never become ready.
      statistics: Its last report; ``None`` before the first.
      busiest: The busiest clients that it reported last, with their datagrams a second.
      began: Time of its start.
      heard: Time of its last message.
      killed: The supervisor had to kill it, because it was silent or ignored its drain.
    """

    settings: Settings
    patience: Patience
    state: State = attrs.field(default=State.STARTING, init=False)
    pid: int = attrs.field(default=0, init=False)
    failure: WorkerError | None = attrs.field(default=None, init=False)
    statistics: ServerStatistics | None = attrs.field(default=None, init=False)
    busiest: list[tuple[Address, float]] = attrs.field(factory=list, init=False)
    began: float = attrs.field(factory=trio.current_time, init=False)
    heard: float = attrs.field(factory=trio.current_time, init=False)
    killed: bool = attrs.field(default=False, init=False)
    _deadline: float = attrs.field(default=math.inf, init=False)
    _end_of_drain: float = attrs.field(default=math.inf, init=False)
    _waiting: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)  # for its death, until the deadline
    _changed: trio.Event = attrs.field(factory=trio.Event, init=False)
    _outgoing: list[Message] = attrs.field(factory=list, init=False)
    _may_send: trio.Event = attrs.field(factory=trio.Event, init=False)

    @property
    def name(self) -> str:
        return f"worker {self.settings.number} (pid {self.pid})"

    @property
    def age(self) -> float:
        """Seconds from its start to its last message."""
        return self.heard - self.began

    @property
    def is_told_to_stop(self) -> bool:
        return self.state in (State.STOPPING, State.DRAINING)

    @property
    def is_reading(self) -> bool:
        return self.state in (State.SERVING, State.LEAVING)

    async def wait_for(self, *states: State) -> State:
        """Wait until the process is in one of these states, or is dead; return its state."""
        while self.state not in states and self.state is not State.DEAD:
            await self._changed.wait()
        return self.state

    def serve(self) -> None:
        """Let the process read its sockets."""
        if self.state is State.READY:
            self._move(State.SERVING, self.patience.silence)
            self._send(Serve())

    def stop(self, *, last: bool) -> None:
        """Let the process stop reading and drain; see :class:`Stop`."""
        if State.STOPPING in NEXT[self.state]:
            self._end_of_drain = trio.current_time() + self.patience.drain + GRACE
            self._move(State.STOPPING, min(self.patience.silence, self.patience.drain + GRACE))
            self._send(Stop(last))

    async def run(self) -> None:
        """Start the process, handle its messages, and return when it is dead. Cancelling kills it."""
        pipe = None
        try:
            ours, theirs = socket.socketpair()
            pipe = Pipe(ours)
            with theirs, trio.CancelScope(shield=True):  # or a process could start that nothing waits for
                process = await trio.lowlevel.open_process(
                    [sys.executable, *WARNINGS, "-c", WORKER, str(theirs.fileno()), *sys.path],
                    pass_fds=[theirs.fileno(), *self.settings.descriptors],
                    # Ctrl-C is for the supervisor. In the same process group it would end a starting worker with a
                    # traceback: no program can ignore a signal before the interpreter runs it.
                    start_new_session=True,
                )
            try:
                await self._follow(process, pipe)
            finally:
                if process.returncode is None:
                    process.kill()
                    with trio.CancelScope(shield=True):
                        await process.wait()
        except OSError as error:  # no more descriptors, memory or processes
            self.failure = WorkerError(f"cannot start a worker: {error}")
        finally:
            if pipe is not None:
                pipe.close()
            self._move(State.DEAD)

    async def _follow(self, process: trio.Process, pipe: Pipe) -> None:
        """Exchange messages with the process until it is dead."""
        self.pid = process.pid
        self._set_patience(self.patience.ready)
        heard_all = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._speak, pipe)
            nursery.start_soon(self._listen, pipe, process, heard_all)
            await self._wait(process)
            with trio.move_on_after(GRACE):  # a child process of the worker may hold the pipe open
                await heard_all.wait()
            nursery.cancel_scope.cancel()
        self._tell_death(process.returncode)

    async def _wait(self, process: trio.Process) -> None:
        """Wait until the process is dead; kill it if it exceeds a time limit."""
        while True:
            with trio.CancelScope(deadline=self._deadline) as self._waiting:
                await process.wait()
                return
            await trio.sleep(LAST_CHANCE)
            if self._deadline <= trio.current_time():
                self._kill(process, OVERDUE[self.state])

    def _kill(self, process: trio.Process, reason: str) -> None:
        if not self.killed:
            self.killed = True
            self._deadline = math.inf
            if self.state is State.STARTING:
                self.failure = WorkerError(f"{self.name} {reason}")
            else:
                LOGGER.error("%s %s: killed", self.name, reason)
            process.kill()

    def _tell_death(self, status: int | None) -> None:
        reason = f"ended with status {status}"
        if status is not None and status < 0:
            reason = f"was ended by {signal.Signals(-status).name}"
        if self.state is State.STARTING:
            self.failure = self.failure or WorkerError(f"{self.name} {reason} before it was ready")
        elif not self.killed and (status or not self.is_told_to_stop):
            LOGGER.error("%s %s", self.name, reason)

    async def _speak(self, pipe: Pipe) -> None:
        await pipe.send(self.settings)
        while True:
            while self._outgoing:
                await pipe.send(self._outgoing.pop(0))
            await self._may_send.wait()
            self._may_send = trio.Event()

    async def _listen(self, pipe: Pipe, process: trio.Process, heard_all: trio.Event) -> None:
        try:
            while (message := await pipe.receive()) is not None:
                self.heard = trio.current_time()
                self._hear(message)
        except (ValueError, TypeError, KeyError) as error:  # after an upgrade of the package
            self._kill(process, f"runs another version of trio_udp, so the service must be restarted ({error!r})")
        heard_all.set()

    def _hear(self, message: Message) -> None:
        if isinstance(message, Report):
            self.statistics = message.statistics
            if self.state in (State.SERVING, State.LEAVING):
                self._set_patience(self.patience.silence)
        elif isinstance(message, Busiest):
            self.busiest = message.clients
        elif isinstance(message, Failed):
            self.failure = WorkerError(message.text, message.exit_status)
        elif isinstance(message, Ready) and self.state is State.STARTING:
            self._move(State.READY, math.inf)
        elif isinstance(message, Leave) and self.state is State.SERVING:
            self._move(State.LEAVING, self.patience.silence)
        elif isinstance(message, Released) and self.state is State.STOPPING:
            self._move(State.DRAINING, self._end_of_drain - trio.current_time())

    def _send(self, message: Message) -> None:
        self._outgoing.append(message)
        self._may_send.set()

    def _move(self, state: State, seconds: float | None = None) -> None:
        """Go to a state, and allow the worker ``seconds`` there; by default the seconds that are left."""
        assert state in NEXT[self.state]
        self.state = state
        if seconds is not None:
            self._set_patience(seconds)
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    def _set_patience(self, seconds: float) -> None:
        self._deadline = self._waiting.deadline = trio.current_time() + seconds
