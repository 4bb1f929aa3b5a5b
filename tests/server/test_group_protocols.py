"""Protocols that use groups and broadcast: DHCP and SSDP, as server and as client, and Wake-on-LAN."""

from __future__ import annotations

import shutil
import socket
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import trio

if sys.platform != "linux":
    pytest.skip("needs Linux", allow_module_level=True)

from trio_udp import Address, Client, Datagram, Server, datagram_handler, open_endpoints, serve

from ..conftest import check_adds_up
from ..namespaces import Machine, inside, machines, needs_namespaces

pytestmark = [needs_namespaces, pytest.mark.usefixtures("engine")]

WIRES = {"one": 1, "two": 2}


@pytest.fixture
async def wired() -> AsyncIterator[tuple[Machine, Machine]]:
    """Our machine, on which the test runs, and another one, with two wires between them. Only ours has addresses."""
    with machines("ours", "theirs") as (ours, theirs), ExitStack() as home:
        for wire, number in WIRES.items():
            ours.wire_to(theirs, wire)
            ours.ip(f"address add 10.0.{number}.1/24 brd + dev {wire}")
            for machine in (ours, theirs):
                machine.ip(f"link set {wire} up")
        ours.wait_until_up(*WIRES)
        home.enter_context(inside(ours.name))
        yield ours, theirs


def allow_broadcast(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)


# DHCP: RFC 2131

COOKIE = b"\x63\x82\x53\x63"
MESSAGE_TYPE, DISCOVER, OFFER, REQUEST, ACK = 53, 1, 2, 3, 5


def dhcp_options(message: bytes) -> dict[int, bytes]:
    options, at = {}, 240
    while message[at] != 255:
        if message[at] == 0:
            at += 1
            continue
        options[message[at]] = message[at + 2 : at + 2 + message[at + 1]]
        at += 2 + message[at + 1]
    return options


def dhcp_answer(message: bytes, own: str) -> bytes | None:
    """Offer address 100 of the network of our own address, or acknowledge it."""
    if message[0] != 1 or message[236:240] != COOKIE:
        return None
    answer = {DISCOVER: OFFER, REQUEST: ACK}.get(dhcp_options(message)[MESSAGE_TYPE][0])
    if answer is None:
        return None
    offered = socket.inet_aton(own.rpartition(".")[0] + ".100")
    head = b"\2" + message[1:12] + bytes(4) + offered + socket.inet_aton(own) + message[24:28] + message[28:236]
    options = {
        MESSAGE_TYPE: bytes([answer]),
        54: socket.inet_aton(own),
        51: struct.pack("!I", 60),
        1: b"\xff\xff\xff\0",
    }
    return head + COOKIE + b"".join(bytes([code, len(value)]) + value for code, value in options.items()) + b"\xff"


async def serve_dhcp(client: Client) -> None:
    async for message in client:
        answer = dhcp_answer(message, client.local_address[0])
        if answer is not None:
            await client.server.send_to(answer, ("255.255.255.255", 68), local_address=client.local_address)


@datagram_handler
def answer_dhcp(datagram: Datagram) -> None:
    answer = dhcp_answer(datagram.payload, datagram.local_address[0])
    if answer is not None:
        datagram.endpoint.send_to_nowait(answer, ("255.255.255.255", 68), local_address=datagram.local_address)


# How both programs print their address.
SCRIPT = """#!/bin/sh
[ "$1" = bound ] && echo "lease $ip $serverid"
[ "$reason" = BOUND ] && echo "lease $new_ip_address $new_dhcp_server_identifier"
exit 0
"""
UDHCPC = ["busybox", "udhcpc", "-f", "-q", "-n", "-t", "5", "-T", "1", "-s"]
DHCLIENT = ["dhclient", "-4", "-1", "-d", "-q", "-sf"]


@pytest.mark.parametrize("handler", [serve_dhcp, answer_dhcp])
@pytest.mark.parametrize("program", ["udhcpc", "dhclient"])
async def test_dhcp_on_two_interfaces(
    wired: tuple[Machine, Machine], nursery: trio.Nursery, tmp_path: Path, program: str, handler: Any
) -> None:
    """DHCP clients on two interfaces get an address each, from the server's interface to them."""
    if shutil.which({"udhcpc": "busybox"}.get(program, program)) is None:
        pytest.skip(f"needs {program}")
    _, theirs = wired
    server: Server = await nursery.start(partial(serve, handler, 67, host="0.0.0.0", configure=allow_broadcast))
    script = tmp_path / "script"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    leases = {}

    async def ask(wire: str) -> None:
        files = ["-lf", f"{tmp_path}/{wire}.leases", "-pf", f"{tmp_path}/{wire}.pid", wire]
        command = [*UDHCPC, str(script), "-i", wire] if program == "udhcpc" else [*DHCLIENT, str(script), *files]
        process = await trio.lowlevel.open_process(["ip", "netns", "exec", theirs.name, *command], stdout=PIPE)
        assert process.stdout is not None
        output = b""
        try:
            with trio.fail_after(15):
                while b"lease " not in output or not output.endswith(b"\n"):
                    output += await process.stdout.receive_some()
        finally:
            process.terminate()
            await process.wait()
            await process.stdout.aclose()
        leases[wire] = output.partition(b"lease ")[2].decode().split()[:2]

    async with trio.open_nursery() as asking:
        for wire in WIRES:
            asking.start_soon(ask, wire)
    assert leases == {wire: [f"10.0.{number}.100", f"10.0.{number}.1"] for wire, number in WIRES.items()}
    s = server.statistics()
    assert (s.sent, s.send_errors, s.refused_source, s.handler_errors) == (s.received, 0, 0, 0)
    check_adds_up(server)


