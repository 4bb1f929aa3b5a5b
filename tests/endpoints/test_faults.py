"""Errors of the system: their meaning, and each of them injected at its system calls, on every engine.

test_network_faults.py has the errors that Linux itself can be made to return.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from trio_udp import Client, Endpoint, Server, serve_endpoints
from trio_udp._endpoints import Address
from trio_udp._endpoints._address import unpack_address
from trio_udp._endpoints._back_off import FRUITLESS_READS, MANY_ANSWERS, PAUSE
from trio_udp._endpoints._faults import TABLE, Fault, fault_of, reason_for
from trio_udp._endpoints._outbox import FULL_THOUGH_WRITABLE
from trio_udp._log import SECONDS_OF_SILENCE, FaultLog

from ..conftest import ALICE, BOB, SERVER, Bystander, check_adds_up, in_memory

# The table

MANUALS = {
    "recv(2) of Linux": "EAGAIN EBADF ECONNREFUSED EFAULT EINTR EINVAL ENOMEM ENOTCONN ENOTSOCK EWOULDBLOCK",
    "send(2) of Linux": "EACCES EAGAIN EALREADY EBADF ECONNRESET EDESTADDRREQ EFAULT EINTR EINVAL EISCONN EMSGSIZE "
    "ENOBUFS ENOMEM ENOTCONN ENOTSOCK EOPNOTSUPP EPIPE EWOULDBLOCK",
    "udp(7), ip(7) and ipv6(7)": "ECONNREFUSED EACCES EADDRINUSE EADDRNOTAVAIL EAGAIN EALREADY ECONNABORTED "
    "EHOSTUNREACH EINVAL EISCONN EMSGSIZE ENOBUFS ENODEV ENOENT ENOMEM ENOPKG ENOPROTOOPT ENOTCONN EOPNOTSUPP EPERM "
    "EPIPE ESOCKTNOSUPPORT",
    "icmp_err_convert and icmpv6_err_convert of Linux": "ENETUNREACH EHOSTUNREACH ENOPROTOOPT ECONNREFUSED EMSGSIZE "
    "EOPNOTSUPP EHOSTDOWN ENONET EPROTO EACCES",
    "recvmsg and sendmsg of POSIX": "EAGAIN EWOULDBLOCK EBADF ECONNRESET EINTR EINVAL EMSGSIZE ENOTCONN ENOTSOCK "
    "EOPNOTSUPP ETIMEDOUT EIO ENOBUFS ENOMEM EAFNOSUPPORT EPIPE EACCES EDESTADDRREQ EHOSTUNREACH EISCONN ENETDOWN "
    "ENETUNREACH ELOOP ENAMETOOLONG ENOENT ENOTDIR",
    "recv(2) and send(2) of FreeBSD and macOS": "EBADF ECONNRESET ENOTCONN ENOTSOCK EAGAIN EINTR EFAULT EACCES "
    "EMSGSIZE ENOBUFS EHOSTUNREACH EHOSTDOWN ENETDOWN ENETUNREACH EISCONN ECONNREFUSED EPIPE EADDRNOTAVAIL "
    "EDESTADDRREQ EINVAL",
    "WSARecvFrom and WSASendTo of Windows": "ECONNRESET EFAULT EINTR EINVAL EMSGSIZE ENETDOWN ENETRESET ENOTCONN "
    "EWOULDBLOCK EACCES EADDRNOTAVAIL EAFNOSUPPORT EDESTADDRREQ EHOSTUNREACH ENETUNREACH ENOBUFS ENOTSOCK ESHUTDOWN "
    "EISCONN EOPNOTSUPP ETIMEDOUT",
}

# The manuals name these too, but they come from bind, connect and listen, from opening a socket, or from path names.
NOT_OURS = {"EADDRINUSE", "EALREADY", "ENOPKG", "ESOCKTNOSUPPORT", "ELOOP", "ENAMETOOLONG", "ENOTDIR"}


@pytest.mark.parametrize("manual", MANUALS)
def test_the_table_is_complete(manual: str) -> None:
    """The table of faults has every error that the manuals list for receiving and sending."""
    known = {name for reasons in TABLE.values() for name in reasons}
    assert set(MANUALS[manual].split()) - NOT_OURS <= known


def test_the_table_is_unambiguous() -> None:
    """The table of faults has each errno once, under whatever name, and a sentence for each."""
    rows = [(name, fault, reason) for fault, reasons in TABLE.items() for name, reason in reasons.items()]
    assert len({name for name, _, _ in rows}) == len(rows)
    for name, fault, reason in rows:
        assert reason[0].isupper()
        assert reason.endswith(".")
        if hasattr(errno, name):
            error = OSError(getattr(errno, name), "")
            assert fault_of(error) is fault
            assert name == "EWOULDBLOCK" or reason_for(error) == reason or errno.EWOULDBLOCK == error.errno


def test_an_unknown_errno_is_a_fault_of_the_machine() -> None:
    """An errno that the table of faults lacks is treated as a fault of the machine."""
    assert fault_of(OSError(99_999, "")) is Fault.MACHINE
    assert fault_of(OSError()) is Fault.MACHINE
    assert reason_for(OSError(99_999, "")) == "Not a known error of a datagram socket."


# Injected errors


class FaultyEndpoint:
    """An endpoint whose system calls fail on request, and two peers that send to it."""

    alice: Address
    bob: Address
    endpoint: Endpoint

    def put(self, payload: bytes, source: Address) -> None:
        """Let a datagram arrive."""
        raise NotImplementedError

    def arrived(self, address: Address) -> list[bytes]:
        """Return the payloads that a client has received since the last call."""
        raise NotImplementedError

    def fail_reading(self, code: int, times: int) -> None:
        raise NotImplementedError

    def fail_sending_to_alice(self, code: int) -> None:
        """Make sends to alice fail with an errno from now on; 0 ends that."""
        raise NotImplementedError

    def close_what_was_given_up(self) -> None:
        """Close the file descriptor that the endpoint has given up."""

    def close(self) -> None:
        pass


class FaultySimulation(FaultyEndpoint):
    alice, bob = ALICE, BOB

    def __init__(self) -> None:
        self._memory = in_memory()
        self.endpoint = self._memory.endpoint

    def put(self, payload: bytes, source: Address) -> None:
        self._memory.put(payload, source)

    def arrived(self, address: Address) -> list[bytes]:
        payloads = self._memory.sent_to(address)
        network = self._memory.network
        network.events[:] = [event for event in network.events if event.destination != address]
        return payloads

    def fail_reading(self, code: int, times: int) -> None:
        for _ in range(times):
            self._memory.network.fail_next_receive(SERVER, code)

    def fail_sending_to_alice(self, code: int) -> None:
        if code:
            self._partition = self._memory.network.partition([SERVER], [ALICE], error=code)
        else:
            self._partition.heal()


class FaultySocket(FaultyEndpoint):
    """Sockets on loopback. Calls that would read and write the server's socket fail before they reach the kernel."""

    def __init__(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._reading = self._reads_to_fail = self._sending = 0
        engine, _, what = kind.partition(" ")
        monkeypatch.setenv("TRIO_UDP_ENGINE", engine)
        if engine == "linux":
            self._patch_linux_engine(monkeypatch)
        for call in ("recvfrom", "recvmsg"):
            self._patch(monkeypatch, call, self._reading_error)
        for call in ("sendto", "sendmsg"):
            self._patch(monkeypatch, call, lambda *args: self._sending_error(args[-1]))
        self._peers = {}
        for _ in range(2):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind(("127.0.0.1", 0))
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1_000_000)
            self._peers[sock.getsockname()] = sock
        self.alice, self.bob = self._peers
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("0.0.0.0" if what == "wildcard" else "127.0.0.1", 0))
        self.fileno = sock.fileno()
        self._port = sock.getsockname()[1]
        self.endpoint = Endpoint.from_socket(sock)

    def put(self, payload: bytes, source: Address) -> None:
        self._peers[source].sendto(payload, ("127.0.0.1", self._port))

    def arrived(self, address: Address) -> list[bytes]:
        payloads = []
        while True:
            try:
                payloads.append(self._peers[address].recv(65_535))
            except BlockingIOError:
                return payloads

    def fail_reading(self, code: int, times: int) -> None:
        self._reading, self._reads_to_fail = code, times

    def fail_sending_to_alice(self, code: int) -> None:
        self._sending = code

    def close_what_was_given_up(self) -> None:
        os.close(self.fileno)

    def close(self) -> None:
        for sock in self._peers.values():
            sock.close()

    def _reading_error(self, *_: Any) -> int:
        if not self._reads_to_fail:
            return 0
        self._reads_to_fail -= 1
        return self._reading

    def _sending_error(self, address: Address) -> int:
        return self._sending if address == self.alice else 0

    def _patch(self, monkeypatch: pytest.MonkeyPatch, call: str, error: Callable[..., int]) -> None:
        real = getattr(socket.socket, call)

        def faulty(sock: socket.socket, *args: Any) -> Any:
            code = error(*args) if sock.fileno() == self.fileno else 0
            if code:
                raise OSError(code, os.strerror(code))
            return real(sock, *args)

        monkeypatch.setattr(socket.socket, call, faulty)

    def _patch_linux_engine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from trio_udp._endpoints.engines import linux
        from trio_udp._endpoints.engines.linux_structures import MsgHdr

        def patch(call: str, error: Callable[..., int], most_messages: int | None = None) -> None:
            real = getattr(linux, call)

            def faulty(fileno: int, pointer: Any, count: int, *rest: Any) -> int:
                code = error(pointer, count, *rest)
                if code:
                    ctypes.set_errno(code)
                    return -1
                return int(real(fileno, pointer, min(count, most_messages or count), *rest))

            monkeypatch.setattr(linux, call, faulty)

        def first_receiver(pointer: Any, count: int, *_: Any) -> int:
            if not count:
                return 0
            header = ctypes.cast(pointer, ctypes.POINTER(MsgHdr)).contents
            return self._sending_error(unpack_address(ctypes.string_at(header.name, header.name_length)))

        patch("_recvmmsg", self._reading_error)
        patch("_sendmmsg", first_receiver, 1)  # otherwise the kernel would send later datagrams to alice
        patch("_sendto", lambda payload, size, flags, address, _: self._sending_error(unpack_address(address)))


