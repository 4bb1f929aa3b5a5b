"""The Linux engine: coalesced and segmented datagrams, missing system calls, the kernel's counters."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

import trio_udp
from trio_udp import Client, Endpoint, Server, connect, serve
from trio_udp._endpoints import reader_of
from trio_udp._endpoints.engines.pktinfo import UDP_GRO, UDP_SEGMENT
from trio_udp._endpoints.engines.portable import PortableEngine
from trio_udp._log import warn_once

from ..conftest import check_adds_up, echo

if sys.platform != "linux":
    pytest.skip("needs Linux", allow_module_level=True)

from trio_udp._endpoints.engines import linux
from trio_udp._endpoints.engines.linux import LinuxEngine
from trio_udp._endpoints.engines.linux_structures import IOVec, MMsgHdr, MsgHdr

SO_NO_CHECK = 11  # from asm-generic/socket.h: send without checksums, which cannot be merged

Start = Callable[..., Awaitable[Server]]

# A buffer that every system grants, so that the log has no line about it.
DEFAULTS = {"host": "127.0.0.1", "receive_buffer": 200_000}


class Collector:
    """A handler that stores the datagrams of its clients."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self._more = trio.Event()

    async def __call__(self, client: Client) -> None:
        async for payload in client:
            self.taken.append(payload)
            self._more.set()

    async def until(self, datagrams: int) -> None:
        """Wait until the handler has taken a number of datagrams."""
        with trio.fail_after(10):
            while len(self.taken) < datagrams:
                await self._more.wait()
                self._more = trio.Event()


@pytest.fixture
def start(nursery: trio.Nursery) -> Start:
    async def start(handler: Callable[[Client], Awaitable[object]] = echo, **options: Any) -> Server:
        server: Server = await nursery.start(partial(serve, handler, 0, **{**DEFAULTS, **options}))
        return server

    return start


@pytest.fixture(autouse=True)
def warn_anew() -> None:
    warn_once.cache_clear()


@pytest.fixture
def peer() -> Iterator[socket.socket]:
    """A socket that can send many datagrams as one message, and receive coalesced ones."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1_000_000)
        sock.settimeout(5)
        yield sock


def send_coalesced(sock: socket.socket, payloads: bytes, size: int, server: Server) -> None:
    control = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", size))]
    sock.sendmsg([payloads], control, 0, server.endpoints[0].local_address)


async def receive(sock: socket.socket) -> bytes:
    return await trio.to_thread.run_sync(sock.recv, 65_536)


# Choosing the engine


def open_socket(family: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0) if family == socket.AF_INET else b"\0trio_udp test of %d" % os.getpid())
    return sock


@pytest.mark.parametrize(
    ("asked_for", "family", "chosen"),
    [
        ("", socket.AF_INET, LinuxEngine),
        ("linux", socket.AF_INET, LinuxEngine),
        ("portable", socket.AF_INET, PortableEngine),
        ("", socket.AF_UNIX, PortableEngine),
        ("linux", socket.AF_UNIX, PortableEngine),  # the variable only applies to UDP
    ],
)
async def test_it_is_chosen(monkeypatch: pytest.MonkeyPatch, asked_for: str, family: int, chosen: type) -> None:
    """UDP sockets have the Linux engine unless TRIO_UDP_ENGINE says otherwise; others have the portable one."""
    monkeypatch.setenv("TRIO_UDP_ENGINE", asked_for)
    endpoint = Endpoint.from_socket(open_socket(family))
    assert isinstance(reader_of(endpoint).engine, chosen)
    endpoint.close()


async def test_an_engine_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TRIO_UDP_ENGINE that names no engine raises ValueError."""
    monkeypatch.setenv("TRIO_UDP_ENGINE", "fast")
    with open_socket(socket.AF_INET) as sock, pytest.raises(ValueError, match=r"TRIO_UDP_ENGINE.*fast"):
        Endpoint.from_socket(sock)


def test_structures_are_the_kernels() -> None:
    """struct mmsghdr and iovec have the kernel's layout for 64-bit machines, the same on x86-64 and arm64."""
    offsets = {name: getattr(MsgHdr, name).offset for name, _ in MsgHdr._fields_}
    assert offsets == {
        "name": 0,
        "name_length": 8,
        "iov": 16,
        "iov_length": 24,
        "control": 32,
        "control_length": 40,
        "flags": 48,
    }
    assert MMsgHdr.length.offset == 56
    assert (ctypes.sizeof(MMsgHdr), ctypes.sizeof(IOVec)) == (64, 16)


