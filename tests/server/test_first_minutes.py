"""The first minutes with this package: Ctrl-C, mistakes in the first handler, a port in use, help() and types."""

from __future__ import annotations

import asyncio
import errno
import functools
import inspect
import re
import signal
import socket
import subprocess
import sys
import textwrap
import typing
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import attrs
import pytest
import trio
import trio.lowlevel
import trio.testing

import trio_udp
from trio_udp import Client, Limits, Server, ServerStatistics, serve

from ..conftest import ALICE, BOB, StartInMemory, StartServer, echo


def run_program(source: str, *, interrupt: bool = False) -> tuple[int, str]:
    """Run a program, optionally send Ctrl-C after its first line, and return its status and output."""
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        try:
            if interrupt:
                assert program.stdout.readline() == "ready\n"
                program.send_signal(signal.SIGINT)
            _, errors = program.communicate(timeout=20)
        finally:
            program.kill()
    return program.returncode, errors


SERVE = """
    import socket, trio, trio_udp

    async def handler(client):
        async for payload in client:
            {busy}

    def ready(sock):  # says so in the next pass, when the server runs
        trio.lowlevel.current_trio_token().run_sync_soon(lambda: print("ready", flush=True))

    trio.run(lambda: trio_udp.serve(handler, 0, host="127.0.0.1", configure=ready))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_ends_a_plain_program() -> None:
    """Ctrl-C under trio.run(serve, ...) is a bare KeyboardInterrupt: a short traceback, no group, status of SIGINT."""
    status, errors = run_program(SERVE.format(busy="pass"), interrupt=True)
    assert status == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "ExceptionGroup" not in errors


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_can_be_caught() -> None:
    """``except KeyboardInterrupt`` around trio.run catches Ctrl-C, and nothing is left open."""
    source = textwrap.dedent(SERVE.format(busy="pass")).replace("trio.run(", "try:\n    trio.run(")
    source += "except KeyboardInterrupt:\n    raise SystemExit(7) from None\n"
    assert run_program(source, interrupt=True) == (7, "")


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
async def test_exceptions_that_end_the_program_are_bare(end: type[BaseException]) -> None:
    """KeyboardInterrupt and SystemExit of a handler leave serve bare, out of nested nurseries too."""

    async def fail() -> None:
        raise end

    async def handler(client: Client) -> None:
        async with trio.open_nursery() as outer, trio.open_nursery() as inner:
            outer.start_soon(trio.sleep_forever)
            inner.start_soon(fail)

    async def run(task_status: trio.TaskStatus[Server]) -> None:
        with pytest.raises(end):
            await serve(handler, 0, host="127.0.0.1", task_status=task_status)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            write_to(await nursery.start(run))


def write_to(server: Server) -> None:
    """Send a datagram to a server, as a stranger."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", server.endpoints[0].local_address)


# Mistakes in the first handler.


class App:
    def __init__(self, client: Client) -> None: ...

    async def handle(self, client: Client) -> None: ...

    async def __call__(self, client: Client) -> None: ...

    async def nothing(self) -> None: ...


async def generator(client: Client) -> AsyncIterator[bytes]:
    yield b""


def old_coroutine(client: Client) -> Iterator[bytes]:
    yield b""


async def no_argument() -> None: ...


async def two_arguments(client: Client, database: object) -> None: ...


async def with_default(client: Client, database: object = None) -> None: ...


APP = App.__new__(App)


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (App, "is a class"),
        (generator, "is an async generator function"),
        (partial(generator), "is an async generator function"),
        (old_coroutine, "is a generator function"),
        (no_argument, "cannot be called with one argument"),
        (two_arguments, "cannot be called with one argument"),
        (lambda: None, "cannot be called with one argument"),
        (partial(with_default, None, None), "cannot be called with one argument"),  # type: ignore[arg-type]
        (APP.nothing, "cannot be called with one argument"),
        (None, "cannot be called"),
        (9999, "cannot be called"),
        (object(), "cannot be called"),
    ],
)
async def test_invalid_handlers(handler: Any, message: str) -> None:
    """serve refuses an invalid handler before it binds a socket, in one line that shows a valid handler."""

    def bound(sock: socket.socket) -> None:
        raise AssertionError("a socket was opened")

    with pytest.raises(TypeError, match=message) as info:
        await serve(handler, 0, configure=bound)
    assert "async def handler(client)" in str(info.value)
    assert "\n" not in str(info.value)


