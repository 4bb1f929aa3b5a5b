"""Opening sockets: the addresses that are bound, the options that are set, and the errors."""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any

import pytest
import trio

import trio_udp
import trio_udp._endpoints._open as opening
from trio_udp import Endpoint

from ..namespaces import inside, machines, needs_namespaces

FOUR_MIB = 4_194_304
UNKNOWN = "no such name.invalid"

needs_reuse_port = pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="platform has no SO_REUSEPORT")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="option numbers and limits of Linux")


@asynccontextmanager
async def opened(port: int = 0, **options: Any) -> AsyncIterator[list[Endpoint]]:
    """Open endpoints, by default on 127.0.0.1, and close them at the end."""
    options.setdefault("host", "127.0.0.1")
    endpoints = await trio_udp.open_endpoints(port, **options)
    try:
        yield endpoints
    finally:
        for endpoint in endpoints:
            await endpoint.aclose()


def port_of(endpoint: Endpoint) -> int:
    return endpoint.local_address[1]


def is_ours(record: logging.LogRecord) -> bool:
    return record.name == "trio_udp"


@contextmanager
def bound(host: str = "127.0.0.1", port: int = 0, *options: int) -> Iterator[socket.socket]:
    """Open a plain socket that is independent of this package."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        for option in options:
            sock.setsockopt(socket.SOL_SOCKET, option, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
        yield sock


@contextmanager
def nothing_left_open() -> Iterator[None]:
    """Check that a block closes every socket that it opens."""
    made: list[socket.socket] = []

    class Kept(socket.socket):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "socket", types.SimpleNamespace(**{**vars(socket), "socket": Kept}))
        yield
    assert made
    assert [sock.fileno() for sock in made] == [-1] * len(made)


def resolve(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    """Make every name resolve to these addresses."""

    async def getaddrinfo(host: object, port: int, *, type: int, flags: int = 0) -> list[Any]:
        return [
            (socket.AF_INET6, type, 17, "", (found, port, 0, 0))
            if ":" in found
            else (socket.AF_INET, type, 17, "", (found, port))
            for found in hosts
        ]

    monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)


NOT_OURS, NOT_OURS_IPV6 = "192.0.2.1", "2001:db8::1"  # for documentation


# Ports


async def test_port_0_is_one_port_in_both_families() -> None:
    """With port 0 and no host, IPv4 and IPv6 are bound to one port."""
    async with opened(host=None) as endpoints:
        assert [endpoint.local_address[0] for endpoint in endpoints] == ["0.0.0.0", "::"]
        assert len({port_of(endpoint) for endpoint in endpoints}) == 1


@needs_reuse_port
async def test_port_0_with_reuse_port_is_a_port_of_its_own() -> None:
    """Among many sockets with shared ports, port 0 never chooses a port that another socket has."""
    with ExitStack() as stack:
        others = [stack.enter_context(bound("127.0.0.1", 0, socket.SO_REUSEPORT)) for _ in range(200)]
        taken = {other.getsockname()[1] for other in others}
        # If the option were set during the bind, about 7 of these would have such a port.
        for _ in range(1_000):
            async with opened(reuse_port=True) as (endpoint,):
                assert port_of(endpoint) not in taken


@needs_reuse_port
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
async def test_port_0_with_reuse_port_is_shared_afterwards(host: str) -> None:
    """A second socket with reuse_port can bind the port that port 0 chose, and gets some of the clients."""
    async with (
        opened(host=host, reuse_port=True) as first,
        opened(port_of(first[0]), host=host, reuse_port=True) as second,
    ):
        here = "::1" if ":" in host else "127.0.0.1"
        for _ in range(60):
            with bound(here) as client:
                client.sendto(b"x", (here, port_of(first[0])))
        shares = [len(waiting_in(endpoint)) for endpoint in (*first, *second)]
        assert sum(shares) == 60
        assert min(shares) > 0


def waiting_in(endpoint: Endpoint) -> list[bytes]:
    """Read all datagrams that wait in a socket."""
    found = []
    with socket.socket(fileno=os.dup(endpoint.socket.fileno())) as sock, suppress(BlockingIOError):
        while True:
            found.append(sock.recv(100))
    return found


@needs_reuse_port
async def test_a_port_is_not_shared_without_the_option() -> None:
    """A port that was bound with reuse_port stays closed to sockets without it, and vice versa."""
    for mine, theirs in ((True, False), (False, True)):
        async with opened(reuse_port=mine) as (endpoint,):
            with pytest.raises(OSError, match="in use"):
                await trio_udp.open_endpoints(port_of(endpoint), host="127.0.0.1", reuse_port=theirs)


@needs_reuse_port
async def test_port_0_with_shared_ports_from_configure() -> None:
    """Port 0 gives an unused port even if ``configure`` allows sharing, and the port can be shared later."""

    def share(sock: socket.socket) -> None:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            sock.setsockopt(socket.SOL_SOCKET, option, 1)

    async with opened(configure=share) as (endpoint,):
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            assert endpoint.socket.getsockopt(socket.SOL_SOCKET, option) != 0
        with bound("127.0.0.1", port_of(endpoint), socket.SO_REUSEPORT):
            pass


class Kernel:
    """Opens sockets like a kernel that lacks something in IPv6.

    Args:
      socket_error: The error from opening an IPv6 socket.
      bind_errors: The errors from binding IPv6 sockets, one after the other, before binding succeeds.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, socket_error: int = 0, bind_errors: Iterable[int] = ()) -> None:
        errors = iter(bind_errors)
        self.sockets: list[socket.socket] = []

        def open_socket(family: int, type: int) -> socket.socket:
            if family == socket.AF_INET6 and socket_error:
                raise OSError(socket_error, os.strerror(socket_error))
            error = next(errors, 0) if family == socket.AF_INET6 else 0
            sock = Unbindable(error, family, type) if error else socket.socket(family, type)
            self.sockets.append(sock)
            return sock

        patch.setattr(opening, "socket", types.SimpleNamespace(**{**vars(socket), "socket": open_socket}))

    def count_open(self) -> int:
        return sum(sock.fileno() != -1 for sock in self.sockets)


