"""Datagrams that the program itself addresses: ``Server.send_to`` and ``send_to_nowait``."""

from __future__ import annotations

import errno
import socket
import sys
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from trio_udp import Address, Client, Endpoint, Server, open_endpoints, serve, serve_endpoints

from ..conftest import ALICE, BOB, StartInMemory, StartServer, echo, narrow, plain_socket, port_of
from ..namespaces import machines, needs_namespaces


async def send(server: Server, nowait: bool, address: Address, **options: Any) -> None:
    if nowait:
        server.send_to_nowait(b"x", address, **options)
    else:
        await server.send_to(b"x", address, **options)


async def test_any_address(start_on_loopback: StartServer) -> None:
    """send_to reaches an address that has never sent to the server, from the endpoint of its family."""
    server = await start_on_loopback(host=None)
    for host in ("127.0.0.1", "::1"):
        with plain_socket(host) as sock:
            await server.send_to(bytearray(b"news"), sock.getsockname())
            payload, source = sock.recvfrom(100)
            assert (payload, source[:2]) == (b"news", (host, port_of(server)))
    assert server.statistics().sent == 2


@pytest.mark.parametrize("nowait", [False, True])
async def test_a_datagram_leaves_from_local_address(start_on_loopback: StartServer, nowait: bool) -> None:
    """A server on every interface sends from the address that local_address names, with or without a port."""
    server = await start_on_loopback(host="0.0.0.0")
    port = port_of(server)
    with plain_socket() as sock:
        await send(server, nowait, sock.getsockname(), local_address=("127.0.0.2", port))
        assert sock.recvfrom(100) == (b"x", ("127.0.0.2", port))
        await send(server, nowait, sock.getsockname(), local_address=("127.0.0.3", 0))
        assert sock.recvfrom(100) == (b"x", ("127.0.0.3", port))


async def test_local_address_chooses_the_endpoint(engine: str, nursery: trio.Nursery) -> None:
    """The endpoint that has local_address sends; without local_address, the first endpoint of the family does."""
    endpoints = [(await open_endpoints(0, host=host))[0] for host in ("::1", "127.0.0.1", "127.0.0.2")]
    server: Server = await nursery.start(serve_endpoints, echo, endpoints)
    with plain_socket() as sock:
        for chosen in endpoints[1:]:
            await server.send_to(b"x", sock.getsockname(), local_address=chosen.local_address)
            assert sock.recvfrom(100) == (b"x", chosen.local_address)
        await server.send_to(b"x", sock.getsockname())
        assert sock.recvfrom(100) == (b"x", endpoints[1].local_address)
    assert [endpoint.statistics().sent for endpoint in endpoints] == [0, 2, 1]


@pytest.mark.parametrize(
    ("code", "options"),
    [
        (errno.EACCES, {"address": ("127.255.255.255", 9)}),
        (errno.EACCES, {"address": ("255.255.255.255", 9)}),
        (errno.EINVAL, {"address": ("127.0.0.1", 0)}),
    ],
    ids=["directed broadcast", "limited broadcast", "port 0"],
)
@pytest.mark.parametrize("nowait", [False, True])
@pytest.mark.skipif(sys.platform != "linux", reason="the numbers of Linux")
async def test_the_kernels_error_is_raised(
    start_on_loopback: StartServer, nowait: bool, code: int, options: Any
) -> None:
    """An error about a datagram of the program's own is raised at the call, and counted once; the server goes on."""
    server = await start_on_loopback(host="0.0.0.0")
    with pytest.raises(OSError, match=r".+") as info:
        await send(server, nowait, **options)
    assert info.value.errno == code
    statistics = server.statistics()
    assert (statistics.sent, statistics.send_errors, statistics.receive_errors) == (0, 1, 0)
    assert statistics.errors == {errno.errorcode[code]: 1}
    with plain_socket() as sock:
        await server.send_to(b"x", sock.getsockname())
        assert sock.recv(100) == b"x"


async def test_a_local_address_that_is_not_ours(start_on_loopback: StartServer) -> None:
    """A server on every interface passes local_address on to the kernel, which refuses one that is not ours."""
    server = await start_on_loopback(host="0.0.0.0")
    with pytest.raises(OSError, match=r".+") as info:
        await server.send_to(b"x", ("127.0.0.1", 9), local_address=("192.0.2.1", 0))
    assert info.value.errno in (errno.EINVAL, errno.ENETUNREACH, errno.EADDRNOTAVAIL)
    assert (server.statistics().sent, server.statistics().send_errors) == (0, 1)


