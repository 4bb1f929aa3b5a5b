"""Datagrams are handed out and answered within one pass of Trio's scheduler."""

from __future__ import annotations

import contextvars
import gc
import itertools
import signal
import sys
from contextlib import suppress
from functools import partial

import pytest
import trio
import trio.testing

from trio_udp import Client, Datagram, Server, connect, datagram_handler, raise_error, serve, serve_endpoints
from trio_udp._endpoints import EachPass
from trio_udp.testing._engine import SimulatedEngine

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

from ..conftest import ALICE, BOB, StartInMemory, StartServer, echo, in_memory, plain_socket, port_of

QUESTIONS = 50


class CountPasses(trio.abc.Instrument):
    """Counts the passes of Trio's scheduler."""

    passes = 0

    def after_io_wait(self, timeout: float) -> None:
        self.passes += 1


async def test_an_answer_takes_one_pass(start_on_loopback: StartServer) -> None:
    """A handler answers in the pass in which Trio learns that its question has arrived; the peer reads in the next."""
    server = await start_on_loopback(echo)
    count = CountPasses()
    with trio.fail_after(5):
        async with await connect("127.0.0.1", port_of(server)) as connection:
            await connection.send(b"begin the conversation")
            await connection.receive()
            trio.lowlevel.add_instrument(count)
            for _ in range(QUESTIONS):
                await connection.send(b"question")
                await connection.receive()
    trio.lowlevel.remove_instrument(count)
    assert count.passes <= 2 * QUESTIONS + 2


async def test_a_new_client_is_answered_in_one_pass(start_on_loopback: StartServer) -> None:
    """The handler of a new client starts in the pass in which Trio learns that its first datagram has arrived."""
    server = await start_on_loopback(echo)
    count = CountPasses()
    with trio.fail_after(5):
        async with await connect("127.0.0.1", port_of(server)) as connection:
            await trio.testing.wait_all_tasks_blocked()
            trio.lowlevel.add_instrument(count)
            await connection.send(b"question")
            await connection.receive()
    trio.lowlevel.remove_instrument(count)
    assert count.passes <= 3


@pytest.mark.parametrize(("apart", "passes"), [(0.0, 2), (1.0, 1)])
async def test_looking_before_waiting(
    start_in_memory: StartInMemory, autojump_clock: trio.testing.MockClock, apart: float, passes: int
) -> None:
    """While datagrams come close together, the server looks for the next one in one more pass before it waits again."""
    run = await start_in_memory(echo)
    count = CountPasses()
    for _ in range(3):
        await trio.sleep(apart)
        run.put(b"question")
        count.passes = -1  # settle() takes one more pass to see that all tasks wait
        trio.lowlevel.add_instrument(count)
        await run.settle()
        trio.lowlevel.remove_instrument(count)
    assert count.passes == passes


@pytest.mark.parametrize("replies", [1, 2])
async def test_replies_to_full_batches(start_in_memory: StartInMemory, replies: int) -> None:
    """Replies to full batches leave sorted by client, each client's in order, even if they fill the queue."""

    async def handler(client: Client) -> None:
        async for payload in client:
            for _ in range(replies):
                await client.send(payload)

    run = await start_in_memory(handler)
    sources = [("192.0.2.1", 1_024 + number) for number in range(64)]
    for source in sources:
        run.put(b"hello", source)
    await run.settle()
    greetings = len(run.sent)
    for number in range(4):
        for source in sources:
            run.put(b"%d" % number, source)
    await run.settle()
    for source in sources:
        assert run.sent_to(source)[replies:] == [b"%d" % number for number in range(4) for _ in range(replies)]
    replied = [peer for peer, _ in run.sent[greetings:]]
    for start in range(0, len(replied), 256):  # so many leave together
        rows = [peer for peer, _ in itertools.groupby(replied[start : start + 256])]
        assert len(rows) == len(sources)


@pytest.mark.parametrize("are_new", [True, False])
async def test_replies_that_are_kept_back(start_in_memory: StartInMemory, are_new: bool) -> None:
    """After a full batch, replies to known clients wait for those to the next batch; replies to new clients leave."""
    sent_before: list[int] = []

    async def handler(client: Client) -> None:
        async for payload in client:
            sent_before.append(len(run.sent))
            await client.send(payload)

    run = await start_in_memory(handler)
    for _ in range(1 if are_new else 2):
        sent_before.clear()
        for number in range(128):
            run.put(b"x", ("192.0.2.1", 1_024 + number))
        await run.settle()
    assert len(sent_before) == 128
    assert (sent_before[96] > sent_before[0]) == are_new  # in the second batch, and at the start of the first


@pytest.mark.parametrize(("size", "leaves"), [(11, False), (12, True)])
async def test_a_long_burst_leaves_at_once(start_in_memory: StartInMemory, size: int, leaves: bool) -> None:
    """A burst of 12 or more leaves at once, unless earlier replies wait; a shorter one when the pass ends."""
    burst = [b"%d" % number for number in range(size)]
    sent: list[int] = []

    async def handler(client: Client) -> None:
        async for payload in client:
            if payload == b"two":
                await client.send(b"first")
            await client.send_many(burst)
            sent.append(len(run.sent))

    run = await start_in_memory(handler)
    for payload, replies in ((b"one", burst), (b"two", [b"first", *burst])):
        sent.clear()
        before = len(run.sent)
        for peer in (ALICE, BOB):  # two datagrams in the batch: replies to a single one never wait
            run.put(payload, peer)
        await run.settle()
        assert sent == ([before + size, before + 2 * size] if leaves and payload == b"one" else [before, before])
        for peer in (ALICE, BOB):
            assert run.sent_to(peer)[-len(replies) :] == replies