class Unbindable(socket.socket):
    def __init__(self, error: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._error = error

    def bind(self, address: Any) -> None:
        raise OSError(self._error, os.strerror(self._error))


async def test_port_0_that_is_taken_in_the_other_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the port that the kernel chose for IPv4 is taken for IPv6, its socket is closed and another port is tried."""
    kernel = Kernel(monkeypatch, bind_errors=[errno.EADDRINUSE] * 3)
    async with opened(host=None) as endpoints:
        assert len({port_of(endpoint) for endpoint in endpoints}) == 1
        assert (len(kernel.sockets), kernel.count_open(), len(endpoints)) == (8, 2, 2)


async def test_port_0_that_is_never_free_in_the_other_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for a port that is free in every family ends."""
    kernel = Kernel(monkeypatch, bind_errors=[errno.EADDRINUSE] * 1_000)
    with pytest.raises(OSError, match=r"in use: cannot bind :: port \d+") as info:
        await trio_udp.open_endpoints(0)
    assert info.value.errno == errno.EADDRINUSE
    assert kernel.count_open() == 0


# Failures


async def test_a_port_in_use() -> None:
    """The kernel's error says which address and port is taken."""
    with bound() as other:
        port = other.getsockname()[1]
        with nothing_left_open(), pytest.raises(OSError, match="in use") as info:
            await trio_udp.open_endpoints(port, host="127.0.0.1")
    assert str(info.value) == (
        f"[Errno {errno.EADDRINUSE}] {os.strerror(errno.EADDRINUSE)}: cannot bind 127.0.0.1 port {port}"
    )
    assert type(info.value) is OSError
    assert info.value.errno == errno.EADDRINUSE


async def test_a_port_in_use_in_one_family() -> None:
    """If a port is taken for IPv6, nothing stays bound for IPv4."""
    # A port of both families, so that no other program has it for IPv4.
    both = {endpoint.local_address[0]: endpoint for endpoint in await trio_udp.open_endpoints(0)}
    await both["0.0.0.0"].aclose()
    async with both["::"] as other:
        port = other.local_address[1]
        with nothing_left_open(), pytest.raises(OSError, match=rf"in use: cannot bind :: port {port}$"):
            await trio_udp.open_endpoints(port)
        async with opened(port):
            pass


async def test_an_address_that_is_not_ours() -> None:
    """Binding an address that this machine does not have raises an error that names the address."""
    for host in (NOT_OURS, NOT_OURS_IPV6):
        with nothing_left_open(), pytest.raises(OSError, match=rf": cannot bind {host} port 9$") as info:
            await trio_udp.open_endpoints(9, host=host)
        assert info.value.errno == errno.EADDRNOTAVAIL


async def test_the_class_of_an_error_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that only root may bind raises a PermissionError."""
    Kernel(monkeypatch, bind_errors=[errno.EACCES])
    with pytest.raises(
        PermissionError, match=r"cannot bind ::1 port 53; ports below 1024 need CAP_NET_BIND_SERVICE"
    ) as info:
        await trio_udp.open_endpoints(53, host="::1")
    assert info.value.errno == errno.EACCES


async def test_an_ipv4_address_of_a_name_that_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every IPv4 address of a name must be one of this machine."""
    resolve(monkeypatch, "127.0.0.1", NOT_OURS)
    with nothing_left_open(), pytest.raises(OSError, match=f"cannot bind {NOT_OURS} port"):
        await trio_udp.open_endpoints(0, host="server.example")


@pytest.mark.parametrize("hosts", [("127.0.0.1", NOT_OURS_IPV6), (NOT_OURS_IPV6, "127.0.0.1")])
async def test_an_ipv6_address_of_a_name_that_is_not_ours(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hosts: tuple[str, ...]
) -> None:
    """An IPv6 address of a name that is not of this machine is skipped if another can be bound; the log names it."""
    resolve(monkeypatch, *hosts)
    async with opened(host="server.example") as endpoints:
        assert [endpoint.local_address[0] for endpoint in endpoints] == ["127.0.0.1"]
    (record,) = filter(is_ours, caplog.records)
    assert record.levelno == logging.WARNING
    assert "'server.example'" in record.getMessage()
    assert f"cannot bind {NOT_OURS_IPV6} port" in record.getMessage()


async def test_a_name_with_no_address_of_ours(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If no address of a name can be bound, the first error is raised, and nothing is logged."""
    resolve(monkeypatch, NOT_OURS_IPV6, "2001:db8::2")
    with nothing_left_open(), pytest.raises(OSError, match=f"cannot bind {NOT_OURS_IPV6} port") as info:
        await trio_udp.open_endpoints(0, host="server.example")
    assert info.value.errno == errno.EADDRNOTAVAIL
    assert [*filter(is_ours, caplog.records)] == []


WITHOUT_IPV6: list[Any] = [
    {"socket_error": errno.EAFNOSUPPORT},
    {"bind_errors": [errno.EADDRNOTAVAIL]},
]


@pytest.mark.parametrize("lack", WITHOUT_IPV6)
async def test_every_interface_of_a_machine_without_ipv6(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lack: Any
) -> None:
    """With no host, a family that the machine lacks is skipped without a warning."""
    Kernel(monkeypatch, **lack)
    caplog.set_level(logging.WARNING)
    async with opened(host=None) as endpoints:
        assert [endpoint.local_address[0] for endpoint in endpoints] == ["0.0.0.0"]
    assert [*filter(is_ours, caplog.records)] == []


@pytest.mark.parametrize("lack", WITHOUT_IPV6)
async def test_localhost_of_a_machine_without_ipv6(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lack: Any
) -> None:
    """Without IPv6, localhost is only 127.0.0.1, and the log says so."""
    resolve(monkeypatch, "::1", "127.0.0.1")
    Kernel(monkeypatch, **lack)
    async with opened(host="localhost") as endpoints:
        assert [endpoint.local_address[0] for endpoint in endpoints] == ["127.0.0.1"]
    (record,) = filter(is_ours, caplog.records)
    assert "cannot bind ::1 port" in record.getMessage()


async def test_ipv6_alone_on_a_machine_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that the machine lacks raises an error if it is the only one requested."""
    Kernel(monkeypatch, socket_error=errno.EAFNOSUPPORT)
    with pytest.raises(OSError, match=r"cannot bind ::1 port 9$") as info:
        await trio_udp.open_endpoints(9, host="::1")
    assert info.value.errno == errno.EAFNOSUPPORT


async def test_a_machine_out_of_file_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other error from opening a socket is raised, and nothing stays bound."""
    kernel = Kernel(monkeypatch, socket_error=errno.EMFILE)
    with pytest.raises(OSError, match="cannot bind :: port") as info:
        await trio_udp.open_endpoints(0)
    assert (info.value.errno, len(kernel.sockets), kernel.count_open()) == (errno.EMFILE, 1, 0)


async def test_a_platform_that_cannot_share_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """reuse_port raises ValueError if the platform has no SO_REUSEPORT."""
    kernel = {name: value for name, value in vars(socket).items() if name != "SO_REUSEPORT"}
    monkeypatch.setattr(opening, "socket", types.SimpleNamespace(**kernel))
    with pytest.raises(ValueError, match="reuse_port"):
        await trio_udp.open_endpoints(0, host="127.0.0.1", reuse_port=True)


async def test_an_engine_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TRIO_UDP_ENGINE that names no engine raises ValueError, and the sockets are closed."""
    monkeypatch.setenv("TRIO_UDP_ENGINE", "steam")
    with pytest.raises(ValueError, match="TRIO_UDP_ENGINE"):
        await trio_udp.open_endpoints(0, host="127.0.0.1")  # a socket left open would be a ResourceWarning


# configure


async def test_configure_is_called_with_each_socket_before_it_is_bound() -> None:
    """``configure`` gets each socket unbound, after all other options were set."""
    seen = []

    def configure(sock: socket.socket) -> None:
        unbound = sock.getsockname()[1] == 0
        seen.append((type(sock), unbound, sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) != 0))

    with bound() as other:
        port = other.getsockname()[1]
    async with opened(port, host=None, reuse_port=True, configure=configure):
        assert seen == [(socket.socket, True, True)] * 2


async def test_configure_overrides_our_options() -> None:
    """An option that ``configure`` sets overrides ours."""
    async with opened(send_buffer=20_000) as (before,):
        ours = before.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)

    def configure(sock: socket.socket) -> None:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == ours
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 40_000)

    async with opened(send_buffer=20_000, configure=configure) as (endpoint,):
        assert endpoint.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * ours