async def test_a_handler_that_was_called_already() -> None:
    """serve refuses a coroutine object, as in ``serve(handler(client), ...)``, without Python's own warning."""
    with pytest.raises(TypeError, match=r"handler has been called already, .* pass it without calling it"):
        await serve(with_default(None), 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "handler",
    [
        APP,
        APP.handle,
        with_default,
        partial(two_arguments, database=None),
        lambda client: two_arguments(client, None),
        functools.wraps(with_default)(lambda *args: with_default(*args)),
    ],
)
async def test_valid_handlers(start_in_memory: StartInMemory, handler: Callable[[Client], Any]) -> None:
    """A handler may be a method, an object with async __call__, a partial, or a function that returns a coroutine."""
    run = await start_in_memory(handler)
    run.put(b"x")
    await run.settle()
    statistics = run.server.statistics()
    assert (statistics.clients_started, statistics.handler_errors, statistics.clients) == (1, 0, 0)


async def test_a_plain_function_that_returns_nothing(nursery: trio.Nursery) -> None:
    """A handler that lacks its ``async`` ends the server at the first datagram with a TypeError that names it."""

    def handler(client: Client) -> None: ...

    async def run(task_status: trio.TaskStatus[Server]) -> None:
        with pytest.raises(TypeError, match=r"handler .* returned None, not an awaitable: a handler is an async"):
            await serve(handler, 0, host="127.0.0.1", task_status=task_status)  # type: ignore[arg-type]
        over.set()

    over = trio.Event()
    server: Server = await nursery.start(run)
    write_to(server)
    with trio.fail_after(5):
        await over.wait()
    assert server.endpoints[0].closed


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_port_in_use_is_named(engine: str, host: str) -> None:
    """The message of a failed bind names address and port; errno is the kernel's."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind((host, 0))
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use") as info:
            await serve(echo, port, host=host)
    assert host in str(info.value)
    assert str(port) in str(info.value)
    assert info.value.errno is not None


async def test_an_address_that_is_not_ours_is_named() -> None:
    """A failed bind to an address of another machine names the address."""
    with pytest.raises(OSError, match=r"192\.0\.2\.1.*5353"):
        await serve(echo, 5353, host="192.0.2.1")


@pytest.mark.parametrize("port", ["9999", None, 1.5, -1, 65_536])
async def test_a_wrong_port_is_named(port: Any) -> None:
    """A port that is not an int from 0 to 65,535 raises with the value in the message."""
    with pytest.raises((TypeError, ValueError), match=str(port)):
        await serve(echo, port)


async def test_a_name_that_nobody_knows_is_named() -> None:
    """The message of a failed look-up has the name."""
    for call in (partial(serve, echo, 0, host="no such host"), partial(trio_udp.connect, "no such host", 9)):
        with pytest.raises(socket.gaierror, match="'no such host'"):
            await call()


@pytest.mark.parametrize("address", ["127.0.0.1:9", "localhost", ("localhost", 9), ("127.0.0.1", "9"), ("127.0.0.1",)])
async def test_what_is_no_address(start_in_memory: StartInMemory, address: Any) -> None:
    """send_to and connect say what an address looks like; a name is told how to be looked up."""
    on = await start_in_memory(echo)
    message = re.escape(f"an address is a tuple of numeric host and port, not {address!r}")
    with pytest.raises((TypeError, ValueError), match=message) as info:
        await on.server.send_to(b"", address)
    assert ("getaddrinfo" in str(info.value)) is (address == ("localhost", 9))
    with pytest.raises((TypeError, ValueError), match=message):
        on.server.connect(address)


async def test_a_payload_that_is_too_long_is_told_the_limit(start_on_loopback: StartServer) -> None:
    """The message has both lengths."""
    server = await start_on_loopback()
    with pytest.raises(OSError, match="100000 bytes, and a datagram carries 65507 at most") as info:
        await server.send_to(bytes(100_000), ("127.0.0.1", 9))
    assert info.value.errno == errno.EMSGSIZE


async def async_function(datagram: object) -> None: ...


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accept": async_function}, "accept must be a plain function, not the async function"),
        ({"accept": lambda: True}, "accept must be a function of a Datagram, not"),
        ({"on_error": async_function}, "on_error must be a plain function, not the async function"),
        ({"on_error": lambda error: None}, "on_error must be a function of a Client (or a Datagram) and an exception"),
        ({"idle_timeout": None}, "idle_timeout must be a number of seconds, not None: use math.inf for no limit"),
    ],
)
async def test_what_is_no_argument_of_serve(arguments: dict[str, Any], message: str) -> None:
    """serve says at the call what is wrong with a function or a time that it is given."""
    with pytest.raises(TypeError, match=re.escape(message)):
        await serve(echo, 0, **arguments)


async def test_an_endpoint_that_is_not_in_a_list(start_in_memory: StartInMemory) -> None:
    """serve_endpoints takes several endpoints; one alone is left open."""
    [endpoint] = await trio_udp.open_endpoints(0, host="127.0.0.1")
    async with endpoint:
        with pytest.raises(TypeError, match=r"endpoints must be a list, \[endpoint\], not "):
            await trio_udp.serve_endpoints(echo, endpoint)  # type: ignore[arg-type]
        assert not endpoint.closed


def test_a_request_handler_of_one_argument() -> None:
    """request_handler says where it is written what its function takes."""

    async def of_one(payload: bytes) -> bytes:
        return payload

    with pytest.raises(TypeError, match="a request_handler must be a function of a payload and a Client, not "):
        trio_udp.request_handler(of_one)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a request_handler must be an async function of a payload and a Client, not 2"):
        trio_udp.request_handler(2)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("payload", "message"), [("hello", "not str: use .encode()"), (5, "not int"), (None, "not NoneType")], ids=repr
)
async def test_a_wrong_payload_is_named(start_in_memory: StartInMemory, payload: Any, message: str) -> None:
    """A payload that is not bytes-like raises at the call, and the message says what to do."""
    on = await start_in_memory(echo)
    with pytest.raises(TypeError, match=re.escape(f"a payload is bytes, {message}")):
        await on.server.send_to(payload, ALICE)


async def test_a_forgotten_await_is_named(start_in_memory: StartInMemory) -> None:
    """If the payload is a coroutine, the message says that an await is missing."""
    on = await start_in_memory(echo)
    forgotten: Any = echo(on.server)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is there an await missing"):
        await on.server.send_to(forgotten, ALICE)
    forgotten.close()


@pytest.mark.parametrize(
    "call", [partial(serve, echo, 0), partial(trio_udp.connect, "127.0.0.1", 9)], ids=["serve", "connect"]
)
def test_the_error_under_asyncio_names_guest_mode(call: Callable[[], Any]) -> None:
    """Without Trio, the message names both ways to run Trio."""
    with pytest.raises(RuntimeError, match="start_guest_run"):
        asyncio.run(call())


async def test_the_error_for_broadcast_names_the_option(start_on_loopback: StartServer) -> None:
    """The error for a broadcast that the socket does not allow names the option to set."""
    server = await start_on_loopback(host="0.0.0.0")
    with pytest.raises(PermissionError, match="SO_BROADCAST"):
        await server.send_to(b"", ("255.255.255.255", 9))
    with pytest.raises(PermissionError, match="SO_BROADCAST"):
        server.send_to_nowait(b"", ("255.255.255.255", 9))


# help() and type checkers.


def test_help_begins_with_the_functions() -> None:
    """help(trio_udp) names the functions before the list of modules and classes."""
    text = inspect.getdoc(trio_udp) or ""
    assert text.index("serve(handler, port)") < text.index("connect(host, port)") < text.index("testing")


def public_members() -> Iterator[tuple[str, object]]:
    for name in trio_udp.__all__:
        value = getattr(trio_udp, name)
        if typing.get_origin(value) is not None:
            continue  # an alias, which looks like a class to Python 3.10
        if inspect.isclass(value) or inspect.isfunction(value):
            yield name, value
        if inspect.isclass(value):
            for member, function in vars(value).items():
                if not member.startswith("_") and (callable(function) or isinstance(function, (property, classmethod))):
                    yield f"{name}.{member}", function


def test_help_begins_with_one_line() -> None:
    """The docstring of each public class, function, method and property begins with one full sentence."""
    for name, value in public_members():
        text = inspect.getdoc(value)
        assert text, name
        lines = text.splitlines()
        assert len(lines) == 1 or lines[1] == "", name
        assert lines[0].endswith((".", ":", "::", "``.")), (name, lines[0])
        assert len(lines[0]) <= 120, name


def test_every_argument_of_serve_is_explained() -> None:
    """help(serve) has an entry for each argument."""
    text = inspect.getdoc(serve) or ""
    for name in inspect.signature(serve).parameters:
        assert f"\n  {name}: " in text, name


def test_types_that_users_write_down() -> None:
    """The names for annotations can be imported, and used in annotations at run time."""
    source = """
        from trio_udp import Accept, Address, Client, Handler, OnError, Payload, serve

        async def start(
            handler: Handler | None,
            accept: Accept | None,
            on_error: OnError | None,
            address: Address | None,
            payload: Payload | None,
            handlers: dict[str, Handler],
        ) -> None: ...
    """
    assert run_program(source) == (0, "")


@pytest.mark.parametrize(
    "arguments",
    [{"max_clients": 0}, {"max_clients": "many"}, {"when_full": "evict"}, {"amplification": -1}, {"rate_limit": 5}],
    ids=repr,
)
def test_messages_about_limits_are_one_line(arguments: dict[str, Any]) -> None:
    """The message for a wrong limit has one line, with the name and the value."""
    [(name, value)] = arguments.items()
    with pytest.raises((TypeError, ValueError), match=name) as info:
        Limits(**arguments)
    assert "\n" not in str(info.value)
    assert repr(value) in str(info.value)
    assert len(info.value.args) == 1


def test_classes_without_a_public_constructor() -> None:
    """Calling Server, Client, Connection, Endpoint or Datagram says that it has no public constructor."""
    for name in ("Server", "Client", "Connection", "Endpoint", "Datagram"):
        with pytest.raises(TypeError, match="no public constructor"):
            getattr(trio_udp, name)()


# Statistics.


async def test_statistics_can_be_added(start_in_memory: StartInMemory) -> None:
    """The statistics of several servers can be added, with + and with sum(), errors by name included."""
    first, second = await start_in_memory(echo), await start_in_memory(echo)
    for run, count in ((first, 1), (second, 2)):
        for _ in range(count):
            run.put(b"abc", ALICE)
            run.put(b"x", ("0.0.0.0", 68))  # cannot be answered
    second.put(b"x", BOB)
    await first.settle()
    parts = [run.server.statistics() for run in (first, second)]
    total = sum(parts)
    assert isinstance(total, ServerStatistics)
    assert total == parts[0] + parts[1]
    for field in attrs.fields(ServerStatistics):
        if field.name != "errors":
            assert getattr(total, field.name) == sum(getattr(part, field.name) for part in parts), field.name
    assert (total.received, total.clients, total.bytes_received) == (7, 5, 13)
    assert total.errors == {"EDESTADDRREQ": 3}
    assert total.received == total.accounted_for
    assert sum(parts[:1]) == parts[0]
    assert sum([]) == 0
    with pytest.raises(TypeError):
        parts[0] + 1
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        parts[0].received = 5  # type: ignore[misc]
