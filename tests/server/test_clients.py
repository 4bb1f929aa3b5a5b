"""The clients of a server: idle expiry, the bound on their number, eviction, transactions."""

from __future__ import annotations

import gc
import math
import sys

import pytest
import trio
from trio.testing import MockClock

from trio_udp import Client, Limits
from trio_udp._endpoints import Address

from ..conftest import ALICE, BOB, CAROL, Bystander, RunningInMemory, StartInMemory, check_adds_up


class Recorder:
    """A handler that records the datagrams of its clients and why they ended."""

    def __init__(self) -> None:
        self.ends: list[tuple[Address, list[bytes], str | None, float]] = []

    async def __call__(self, client: Client) -> None:
        seen = [payload async for payload in client]
        self.ends.append((client.peer_address, seen, client.ended, trio.current_time()))


async def test_a_silent_client_ends(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A client that is silent for idle_timeout ends; its next datagram starts a new one."""
    handler = Recorder()
    run = await start_in_memory(handler, idle_timeout=4)
    run.put(b"a")
    await trio.sleep(1)
    run.put(b"b")
    await trio.sleep(9)
    run.put(b"c")
    await trio.sleep(10)
    assert [end[:3] for end in handler.ends] == [(ALICE, [b"a", b"b"], "idle"), (ALICE, [b"c"], "idle")]
    # Silent since 1 and since 10; checked in steps of half a second.
    assert [end[3] for end in handler.ends] == [5.0, 14.0]
    assert run.server.statistics().clients_expired == 2


async def test_expiry_is_at_most_a_quarter_late(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A client ends between one and one and a quarter idle timeouts after its last datagram."""
    handler = Recorder()
    run = await start_in_memory(handler, idle_timeout=0.7)
    last: dict[object, float] = {}
    for i in range(200):
        address = ("192.0.2.7", i + 1)
        for _ in range(i % 3 + 1):
            run.put(b"x", address)
            await run.settle()
            last[address] = trio.current_time()
            await trio.sleep(0.013 * (i % 17))
    await trio.sleep(5)
    delays = [time - last[address] for address, _, _, time in handler.ends]
    assert len(delays) == 200
    assert min(delays) >= 0.7
    assert max(delays) <= 0.7 * 1.25


async def test_a_busy_handler_is_never_expired(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """Silence begins when the handler begins to wait, even after long work."""
    times = []

    async def handler(client: Client) -> None:
        await client.receive()
        await trio.sleep(100)
        assert client.ended is None
        with pytest.raises(trio.EndOfChannel):
            await client.receive()
        times.append(trio.current_time())

    run = await start_in_memory(handler, idle_timeout=8)
    run.put(b"x")
    await trio.sleep(200)
    assert times == [108.0]


async def test_a_client_can_say_goodbye(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """When the channel has ended, sending still works, and receiving goes on raising EndOfChannel."""

    async def handler(client: Client) -> None:
        async for _ in client:
            pass
        assert client.ended == "idle"
        with pytest.raises(trio.EndOfChannel):
            await client.receive()
        await client.send(b"goodbye")

    run = await start_in_memory(handler, idle_timeout=8)
    run.put(b"x")
    await trio.sleep(20)
    assert run.sent_to(ALICE) == [b"goodbye"]


async def test_end_of_channel_is_not_an_error(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """An EndOfChannel that leaves the handler, alone or from a nursery in it, is a normal end."""

    async def receive_for_ever(client: Client) -> None:
        while True:
            await client.receive()

    async def in_a_nursery(client: Client) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive_for_ever, client)

    for handler in (receive_for_ever, in_a_nursery):
        run = await start_in_memory(handler, idle_timeout=8)
        run.put(b"x")
        await trio.sleep(20)
        assert run.server.statistics().clients_expired == 1
        assert run.server.statistics().clients == 0
        assert run.server.statistics().handler_errors == 0


async def test_idle_timeout_can_be_set_per_client(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A client's own idle_timeout takes effect at once, shorter or longer, also while its handler waits."""
    handler = Recorder()
    run = await start_in_memory(handler, idle_timeout=80)
    for address in (ALICE, BOB, CAROL):
        run.put(b"x", address)
    await run.settle()
    by_address = {client.peer_address: client for client in run.server.clients}
    assert by_address[ALICE].idle_timeout == 80
    by_address[ALICE].idle_timeout = 160
    by_address[BOB].idle_timeout = math.inf
    await trio.sleep(20)
    by_address[CAROL].idle_timeout = 16  # already silent for longer than that
    await run.settle()
    await trio.sleep(1_000)
    by_address[BOB].idle_timeout = 5_000
    await trio.sleep(10_000)
    assert [(end[0], end[3]) for end in handler.ends] == [(CAROL, 20.0), (ALICE, 160.0), (BOB, 5_000.0)]


async def test_the_last_idle_timeout_counts(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A handler may set idle_timeout with every datagram; the last value applies."""
    ends = []

    async def handler(client: Client) -> None:
        async for payload in client:
            client.idle_timeout = float(payload)
        ends.append(trio.current_time())

    run = await start_in_memory(handler, idle_timeout=80)
    for i in range(1_000):
        run.put(b"40" if i % 2 else b"8")
        await run.settle()
    await trio.sleep(100)
    assert ends == [40.0]


@pytest.mark.parametrize("seconds", [0, -1, math.nan])
async def test_an_idle_timeout_must_be_positive(start_in_memory: StartInMemory, seconds: float) -> None:
    """Zero, negative and undefined idle timeouts are refused, by the server and by a client."""

    async def handler(client: Client) -> None:
        with pytest.raises(ValueError, match="idle_timeout"):
            client.idle_timeout = seconds
        with pytest.raises(TypeError, match="idle_timeout"):
            client.idle_timeout = None  # type: ignore[assignment]
        assert client.idle_timeout == 60

    run = await start_in_memory(handler)
    run.put(b"x")
    await run.settle()
    assert run.server.statistics().handler_errors == 0
    with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="idle_timeout"), allow_unwrapped=True):
        await start_in_memory(handler, idle_timeout=seconds)


async def test_strangers_are_refused_when_full(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """Strangers are refused and counted at max_clients; clients are served, and a free place is reused."""
    handler = Recorder()
    run = await start_in_memory(handler, idle_timeout=8, limits=Limits(max_clients=2))
    run.put(b"1", ALICE)
    run.put(b"1", BOB)
    for _ in range(5):
        run.put(b"1", CAROL)
    run.put(b"2", ALICE)
    await run.settle()
    assert run.server.statistics().refused_full == 5
    assert run.server.statistics().clients == 2
    await trio.sleep(20)
    run.put(b"2", CAROL)
    await trio.sleep(20)
    assert sorted(end[:2] for end in handler.ends) == [(ALICE, [b"1", b"2"]), (BOB, [b"1"]), (CAROL, [b"2"])]
    check_adds_up(run.server)


async def test_a_lingering_handler_counts(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A handler that still runs after its client has ended takes a place of max_clients."""

    async def handler(client: Client) -> None:
        async for _ in client:
            pass
        await trio.sleep(100)

    run = await start_in_memory(handler, idle_timeout=8, limits=Limits(max_clients=1))
    run.put(b"x", ALICE)
    await trio.sleep(20)
    run.put(b"x", BOB)
    await run.settle()
    assert run.server.statistics().refused_full == 1
    await trio.sleep(100)
    run.put(b"x", BOB)
    await run.settle()
    assert [client.peer_address for client in run.server.clients] == [BOB]


async def start_evicting(start_in_memory: StartInMemory, handler: Recorder, max_clients: int) -> RunningInMemory:
    limits = Limits(max_clients=max_clients, when_full="evict_idle")
    return await start_in_memory(handler, idle_timeout=1_000, limits=limits)


async def test_the_client_that_waits_the_longest_is_evicted(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """With evict_idle a stranger takes the place of the client that has been waiting the longest."""
    handler = Recorder()
    run = await start_evicting(start_in_memory, handler, 2)
    for address in (ALICE, BOB, ALICE, CAROL):
        run.put(b"x", address)
        await trio.sleep(1)
    assert handler.ends == [(BOB, [b"x"], "evicted", 3.0)]
    assert {client.peer_address for client in run.server.clients} == {ALICE, CAROL}
    assert run.server.statistics().clients_evicted == 1
    check_adds_up(run.server)


async def test_a_handler_at_work_is_not_evicted(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """With evict_idle a stranger is refused while every handler is at work or has datagrams waiting."""

    async def handler(client: Client) -> None:
        async for payload in client:
            await trio.sleep(float(payload))

    run = await start_in_memory(handler, limits=Limits(max_clients=2, when_full="evict_idle"))
    run.put(b"100", ALICE)
    run.put(b"10", BOB)
    await run.settle()
    run.put(b"0", CAROL)
    await run.settle()
    assert run.server.statistics().refused_full == 1
    await trio.sleep(11)
    # Bob waits now, but in the batch with the stranger's datagram there is one for him before it.
    run.put(b"1", BOB)
    run.put(b"0", CAROL)
    await run.settle()
    assert run.server.statistics().refused_full == 2
    await trio.sleep(2)
    run.put(b"0", CAROL)
    await run.settle()
    assert run.server.statistics().clients_evicted == 1
    assert {client.peer_address for client in run.server.clients} == {ALICE, CAROL}


async def test_eviction_exceeds_the_bound_by_one_batch_at_most(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """Evicted handlers that linger cannot make the number of handlers grow beyond max_clients and a batch."""
    most = 0

    async def handler(client: Client) -> None:
        nonlocal most
        most = max(most, len(client.server.clients))
        async for _ in client:
            pass
        await trio.sleep(1_000)

    run = await start_in_memory(handler, limits=Limits(max_clients=100, when_full="evict_idle"))
    for i in range(1_000):
        run.put(b"x", ("192.0.2.8", i + 1))
        if i % 100 == 99:
            await run.settle()
    assert most == 164
    assert run.server.statistics().refused_full == 1_000 - 164
    check_adds_up(run.server)


async def test_a_transaction_protects_from_eviction(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A waiting client in a transaction is not evicted; its idle timeout still applies."""
    ends = []

    async def handler(client: Client) -> None:
        if await client.receive() == b"begin":
            with client.transaction(), client.transaction():
                await client.receive()
        with pytest.raises(trio.EndOfChannel):
            await client.receive()
        ends.append((client.peer_address, client.ended))

    run = await start_in_memory(handler, idle_timeout=80, limits=Limits(max_clients=1, when_full="evict_idle"))
    run.put(b"begin", ALICE)
    await run.settle()
    run.put(b"x", BOB)
    await run.settle()
    assert run.server.statistics().refused_full == 1
    run.put(b"finish", ALICE)
    await run.settle()
    run.put(b"x", BOB)
    await run.settle()
    assert ends == [(ALICE, "evicted")]
    await trio.sleep(200)
    run.put(b"begin", CAROL)
    await trio.sleep(200)
    assert ends == [(ALICE, "evicted"), (BOB, "idle")]
    assert run.server.statistics().clients_expired == 2
    assert run.server.statistics().handler_errors == 0


async def test_the_clients_of_a_server(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """server.clients is live and read-only, and may change while it is iterated."""

    async def handler(client: Client) -> None:
        async for _ in client:
            await client.send(b"hello")

    run = await start_in_memory(handler, idle_timeout=80)
    clients = run.server.clients
    assert len(clients) == 0
    run.put(b"x", ALICE)
    run.put(b"x", BOB)
    await run.settle()
    assert [client.peer_address for client in clients] == [ALICE, BOB]
    assert repr(clients) == "<2 clients>"
    for client in clients:
        assert client in clients
        client.close()
        await run.settle()
        assert client not in clients
    assert len(clients) == 0


@pytest.mark.no_cover  # heavy
async def test_short_conversations_leave_nothing_behind(
    start_in_memory: StartInMemory, autojump_clock: MockClock
) -> None:
    """After 50,000 conversations of one datagram each, nothing is kept of them."""

    async def handler(client: Client) -> None:
        await client.receive()

    run = await start_in_memory(handler, idle_timeout=1_000)
    for i in range(50_000):
        run.put(b"x", ("192.0.2.8", i + 1))
    await run.settle()
    assert run.server.statistics().clients_started == 50_000
    gc.collect()
    assert sum(isinstance(thing, Client) for thing in gc.get_objects()) < 2_000


async def test_many_clients_that_expire_together(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A thousand clients that are due at the same moment all expire then, and other tasks run meanwhile."""
    all_ended = trio.Event()
    handler = Recorder()

    async def record(client: Client) -> None:
        await handler(client)
        if len(handler.ends) == 1_000:
            all_ended.set()

    run = await start_in_memory(record, idle_timeout=8)
    for i in range(1_000):
        run.put(b"x", ("192.0.2.8", i + 1))
    bystander = Bystander(lambda: run.server.statistics().clients_expired)
    await trio.sleep_until(8)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bystander.run)
        await all_ended.wait()
        nursery.cancel_scope.cancel()
    assert 0 < bystander.most <= 128  # 64 in each pass of the scheduler, whose tasks run in random order
    assert {end[3] for end in handler.ends} == {8.0}
    assert run.server.statistics().clients_expired == 1_000


async def test_a_transaction_of_another_task(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """A client whose handler already waits is protected as soon as another task enters a transaction, and no longer."""

    async def in_a_transaction(client: Client) -> None:
        await trio.sleep(1)
        with client.transaction():
            await trio.sleep(1)

    async def handler(client: Client) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_a_transaction, client)
            async for _ in client:
                pass
            nursery.cancel_scope.cancel()

    run = await start_in_memory(handler, limits=Limits(max_clients=1, when_full="evict_idle"))
    run.put(b"x", ALICE)
    await trio.sleep(1.5)
    run.put(b"x", BOB)
    await trio.sleep(1)
    assert [client.peer_address for client in run.server.clients] == [ALICE]
    run.put(b"x", BOB)
    await trio.sleep(0.1)
    assert [client.peer_address for client in run.server.clients] == [BOB]


@pytest.mark.parametrize("step", [0, 1])
async def test_many_timeouts_leave_nothing_behind(
    start_in_memory: StartInMemory, autojump_clock: MockClock, step: int
) -> None:
    """A handler that sets the idle timeout with every datagram does not make the server's memory grow."""

    async def handler(client: Client) -> None:
        left = 1_000_000.0
        async for _ in client:
            left -= step
            client.idle_timeout = left

    run = await start_in_memory(handler)
    for _ in range(1_000):
        run.put(b"x")
        await run.settle()
    run.network.events.clear()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(5_000):
        run.put(b"x")
        await run.settle()
    run.network.events.clear()
    gc.collect()
    assert sys.getallocatedblocks() - before < 5_000
