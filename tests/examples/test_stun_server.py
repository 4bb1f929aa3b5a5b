"""The STUN server: with coturn's clients, the test vectors of RFC 5769, and garbage."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from struct import pack

import pytest
from hypothesis import given, strategies as st

from ..project.conftest import TIMEOUT, Example, Start, ask, waiting, without_signals
from .conftest import load, program

stun_server = load("stun_server")

COOKIE = bytes.fromhex("2112A442")
TRANSACTION = bytes.fromhex("b7e7a701bc34d686fa87dfae")  # of RFC 5769

pytestmark = without_signals
needs_two_hosts = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere the loopback interface has only 127.0.0.1"
)


def request(*attributes: tuple[int, bytes]) -> bytes:
    body = b"".join(pack("!HH", kind, len(value)) + value for kind, value in attributes)
    return pack("!HH", 1, len(body)) + COOKIE + TRANSACTION + body


def read(answer: bytes) -> tuple[int, dict[int, bytes]]:
    """Return the type and the attributes of an answer."""
    assert answer[4:20] == COOKIE + TRANSACTION
    assert int.from_bytes(answer[2:4], "big") == len(answer) - 20
    attributes, rest = {}, answer[20:]
    while rest:
        kind, length = int.from_bytes(rest[:2], "big"), int.from_bytes(rest[2:4], "big")
        attributes[kind] = rest[4 : 4 + length]
        rest = rest[4 + length + -length % 4 :]
    return int.from_bytes(answer[:2], "big"), attributes


def encoded(address: tuple[str, int]) -> bytes:
    return b"\0\1" + pack("!H", address[1]) + socket.inet_aton(address[0])


def start_with_two_hosts(start: Start) -> tuple[Example, tuple[str, int]]:
    """Start the server on two addresses with two ports each; return it, and the address where both differ."""
    example = start("stun_server", "--host", "127.0.0.1", "--other-host", "127.0.0.2", "--other-port", "0")
    others = [example.next_line().removeprefix("listening on ").split(":") for _ in range(3)]
    other_port = int(others[0][1])
    assert others == [["127.0.0.1", str(other_port)], ["127.0.0.2", str(example.port)], ["127.0.0.2", str(other_port)]]
    return example, ("127.0.0.2", other_port)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_stunclient(start: Start, host: str) -> None:
    """coturn's client learns its address from a server with one address."""
    stunclient = program("turnutils_stunclient", "coturn")
    example = start("stun_server", "--host", host)
    command = [stunclient, "-p", str(example.port), host]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert re.search(r"UDP reflexive addr: (\S+):\d+\n", done.stdout), done
    assert (done.returncode, "Other addr" in done.stdout) == (0, False)