KINDS = ["simulated", "portable", "portable wildcard", "linux", "linux wildcard"]


@pytest.fixture(params=KINDS)
def faulty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyEndpoint]:
    if request.param.startswith("linux") and sys.platform != "linux":
        pytest.skip("needs Linux")
    faulty = FaultySimulation() if request.param == "simulated" else FaultySocket(request.param, monkeypatch)
    yield faulty
    faulty.close()


@attrs.define
class Running:
    server: Server
    alice: Client
    bob: Client
    x_taken: trio.Event  # b"x" has arrived


@pytest.fixture
async def running(faulty: FaultyEndpoint, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> Running:
    """An echo server to which both clients have already sent."""
    clients = {}

    x_taken = trio.Event()

    async def handler(client: Client) -> None:
        clients[client.peer_address] = client
        async for payload in client:
            await client.send(payload)
            if payload == b"x":
                x_taken.set()

    server = await nursery.start(partial(serve_endpoints, handler, [faulty.endpoint]))
    for address in (faulty.alice, faulty.bob):
        faulty.put(b"hello", address)
        await settle()
        assert faulty.arrived(address) == [b"hello"]
    caplog.clear()  # log lines about features that the engine does without
    return Running(server, clients[faulty.alice], clients[faulty.bob], x_taken)


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


def errnos(*faults: Fault) -> pytest.MarkDecorator:
    """Parametrize a test with the errnos of these faults that this platform has, and with an unknown errno."""
    codes = {name: getattr(errno, name) for fault in faults for name in TABLE[fault] if hasattr(errno, name)}
    if Fault.MACHINE in faults:
        codes["99999"] = 99_999
    return pytest.mark.parametrize("code", codes.values(), ids=codes.keys())


def name_of(code: int) -> str:
    return errno.errorcode.get(code, str(code))


def line(faulty: FaultyEndpoint, code: int, count: int) -> str:
    reason = reason_for(OSError(code, ""))
    host, port = faulty.endpoint.local_address[:2]
    return f"{host} port {port}: {name_of(code)} ({count} since last logged): {reason}"


@errnos(Fault.PEER, Fault.MACHINE)
async def test_reading_that_goes_on_failing(
    faulty: FaultyEndpoint, running: Running, mock_clock: MockClock, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """Reading that keeps failing is retried a few times, then once in PAUSE; it is logged once a minute."""
    faulty.fail_reading(code, 30)
    faulty.put(b"x", faulty.alice)
    for _ in range(1_000):  # like another task that never waits
        await trio.lowlevel.checkpoint()
    expected = FRUITLESS_READS + 1
    assert running.server.statistics().receive_errors == expected
    for seconds in (PAUSE, PAUSE, SECONDS_OF_SILENCE - 3 * PAUSE, PAUSE, PAUSE, PAUSE):
        mock_clock.jump(seconds)
        await settle()
        expected += 1
        assert running.server.statistics().receive_errors == expected
    # A fault that a peer can cause is logged only if it persists.
    before = 1 if fault_of(OSError(code, "")) is Fault.MACHINE else FRUITLESS_READS + 1
    after = expected - before - 2
    assert caplog.messages == [line(faulty, code, before), line(faulty, code, after)]

    faulty.fail_reading(0, 0)
    for _ in range(30):  # the rest of those in memory cannot be removed
        mock_clock.jump(PAUSE)
        await settle()
        if payloads := faulty.arrived(faulty.alice):
            break
    assert payloads == [b"x"]
    statistics = running.server.statistics()
    assert statistics.errors == {name_of(code): statistics.receive_errors}
    assert (statistics.received, statistics.sent, statistics.send_errors) == (3, 3, 0)
    check_adds_up(running.server)


@errnos(Fault.ANSWER)
async def test_answers_of_the_network(
    faulty: FaultyEndpoint, running: Running, mock_clock: MockClock, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """A thousand ICMP errors in a row do not pause reading, block other tasks or fill the log."""
    faulty.fail_reading(code, 1_000)
    faulty.put(b"x", faulty.alice)
    bystander = Bystander()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bystander.run)
        await running.x_taken.wait()
        nursery.cancel_scope.cancel()
    await settle()
    assert bystander.turns >= 1_000
    assert faulty.arrived(faulty.alice) == [b"x"]
    assert trio.current_time() == 0
    statistics = running.server.statistics()
    assert statistics.errors == {name_of(code): 1_000}
    assert (statistics.receive_errors, statistics.received, statistics.sent) == (1_000, 3, 3)
    assert caplog.messages == []


@errnos(Fault.ANSWER)
async def test_answers_without_end(
    faulty: FaultyEndpoint, running: Running, mock_clock: MockClock, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """More than MANY_ANSWERS ICMP errors in a row count as a persistent fault."""
    faulty.fail_reading(code, 2_000)
    faulty.put(b"x", faulty.alice)
    for _ in range(2_000):
        await trio.lowlevel.checkpoint()
    tried = MANY_ANSWERS + FRUITLESS_READS
    assert running.server.statistics().receive_errors == tried
    mock_clock.jump(PAUSE)
    await settle()
    assert running.server.statistics().receive_errors == tried + 1
    assert caplog.messages == [line(faulty, code, tried)]


@errnos(Fault.WAIT)
async def test_nothing_to_read_after_all(
    faulty: FaultyEndpoint, running: Running, mock_clock: MockClock, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """A socket that polls as readable and has no datagram causes no busy loop and no error."""
    faulty.fail_reading(code, FRUITLESS_READS + 2)
    faulty.put(b"x", faulty.alice)
    for _ in range(1_000):
        await trio.lowlevel.checkpoint()
    assert faulty.arrived(faulty.alice) == []
    for _ in range(2):
        mock_clock.jump(PAUSE)
        await settle()
    assert faulty.arrived(faulty.alice) == [b"x"]
    assert running.server.statistics().errors == {}
    assert caplog.messages == []


@errnos(Fault.PEER, Fault.MACHINE, Fault.ANSWER)
async def test_sending_that_fails(
    faulty: FaultyEndpoint, running: Running, mock_clock: MockClock, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """A send error counts for its client, others are answered, and errors that strangers can cause are not logged."""
    alice, bob, fault = running.alice, running.bob, fault_of(OSError(code, ""))
    for payload in (b"1", b"2", b"3"):  # a batch, so the replies leave together
        faulty.put(payload, faulty.alice)
        faulty.put(payload, faulty.bob)
    faulty.fail_sending_to_alice(code)
    await settle()
    await alice.send_many([b"x"] * 97)
    assert faulty.arrived(faulty.bob) == [b"1", b"2", b"3"]
    assert (alice.statistics().errors, alice.statistics().send_errors) == ({name_of(code): 100}, 100)
    assert caplog.messages == ([line(faulty, code, 1)] if fault is Fault.MACHINE else [])
    mock_clock.jump(SECONDS_OF_SILENCE)
    await alice.send(b"x")
    assert caplog.messages[1:] == ([line(faulty, code, 100)] if fault is Fault.MACHINE else [])

    faulty.fail_sending_to_alice(0)
    await alice.send(b"again")
    await settle()
    assert faulty.arrived(faulty.alice) == [b"again"]
    # An error that may be the answer to an earlier datagram is counted as such, and then the call is repeated.
    answers = 101 if fault is Fault.ANSWER else 0
    statistics = running.server.statistics()
    assert statistics.errors == {name_of(code): 101 + answers}
    assert (statistics.send_errors, statistics.receive_errors) == (101, answers)
    assert (alice.statistics().sent, bob.statistics().sent, statistics.sent) == (2, 4, 6)
    assert bob.statistics().errors == {}


@errnos(Fault.WAIT)
async def test_sending_that_has_to_wait(
    faulty: FaultyEndpoint, running: Running, mock_clock: MockClock, nursery: trio.Nursery, code: int
) -> None:
    """A full send buffer counts no error; all datagrams leave in order once there is room."""
    faulty.fail_sending_to_alice(code)
    nursery.start_soon(running.alice.send, b"1")
    await settle()
    nursery.start_soon(running.bob.send, b"2")
    await settle()
    assert faulty.arrived(faulty.bob) == []
    faulty.fail_sending_to_alice(0)
    for _ in range(2):
        mock_clock.jump(FULL_THOUGH_WRITABLE)
        await settle()
    assert (faulty.arrived(faulty.alice), faulty.arrived(faulty.bob)) == ([b"1"], [b"2"])
    assert running.server.statistics().errors == {}


@errnos(Fault.CLOSED)
@pytest.mark.parametrize("way", ["reading", "sending"])
async def test_a_file_descriptor_that_is_gone(
    faulty: FaultyEndpoint, caplog: pytest.LogCaptureFixture, code: int, way: str
) -> None:
    """A server whose file descriptor is gone ends with ClosedResourceError and logs why, reading or sending."""
    outcome = []
    expected = line(faulty, code, 1)

    async def handler(client: Client) -> None:
        await client.receive()
        with pytest.raises(trio.ClosedResourceError):
            await client.send(b"x")
        outcome.append("told")

    async def run() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await serve_endpoints(handler, [faulty.endpoint])
        outcome.append("ended")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await settle()
        if way == "reading":
            faulty.fail_reading(code, 1)
        faulty.put(b"x", faulty.alice)
        if way == "sending":
            faulty.fail_sending_to_alice(code)
        await settle()
        nursery.cancel_scope.cancel()
    assert outcome == (["ended"] if way == "reading" else ["told", "ended"])
    assert caplog.messages[-1] == expected
    assert faulty.endpoint.closed
    faulty.close_what_was_given_up()


@pytest.mark.parametrize("faulty", KINDS[1:], indirect=True)
async def test_a_file_descriptor_that_is_not_a_socket_any_more(faulty: FaultySocket) -> None:
    """Waiting for a file descriptor that is another kind of file by now raises ClosedResourceError."""
    with open(os.devnull) as other:  # noqa: ASYNC230
        os.dup2(other.fileno(), faulty.fileno)
    with pytest.raises(trio.ClosedResourceError):
        await faulty.endpoint.receive()
    assert faulty.endpoint.closed
    faulty.close_what_was_given_up()


async def test_a_unix_domain_peer_that_is_gone(nursery: trio.Nursery, tmp_path: Path) -> None:
    """On a Unix-domain socket a refusal is about this datagram: it is counted once, for its client."""
    clients = []

    async def handler(client: Client) -> None:
        clients.append(client)
        await trio.sleep_forever()

    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(tmp_path / "server"))
    server = await nursery.start(partial(serve_endpoints, handler, [Endpoint.from_socket(sock)]))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
        peer.bind(str(tmp_path / "peer"))
        peer.sendto(b"x", str(tmp_path / "server"))
        await settle()
    await clients[0].send(b"refused")
    (tmp_path / "peer").unlink()
    await clients[0].send(b"nobody there")
    assert clients[0].statistics().errors == {"ECONNREFUSED": 1, "ENOENT": 1}
    assert (server.statistics().send_errors, server.statistics().receive_errors) == (2, 0)


def test_outside_of_trio_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """An error outside of Trio is not logged: an endpoint may be closed there, but there is no clock."""
    error = OSError(errno.ENOMEM, "")
    log = FaultLog()
    log.count(error)
    log.write("a socket", error, reason_for(error))
    assert caplog.messages == []