# SSDP: UPnP Device Architecture 2.0, section 1

SSDP = ("239.255.255.250", 1900)
SEARCH = b'M-SEARCH * HTTP/1.1\r\nHOST: 239.255.255.250:1900\r\nMAN: "ssdp:discover"\r\nMX: 1\r\nST: ssdp:all\r\n\r\n'


async def respond(sock: trio.socket.SocketType, name: bytes) -> None:
    """Answer searches as a device does: one datagram to the peer that asks."""
    while True:
        search, address = await sock.recvfrom(65_535)
        assert search == SEARCH
        await sock.sendto(b"HTTP/1.1 200 OK\r\nST: upnp:rootdevice\r\nUSN: uuid:%b\r\n\r\n" % name, address)


async def test_ssdp_discovery(wired: tuple[Machine, Machine], nursery: trio.Nursery) -> None:
    """An endpoint without a server asks a group on two interfaces in turn, and receives answers from many devices."""
    _, theirs = wired
    with ExitStack() as closing:
        for wire, number in WIRES.items():
            theirs.ip(f"address add 10.0.{number}.2/24 dev {wire}")
            for device in (b"lamp", b"printer"):
                with inside(theirs.name):
                    sock = closing.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.setsockopt(socket.SOL_SOCKET, 25, wire.encode())  # SO_BINDTODEVICE
                sock.bind(SSDP)
                membership = socket.inet_aton(SSDP[0]) + struct.pack("@4xI", theirs.index(wire))
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
                nursery.start_soon(respond, trio.socket.from_stdlib_socket(sock), device)
        (endpoint,) = await open_endpoints(0, host="0.0.0.0")
        async with endpoint:
            endpoint.multicast_hops = 2
            found: set[tuple[Address, bytes]] = set()
            with trio.fail_after(5):
                for wire in WIRES:
                    endpoint.multicast_interface = wire
                    await endpoint.send_to(SEARCH, SSDP)
                while len(found) < 4:
                    datagram = await endpoint.receive()
                    found.add((datagram.peer_address, datagram.payload.split(b"uuid:")[1].strip()))
        nursery.cancel_scope.cancel()
    assert found == {
        ((f"10.0.{number}.2", 1900), device) for number in WIRES.values() for device in (b"lamp", b"printer")
    }


# Wake-on-LAN


@pytest.mark.parametrize("wire", WIRES)
async def test_wake_on_lan(wired: tuple[Machine, Machine], wire: str) -> None:
    """A magic packet leaves by broadcast: on the interface of local_address, or on the interface of a network."""
    _, theirs = wired
    magic = b"\xff" * 6 + bytes.fromhex("020304050607") * 16
    number = WIRES[wire]
    (endpoint,) = await open_endpoints(0, host="0.0.0.0", configure=allow_broadcast)
    with theirs.socket("0.0.0.0", 9) as sleeper:
        sleeper.setsockopt(socket.SOL_SOCKET, 25, wire.encode())  # SO_BINDTODEVICE
        theirs.ip(f"address add 10.0.{number}.2/24 dev {wire}")
        async with endpoint:
            own = (f"10.0.{number}.1", endpoint.local_address[1])
            await endpoint.send_to(magic, ("255.255.255.255", 9), local_address=own)
            await endpoint.send_to(magic, (f"10.0.{number}.255", 9))
            with trio.fail_after(5):
                for _ in range(2):
                    await trio.lowlevel.wait_readable(sleeper)
                    assert sleeper.recvfrom(200) == (magic, own)


async def test_broadcast_must_be_allowed(wired: tuple[Machine, Machine]) -> None:
    """Without SO_BROADCAST the kernel refuses to send a broadcast, and the error is raised."""
    (endpoint,) = await open_endpoints(0, host="0.0.0.0")
    async with endpoint:
        for host in ("255.255.255.255", "10.0.1.255"):
            with pytest.raises(PermissionError):
                await endpoint.send_to(b"x", (host, 9), local_address=("10.0.1.1", endpoint.local_address[1]))
