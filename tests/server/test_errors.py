"""Mistakes of strangers and users: handlers and accept that raise, errors of the network, wrong arguments."""

from __future__ import annotations

import errno
import inspect
import logging
import sys
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock

import trio_udp
from trio_udp import Client, Datagram, Limits, serve_endpoints

from ..conftest import ALICE, BOB, SERVER, StartInMemory, check_adds_up, echo, in_memory

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup


async def divide(client: Client) -> None:
    async for payload in client:
        await client.send(b"%d" % (60 // int(payload)))


async def test_an_error_ends_only_its_client(start_in_memory: StartInMemory, caplog: pytest.LogCaptureFixture) -> None:
    """A handler that raises is logged with its traceback and counted; its client and the others go on."""
    run = await start_in_memory(divide)
    for payload in (b"6", b"0", b"5"):
        run.put(payload, ALICE)
        run.put(b"12", BOB)
    await run.settle()
    assert run.sent_to(ALICE) == [b"10", b"12"]
    assert run.sent_to(BOB) == [b"5", b"5", b"5"]
    assert run.server.statistics().handler_errors == 1
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("trio_udp", "ERROR")
    assert record.getMessage() == "Handler of client ('192.0.2.1', 1000) failed"
    assert record.exc_info
    assert record.exc_info[0] is ZeroDivisionError
    check_adds_up(run.server)


async def test_garbage_is_not_a_log_flood(
    start_in_memory: StartInMemory, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """At most 10 tracebacks a second are logged. The number of suppressed ones is logged in time and at the end."""
    run = await start_in_memory(divide)

    async def fail(times: int) -> list[str]:
        caplog.clear()
        for _ in range(times):
            run.put(b"0")
            await run.settle()
        await trio.sleep(0.4)
        return [record.getMessage() for record in caplog.records]

    failed = "Handler of client ('192.0.2.1', 1000) failed"
    assert await fail(25) == [failed] * 10
    caplog.clear()
    await trio.sleep(1)
    assert [record.getMessage() for record in caplog.records] == ["15 more errors suppressed"]
    assert await fail(10) == [failed] * 10
    assert await fail(3) == []
    caplog.clear()
    run.server.stop()
    await run.settle()
    assert [record.getMessage() for record in caplog.records] == ["3 more errors suppressed"]
    assert run.server.statistics().handler_errors == 38


async def test_on_error_replaces_the_log(start_in_memory: StartInMemory, caplog: pytest.LogCaptureFixture) -> None:
    """on_error is called with the client, which can still be answered, and the exception."""
    errors = []

    def on_error(client: Client, error: Exception) -> None:
        errors.append((client.peer_address, type(error)))
        client.send_nowait(b"sorry")

    run = await start_in_memory(divide, on_error=on_error)
    run.put(b"0")
    run.put(b"six", BOB)
    await run.settle()
    assert sorted(errors) == [(ALICE, ZeroDivisionError), (BOB, ValueError)]
    assert sorted(run.sent) == [(ALICE, b"sorry"), (BOB, b"sorry")]
    assert caplog.records == []


async def test_log_error_can_be_called_from_on_error(
    start_in_memory: StartInMemory, caplog: pytest.LogCaptureFixture
) -> None:
    """A user's on_error may call log_error to log as usual."""
    seen = []

    def on_error(client: Client, error: Exception) -> None:
        seen.append(client.peer_address)
        trio_udp.log_error(client, error)

    run = await start_in_memory(divide, on_error=on_error)
    run.put(b"0")
    await run.settle()
    assert seen == [ALICE]
    assert [record.getMessage() for record in caplog.records] == ["Handler of client ('192.0.2.1', 1000) failed"]


async def test_on_error_may_crash_the_server() -> None:
    """An exception that on_error raises, as raise_error does, ends the server in a group, as from any nursery."""
    run = in_memory()
    run.put(b"0")
    run.put(b"6", BOB)
    with pytest.RaisesGroup(ZeroDivisionError):
        await serve_endpoints(divide, [run.endpoint], on_error=trio_udp.raise_error)
    assert run.endpoint.closed


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
async def test_exceptions_that_end_the_program_always_propagate(error: type[BaseException]) -> None:
    """SystemExit and KeyboardInterrupt in a handler end the server and leave serve bare, not in a group."""
    run = in_memory()

    async def handler(client: Client) -> None:
        raise error("the end")

    run.put(b"x")
    with pytest.raises(error, match="the end") as info:
        await serve_endpoints(handler, [run.endpoint])
    assert info.value.__cause__ is None
    assert run.endpoint.closed


async def test_other_base_exceptions_propagate_in_a_group() -> None:
    """A BaseException that does not end the program ends the server, in an exception group as from any nursery."""

    class Unusual(BaseException):
        pass

    async def handler(client: Client) -> None:
        raise Unusual

    run = in_memory()
    run.put(b"x")
    with pytest.RaisesGroup(Unusual):
        await serve_endpoints(handler, [run.endpoint])
    assert run.endpoint.closed


async def test_exception_groups_are_errors_unless_all_are_ends(start_in_memory: StartInMemory) -> None:
    """A group with anything but EndOfChannel in it is the handler's error."""
    errors: list[Exception] = []

    async def handler(client: Client) -> None:
        raise ExceptionGroup("both", [trio.EndOfChannel(), ExceptionGroup("inner", [ValueError("wrong")])])

    run = await start_in_memory(handler, on_error=lambda client, error: errors.append(error))
    run.put(b"x")
    await run.settle()
    assert [type(error) for error in errors] == [ExceptionGroup]


async def test_using_a_closed_client_is_a_normal_end(start_in_memory: StartInMemory) -> None:
    """A ClosedResourceError of this client's own, alone or from a nursery, is no error when it leaves the handler."""
    errors: list[Exception] = []

    async def receive(client: Client) -> None:
        client.close()
        await client.receive()

    async def send_in_a_nursery(client: Client) -> None:
        async with trio.open_nursery() as nursery:
            client.close()
            nursery.start_soon(client.send, b"x")
            client.send_nowait(b"x")

    for handler in (receive, send_in_a_nursery):
        run = await start_in_memory(handler, on_error=lambda client, error: errors.append(error))
        run.put(b"x")
        await run.settle()
        assert errors == []
        assert (run.server.statistics().clients, run.server.statistics().handler_errors) == (0, 0)
        check_adds_up(run.server)


async def test_a_closed_resource_of_the_handlers_own_is_an_error(start_in_memory: StartInMemory) -> None:
    """A ClosedResourceError from something else that the handler uses goes to on_error, though its client is closed."""
    errors: list[Exception] = []

    async def handler(client: Client) -> None:
        client.close()
        sender, _ = trio.open_memory_channel[int](0)
        sender.close()
        await sender.send(1)

    run = await start_in_memory(handler, on_error=lambda client, error: errors.append(error))
    run.put(b"x")
    await run.settle()
    assert [type(error) for error in errors] == [trio.ClosedResourceError]
    assert run.server.statistics().handler_errors == 1


async def test_accept_turns_strangers_away(start_in_memory: StartInMemory, caplog: pytest.LogCaptureFixture) -> None:
    """accept sees a stranger's datagram before anything is kept; False or an exception refuses it."""
    asked = []

    def accept(datagram: Datagram) -> bool:
        asked.append((datagram.payload, datagram.peer_address))
        return datagram.payload[0] == ord("+")

    run = await start_in_memory(echo, accept=accept, limits=Limits(max_clients=1))
    for payload in (b"no", b"", b"+yes", b"no more questions"):
        run.put(payload)
    run.put(b"no", BOB)
    run.put(b"+yes", BOB)
    await run.settle()
    assert asked == [(b"no", ALICE), (b"", ALICE), (b"+yes", ALICE), (b"no", BOB), (b"+yes", BOB)]
    assert run.sent_to(ALICE) == [b"+yes", b"no more questions"]
    statistics = run.server.statistics()
    assert (statistics.refused_by_accept, statistics.refused_full, statistics.clients_started) == (3, 1, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "accept failed on a datagram from ('192.0.2.1', 1000)",
        "strangers are refused: the table of clients is full (max_clients=1)",
    ]
    check_adds_up(run.server)


@pytest.mark.parametrize("answer", [1, 0, None, "text", bytearray(b"x"), []])
async def test_accept_must_return_a_bool_or_bytes(
    start_in_memory: StartInMemory, caplog: pytest.LogCaptureFixture, answer: object
) -> None:
    """An answer of accept that is only truthy refuses the datagram, and is logged as an error."""
    accept: Any = lambda datagram: answer  # noqa: E731
    run = await start_in_memory(echo, accept=accept)
    run.put(b"x")
    await run.settle()
    assert run.sent == []
    assert (run.server.statistics().refused_by_accept, run.server.statistics().clients_started) == (1, 0)
    assert "accept failed on a datagram from ('192.0.2.1', 1000)" in caplog.text
    assert "accept must return True, False or bytes" in caplog.text
    check_adds_up(run.server)


async def test_receive_errors_are_counted_and_survived(start_in_memory: StartInMemory) -> None:
    """An error on receive loses no datagram, not even in the middle of a batch."""
    run = await start_in_memory(echo)
    run.put(b"1")
    run.network.fail_next_receive(SERVER, errno.ECONNRESET)
    run.put(b"2")
    run.network.fail_next_receive(SERVER, errno.ENOMEM)
    run.network.fail_next_receive(SERVER, 99_999)
    run.put(b"3")
    await run.settle()
    assert run.sent_to(ALICE) == [b"1", b"2", b"3"]
    statistics = run.server.statistics()
    assert statistics.receive_errors == 3
    assert statistics.errors == {"ECONNRESET": 1, "ENOMEM": 1, "99999": 1}
    check_adds_up(run.server)


async def test_a_persistent_error_causes_no_busy_loop(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """A server whose reads keep failing retries at intervals, and recovers."""
    run = await start_in_memory(echo)
    for _ in range(100):
        run.network.fail_next_receive(SERVER, errno.EIO)
    run.put(b"x")
    await trio.sleep(5)
    assert run.server.statistics().receive_errors < 60
    await trio.sleep(10)
    assert run.sent_to(ALICE) == [b"x"]
    assert run.server.statistics().receive_errors == 100


async def test_send_errors_are_counted_for_the_client_they_concern(start_in_memory: StartInMemory) -> None:
    """A reply that cannot be sent counts as its client's send error; the rest of the batch is sent."""
    kept: dict[object, Client] = {}

    async def handler(client: Client) -> None:
        kept[client.peer_address] = client
        async for payload in client:
            await client.send(payload)

    run = await start_in_memory(handler)
    for payload in (b"1", b"2"):
        run.put(payload, ALICE)
        run.put(payload, BOB)
    run.network.partition([SERVER], [ALICE], error=errno.EPERM)
    await run.settle()
    assert run.sent == [(BOB, b"1"), (BOB, b"2")]
    assert run.server.statistics().send_errors == 2
    assert run.server.statistics().errors == {"EPERM": 2}
    assert kept[ALICE].statistics().errors == {"EPERM": 2}
    assert kept[BOB].statistics().errors == {}
    assert kept[BOB].statistics().sent == 2


async def _async_accept(datagram: Datagram) -> bool:
    return True


async def _async_accept_with_prefix(prefix: bytes, datagram: Datagram) -> bool:
    return datagram.payload.startswith(prefix)


async def _no_argument() -> None: ...


class _AsyncCallable:
    async def __call__(self, *arguments: object) -> bool:
        return True


async def _generator(client: Client) -> Any:
    yield


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (TypeError, {"handler": None}),
        (TypeError, {"handler": _generator}),
        (TypeError, {"handler": _AsyncCallable}),
        (TypeError, {"handler": _no_argument}),
        (TypeError, {"endpoints": 5}),
        (TypeError, {"endpoints": ["not an endpoint"]}),
        (ValueError, {"endpoints": []}),
        (TypeError, {"limits": 5}),
        (TypeError, {"accept": True}),
        (TypeError, {"accept": _async_accept}),
        (TypeError, {"accept": _AsyncCallable()}),
        (TypeError, {"accept": partial(_async_accept_with_prefix, b"")}),
        (TypeError, {"accept": lambda payload, address: True}),
        (ValueError, {"handler": trio_udp.datagram_handler(lambda datagram: None), "accept": lambda datagram: True}),
        (TypeError, {"on_error": None}),
        (TypeError, {"on_error": _async_accept}),
        (TypeError, {"on_error": _AsyncCallable()}),
        (TypeError, {"idle_timeout": None}),
        (TypeError, {"drain_timeout": "5"}),
        (ValueError, {"drain_timeout": -1}),
        (TypeError, {"stop_signals": 15}),
        (TypeError, {"stop_signals": ["SIGTERM"]}),
    ],
)
async def test_wrong_arguments_raise_at_once(error: type[Exception], arguments: dict[str, Any]) -> None:
    """A wrong argument of serve_endpoints raises at the call and closes the endpoints."""
    run = in_memory()
    keywords = {"handler": echo, "endpoints": [run.endpoint], **arguments}
    with pytest.raises(error):
        await serve_endpoints(**keywords)
    assert run.endpoint.closed or "endpoints" in arguments


async def test_the_same_endpoint_twice_closes_all() -> None:
    """A duplicate endpoint raises at the call, and closes all endpoints, because the server owned them."""
    first, last = in_memory().endpoint, in_memory().endpoint
    with pytest.raises(ValueError, match="twice"):
        await serve_endpoints(echo, [first, first, last])
    assert first.closed
    assert last.closed


async def test_endpoints_beside_something_else_are_closed() -> None:
    """serve_endpoints raises TypeError for an object that is not an endpoint, and closes the endpoints in the list."""
    first, last = in_memory().endpoint, in_memory().endpoint
    endpoints: Any = [first, "not an endpoint", last]
    with pytest.raises(TypeError, match="not an endpoint"):
        await serve_endpoints(echo, endpoints)
    assert first.closed
    assert last.closed


async def test_an_endpoint_that_is_received_from_stays_open(nursery: trio.Nursery) -> None:
    """serve_endpoints raises BusyResourceError for an endpoint in use, and closes all endpoints but that one."""
    free, busy = in_memory(), in_memory()
    nursery.start_soon(busy.endpoint.receive)
    await busy.settle()
    with pytest.raises(trio.BusyResourceError):
        await serve_endpoints(echo, [free.endpoint, busy.endpoint])
    assert free.endpoint.closed
    assert not busy.endpoint.closed
    busy.put(b"x")  # for the task that receives


@pytest.mark.parametrize(
    ("error", "name", "value"),
    [
        (TypeError, "max_clients", 1.5),
        (TypeError, "max_clients", True),
        (ValueError, "max_clients", 0),
        (ValueError, "inbox_datagrams", 0),
        (ValueError, "inbox_bytes", -1),
        (TypeError, "total_bytes", None),
        (ValueError, "when_full", "drop"),
        (ValueError, "when_inbox_full", "refuse"),
    ],
)
def test_wrong_limits_raise_at_once(error: type[Exception], name: str, value: Any) -> None:
    """Limits that make no sense raise when they are made, naming the limit."""
    with pytest.raises(error, match=name):
        Limits(**{name: value})


async def test_a_handler_that_returns_no_awaitable_ends_the_server() -> None:
    """A plain function as handler that returns no awaitable ends the server with a TypeError, not in a group."""
    run = in_memory()
    handler: Any = lambda client: None  # noqa: E731
    run.put(b"x")
    with pytest.raises(TypeError, match="returned None, not an awaitable: a handler is an async function"):
        await serve_endpoints(handler, [run.endpoint])
    assert run.endpoint.closed


async def test_a_plain_function_that_returns_an_awaitable_is_a_handler(start_in_memory: StartInMemory) -> None:
    """A plain function that returns an awaitable is a handler, such as ``lambda client: handler(client, ...)``."""
    run = await start_in_memory(lambda client: echo(client))
    run.put(b"x")
    await run.settle()
    assert run.sent_to(ALICE) == [b"x"]


def test_serve_takes_the_keywords_of_its_parts() -> None:
    """Every keyword of open_endpoints and serve_endpoints is one of serve, with the same default."""
    of_serve = inspect.signature(trio_udp.serve).parameters
    for part in (trio_udp.open_endpoints, serve_endpoints):
        for name, parameter in inspect.signature(part).parameters.items():
            if name != "endpoints":
                assert of_serve[name] == parameter


async def test_logging_is_the_standard_library(
    start_in_memory: StartInMemory, caplog: pytest.LogCaptureFixture
) -> None:
    """The logger is called trio_udp and can be silenced like any other."""
    run = await start_in_memory(divide)
    logging.getLogger("trio_udp").disabled = True
    try:
        run.put(b"0")
        await run.settle()
    finally:
        logging.getLogger("trio_udp").disabled = False
    assert caplog.records == []


async def test_a_closed_handler_nursery_is_the_callers_mistake() -> None:
    """With a handler_nursery that is already closed, the server ends with Trio's error."""
    run = in_memory()
    async with trio.open_nursery() as handler_nursery:
        pass
    run.put(b"x")
    with pytest.RaisesGroup(RuntimeError):
        await serve_endpoints(echo, [run.endpoint], handler_nursery=handler_nursery)
    assert run.endpoint.closed


async def test_a_cancelled_handler_nursery_leaves_the_server_alone() -> None:
    """A server forgets handlers that their own nursery cancels, and counts their waiting datagrams."""
    run = in_memory()
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as handler_nursery:
            server = await nursery.start(
                partial(serve_endpoints, echo, [run.endpoint], handler_nursery=handler_nursery)
            )
            run.put(b"x")
            await trio.testing.wait_all_tasks_blocked()
            handler_nursery.cancel_scope.cancel()
        assert server.statistics().clients == 0
        assert run.sent_to(ALICE) == [b"x"]
        server.stop()
    check_adds_up(server)


async def test_the_rest_of_a_batch_is_counted_when_the_server_crashes() -> None:
    """The counters add up even if accept raises KeyboardInterrupt or handler_nursery is closed."""

    def accept(datagram: Datagram) -> bool:
        if datagram.payload == b"crash":
            raise KeyboardInterrupt
        return True

    async with trio.open_nursery() as over:
        pass
    for options in ({"accept": accept}, {"handler_nursery": over}):
        run = in_memory()
        servers: list[trio_udp.Server] = []
        for payload, address in ((b"1", ALICE), (b"2", ALICE), (b"crash", BOB), (b"3", ALICE), (b"4", BOB)):
            run.put(payload, address)
        try:
            async with trio.open_nursery() as nursery:
                servers.append(await nursery.start(partial(serve_endpoints, echo, [run.endpoint], **options)))
        except BaseException:
            pass
        assert servers[0].statistics().received == 5
        assert servers[0].statistics().clients == len(servers[0].clients) == 0
        check_adds_up(servers[0])


async def test_an_accept_that_returns_a_coroutine_accepts_no_stranger(
    start_in_memory: StartInMemory, caplog: pytest.LogCaptureFixture
) -> None:
    """An accept that returns a coroutine accepts no stranger, and the log says so."""
    accept: Any = lambda datagram: _async_accept(datagram)  # noqa: E731
    run = await start_in_memory(echo, accept=accept)
    run.put(b"x")
    await run.settle()
    assert run.server.statistics().refused_by_accept == 1
    assert "accept must return True, False or bytes, not <coroutine object" in caplog.text


async def test_the_counters_add_up_inside_accept(start_in_memory: StartInMemory) -> None:
    """No datagram of a batch counts as received before its fate is known."""
    checked = []

    def accept(datagram: Datagram) -> bool:
        assert datagram.server is not None
        check_adds_up(datagram.server)
        checked.append(datagram.payload)
        return datagram.payload != b"no"

    run = await start_in_memory(echo, accept=accept)
    for i in range(10):
        run.put(b"no" if i % 3 else b"yes", ("192.0.2.8", i + 1))
    await run.settle()
    assert len(checked) == 10
    assert run.server.statistics().refused_by_accept == 6
    check_adds_up(run.server)


async def test_strangers_cannot_make_the_server_pause(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """Datagrams with a wrong checksum, which poll as readable and are then dropped, do not delay the server."""
    run = await start_in_memory(echo)
    for _ in range(100):
        run.network.fail_next_receive(SERVER, errno.EAGAIN)
        await run.settle()
    run.put(b"x")
    await run.settle()
    assert run.sent_to(ALICE) == [b"x"]
    assert trio.current_time() == 0


async def test_errors_beside_the_one_that_ends_the_program_are_its_cause() -> None:
    """A KeyboardInterrupt leaves serve bare even if another task of the handler fails; that error is its cause."""
    run = in_memory()

    async def fail(error: BaseException) -> None:
        raise error

    async def handler(client: Client) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, KeyboardInterrupt())
            nursery.start_soon(fail, ValueError("beside it"))

    run.put(b"x")
    with pytest.raises(KeyboardInterrupt) as info:
        await serve_endpoints(handler, [run.endpoint], on_error=trio_udp.raise_error)
    cause = info.value.__cause__
    assert isinstance(cause, BaseException)
    assert pytest.RaisesGroup(ValueError, flatten_subgroups=True).matches(cause)
    assert run.endpoint.closed