async def test_configure_that_binds_to_both_families() -> None:
    """An IPv6 socket receives IPv6 only, unless ``configure`` says otherwise."""

    def configure(sock: socket.socket) -> None:
        assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)

    async with opened(host="::", configure=configure) as (endpoint,):
        assert endpoint.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 0


async def test_an_error_of_configure() -> None:
    """If ``configure`` raises, all opened sockets are closed, and the error is raised unchanged."""
    errors = [ZeroDivisionError("mine"), OSError(errno.EADDRINUSE, "mine"), OSError(errno.EADDRNOTAVAIL, "mine")]
    for error in errors:
        calls = []

        def configure(sock: socket.socket) -> None:
            calls.append(sock.family)  # noqa: B023
            if sock.family == socket.AF_INET6:
                raise error  # noqa: B023

        with nothing_left_open(), pytest.raises((ZeroDivisionError, OSError)) as info:
            await trio_udp.open_endpoints(0, configure=configure)
        assert info.value is error
        assert calls == [socket.AF_INET, socket.AF_INET6]


async def configure_async(sock: socket.socket) -> None: ...


class ConfigureAsync:
    async def __call__(self, sock: socket.socket) -> None: ...


@pytest.mark.parametrize("configure", [configure_async, ConfigureAsync(), lambda sock: configure_async(sock), 5, "x"])
async def test_configure_is_a_plain_function(configure: Any) -> None:
    """An async ``configure``, or one that is not callable, raises TypeError, and nothing stays open."""
    with pytest.raises(TypeError, match="configure must be a"):
        await trio_udp.open_endpoints(0, host="127.0.0.1", configure=configure)
    with pytest.raises(TypeError, match="configure must be a"):
        await trio_udp.connect("127.0.0.1", 9, configure=configure)