# Coalesced and segmented datagrams


async def test_replies_of_one_size_leave_as_one(start: Start, peer: socket.socket) -> None:
    """Replies of one batch arrive coalesced at a peer with UDP_GRO; the last of a message may be shorter."""

    async def handler(client: Client) -> None:
        async for _ in client:
            await client.send_many([bytes(100)] * 20 + [b"end"] + [bytes(100)] * 2)

    server = await start(handler)
    peer.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    peer.sendto(b"go", server.endpoints[0].local_address)
    messages = [await receive(peer), await receive(peer)]
    assert messages == [bytes(2000) + b"end", bytes(200)]
    assert server.statistics().sent == 23
    assert next(iter(server.clients)).statistics().sent == 23


async def test_each_client_counts_its_own_replies(start: Start, peer: socket.socket) -> None:
    """A client and the next client of the same peer each count their own replies, even in one message."""
    clients = []

    async def handler(client: Client) -> None:
        clients.append(client)
        await client.send(await client.receive())
        client.close()

    server = await start(handler)
    for payload in (b"a", b"b", b"c"):
        peer.sendto(payload, server.endpoints[0].local_address)
        assert await receive(peer) == payload
    assert [client.statistics().sent for client in clients] == [1] * 3
    assert server.statistics().sent == 3