@pytest.mark.parametrize("kind", ["handler", "datagram_handler"])
async def test_a_reply_in_a_flood(start_in_memory: StartInMemory, kind: str) -> None:
    """A reply waits for four batches at most, even if no datagram behind it is answered."""
    sent_before: list[int] = []

    def answer(datagram: Datagram) -> bytes | None:
        if datagram.peer_address == ALICE:
            return datagram.payload
        sent_before.append(len(run.sent))
        return None

    if kind == "datagram_handler":
        run = await start_in_memory(datagram_handler(answer))
    else:
        run = await start_in_memory(echo, accept=lambda datagram: answer(datagram) is not None)
    run.put(b"question", ALICE)
    for number in range(999):
        run.put(b"flood", ("192.0.2.2", 1_024 + number))
    await run.settle()
    assert sent_before == [0] * 255 + [1] * (999 - 255)


async def test_context_variables(start_in_memory: StartInMemory) -> None:
    """accept and handlers see the context variables that were set where the server was started."""
    variable = contextvars.ContextVar("variable", default="unset")
    seen: list[str] = []

    def accept(datagram: Datagram) -> bool:
        seen.append(f"accept {variable.get()}")
        return True

    async def handler(client: Client) -> None:
        seen.append(f"handler {variable.get()}")
        variable.set("set by a handler")

    variable.set("set by the caller")
    run = await start_in_memory(handler, accept=accept)
    variable.set("set later")
    run.put(b"1", ALICE)
    await run.settle()
    run.put(b"2", BOB)
    await run.settle()
    assert seen == ["accept set by the caller", "handler set by the caller"] * 2


def test_ctrl_c_interrupts_accept() -> None:
    """Ctrl-C interrupts an accept that takes too long, as it interrupts any function of the program."""

    def accept(datagram: Datagram) -> bool:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not interrupted")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            server: Server = await nursery.start(partial(serve, echo, 0, host="127.0.0.1", accept=accept))
            async with await connect("127.0.0.1", port_of(server)) as connection:
                await connection.send(b"x")
                with trio.fail_after(5):
                    await trio.sleep_forever()

    with pytest.raises(BaseExceptionGroup) as caught:
        trio.run(main)
    assert caught.value.split(KeyboardInterrupt)[1] is None


@pytest.mark.no_cover  # heavy
async def test_a_server_leaves_no_instrument() -> None:
    """After serve has ended, nothing of it runs in Trio's scheduler."""

    def instruments() -> list[trio.abc.Instrument]:
        gc.collect()
        return [each for each in gc.get_objects() if isinstance(each, trio.abc.Instrument)]

    before = instruments()
    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(partial(serve, echo, 0))
        await trio.testing.wait_all_tasks_blocked()
        assert len(instruments()) == len(before) + 1
        server.stop()
    del server
    assert instruments() == before


async def test_servers_side_by_side(start_in_memory: StartInMemory) -> None:
    """Two servers in one program do not disturb each other, and the end of one leaves the other running."""
    one, other = await start_in_memory(echo), await start_in_memory(echo, on=in_memory())
    for run in (one, other):
        run.put(b"1")
        await run.settle()
    one.server.stop()
    await one.settle()
    other.put(b"2")
    await other.settle()
    assert one.sent == [(ALICE, b"1")]
    assert other.sent == [(ALICE, b"1"), (ALICE, b"2")]


async def test_a_removed_hook(start_on_loopback: StartServer) -> None:
    """A server whose hook the program has removed still answers every datagram of a batch, and still ends."""
    server = await start_on_loopback(echo)
    with trio.fail_after(5):
        async with await connect("127.0.0.1", port_of(server)) as connection:
            await connection.send(b"1")
            await connection.receive()
            for each in gc.get_objects():
                if isinstance(each, EachPass):
                    with suppress(KeyError):
                        trio.lowlevel.remove_instrument(each)
            await connection.send_many([b"2", b"3"])
            assert [await connection.receive(), await connection.receive()] == [b"2", b"3"]
        server.stop()


@pytest.mark.parametrize("datagrams", [1, 2])
async def test_an_error_that_sending_never_raises(monkeypatch: pytest.MonkeyPatch, datagrams: int) -> None:
    """An error such as MemoryError ends the server, whether a handler sends or replies leave at the end of a pass."""

    def send(engine: SimulatedEngine, *columns: object) -> int:
        raise MemoryError

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            run = in_memory()
            await nursery.start(partial(serve_endpoints, echo, [run.endpoint], on_error=raise_error))
            for _ in range(datagrams):
                run.put(b"x")

    monkeypatch.setattr(SimulatedEngine, "send", send)
    with pytest.raises(BaseExceptionGroup) as caught:
        await main()
    assert caught.value.split(MemoryError)[1] is None


async def test_an_error_of_accept_in_a_cancelled_server() -> None:
    """An error that ends the program is raised even if the server is cancelled in the same pass."""

    def accept(datagram: Datagram) -> bool:
        scope.cancel()
        raise SystemExit(3)

    scope = trio.CancelScope()
    run = in_memory()

    async def main() -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(partial(serve_endpoints, echo, [run.endpoint], accept=accept))
                run.put(b"x")

    with pytest.raises(BaseExceptionGroup) as caught:
        await main()
    assert caught.value.split(SystemExit)[1] is None


async def test_a_cancelled_server_starts_no_handler(engine: str) -> None:
    """Once serve is cancelled, it reads nothing more and starts no handler."""
    with plain_socket() as peer:
        async with trio.open_nursery() as nursery:
            server: Server = await nursery.start(partial(serve, echo, 0, host="127.0.0.1"))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            peer.sendto(b"x", ("127.0.0.1", port_of(server)))
    assert (server.statistics().received, server.statistics().clients_started) == (0, 0)