# Buffers


async def test_both_ends_ask_for_4_mib() -> None:
    """Endpoints and connections request the same receive buffer, and show it in their statistics."""
    async with opened() as (endpoint,), await trio_udp.connect(*endpoint.local_address) as connection:
        for statistics in (endpoint.statistics(), connection.statistics()):
            assert statistics.receive_buffer_requested == FOUR_MIB
        assert connection.statistics().receive_buffer == endpoint.statistics().receive_buffer


async def test_both_ends_take_a_size() -> None:
    """receive_buffer is the size that is requested from the kernel."""
    async with (
        opened(receive_buffer=20_000) as (endpoint,),
        await trio_udp.connect(*endpoint.local_address, receive_buffer=20_000) as connection,
    ):
        for statistics in (endpoint.statistics(), connection.statistics()):
            assert (statistics.receive_buffer, statistics.receive_buffer_requested) == (20_000, 20_000)


@linux_only
async def test_a_small_receive_buffer_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """If the kernel grants less than half of the requested size, the log names the setting to change."""
    for size, connecting in ((2_000_000_001, False), (2_000_000_002, True)):  # each message is logged once
        if connecting:
            async with await trio_udp.connect("127.0.0.1", 9, receive_buffer=size):
                pass
        else:
            async with opened(receive_buffer=size):
                pass
        (record,) = filter(is_ours, caplog.records)
        assert f"sysctl -w net.core.rmem_max={size}" in record.getMessage()
        caplog.clear()