@pytest.mark.parametrize("host", ["127.0.0.1", None])
@pytest.mark.parametrize("size", [1, 7, 100, 1400])
async def test_coalesced_datagrams_are_divided(start: Start, peer: socket.socket, host: str | None, size: int) -> None:
    """A handler gets single datagrams, in order, whether they arrived coalesced or not."""
    handler = Collector()
    server = await start(handler, host=host)
    address = ("127.0.0.1", server.endpoints[0].local_address[1])
    whole = bytes(range(256)) * 256
    coalesced = whole[: 30 * size + (size + 1) // 2]
    for _ in range(3):
        control = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", size))]
        peer.sendmsg([coalesced], control, 0, address)
        peer.sendto(b"between", address)
        peer.sendto(b"", address)
    parts = [coalesced[start : start + size] for start in range(0, len(coalesced), size)]
    await handler.until(3 * (len(parts) + 2))
    assert handler.taken == 3 * [*parts, b"between", b""]
    assert server.statistics().clients_started == 1
    check_adds_up(server)


async def test_coalesced_datagrams_count_one_by_one(start: Start, peer: socket.socket) -> None:
    """Coalesced datagrams count one by one for fairness, so a default inbox loses none of them."""
    handler = Collector()
    server = await start(handler)
    batches = [[b"%d %d" % (message, i % 10) for i in range(60)] for message in range(40)]
    for batch in batches:
        send_coalesced(peer, b"".join(batch), len(batch[0]), server)
    await handler.until(2400)
    assert handler.taken == [payload for batch in batches for payload in batch]
    assert server.statistics().dropped_inbox_full == 0


async def test_datagrams_that_are_too_long_are_truncated_one_by_one(start: Start, peer: socket.socket) -> None:
    """max_datagram_size applies to each datagram of a coalesced message."""
    handler = Collector()
    server = await start(handler, max_datagram_size=10)
    send_coalesced(peer, bytes(100), 10, server)
    send_coalesced(peer, bytes(25), 12, server)
    peer.sendto(bytes(10), server.endpoints[0].local_address)
    await handler.until(12)
    s = server.statistics()
    assert (s.truncated, s.delivered) == (2, 12)
    check_adds_up(server)


async def test_coalesced_datagrams_of_a_connection(peer: socket.socket) -> None:
    """A connection splits coalesced datagrams too, and reads ahead at most one batch."""
    async with await connect(*peer.getsockname()) as connection:
        control = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", 4))]
        for _ in range(5):
            peer.sendmsg([b"abcd" * 50], control, 0, connection.local_address)
        with trio.fail_after(5):
            for _ in range(250):
                assert await connection.receive() == b"abcd"
                assert connection.statistics().waiting < 64


async def test_closing_drops_datagrams_that_were_read_ahead(start: Start, peer: socket.socket) -> None:
    """A closed endpoint serves no stranger, even if its datagrams were read with the last batch."""
    started = []

    async def handler(client: Client) -> None:
        started.append(client)
        async for _ in client:
            client.server.endpoints[0].close()

    with pytest.RaisesGroup(trio.ClosedResourceError):
        async with trio.open_nursery() as nursery:
            server = await nursery.start(partial(serve, handler, 0, host="127.0.0.1"))
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
                for sock in (*[peer] * 5, other):
                    send_coalesced(sock, bytes(1_000), 16, server)
                await trio.sleep_forever()
    assert len(started) == 1
    check_adds_up(server)


async def test_other_holders_of_a_socket_get_single_datagrams_again(start: Start) -> None:
    """Other holders of the socket get single datagrams again after the endpoint is closed."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        endpoint = Endpoint.from_socket(sock.dup())
        assert sock.getsockopt(socket.IPPROTO_UDP, UDP_GRO) == 1
        endpoint.close()
        assert sock.getsockopt(socket.IPPROTO_UDP, UDP_GRO) == 0


# Without segmentation or system calls


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


async def test_where_merging_does_not_work(start: Start, peer: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    """If the kernel cannot segment a message, datagrams leave singly, without loss, and the log says so once."""

    async def handler(client: Client) -> None:
        async for _ in client:
            await client.send_many([b"%d" % (i % 10) for i in range(50)])

    server = await start(handler)
    server.endpoints[0].socket.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
    for _ in range(3):
        peer.sendto(b"go", server.endpoints[0].local_address)
        assert [await receive(peer) for _ in range(50)] == [b"%d" % (i % 10) for i in range(50)]
    assert server.statistics().send_errors == 0
    assert warnings_of(caplog) == ["UDP_SEGMENT does not work here (EINVAL): datagrams are sent one by one"]


async def test_segments_too_long_for_the_way_leave_singly(
    start: Start, peer: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A peer with a small path MTU gets its datagrams in fragments; merging goes on for other peers."""
    messages_sent = fail_when(monkeypatch, "_sendmmsg", lambda args: errno.EMSGSIZE if merged(args) else 0)

    async def handler(client: Client) -> None:
        async for _ in client:
            await client.send_many([b"123"] * 5)

    server = await start(handler)
    for _ in range(2):
        peer.sendto(b"go", server.endpoints[0].local_address)
        assert [await receive(peer) for _ in range(5)] == [b"123"] * 5
    assert messages_sent == [1, 5, 1, 5]
    assert warnings_of(caplog) == []


def merged(args: tuple[Any, ...]) -> bool:
    """Whether the first message of a sendmmsg call has several datagrams."""
    _, pointer, count, *_ = args
    if not count:  # the check whether the call exists
        return False
    header = ctypes.cast(pointer, ctypes.POINTER(MsgHdr)).contents
    return bool(header.control_length)


def fail_when(monkeypatch: pytest.MonkeyPatch, call: str, error: Callable[[tuple[Any, ...]], int]) -> list[int]:
    """Make a system call fail as a kernel or a filter would; return the number of messages of each call."""
    real = getattr(linux, call)
    tries = []

    def faulty(*args: Any) -> int:
        if args[2]:  # not the check whether the call exists
            tries.append(args[2])
        if code := error(args):
            ctypes.set_errno(code)
            return -1
        result: int = real(*args)
        return result

    monkeypatch.setattr(linux, call, faulty)
    return tries


@pytest.mark.parametrize("host", ["127.0.0.1", None])
async def test_a_full_send_buffer(
    start: Start, peer: socket.socket, monkeypatch: pytest.MonkeyPatch, host: str | None
) -> None:
    """Datagrams of a batch that meet a full send buffer leave later, once and in order."""
    real_sendmmsg, real_sendto, calls = linux._sendmmsg, linux._sendto, 0

    def there_is_room() -> bool:
        """Say yes and no in turn, and leave EAGAIN in errno for the calls that find no room."""
        nonlocal calls
        calls += 1
        ctypes.set_errno(errno.EAGAIN)
        return calls % 2 == 1

    def sendmmsg(fileno: int, messages: Any, count: int, flags: int) -> int:
        """Take at most three messages, if there is room."""
        return int(real_sendmmsg(fileno, messages, min(count, 3), flags)) if there_is_room() else -1

    def sendto(*arguments: Any) -> int:
        return int(real_sendto(*arguments)) if there_is_room() else -1

    monkeypatch.setattr(linux, "_sendmmsg", sendmmsg)
    monkeypatch.setattr(linux, "_sendto", sendto)

    async def handler(client: Client) -> None:
        async for _ in client:
            await client.send_many([b"%d" % i for i in range(30)])  # sizes 1 and 2
            for i in range(30, 60):
                await client.send(bytes(i))  # of growing size: nothing to merge

    server = await start(handler, host=host)
    for _ in range(3):
        peer.sendto(b"go", ("127.0.0.1", server.endpoints[0].local_address[1]))
    expected = 3 * [*[b"%d" % i for i in range(30)], *[bytes(i) for i in range(30, 60)]]
    assert [await receive(peer) for _ in expected] == expected
    assert calls > 20
    assert (server.statistics().sent, server.statistics().send_errors) == (180, 0)


@pytest.mark.parametrize("host", ["127.0.0.1", None])
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM, errno.EINVAL])
@pytest.mark.parametrize("call", ["_recvmmsg", "_sendmmsg"])
async def test_where_a_system_call_is_missing(
    start: Start,
    peer: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    host: str | None,
    code: int,
    call: str,
) -> None:
    """If recvmmsg or sendmmsg is denied, datagrams are moved one at a time, and the log says so once."""
    fail_when(monkeypatch, call, lambda _: code)

    async def handler(client: Client) -> None:
        async for payload in client:
            await client.send_many([payload, b"%d" % client.peer_address[1], b""])

    server = await start(handler, host=host)
    port = server.endpoints[0].local_address[1]
    me = b"%d" % peer.getsockname()[1]
    for payload in (b"one", b"two"):
        peer.sendto(payload, ("127.0.0.2" if host is None else host, port))
        assert [await receive(peer) for _ in range(3)] == [payload, me, b""]
    async with await connect("127.0.0.1", port) as connection:
        await connection.send(b"")
        assert [await connection.receive() for _ in range(3)] == [b"", b"%d" % connection.local_address[1], b""]
    s = server.statistics()
    assert (s.received, s.sent, s.clients_started, s.send_errors, s.receive_errors) == (3, 9, 2, 0, 0)
    (warning,) = warnings_of(caplog)
    assert errno.errorcode[code] in warning


