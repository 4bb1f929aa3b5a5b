"""``--live``: the terminal of the live view, and the loop that draws; without a terminal, a log line every 10 seconds.

It runs in the supervisor, where a slow terminal delays no datagram. _view.py makes the picture. Meanwhile standard
output and standard error, which workers and their handlers share, go into a pipe. The view shows the last lines, and
writes them to the terminal when it ends.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import attrs
import trio
from rich.console import Console

from ._moments import Moment, summary
from ._view import ASCII_BLOCKS, BLOCKS, MINUTE, picture

LOGGER = logging.getLogger("trio_udp")

LOG_EVERY = 10.0  # seconds, without a terminal
KEPT_LINES = 100  # of the output during the view
LONGEST_LINE = 10_000  # characters

# Seconds that a terminal may take for the last characters. It may be stopped (Ctrl-S), or its connection slow.
PATIENCE = 1.0

ENTER = "\x1b[?1049h\x1b[?25l\x1b[2J"  # the alternate screen, without cursor, empty
LEAVE = "\x1b[?25h\x1b[?1049l"
HOME = "\x1b[H"
NEXT_LINE = "\x1b[K\r\n"  # clears the rest of the line
REST = "\x1b[J"  # clears the rest of the screen


@attrs.define(eq=False)
class Terminal:
    """The terminal of the view.

    Attributes:
      lines: The last lines that this process, or a worker, has written to standard output or standard error.
    """

    descriptor: int
    encoding: str = "utf-8"
    lines: deque[str] = attrs.field(factory=lambda: deque(maxlen=KEPT_LINES))
    _writing: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    _is_entered: bool = attrs.field(default=False, init=False)
    _is_left: bool = attrs.field(default=False, init=False)
    _was_suspended: bool = attrs.field(default=False, init=False)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines; 80 x 24 if the terminal does not report its size."""
        with suppress(OSError):
            size = os.get_terminal_size(self.descriptor)
            if size.columns and size.lines:
                return size.columns, size.lines
        return 80, 24

    def show(self, picture: str) -> None:
        """Show a picture of the whole screen. Waits for the terminal, so call it in a thread."""
        with self._writing:
            if not self._is_left and (not self._was_suspended or self._is_in_foreground()):
                self._write(("" if self._is_entered else ENTER) + HOME + picture.replace("\n", NEXT_LINE) + REST)
                self._is_entered = True

    async def suspend(self) -> None:
        """Give the terminal back and stop this process, as Ctrl-Z does by default; return after ``fg`` or ``bg``."""
        await trio.to_thread.run_sync(self._give_back, abandon_on_cancel=True)
        self._was_suspended = True
        ours = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)  # the kernel ignores it if no shell could continue this process
        signal.signal(signal.SIGTSTP, ours)

    async def leave(self) -> None:
        """Restore the terminal. Later pictures are ignored."""
        self._is_left = True
        with trio.move_on_after(PATIENCE, shield=True):
            await trio.to_thread.run_sync(self._give_back, abandon_on_cancel=True)

    def leave_after_crash(self) -> None:
        """Like :meth:`leave`, if Trio ended before that could be called."""
        if not self._is_left:
            self._give_back()

    def _give_back(self) -> None:
        with self._writing:
            if self._is_entered:
                self._write(LEAVE)
                self._is_entered = False

    def _is_in_foreground(self) -> bool:
        """Whether this process may use the terminal: not after ``bg``."""
        try:
            return os.tcgetpgrp(self.descriptor) == os.getpgrp()
        except OSError:  # not our controlling terminal
            return True

    def _write(self, text: str) -> None:
        rest = text.encode(self.encoding, "replace")
        while rest:
            rest = rest[os.write(self.descriptor, rest) :]


@contextmanager
def take_terminal() -> Iterator[Terminal | None]:
    """Take the terminal on standard output until the block ends; ``None`` if there is none to draw on."""
    if not os.isatty(1) or os.environ.get("TERM") in (None, "", "dumb", "unknown"):
        yield None
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2) if os.isatty(descriptor)}
    terminal = Terminal(kept[1], sys.stdout.encoding)
    reading, writing = os.pipe()
    for descriptor in kept:
        os.dup2(writing, descriptor)
    os.close(writing)
    reader = threading.Thread(target=_keep_lines, args=(reading, terminal.lines), name="log of the view", daemon=True)
    reader.start()
    try:
        yield terminal
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        with suppress(OSError):
            terminal.leave_after_crash()
        for descriptor, original in kept.items():
            os.dup2(original, descriptor)
        reader.join(PATIENCE)  # until the workers have closed it too
        with suppress(OSError):
            for line in list(terminal.lines):
                print(line, file=sys.stderr)
        for original in kept.values():
            os.close(original)


def _keep_lines(descriptor: int, lines: deque[str]) -> None:
    rest = ""
    with os.fdopen(descriptor, "rb", buffering=0) as pipe:
        while data := pipe.read(65_536):
            *whole, rest = (rest + data.decode(errors="replace")).split("\n")
            lines.extend(whole)
            rest = rest[-LONGEST_LINE:]
    if rest:
        lines.append(rest)


async def show_live(look: Callable[[], Moment], terminal: Terminal | None) -> None:
    """Draw the state every second until cancelled; without a terminal, log it every 10 seconds.

    If the terminal is gone, the view ends, but not the server.
    """
    if terminal is None:
        await _log(look)
        return
    try:
        await _draw(look, terminal)
    except Exception:
        LOGGER.exception("the live view has ended; the workers continue")
    finally:
        with suppress(OSError):
            await terminal.leave()


async def _log(look: Callable[[], Moment]) -> None:
    moments: deque[Moment] = deque(maxlen=2)
    while True:
        moments.append(look())
        if len(moments) == 2:
            LOGGER.info("%s", summary(moments))
        await trio.sleep(LOG_EVERY)


async def _draw(look: Callable[[], Moment], terminal: Terminal) -> None:
    console = Console(force_terminal=True)
    blocks = BLOCKS if terminal.encoding.lower().startswith("utf") else ASCII_BLOCKS
    moments: deque[Moment] = deque(maxlen=MINUTE + 1)

    def draw(moments: list[Moment], lines: list[str]) -> None:
        """Draw, in a thread: a picture takes some milliseconds, and a terminal may take any time."""
        console.size = width, height = terminal.size
        with console.capture() as capture:
            console.print(picture(moments, lines, width, height, blocks=blocks), end="", soft_wrap=True)
        terminal.show(capture.get())

    with trio.open_signal_receiver(signal.SIGWINCH, signal.SIGTSTP) as signals:
        next_look = trio.current_time()
        while True:
            with trio.move_on_at(next_look):
                if await anext(signals) == signal.SIGTSTP:  # Ctrl-Z
                    await terminal.suspend()
            if trio.current_time() >= next_look:
                moments.append(look())
                next_look = max(next_look, trio.current_time() - 1) + 1  # after a pause, do not catch up
            await trio.to_thread.run_sync(draw, list(moments), list(terminal.lines), abandon_on_cancel=True)
