"""Errors of the network as Linux itself gives them: packet filters, missing routes, small links, ICMP, no interface.

Two network namespaces, joined by a wire, stand for a server's machine and its clients'. A socket belongs to the
namespace in which it was opened, so the servers here run in this process like all others. Needs root, ip(8) and nft(8).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio

from trio_udp import Client, Connection, Endpoint, Server, serve_endpoints
from trio_udp._endpoints import Address

from .conftest import check_adds_up

if sys.platform != "linux":
    pytest.skip("needs Linux", allow_module_level=True)
if os.geteuid() != 0:
    pytest.skip("needs root, for network namespaces", allow_module_level=True)
for tool in ("ip", "nft"):
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("engine")

# Addresses for documentation. The clients' machine has several, one for each client; to the last of them the server's
# has no route, unless a test gives it one.
PORT = 53
OURS, OURS_TOO, OURS_IPV6, OURS_TOO_IPV6 = "192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"
ALICE, BOB, BOB_IPV6 = "192.0.2.11", "192.0.2.12", "2001:db8::12"
FAR = "198.51.100.13"

# From linux/in.h. Let no router, and not this machine, cut datagrams into fragments; tell of all errors.
IP_MTU_DISCOVER, IP_PMTUDISC_DO = 10, 2
IP_RECVERR = 11

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)  # os.setns is there since Python 3.12


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """What is opened meanwhile is opened there."""
    with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{namespace}") as there:
        if _libc.setns(there.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
        try:
            yield
        finally:
            if _libc.setns(home.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "cannot leave again")


@attrs.frozen
class Machine:
    """A network namespace."""

    name: str

    def ip(self, command: str) -> str:
        return run("ip", "-netns", self.name, *command.split())

    def filter(self, hook: str, rule: str) -> None:
        """Add a rule of nftables for all packets that come in, or go out."""
        chain = f"add table inet test; add chain inet test {hook} {{ type filter hook {hook} priority 0; }}"
        with inside(self.name):
            run("nft", f"{chain}; add rule inet test {hook} {rule}")

    def open_filters(self) -> None:
        with inside(self.name):
            run("nft", "flush", "ruleset")

    def set(self, setting: str, value: int) -> None:
        with inside(self.name):
            Path("/proc/sys/net", setting).write_text(str(value))

    def count(self, counter: str) -> int:
        """What the kernel has counted, by the names of /proc/net/snmp: ``Icmp InDestUnreachs``."""
        protocol, name = counter.split()
        with inside(self.name):
            lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
        names, values = (line.split() for line in lines if line.startswith(f"{protocol}:"))
        return int(values[names.index(name)])

    def socket(self, host: str, port: int = 0, family: int = socket.AF_INET) -> socket.socket:
        with inside(self.name):
            sock = socket.socket(family, socket.SOCK_DGRAM)
            sock.setblocking(False)
            try:
                sock.bind((host, port))
            except BaseException:
                sock.close()
                raise
            return sock


@attrs.frozen
class Network:
    """Two machines, each with an interface called ``wire``."""

    ours: Machine
    theirs: Machine
    _sockets: list[socket.socket] = attrs.field(factory=list)

    def client(self, host: str, server: str = OURS) -> Peer:
        """Open a socket on the clients' machine."""
        sock = self.theirs.socket(host, family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._sockets.append(sock)
        return Peer(sock, (server, PORT))

    async def until_up(self) -> None:
        await until(lambda: all("state UP" in machine.ip("link show wire") for machine in (self.ours, self.theirs)))


@attrs.frozen
class Peer:
    """A client, as seen from the clients' machine."""

    socket: socket.socket
    server: Address

    def send(self, *payloads: bytes) -> None:
        """Send datagrams, before the server runs again."""
        for payload in payloads:
            self.socket.sendto(payload, self.server)

    async def receive(self) -> bytes:
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(self.socket)
        return self.socket.recv(65_535)

    async def ask(self, *payloads: bytes) -> list[bytes]:
        """Send datagrams, and return as many answers."""
        self.send(*payloads)
        return [await self.receive() for _ in payloads]


@pytest.fixture
async def network() -> AsyncIterator[Network]:
    ours, theirs = (Machine(f"trio-udp-{os.getpid()}-{whose}") for whose in ("ours", "theirs"))
    network = Network(ours, theirs)
    try:
        for machine in (ours, theirs):
            try:
                run("ip", "netns", "add", machine.name)
            except OSError as error:  # root in a container may not be allowed to
                pytest.skip(str(error))
        run(*f"ip link add wire netns {ours.name} type veth peer name wire netns {theirs.name}".split())
        # Let the server's machine take datagrams from where it has no route to.
        for setting in ("all", "wire"):
            ours.set(f"ipv4/conf/{setting}/rp_filter", 0)
        theirs.set("ipv4/icmp_ratelimit", 0)
        addresses = {ours: [OURS, OURS_TOO, OURS_IPV6, OURS_TOO_IPV6], theirs: [ALICE, BOB, BOB_IPV6, FAR]}
        for machine, hosts in addresses.items():
            for host in hosts:
                rest = "/64 nodad" if ":" in host else "/24"
                machine.ip(f"address add {host}{rest} dev wire")
            machine.ip("link set lo up")
            machine.ip("link set wire up")
        await network.until_up()
        yield network
    finally:
        for sock in network._sockets:
            sock.close()
        for machine in (ours, theirs):
            with suppress(OSError):  # never made
                run("ip", "netns", "delete", machine.name)


Start = Callable[..., Awaitable[Server]]


@pytest.fixture
def start(network: Network, nursery: trio.Nursery) -> Start:
    """Start a server on the server's machine."""

    async def echo(client: Client) -> None:
        async for payload in client:
            await client.send(payload)

    async def start(handler: Callable[[Client], Awaitable[object]] = echo, host: str = OURS) -> Server:
        sock = network.ours.socket(host, PORT, socket.AF_INET6 if ":" in host else socket.AF_INET)
        server: Server = await nursery.start(partial(serve_endpoints, handler, [Endpoint.from_socket(sock)]))
        return server

    return start


async def until(condition: Callable[[], object]) -> None:
    """Wait for what the kernel does by itself."""
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.001)