@needs_two_hosts
def test_stunclient_with_two_addresses(start: Start) -> None:
    """coturn's client gets all its answers: two from the other address and port, one with padding."""
    stunclient = program("turnutils_stunclient", "coturn")
    example, other = start_with_two_hosts(start)
    command = [stunclient, "-f", "-p", str(example.port), "127.0.0.1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert [int(n) for n in re.findall(r"RFC 5780 response (\d)", done.stdout)] == [1, 2, 3]
    first, second, third = done.stdout.split("RFC 5780 response")[1:]
    ours, theirs = f"origin: : 127.0.0.1:{example.port}\n", "origin: : {}:{}\n".format(*other)
    assert [ours in first, theirs in second, theirs in third] == [True] * 3
    assert "Other addr: : {}:{}\n".format(*other) in first


@needs_two_hosts
def test_natdiscovery(start: Start) -> None:
    """coturn finds that there is no NAT, and that answers from elsewhere get in."""
    natdiscovery = program("turnutils_natdiscovery", "coturn")
    example, _ = start_with_two_hosts(start)
    command = [natdiscovery, "-m", "-f", "-P", "-L", "127.0.0.1", "-p", str(example.port), "127.0.0.1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert "No NAT! (Endpoint Independent Mapping)" in done.stdout
    assert "NAT with Endpoint Independent Filtering!" in done.stdout
    assert "No ALG: Mapped == XOR-Mapped" in done.stdout


@needs_two_hosts
@pytest.mark.parametrize(("change", "which"), [(0, (0, 0)), (2, (0, 1)), (4, (1, 0)), (6, (1, 1))])
def test_answers_from_elsewhere(start: Start, change: int, which: tuple[int, int]) -> None:
    """CHANGE-REQUEST selects the address and the port of the answer, and the answer names both."""
    example, other = start_with_two_hosts(start)
    hosts, ports = ("127.0.0.1", "127.0.0.2"), (example.port, other[1])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT)
        sock.bind(("127.0.0.1", 0))
        for at in (0, 1):  # asking either of our addresses
            target = (hosts[at], ports[at])
            sock.sendto(request((0x0003, pack("!I", change))), target)
            answer, source = sock.recvfrom(2048)
            assert source == (hosts[which[0] ^ at], ports[which[1] ^ at])
            kind, attributes = read(answer)
            assert kind == 0x0101
            assert attributes[0x802B] == encoded(source)
            assert attributes[0x802C] == encoded((hosts[1 - at], ports[1 - at]))
            assert attributes[0x0001] == encoded(sock.getsockname())


@needs_two_hosts
def test_response_port(start: Start) -> None:
    """An answer can go to another port of the client, but not together with padding, nor to port 0."""
    example, _ = start_with_two_hosts(start)
    peer, there = example.peer(), example.peer()
    there_port = there.getsockname()[1]
    peer.send(request((0x0027, pack("!HH", 0, 0))))
    peer.send(request((0x0027, pack("!HH", there_port, 0))))
    assert read(there.recv(2048))[1][0x0001] == encoded(peer.getsockname())
    kind, attributes = read(ask(peer, request((0x0027, pack("!HH", there_port, 0)), (0x0026, bytes(4)))))
    assert (kind, attributes[0x0009][:4]) == (0x0111, b"\0\0\4\0")
    assert waiting(there) == waiting(peer) == []


def test_unknown_attributes(start: Start) -> None:
    """Error 420 names unknown attributes that must be understood; others, and credentials, are ignored."""
    example = start("stun_server", "--host", "127.0.0.1")
    peer = example.peer()
    kind, attributes = read(ask(peer, request((0x0003, bytes(4)), (0x8000, bytes(8)), (0x7FFF, b""))))
    assert (kind, attributes) == (0x0111, {0x0009: b"\0\0\4\x14Unknown Attribute", 0x000A: b"\0\3\x7f\xff"})
    assert read(ask(peer, request((0x0006, b"user"), (0x8022, b"test"))))[0] == 0x0101


def test_only_requests_are_answered(start: Start) -> None:
    """A payload that is not a Binding request gets no answer, least of all the server's own answer."""
    example = start("stun_server", "--host", "127.0.0.1")
    peer = example.peer()
    answer = ask(peer, request())
    whole = request((0x8022, b"test"))
    for payload in (b"", answer, whole[:-1], whole + bytes(4), b"\0\3" + whole[2:], whole[:4] + bytes(4) + whole[8:]):
        peer.send(payload)
    assert ask(peer, request()) == answer
    assert waiting(peer) == []


def test_vectors() -> None:
    """Addresses are written as in the samples of RFC 5769."""
    for address, wire in (
        (("192.0.2.1", 32853), "002000080001a147e112a643"),
        (("2001:db8:1234:5678:11:2233:4455:6677", 32853), "002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d9"),
    ):
        assert stun_server.address(0x0020, address, COOKIE + TRANSACTION) == bytes.fromhex(wire)


@given(st.binary(max_size=60), st.booleans())
def test_garbage(body: bytes, has_header: bool) -> None:
    """Any bytes are a request, or none; reading them raises nothing."""
    payload = pack("!HH", 1, len(body)) + COOKIE + TRANSACTION + body if has_header else body
    attributes = stun_server.read_request(payload)
    assert attributes is None or sum(4 + len(value) for value in attributes.values()) <= len(body)
