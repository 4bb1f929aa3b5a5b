"""request_handler: a function that answers one datagram."""

from __future__ import annotations

import inspect

import pytest
import trio
from trio.testing import MockClock

import trio_udp
from trio_udp import Client

from ..conftest import ALICE, BOB, StartInMemory, check_adds_up


async def test_the_result_of_the_function_is_the_reply(start_in_memory: StartInMemory) -> None:
    """Bytes that the function of a request_handler returns are the reply, empty ones included; None is no reply."""

    @trio_udp.request_handler
    async def reply(payload: bytes, client: Client) -> bytes | None:
        return None if payload == b"quiet" else payload * 2

    run = await start_in_memory(reply)
    for payload in (b"a", b"quiet", b"", b"b"):
        run.put(payload)
    await run.settle()
    assert run.sent_to(ALICE) == [b"aa", b"", b"bb"]
    assert run.server.statistics().clients_started == 1


async def test_requests_that_time_out_are_counted(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A request that exceeds its timeout is cancelled, counted and not answered; those behind it are answered."""

    @trio_udp.request_handler(timeout=2)
    async def reply(payload: bytes, client: Client) -> bytes:
        await trio.sleep(float(payload))
        return payload

    run = await start_in_memory(reply)
    for payload in (b"1", b"3", b"1.5"):
        run.put(payload)
    run.put(b"0", BOB)
    await run.settle()
    assert run.sent == [(BOB, b"0")]
    (alice,) = [client for client in run.server.clients if client.peer_address == ALICE]
    await trio.sleep(10)
    assert run.sent_to(ALICE) == [b"1", b"1.5"]
    assert run.server.statistics().requests_timed_out == 1
    assert alice.statistics().requests_timed_out == 1
    check_adds_up(run.server)


async def test_an_error_costs_one_request(start_in_memory: StartInMemory) -> None:
    """An error in a request goes to the server's on_error; the requests behind it are answered."""
    errors: list[str] = []

    @trio_udp.request_handler
    async def double(payload: bytes, client: Client) -> bytes:
        return b"%d" % (2 * int(payload))

    run = await start_in_memory(double, on_error=lambda client, error: errors.append(str(error)))
    for payload in (b"1", b"one", b"2"):
        run.put(payload)
    await run.settle()
    assert run.sent_to(ALICE) == [b"2", b"4"]
    assert errors == ["invalid literal for int() with base 10: b'one'"]


def test_the_handler_looks_like_the_function() -> None:
    """A request_handler has the name and docstring of its function, and the arguments of a handler."""

    @trio_udp.request_handler
    async def reply(payload: bytes, client: Client) -> None:
        """Return no reply."""

    assert (reply.__name__, reply.__doc__) == ("reply", "Return no reply.")
    assert list(inspect.signature(reply).parameters) == ["client"]


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_must_be_positive(timeout: float) -> None:
    """Zero, negative and undefined timeouts of a request_handler raise ValueError."""
    with pytest.raises(ValueError, match="timeout"):
        trio_udp.request_handler(timeout=timeout)


def test_it_takes_a_function() -> None:
    """A positional timeout, as in request_handler(2), raises TypeError."""
    with pytest.raises(TypeError, match="2"):
        trio_udp.request_handler(2)  # type: ignore[call-overload]
