"""The servers of trio_udp: one for each kind of handler, and for each setting that may cost CPU time."""

from __future__ import annotations

import gc
from functools import partial
from typing import TYPE_CHECKING

import trio
from techniques import use_portable_engine
from traffic import ACKNOWLEDGEMENT, IN_BURST, JOIN, RECEIVE_BUFFER, burst, ready, unix_name

import trio_udp

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    Bind = Callable[[], Awaitable[list[trio_udp.Endpoint]]]

MAX_CLIENTS = 200_000
LOCALHOST = "127.0.0.1"


def task_per_client(what: str, bind: Bind | None = None, limits: trio_udp.Limits | None = None) -> None:
    members: list[trio_udp.Client] = []

    async def echo(client: trio_udp.Client) -> None:
        async for payload in client:
            await client.send(payload)

    async def once(client: trio_udp.Client) -> None:
        await client.send(await client.receive())

    async def send_bursts(client: trio_udp.Client) -> None:
        datagrams = burst(what)
        async for _ in client:
            await client.send_many(datagrams)

    async def count(client: trio_udp.Client) -> None:
        counted = 0
        async for payload in client:
            counted += 1
            if counted % IN_BURST == 0:
                await client.send(payload[:ACKNOWLEDGEMENT])

    async def send_to_each(client: trio_udp.Client) -> None:
        async for payload in client:
            if payload.startswith(JOIN):
                members.append(client)
                await client.send(payload)
            else:
                for member in members:
                    await member.send(payload)

    handlers = {
        "echo": echo,
        "proxied": echo,
        "unix": echo,
        "once": once,
        "out": send_bursts,
        "flight": send_bursts,
        "in": count,
        "fan": send_to_each,
    }
    _serve(handlers[what], bind=bind or BINDS.get(what, _bind), limits=limits)


def portable(what: str) -> None:
    use_portable_engine()
    task_per_client(what)


def on_all_interfaces(what: str) -> None:
    task_per_client(what, bind=partial(_bind, None))


def with_credentials(what: str) -> None:
    task_per_client(what, bind={"unix": partial(_bind_unix, credentials=True)}[what])


def with_limits(what: str) -> None:
    task_per_client(what, limits=generous_limits())


def with_rare_collections(what: str) -> None:
    gc.set_threshold(700, 10, 1_000)  # as the command line and the workers do
    task_per_client(what)


def with_send_to_all(what: str) -> None:
    members: list[trio_udp.Client] = []

    async def send_to_all(client: trio_udp.Client) -> None:
        async for payload in client:
            if payload.startswith(JOIN):
                members.append(client)
                await client.send(payload)
            else:
                await client.server.send_to_all(payload, members)

    _serve({"fan": send_to_all}[what])


def requests(what: str) -> None:
    @trio_udp.request_handler
    async def echo(payload: bytes, client: trio_udp.Client) -> bytes:
        return payload

    _serve({"echo": echo}[what])


def datagrams(what: str, bind: Bind | None = None, limits: trio_udp.Limits | None = None) -> None:
    counted = 0

    @trio_udp.datagram_handler
    def echo(datagram: trio_udp.Datagram) -> bytes:
        return datagram.payload

    @trio_udp.datagram_handler
    def send_flights(datagram: trio_udp.Datagram) -> list[bytes]:
        return flight

    @trio_udp.datagram_handler
    def count(datagram: trio_udp.Datagram) -> bytes | None:
        nonlocal counted
        counted += 1
        return None if counted % IN_BURST else datagram.payload[:ACKNOWLEDGEMENT]

    flight = burst("flight")
    handlers = {"echo": echo, "proxied": echo, "unix": echo, "once": echo, "flight": send_flights, "in": count}
    _serve(handlers[what], bind=bind or BINDS.get(what, _bind), limits=limits)


def datagrams_on_all_interfaces(what: str) -> None:
    datagrams(what, bind=partial(_bind, None))


def datagrams_with_limits(what: str) -> None:
    datagrams(what, limits=generous_limits())


def accept_answers(what: str) -> None:
    async def never_called(client: trio_udp.Client) -> None:
        raise AssertionError(client)

    def answer(datagram: trio_udp.Datagram) -> bytes:
        return datagram.payload

    _serve({"once": never_called}[what], accept=answer)


def generous_limits() -> trio_udp.Limits:
    """Return limits that are checked for each datagram and refuse none."""
    rate = trio_udp.RateLimit(per_second=1e9, burst=1_000_000)
    return trio_udp.Limits(max_clients=MAX_CLIENTS, rate_limit=rate, amplification=3)


async def _bind(host: str | None = LOCALHOST, proxies: Iterable[str] = ()) -> list[trio_udp.Endpoint]:
    return await trio_udp.open_endpoints(0, host=host, receive_buffer=RECEIVE_BUFFER, proxies=proxies)


async def _bind_unix(credentials: bool) -> list[trio_udp.Endpoint]:
    return [await trio_udp.open_unix_endpoint(unix_name(), credentials=credentials, receive_buffer=RECEIVE_BUFFER)]


def _serve(
    handler: trio_udp.Handler,
    *,
    bind: Bind = _bind,
    limits: trio_udp.Limits | None = None,
    accept: trio_udp.Accept | None = None,
) -> None:
    async def main() -> None:
        endpoints = await bind()
        address = endpoints[0].local_address
        limited = limits or trio_udp.Limits(max_clients=MAX_CLIENTS)
        async with trio.open_nursery() as nursery:
            await nursery.start(
                lambda task_status: trio_udp.serve_endpoints(
                    handler, endpoints, limits=limited, accept=accept, task_status=task_status
                )
            )
            ready(address[1] if isinstance(address, tuple) else unix_name())

    trio.run(main)


def endpoint_alone(what: str) -> None:
    """An endpoint without a server: one task, and a protocol that keeps its own state."""

    async def main() -> None:
        (endpoint,) = await _bind()
        async with endpoint:
            ready(endpoint.local_address[1])
            flight = burst(what)
            async for datagram in endpoint:
                for payload in flight:
                    datagram.reply_nowait(payload)

    trio.run(main)


# How endpoints are bound for servers that need more than an IP address.
BINDS: dict[str, Bind] = {
    "proxied": partial(_bind, proxies=["127.0.0.0/8"]),
    "unix": partial(_bind_unix, credentials=False),
}

SERVERS: dict[str, Callable[[str], None]] = {
    "trio_udp": task_per_client,
    "trio_udp portable": portable,
    "trio_udp gc.set_threshold": with_rare_collections,
    "trio_udp request_handler": requests,
    "trio_udp datagram_handler": datagrams,
    "trio_udp accept": accept_answers,
    "trio_udp send_to_all": with_send_to_all,
    "trio_udp Endpoint": endpoint_alone,
    "trio_udp all interfaces": on_all_interfaces,
    "trio_udp datagram_handler all interfaces": datagrams_on_all_interfaces,
    "trio_udp with credentials": with_credentials,
    "trio_udp with limits": with_limits,
    "trio_udp datagram_handler with limits": datagrams_with_limits,
}