def until_now(condition: Callable[[], object]) -> None:
    """The same, while no other task may run."""
    for _ in range(5_000):
        if condition():
            return
        time.sleep(0.001)
    raise TimeoutError


def client_at(server: Server, host: str) -> Client:
    (client,) = (client for client in server.clients if client.peer_address[0] == host)
    return client


def check(server: Server, *, received: int, sent: int, errors: dict[str, int]) -> None:
    """Nothing else has happened, and none of it has been dropped."""
    s = server.statistics()
    assert (s.received, s.delivered, s.sent, s.errors) == (received, received, sent, errors)
    assert (s.send_errors, s.receive_errors, s.handler_errors) == (sum(errors.values()), 0, 0)
    check_adds_up(server)


def check_client(client: Client, *, sent: int, errors: dict[str, int]) -> None:
    s = client.statistics()
    assert (s.sent, s.send_errors, s.errors) == (sent, sum(errors.values()), errors)


@pytest.mark.parametrize("host", [OURS, "0.0.0.0"])
async def test_a_packet_filter(network: Network, start: Start, host: str) -> None:
    """What it does not let out to one client is that client's; others are answered, and so is this one afterwards."""
    server = await start(host=host)
    alice, bob = network.client(ALICE), network.client(BOB)
    network.ours.filter("output", f"ip daddr {ALICE} drop")
    for _ in range(3):
        alice.send(b"1", b"2")
        assert await bob.ask(b"1", b"2") == [b"1", b"2"]
    check(server, received=12, sent=6, errors={"EPERM": 6})
    check_client(client_at(server, ALICE), sent=0, errors={"EPERM": 6})
    check_client(client_at(server, BOB), sent=6, errors={})
    network.ours.open_filters()
    assert await alice.ask(b"3") == [b"3"]
    check(server, received=13, sent=7, errors={"EPERM": 6})


@pytest.mark.parametrize("host", [OURS, "0.0.0.0"])
@pytest.mark.parametrize(
    ("route", "error"),
    [
        ("none", "ENETUNREACH"),
        ("unreachable", "EHOSTUNREACH"),
        ("prohibit", "EACCES"),
        ("blackhole", "EINVAL"),
    ],
)
async def test_no_way_back(network: Network, start: Start, host: str, route: str, error: str) -> None:
    """A client, or whoever forges its address, that cannot be answered harms nobody else."""
    server = await start(host=host)
    if route != "none":
        network.ours.ip(f"route add {route} {FAR}")
    far, bob = network.client(FAR), network.client(BOB)
    for _ in range(3):
        far.send(b"1", b"2")
        assert await bob.ask(b"1", b"2") == [b"1", b"2"]
    check(server, received=12, sent=6, errors={error: 6})
    check_client(client_at(server, FAR), sent=0, errors={error: 6})
    check_client(client_at(server, BOB), sent=6, errors={})
    network.ours.ip(f"route replace {FAR} dev wire")
    assert await far.ask(b"3") == [b"3"]


