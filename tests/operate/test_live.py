"""The live view on its own terminal, and the state of the terminal afterwards."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import pytest
import trio

pytest.importorskip("rich")
if sys.platform == "win32":
    pytest.skip("needs a terminal of POSIX", allow_module_level=True)

from tests.operate.watched import SECONDS, command, environment
from trio_udp.operate import _live
from trio_udp.operate._live import ENTER, HOME, LEAVE, REST, Terminal, show_live
from trio_udp.operate._moments import Moment
from trio_udp.operate._slot import NOTHING

MOMENT = Moment(time=0.0, addresses=("192.0.2.1:53",), ready=True, workers=(), total=NOTHING)


class Person:
    """Reads what a program writes to a terminal, and sets the terminal's size."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._unread = ""

    async def read_until(self, text: str) -> str:
        """Return all output up to and including this text."""
        with trio.fail_after(SECONDS):
            while text not in self._unread:
                await trio.lowlevel.wait_readable(self.descriptor)
                self._unread += os.read(self.descriptor, 65_536).decode(errors="replace")
        end = self._unread.index(text) + len(text)
        found, self._unread = self._unread[:end], self._unread[end:]
        return found

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def close(self) -> None:
        if self.descriptor != -1:
            os.close(self.descriptor)
        self.descriptor = -1


@contextmanager
def terminal_of(columns: int, lines: int) -> Iterator[tuple[Person, int]]:
    """Open a terminal; return its person, and the descriptor for the program."""
    descriptor, program = os.openpty()
    person = Person(descriptor)
    try:
        person.resize(columns, lines)
        yield person, program
    finally:
        person.close()
        os.close(program)


def look() -> Moment:
    return attrs.evolve(MOMENT, time=trio.current_time())


async def test_the_terminal_is_given_back() -> None:
    """The view uses an alternate screen without a cursor, and restores both when it is cancelled."""
    with terminal_of(80, 24) as (person, program):
        async with trio.open_nursery() as viewing:
            viewing.start_soon(show_live, look, Terminal(program))
            assert await person.read_until(HOME) == ENTER + HOME
            picture = await person.read_until(REST)
            assert "kernel_dropped" in picture
            assert picture.count("\n") == 23
            viewing.cancel_scope.cancel()
        await person.read_until(LEAVE)


async def test_a_failure_ends_the_view_only(caplog: pytest.LogCaptureFixture) -> None:
    """If the view fails, the terminal is restored, the failure is logged, and the server goes on."""

    def look_once() -> Moment:
        looks.append(1)
        return attrs.evolve(MOMENT, time=1 / (2 - len(looks)))

    looks: list[int] = []
    with terminal_of(80, 24) as (person, program), trio.fail_after(SECONDS):
        await show_live(look_once, Terminal(program))
        assert (await person.read_until(LEAVE)).startswith(ENTER)
    assert [record.getMessage() for record in caplog.records] == ["the live view has ended; the workers continue"]


async def test_a_terminal_that_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    """If the terminal is closed, the view ends and the server goes on."""
    with terminal_of(80, 24) as (person, program), trio.fail_after(SECONDS):
        person.close()
        await show_live(look, Terminal(program))
    [record] = caplog.records
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], OSError)
    assert record.exc_info[1].errno == errno.EIO


async def test_a_terminal_that_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped terminal (Ctrl-S) does not delay the end of the server."""
    monkeypatch.setattr(_live, "PATIENCE", 0.1)
    with terminal_of(80, 24) as (person, program), trio.fail_after(SECONDS):
        async with trio.open_nursery() as viewing:
            viewing.start_soon(show_live, look, Terminal(program))
            await person.read_until(REST)
            termios.tcflow(program, termios.TCOOFF)
            viewing.cancel_scope.cancel()
        termios.tcflow(program, termios.TCOON)
        await person.read_until(LEAVE)  # it comes when the terminal goes on


async def test_resizing() -> None:
    """When the terminal changes its size, the view fits immediately."""
    with terminal_of(80, 24) as (person, program):
        async with trio.open_nursery() as viewing:
            viewing.start_soon(show_live, look, Terminal(program))
            await person.read_until(REST)
            person.resize(60, 20)
            os.kill(os.getpid(), signal.SIGWINCH)
            assert (await person.read_until(REST)).count("\n") == 19
            viewing.cancel_scope.cancel()


async def test_without_a_terminal(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a terminal, a line goes to the log every 10 seconds."""
    caplog.set_level(logging.INFO, "trio_udp")

    def look() -> Moment:
        received = int(trio.current_time()) * 7
        return attrs.evolve(MOMENT, time=trio.current_time(), total=attrs.evolve(NOTHING, received=received))

    nursery.start_soon(show_live, look, None)
    await trio.sleep(35)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["in 7/s, 0 B/s, out 0/s, 0 B/s, clients 0, workers 0 of 0 serving, restarts 0"] * 3
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
async def test_the_command_line_on_a_terminal(ending: signal.Signals) -> None:
    """The command draws on its terminal until it stops; then the log of that time is printed on the old screen."""
    with terminal_of(80, 24) as (person, program):
        before = termios.tcgetattr(program)
        process = await trio.lowlevel.open_process(
            command("--live"), stdin=program, stdout=program, stderr=program, env={**environment(), "TERM": "xterm"}
        )
        try:
            assert await person.read_until(ENTER) == ENTER
            await person.read_until("busiest clients")
            await person.read_until("serving trio_udp.operate._echo")
            process.send_signal(ending)
            await person.read_until(LEAVE)
            log = await person.read_until("datagrams received in all")
            assert [text in log for text in ("serving", "the workers drain", "stopped")] == [True] * 3
            with trio.fail_after(SECONDS):
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert termios.tcgetattr(program) == before


async def test_the_command_line_with_an_error_on_a_terminal() -> None:
    """An error at the start is printed on the terminal, and the view never appears."""
    with terminal_of(80, 24) as (person, program):
        with trio.fail_after(SECONDS):
            ended = await trio.run_process(
                [*command("--live")[:-1], "nothing:handler"],
                stdin=program,
                stdout=program,
                stderr=program,
                env={**environment(), "TERM": "xterm"},
                check=False,
            )
        assert (await person.read_until("\n")).startswith("trio-udp: ")
        assert ended.returncode == 2