async def test_a_refusing_filter_is_not_a_missing_call(
    start: Start, peer: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """EPERM for one datagram, for example from netfilter, is that client's error; batches go on."""
    refuses = [True]
    tries = fail_when(monkeypatch, "_sendmmsg", lambda args: errno.EPERM if refuses and args[2] else 0)
    fail_when(monkeypatch, "_sendto", lambda _: errno.EPERM if refuses else 0)

    first_refused = trio.Event()

    async def handler(client: Client) -> None:
        async for payload in client:
            await client.send_many([payload, payload + b"longer"])
            refuses.clear()
            first_refused.set()

    server = await start(handler)
    peer.sendto(b"1", server.endpoints[0].local_address)
    with trio.fail_after(5):
        await first_refused.wait()
    peer.sendto(b"2", server.endpoints[0].local_address)
    assert [await receive(peer) for _ in range(2)] == [b"2", b"2longer"]
    assert server.statistics().errors == {"EPERM": 2}
    assert next(iter(server.clients)).statistics().errors == {"EPERM": 2}
    assert tries[-1] == 2
    assert warnings_of(caplog) == []


# The kernel's figures


async def test_datagrams_that_the_kernel_dropped_are_counted(peer: socket.socket) -> None:
    """Statistics count datagrams that the kernel dropped at a full receive buffer, and show the bytes in the buffer."""
    (endpoint,) = await trio_udp.open_endpoints(0, host="127.0.0.1", receive_buffer=10_000)
    for _ in range(100):
        peer.sendto(bytes(100), endpoint.local_address)
    before = endpoint.statistics()
    with trio.fail_after(5):
        for _ in range(100 - before.kernel_dropped):
            await endpoint.receive()
    with pytest.raises(trio.WouldBlock):
        endpoint.receive_nowait()
    endpoint.close()
    after = endpoint.statistics()
    assert 0 < before.kernel_dropped < 100
    assert (before.receive_buffer, before.receive_buffer_requested) == (10_000, 10_000)
    assert before.kernel_queued > after.kernel_queued == 0
    assert (after.received, after.kernel_dropped) == (100 - before.kernel_dropped, before.kernel_dropped)


async def test_a_small_receive_buffer_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """If the system grants much less than requested, the log says so once, and names the setting to change."""
    allowed = int(await trio.Path("/proc/sys/net/core/rmem_max").read_text())
    for _ in range(2):
        (endpoint,) = await trio_udp.open_endpoints(0, host="127.0.0.1", receive_buffer=3 * allowed)
        s = endpoint.statistics()
        assert (s.receive_buffer, s.receive_buffer_requested) == (allowed, 3 * allowed)
        endpoint.close()
    (warning,) = warnings_of(caplog)
    assert f"sysctl -w net.core.rmem_max={3 * allowed}" in warning