async def test_a_datagram_too_long_for_the_link(network: Network, start: Start) -> None:
    """If it must not be cut into fragments it is not sent; the shorter ones before and after it are."""

    async def handler(client: Client) -> None:
        async for _ in client:
            await client.send_many([b"short", bytes(1_000), b"too"])

    server = await start(handler)
    server.endpoints[0].socket.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
    network.ours.ip("link set wire mtu 576")
    alice = network.client(ALICE)
    assert await alice.ask(b"x", b"x") == [b"short", b"too"]
    assert [await alice.receive() for _ in range(2)] == [b"short", b"too"]
    check(server, received=2, sent=4, errors={"EMSGSIZE": 2})
    check_client(client_at(server, ALICE), sent=4, errors={"EMSGSIZE": 2})


async def test_replies_of_one_size_over_a_small_link(network: Network, start: Start) -> None:
    """However the engine would have sent them otherwise, they arrive, in fragments, and others are answered as ever."""
    replies = [b"%04d" % i * 250 for i in range(20)]

    async def handler(client: Client) -> None:
        async for _ in client:
            await client.send_many(replies)

    server = await start(handler)
    network.ours.ip("link set wire mtu 576")
    alice, bob = network.client(ALICE), network.client(BOB)
    for peer in (alice, bob):
        peer.send(b"x")
    for peer in (alice, bob):
        assert [await peer.receive() for _ in replies] == replies
    assert network.ours.count("Ip FragOKs") == 40
    check(server, received=2, sent=40, errors={})


@pytest.mark.parametrize("host", [OURS, "0.0.0.0"])
async def test_a_source_port_of_zero(network: Network, start: Start, host: str) -> None:
    """Nobody can answer that: it is counted, for that client alone."""
    server = await start(host=host)
    alice, bob = network.client(ALICE), network.client(BOB)
    network.theirs.filter("output", f"ip saddr {ALICE} udp sport set 0")
    for _ in range(3):
        alice.send(b"1", b"2")
        assert await bob.ask(b"1", b"2") == [b"1", b"2"]
    check(server, received=12, sent=6, errors={"EINVAL": 6})
    assert client_at(server, ALICE).peer_address == (ALICE, 0)
    check_client(client_at(server, ALICE), sent=0, errors={"EINVAL": 6})
    check_client(client_at(server, BOB), sent=6, errors={})


ICMP = ["port-unreachable", "host-unreachable", "net-unreachable", "admin-prohibited"]


@pytest.mark.parametrize("answer", ICMP)
async def test_icmp_at_a_server(network: Network, start: Start, answer: str) -> None:
    """A socket with many peers is not told: nothing is counted, and everybody else is answered."""
    server = await start()
    alice, bob = network.client(ALICE), network.client(BOB)
    network.theirs.filter("input", f"ip daddr {ALICE} udp sport {PORT} reject with icmp type {answer}")
    for count in range(1, 4):
        alice.send(b"x")
        await until(lambda: network.ours.count("Icmp InDestUnreachs") == count)  # noqa: B023
        assert await bob.ask(b"1", b"2") == [b"1", b"2"]
    check(server, received=9, sent=9, errors={})


async def test_icmp_at_a_server_that_asks_for_it(network: Network, start: Start) -> None:
    """With IP_RECVERR the answer to what was sent to one client may meet the next, which is answered all the same."""
    server = await start()
    server.endpoints[0].socket.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
    alice, bob = network.client(ALICE), network.client(BOB)
    assert await alice.ask(b"x") + await bob.ask(b"x") == [b"x"] * 2
    network.theirs.filter("input", f"ip daddr {ALICE} udp sport {PORT} reject with icmp type port-unreachable")
    for count in range(1, 6):
        client_at(server, ALICE).send_nowait(b"y")
        until_now(lambda: network.ours.count("Icmp InDestUnreachs") == count)  # noqa: B023
        client_at(server, BOB).send_nowait(b"z")
        assert await bob.receive() == b"z"
    s = server.statistics()
    assert (s.sent, s.send_errors, s.errors) == (12, 0, {"ECONNREFUSED": 5})
    assert s.receive_errors == 5