@linux_only
async def test_no_warning_about_a_buffer_that_configure_chose(caplog: pytest.LogCaptureFixture) -> None:
    """The log does not warn about a small buffer that the program itself has set."""

    def configure(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)

    async with opened(receive_buffer=2_000_000_003, configure=configure) as (endpoint,):
        assert endpoint.statistics().receive_buffer == 20_000
    assert [*filter(is_ours, caplog.records)] == []


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "port must be an int", {"port": "9999"}),
        (ValueError, "port must be from 0 to 65535", {"port": 65_536}),
        (TypeError, "max_datagram_size must be an int", {"max_datagram_size": 1.5}),
        (ValueError, "max_datagram_size must be from 1 to 65535", {"max_datagram_size": 0}),
        (TypeError, "receive_buffer must be an int or None", {"receive_buffer": "1M"}),
        (ValueError, "receive_buffer must be from 1 to", {"receive_buffer": 2**31}),
        (ValueError, "send_buffer must be from 1 to", {"send_buffer": 0}),
    ],
)
async def test_wrong_arguments(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    """A wrong argument raises at the call, with one line that names it."""
    with pytest.raises(error, match=f"^{message}") as info:
        await trio_udp.open_endpoints(**{"port": 0, **arguments})
    assert "\n" not in str(info.value)


# connect


async def test_connecting_to_a_peer_address() -> None:
    """connect takes an IPv6 address in four parts, as sockets return it, and an IPv4 address in two."""
    for host in ("::1", "127.0.0.1"):
        with bound(host) as server:
            async with await trio_udp.connect(*server.getsockname()) as connection:
                assert connection.peer_address == server.getsockname()


async def test_connecting_with_a_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scope of a link-local peer comes from scope_id or, without it, from the host."""
    asked = []

    class Socket(socket.socket):
        def connect(self, address: Any) -> None:
            asked.append(address)
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    kernel = types.SimpleNamespace(**{**vars(socket), "socket": Socket})
    monkeypatch.setattr(opening, "socket", kernel)
    index = socket.if_nametoindex("lo")
    for host, more in ((f"fe80::1%{index}", ()), ("fe80::1", (0, index)), (f"fe80::1%{index + 1}", (7, index))):
        with pytest.raises(OSError, match=rf"cannot connect to fe80::1%{index} port 9$"):
            await trio_udp.connect(host, 9, *more)
    assert asked == [("fe80::1", 9, 0, index), ("fe80::1", 9, 0, index), ("fe80::1", 9, 7, index)]


async def test_a_scope_is_for_ipv6_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scope or flow information raises ValueError for an IPv4 peer; for a name, it selects the IPv6 addresses."""
    for more in ((1, 0), (0, 1)):
        with pytest.raises(ValueError, match="for IPv6 only"):
            await trio_udp.connect("127.0.0.1", 9, *more)
    async with await trio_udp.connect("127.0.0.1", 9, 0, 0):
        pass
    resolve(monkeypatch, "127.0.0.1", "::1")
    async with await trio_udp.connect("localhost", 9, 1, 0) as connection:
        assert connection.peer_address[0] == "::1"


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (TypeError, {"flowinfo": "1"}),
        (ValueError, {"flowinfo": 1 << 20}),
        (ValueError, {"scope_id": -1}),
        (ValueError, {"scope_id": 1 << 32}),
        (ValueError, {"receive_buffer": 0}),
        (ValueError, {"local_address": ("localhost", 0)}),
        (ValueError, {"local_address": ("127.0.0.1", 0)}),
    ],
)
async def test_wrong_arguments_of_connect(error: type[Exception], arguments: dict[str, Any]) -> None:
    """connect checks its arguments, and that the local address is a numeric one of the peer's family."""
    with pytest.raises(
        error, match=next(iter(arguments)) if "localhost" not in str(arguments) else "an address is a tuple"
    ):
        await trio_udp.connect("::1", 9, **arguments)


async def test_connecting_from_an_address_that_is_not_ours() -> None:
    """The kernel's error names the local address, and the socket is closed."""
    with nothing_left_open(), pytest.raises(OSError, match=f"cannot bind {NOT_OURS} port 0$") as info:
        await trio_udp.connect("127.0.0.1", 9, local_address=(NOT_OURS, 0))
    assert info.value.errno == errno.EADDRNOTAVAIL


