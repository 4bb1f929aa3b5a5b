# pyright: strict
"""The types that a type checker shows to users. mypy and pyright check this file; nothing runs it.

A line with ``# type: ignore[...]`` must be an error. If it is not, both tools warn.
"""
# pyright: reportUnnecessaryTypeIgnoreComment=error

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, Literal

import trio
from typing_extensions import assert_type

import trio_udp
from trio_udp.testing import DatagramEvent, SimulatedNetwork


async def handler(client: trio_udp.Client) -> None:
    assert_type(await client.receive(), bytes)
    assert_type(client.receive_nowait(), bytes)
    assert_type(await client.receive_many(), list[bytes])
    async for payload in client:
        assert_type(payload, bytes)
        await client.send(payload)
        await client.send(bytearray(payload))
        await client.send(memoryview(payload))
    assert_type(client.ended, Literal["idle", "evicted", "stopping"] | None)
    assert_type(client.peer_address, tuple[str, int] | tuple[str, int, int, int])
    assert_type(client.server, trio_udp.Server)
    assert_type(client.idle_timeout, float)
    assert_type(client.statistics(), trio_udp.ClientStatistics)
    with client.transaction() as nothing:
        assert_type(nothing, None)
    await client.send("text")  # type: ignore[arg-type]
    client.ended = None  # type: ignore[misc]


@trio_udp.request_handler
async def answer(payload: bytes, client: trio_udp.Client) -> bytes | None:
    return payload or None


@trio_udp.request_handler(timeout=2, concurrency=10)
async def answer_in_time(payload: bytes, client: trio_udp.Client) -> bytes:
    return payload


@trio_udp.datagram_handler
def at_once(datagram: trio_udp.Datagram) -> bytes | None:
    assert_type(datagram.payload, bytes)
    assert_type(datagram.server, trio_udp.Server | None)
    return None


class Method:
    async def handler(self, client: trio_udp.Client) -> None: ...


async def with_database(database: dict[bytes, bytes], client: trio_udp.Client) -> None: ...


def accept(datagram: trio_udp.Datagram) -> bool | bytes:
    return datagram.payload == b"hello" or b"say hello first"


def on_error(client: trio_udp.Client, error: Exception) -> None: ...


async def serving() -> None:
    await trio_udp.serve(handler, 9999)
    await trio_udp.serve(Method().handler, 9999, accept=accept, on_error=on_error)
    await trio_udp.serve(partial(with_database, {}), 9999, on_error=trio_udp.raise_error)
    await trio_udp.serve(lambda client: handler(client), 9999)
    await trio_udp.serve(answer, 9999)
    await trio_udp.serve(answer_in_time, 9999)
    await trio_udp.serve(at_once, 9999)
    await trio_udp.serve(accept, 9999)  # type: ignore[arg-type]
    await trio_udp.serve(handler, "9999")  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(trio_udp.serve, handler, 0)
        assert_type(server.endpoints, tuple[trio_udp.Endpoint, ...])
        assert_type(server.clients, Collection[trio_udp.Client])
        assert_type(server.connect(("192.0.2.1", 9)), trio_udp.Client)
        statistics = server.statistics()
        assert_type(statistics, trio_udp.ServerStatistics)
        assert_type(statistics.received, int)
        assert_type(statistics.errors, Mapping[str, int])
        assert_type(statistics + statistics, trio_udp.ServerStatistics)
        statistics.received = 0  # type: ignore[misc]


async def endpoints() -> None:
    opened = await trio_udp.open_endpoints(0)
    assert_type(opened, list[trio_udp.Endpoint])
    async with opened[0] as endpoint:
        assert_type(await endpoint.receive(), trio_udp.Datagram)
        async for datagram in endpoint:
            assert_type(datagram, trio_udp.Datagram)


async def connections() -> None:
    async with await trio_udp.connect("192.0.2.1", 9) as connection:
        assert_type(connection, trio_udp.Connection)
        assert_type(await connection.receive(), bytes)
        assert_type(await trio_udp.request(connection, b"?", lambda payload: payload == b"!"), bytes)
        channel: trio.abc.Channel[bytes] = connection
        await channel.send(b"")


def encode(number: int) -> bytes:
    return b"%d" % number


async def typed(channel: trio_udp.TypedChannel[int]) -> None:
    assert_type(await channel.receive(), int)
    assert_type(channel.channel, trio_udp.Client)
    await channel.send(1)
    await channel.send("1")  # type: ignore[arg-type]


async def typed_serving() -> None:
    await trio_udp.serve(trio_udp.typed(typed, decode=int, encode=encode), 9999)
    channel = trio_udp.TypedChannel[Any, Any, trio_udp.Connection](
        await trio_udp.connect("192.0.2.1", 9), decode=json.loads, encode=encode
    )
    assert_type(channel.channel, trio_udp.Connection)


def values() -> None:
    limits = trio_udp.Limits(when_full="evict_idle", rate_limit=trio_udp.RateLimit(10))
    assert_type(limits.worst_case_memory(), int)
    assert_type(limits.rate_limit, trio_udp.RateLimit | None)
    trio_udp.Limits(when_full="evict")  # type: ignore[arg-type]
    limits.max_clients = 5  # type: ignore[misc]


async def testing() -> None:
    network = SimulatedNetwork(seed=1, loss=0.2)
    assert_type(network.endpoint("192.0.2.1", 53), trio_udp.Endpoint)
    assert_type(await network.connect("192.0.2.1", 53), trio_udp.Connection)
    assert_type(network.events, list[DatagramEvent])