async def test_clients_that_are_gone(network: Network, start: Start) -> None:
    """The answer to a reply to a port that is closed by now disturbs nobody."""
    server = await start()
    bob = network.client(BOB)
    for count in range(1, 6):
        gone = network.client(ALICE)
        gone.send(b"x")
        gone.socket.close()
        assert await bob.ask(b"y") == [b"y"]
        await until(lambda: network.ours.count("Icmp InDestUnreachs") == count)  # noqa: B023
    assert await bob.ask(b"z") == [b"z"]
    check(server, received=11, sent=11, errors={})


@pytest.mark.parametrize("answer", ["port-unreachable", "host-unreachable", "admin-prohibited"])
async def test_icmp_at_a_connection(network: Network, answer: str) -> None:
    """A refusal is raised once; what else is certain is counted; what may pass is not even told."""
    theirs = network.theirs.socket(BOB, PORT)
    network._sockets.append(theirs)
    network.theirs.filter("input", f"udp dport {PORT} reject with icmp type {answer}")
    sock = network.ours.socket(OURS)
    sock.connect((BOB, PORT))
    endpoint = Endpoint.from_socket(sock)
    endpoint.tells_refusals = True  # as connect() does
    async with Connection(endpoint, endpoint.route((BOB, PORT))) as connection:
        await connection.send(b"x")
        await until(lambda: network.ours.count("Icmp InDestUnreachs") == 1)
        if answer == "port-unreachable":
            with pytest.raises(ConnectionRefusedError):
                connection.receive_nowait()
        for _ in range(2):
            with pytest.raises(trio.WouldBlock):
                connection.receive_nowait()
        s = connection.statistics()
        told = {"port-unreachable": {"ECONNREFUSED": 1}, "admin-prohibited": {"EHOSTUNREACH": 1}}
        assert (s.sent, s.send_errors, s.errors) == (1, 0, told.get(answer, {}))
        network.theirs.open_filters()
        await connection.send(b"y")
        peer = trio.socket.from_stdlib_socket(theirs)
        with trio.fail_after(5):
            payload, address = await peer.recvfrom(100)
            assert payload == b"y"
            await peer.sendto(b"z", address)
            assert await connection.receive() == b"z"


@pytest.mark.parametrize("host", [OURS, "0.0.0.0"])
async def test_an_interface_that_goes_down_and_up(network: Network, start: Start, host: str) -> None:
    """What cannot be sent meanwhile is counted; then the same clients are answered again."""
    server = await start(host=host)
    bob = network.client(BOB)
    assert await bob.ask(b"1") == [b"1"]
    for down in range(1, 3):
        network.ours.ip("link set wire down")
        await client_at(server, BOB).send_many([b"x"] * 10)
        network.ours.ip("link set wire up")
        await network.until_up()
        assert await bob.ask(b"2") == [b"2"]
        check(server, received=1 + down, sent=1 + down, errors={"ENETUNREACH": 10 * down})
        check_client(client_at(server, BOB), sent=1 + down, errors={"ENETUNREACH": 10 * down})


@pytest.mark.parametrize(
    ("everywhere", "host", "removed", "peer", "error"),
    [
        ("0.0.0.0", OURS, OURS_TOO, BOB, "ENETUNREACH"),
        ("::", OURS_IPV6, OURS_TOO_IPV6, BOB_IPV6, "EINVAL"),
    ],
)
async def test_a_local_address_that_is_removed(
    network: Network, start: Start, everywhere: str, host: str, removed: str, peer: str, error: str
) -> None:
    """Only who has written to that address cannot be answered, until it is there again."""
    server = await start(host=everywhere)
    lost, kept = network.client(peer, removed), network.client(peer, host)
    assert await lost.ask(b"1") + await kept.ask(b"1") == [b"1"] * 2
    length = 64 if ":" in host else 24
    network.ours.ip(f"address delete {removed}/{length} dev wire")
    to_lost, to_kept = sorted(server.clients, key=lambda client: client.local_address[0] != removed)
    for _ in range(3):
        await to_lost.send(b"2")
        await to_kept.send(b"3")
        assert await kept.receive() == b"3"
    check(server, received=2, sent=5, errors={error: 3})
    check_client(to_lost, sent=1, errors={error: 3})
    check_client(to_kept, sent=4, errors={})
    network.ours.ip(f"address add {removed}/{length} dev wire {'nodad' if ':' in host else ''}")
    assert await lost.ask(b"4") == [b"4"]
