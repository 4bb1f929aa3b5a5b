"""The program of a worker process: load the handler, wait for the turn to read, serve, drain, end.

The supervisor starts it (see _process.py) and makes all decisions. A worker without a supervisor drains and ends.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from functools import partial

import trio

from .. import Accept, Endpoint, Handler, Server, serve_endpoints
from ._busiest import BusiestClients
from ._logging import prepare_process
from ._messages import Busiest, Failed, Leave, Pipe, Ready, Released, Report, Serve, Settings, Stop
from ._process import GRACE
from ._target import TargetError, check_accept, entered, load_target

LOGGER = logging.getLogger("trio_udp")

# Seconds between two reports: the first while counts change, the second at most. The counts since the last report are
# lost if the worker is killed. A report takes 0.2 ms, so an idle worker should make few.
QUICK_REPORT = 0.1
SLOW_REPORT = 1.0

# Seconds for handlers to take the datagrams that the worker has read, before the next worker reads, so that the replies
# of both leave in order. A longer wait could fill the kernel's buffer.
HAND_OVER = 0.05

# A year, in seconds. A drain may take infinity, for which time.sleep raises.
LONGEST_SLEEP = 365 * 86_400.0


def main() -> None:
    """Run a worker; the only argument is the descriptor of its end of the pipe."""
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):  # meant for the supervisor, but sent to all its processes
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.argv[1:], descriptor = [], int(sys.argv[1])
    with socket.socket(fileno=descriptor) as end:
        status = trio.run(work, end)
    sys.exit(status)


async def work(end: socket.socket) -> int:
    """Run the life of a worker; return its exit status."""
    pipe = Pipe(end)
    settings = await pipe.receive()
    if not isinstance(settings, Settings):
        return 1
    prepare_process(settings.log_level, settings.log_format, is_worker=True)
    end_without_supervisor(end.fileno(), settings.drain_timeout + GRACE)
    is_ready = False
    try:
        with contextlib.ExitStack() as cleanup:
            endpoints = [take_over(descriptor, settings) for descriptor in settings.descriptors]
            for endpoint in endpoints:
                cleanup.callback(endpoint.close)
            found = load_target(settings.target, settings.app_dir)
            async with entered(found, settings.target, settings.factory) as handler:
                accept = None
                if settings.accept is not None:
                    accept = load_target(settings.accept, settings.app_dir)
                    check_accept(accept, settings.accept, handler)
                await pipe.send(Ready())
                is_ready = True
                if isinstance(await pipe.receive(), Serve):
                    await serve_until_told(pipe, settings, handler, accept, endpoints)
    except TargetError as error:
        await pipe.send(Failed(str(error), 2))
    except BaseException as error:  # SystemExit too
        if is_ready:
            LOGGER.critical("Worker %d has failed", settings.number, exc_info=error)
        else:
            await pipe.send(Failed(traceback_of_user(error), 1))
    else:
        return 0
    return 1


def take_over(descriptor: int, settings: Settings) -> Endpoint:
    sock = socket.socket(fileno=descriptor)
    return Endpoint.from_socket(sock, shared=True, max_datagram_size=settings.max_datagram_size)


async def serve_until_told(
    pipe: Pipe, settings: Settings, handler: Handler, accept: Accept | None, endpoints: list[Endpoint]
) -> None:
    """Serve until the supervisor sends ``Stop`` or is gone; return after the drain."""
    serve = partial(
        serve_endpoints,
        handler,
        endpoints,
        idle_timeout=settings.idle_timeout,
        limits=settings.limits,
        accept=accept,
        drain_timeout=settings.drain_timeout,
    )
    async with trio.open_nursery() as helpers:
        async with trio.open_nursery() as serving:
            await helpers.start(ask_to_leave_at_sigterm, pipe)  # before anyone can learn of this process
            server: Server = await serving.start(serve)
            helpers.start_soon(report, pipe, server)
            if settings.busiest_clients:
                helpers.start_soon(report_busiest_clients, pipe, BusiestClients(server, settings.busiest_clients))
            try:
                message = await pipe.receive()
                has_successor = isinstance(message, Stop) and not message.last
                for endpoint in endpoints:
                    endpoint.shared = has_successor or settings.inherited
                server.stop()
                if has_successor:
                    await finish_what_was_read(server)
                await pipe.send(Released())
            except BaseException:
                await pipe.send(Report(server.statistics()))  # the server has crashed
                raise
        helpers.cancel_scope.cancel()
    await pipe.send(Report(server.statistics()))


async def finish_what_was_read(server: Server) -> None:
    """Let handlers take the datagrams that wait for them, if they do so soon."""
    with trio.move_on_after(HAND_OVER):
        while server.statistics().waiting:  # noqa: ASYNC110  # counters do not notify
            await trio.sleep(0.001)
    await trio.sleep(0.001)  # until their replies have left


async def report(pipe: Pipe, server: Server) -> None:
    last, pause = None, QUICK_REPORT
    while True:
        statistics = server.statistics()
        pause = QUICK_REPORT if statistics != last else min(2 * pause, SLOW_REPORT)
        last = statistics
        await pipe.send(Report(statistics))
        await trio.sleep(pause)


async def report_busiest_clients(pipe: Pipe, clients: BusiestClients) -> None:
    while True:
        await trio.sleep(1)
        await pipe.send(Busiest(await clients.look()))


async def ask_to_leave_at_sigterm(pipe: Pipe, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as arriving:
        task_status.started()
        async for _ in arriving:
            await pipe.send(Leave())


def end_without_supervisor(descriptor: int, seconds: float) -> None:
    """End this process ``seconds`` after its supervisor, even if a handler blocks it for ever."""

    def watch() -> None:
        poll = select.poll()
        poll.register(descriptor, 0)  # 0: only report that the other end is closed
        poll.poll()
        time.sleep(min(seconds, LONGEST_SLEEP))
        os._exit(1)

    threading.Thread(target=watch, name="end without supervisor", daemon=True).start()


def traceback_of_user(error: BaseException) -> str:
    """Format an error with its traceback, without the first frames, of this package and the import system.

    A file that Python cannot parse has no frame of the user's code; the error itself names the line.
    """
    ours = (os.path.dirname(__file__), os.path.dirname(importlib.__file__), contextlib.__file__, "<frozen importlib")
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(ours):
        trace = trace.tb_next
    if trace is None and not isinstance(error, SyntaxError):
        trace = error.__traceback__
    return "".join(traceback.format_exception(type(error), error, trace)).rstrip()