async def test_connecting_fails_with_the_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the kernel connects to no address of a name, the error is the first one, and names the address."""
    resolve(monkeypatch, "127.255.255.255", "255.255.255.255")
    with (
        nothing_left_open(),
        pytest.raises(PermissionError, match=r"connect to 127\.255\.255\.255 port 9; .*SO_BROADCAST"),
    ):
        await trio_udp.connect("server.example", 9)


async def test_connecting_to_the_address_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address of a name that the kernel can connect to is the peer."""
    resolve(monkeypatch, "127.255.255.255", "127.0.0.1")
    async with await trio_udp.connect("server.example", 9) as connection:
        assert connection.peer_address == ("127.0.0.1", 9)


async def test_connecting_from_the_family_of_the_local_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """connect chooses the address of a name that has the family of the local address."""
    resolve(monkeypatch, "::1", "127.0.0.1")
    async with await trio_udp.connect("localhost", 9, local_address=("127.0.0.1", 0)) as connection:
        assert connection.peer_address == ("127.0.0.1", 9)


async def test_connecting_to_a_mapped_address() -> None:
    """connect takes an IPv4 address in the mapped form of a dual-stack socket."""
    with bound() as server:
        server.settimeout(5)
        async with await trio_udp.connect("::ffff:127.0.0.1", server.getsockname()[1], 0, 0) as connection:
            await connection.send(b"x")
            assert await trio.to_thread.run_sync(server.recv, 100) == b"x"


async def test_configure_of_a_connection() -> None:
    """connect calls ``configure`` with the socket before it is bound; an error in ``configure`` closes the socket."""
    seen = []

    def allow_broadcast(sock: socket.socket) -> None:
        seen.append(sock.getsockname()[1])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)

    async with await trio_udp.connect("127.255.255.255", 9, configure=allow_broadcast, local_address=("127.0.0.1", 0)):
        assert seen == [0]

    def fail(sock: socket.socket) -> None:
        raise OSError(errno.EPERM, "mine")

    with nothing_left_open(), pytest.raises(PermissionError, match=r"mine$"):
        await trio_udp.connect("127.0.0.1", 9, configure=fail)


# Two real network namespaces


Link = Callable[[str], object]


@pytest.fixture
def link() -> Iterator[Link]:
    """Two network namespaces with a wire; ``ip`` runs in the first, in which this thread opens its sockets."""
    with machines("ours", "theirs") as (ours, theirs):
        ours.wire_to(theirs)
        for machine in (ours, theirs):
            machine.ip("link set wire up")
        with inside(ours.name):
            yield ours.ip


@needs_namespaces
async def test_an_address_that_is_still_tentative(
    link: Link, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At boot the IPv6 address of a name may not be usable yet: the log says that it is not served."""
    link("address add 192.0.2.1/24 dev wire")
    link("address add 2001:db8::1/64 dev wire")  # tentative for a second or two
    resolve(monkeypatch, "192.0.2.1", "2001:db8::1")
    async with opened(host="server.example") as endpoints:
        assert [endpoint.local_address[0] for endpoint in endpoints] == ["192.0.2.1"]
    (record,) = filter(is_ours, caplog.records)
    assert (record.levelno, "2001:db8::1" in record.getMessage()) == (logging.WARNING, True)


@needs_namespaces
async def test_connecting_from_a_link_local_address(link: Link) -> None:
    """A local address without a scope is on the link of the peer."""
    link("address add fe80::99/64 dev wire nodad")
    index = socket.if_nametoindex("wire")
    for local in (("fe80::99", 0), ("fe80::99", 0, 0, index)):
        async with await trio_udp.connect("fe80::2", 9, 0, index, local_address=local) as connection:
            assert connection.peer_address == ("fe80::2", 9, 0, index)
            assert connection.local_address[::3] == ("fe80::99", index)


@pytest.mark.parametrize(
    "way", [lambda: trio_udp.open_endpoints(0, host=UNKNOWN), lambda: trio_udp.connect(UNKNOWN, 1)]
)
async def test_an_unknown_name_is_in_the_error(way: Callable[[], Awaitable[object]]) -> None:
    """The error for a name that cannot be resolved says which name."""
    with pytest.raises(socket.gaierror, match=f"'{UNKNOWN}'"):
        await way()