@needs_namespaces
async def test_no_route_is_raised(engine: str, nursery: trio.Nursery) -> None:
    """send_to raises the kernel's error on a machine that has no route to an address or a group."""
    with machines("alone") as [alone]:
        sockets = [alone.socket("0.0.0.0"), alone.socket("::", family=socket.AF_INET6)]
        server: Server = await nursery.start(serve_endpoints, echo, [Endpoint.from_socket(s) for s in sockets])
        for host in ("192.0.2.1", "239.1.2.3", "2001:db8::1", "fe80::1"):
            with pytest.raises(OSError, match="Network is unreachable"):
                await server.send_to(b"x", (host, 9))
        assert server.statistics().errors == {"ENETUNREACH": 4}
        nursery.cancel_scope.cancel()


async def test_a_broadcast_that_the_socket_allows(start_on_loopback: StartServer) -> None:
    """send_to sends a broadcast if configure has set SO_BROADCAST."""
    server = await start_on_loopback(
        host="0.0.0.0", configure=lambda sock: sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    )
    with plain_socket("127.255.255.255") as sock:
        await server.send_to(b"x", sock.getsockname())
        assert sock.recv(100) == b"x"


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (ValueError, {"address": ("localhost", 9)}),
        (ValueError, {"address": ("127.0.0.1", 65_536)}),
        (ValueError, {"address": ("::1", 9)}),
        (ValueError, {"address": ("127.0.0.1", 9), "local_address": ("::1", 0)}),
        (ValueError, {"address": ("127.0.0.1", 9), "local_address": ("127.0.0.1", 1)}),
        (ValueError, {"address": ("127.0.0.1", 9), "local_address": ("127.0.0.2", 0)}),
        (TypeError, {"address": ("127.0.0.1", "9")}),
        (TypeError, {"address": "127.0.0.1"}),
        (TypeError, {"address": ("127.0.0.1", 9), "local_address": 5}),
    ],
    ids=repr,
)
async def test_addresses_that_no_endpoint_can_use(
    start_on_loopback: StartServer, error: type[Exception], options: dict[str, Any]
) -> None:
    """A name, another family, or a local address that no endpoint is bound to raises at the call; nothing is sent."""
    server = await start_on_loopback()
    with pytest.raises(error):
        await server.send_to(b"x", **options)
    with pytest.raises(error):
        server.send_to_nowait(b"x", **options)
    assert server.statistics().send_errors == 0


async def test_invalid_addresses(start_on_loopback: StartServer) -> None:
    """Names, ports out of range and tuples of the wrong length or types raise at the call, and the server goes on."""
    server = await start_on_loopback(host=None)
    wrong: list[Any] = [(host, 9) for host in ("localhost", "", "1.2.3.4\0", "fe80::1%none", "::g", None, 5)]
    wrong += [("127.0.0.1", port) for port in (-1, 65_536, 10**30, "80", None, 1.5)]
    wrong += [("127.0.0.1",), ("127.0.0.1", 9, 0, 0), ("::1", 9, 0), ("::1", 9, "a", 0), ("::1", 9, 0, 0, 0), None]
    wrong += [("::1", 9, 1 << 20, 0), ("::1", 9, 0, 1 << 32), ("::1", 9, -1, 0)]
    for address in wrong:
        with pytest.raises((TypeError, ValueError)):
            await server.send_to(b"x", address)
    with plain_socket() as sock:
        await server.send_to(b"still there", sock.getsockname())
        assert sock.recv(100) == b"still there"
    assert server.statistics().send_errors == 0


async def test_a_payload_that_is_too_long(start_on_loopback: StartServer) -> None:
    """A payload over 65,507 bytes raises EMSGSIZE before anything is sent; an object that is not bytes, TypeError."""
    server = await start_on_loopback()
    with pytest.raises(OSError, match=r".+") as info:
        await server.send_to(bytes(65_508), ("127.0.0.1", 9))
    assert info.value.errno == errno.EMSGSIZE
    with pytest.raises(TypeError):
        await server.send_to("x", ("127.0.0.1", 9))  # type: ignore[arg-type]


async def test_mapped_addresses(start_on_loopback: StartServer) -> None:
    """The IPv4 endpoint sends to an IPv4 address that is written as mapped into IPv6."""
    server = await start_on_loopback(host=None)
    with plain_socket() as sock:
        host, port = sock.getsockname()
        await server.send_to(b"x", (f"::ffff:{host}", port), local_address=("::ffff:127.0.0.2", 0))
        assert sock.recvfrom(100) == (b"x", ("127.0.0.2", port_of(server)))


async def test_a_dual_stack_socket(engine: str, nursery: trio.Nursery) -> None:
    """A socket that carries both families sends to IPv4 addresses in either spelling, from local_address too."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as dual:
        dual.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        dual.bind(("::", 0))
        server: Server = await nursery.start(serve_endpoints, echo, [Endpoint.from_socket(dual.dup())])
    with plain_socket() as sock, plain_socket("::1") as sock6:
        host, port = sock.getsockname()
        for target in (host, f"::ffff:{host}"):
            await server.send_to(b"x", (target, port), local_address=("127.0.0.2", 0))
            assert sock.recvfrom(100) == (b"x", ("127.0.0.2", port_of(server)))
        await server.send_to(b"x", sock6.getsockname())
        assert sock6.recv(100) == b"x"


async def test_send_to_makes_no_client(start_on_loopback: StartServer) -> None:
    """The receiver of a send_to is a stranger as before; its answer makes it a client."""
    server = await start_on_loopback()
    with plain_socket() as sock:
        await server.send_to(b"x", sock.getsockname())
        assert (len(server.clients), server.statistics().clients_started) == (0, 0)
        _, server_address = sock.recvfrom(100)
        sock.sendto(b"answer", server_address)
        assert await trio.to_thread.run_sync(sock.recv, 100) == b"answer"
        assert [client.peer_address for client in server.clients] == [sock.getsockname()]


@pytest.mark.parametrize("nowait", [False, True])
async def test_it_leaves_after_replies_that_were_sent_before(start_in_memory: StartInMemory, nowait: bool) -> None:
    """Replies that wait for the end of a batch leave before a later send_to, also if that goes to another address."""

    async def handler(client: Client) -> None:
        async for payload in client:
            await client.send(payload)
            if payload == b"2":
                await send(client.server, nowait, BOB)

    run = await start_in_memory(handler)
    for payload in (b"1", b"2", b"3"):
        run.put(payload)
    await run.settle()
    assert run.sent == [(ALICE, b"1"), (ALICE, b"2"), (BOB, b"x"), (ALICE, b"3")]


async def test_it_waits_for_room(start_in_memory: StartInMemory, autojump_clock: MockClock) -> None:
    """At a full send buffer send_to waits, send_to_nowait raises WouldBlock, and a cancelled send_to sends nothing."""
    run = await start_in_memory(echo, on=narrow())
    await run.server.send_to(b"1", ALICE)
    with pytest.raises(trio.WouldBlock):
        run.server.send_to_nowait(b"2", ALICE)
    with trio.move_on_after(0.5) as scope:
        await run.server.send_to(b"3", ALICE)
    assert scope.cancelled_caught
    await run.server.send_to(b"4", BOB)
    assert trio.current_time() == 1
    assert run.sent == [(ALICE, b"1"), (BOB, b"4")]


async def test_it_is_a_checkpoint(start_in_memory: StartInMemory) -> None:
    """A cancelled send_to sends nothing, even if the send buffer has room."""
    run = await start_in_memory(echo)
    with trio.CancelScope() as scope:
        scope.cancel()
        await run.server.send_to(b"x", ALICE)
    assert scope.cancelled_caught
    assert run.sent == []


async def test_after_the_end(engine: str) -> None:
    """A server that has ended sends nothing more."""
    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(partial(serve, echo, 0, host="127.0.0.1"))
        server.stop()
    with pytest.raises(trio.ClosedResourceError):
        await server.send_to(b"x", ("127.0.0.1", 9))
    with pytest.raises(trio.ClosedResourceError):
        server.send_to_nowait(b"x", ("127.0.0.1", 9))
