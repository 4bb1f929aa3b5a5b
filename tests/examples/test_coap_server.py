"""The CoAP server: the clients of libcoap and aiocoap, also with loss and DTLS; timers in virtual time."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from aiocoap import ACK, CON, NON, RST, Message
from aiocoap.numbers.codes import CHANGED, CONTENT, CREATED, EMPTY, GET, NOT_FOUND, PUT
from trio.testing import MockClock

import trio_udp
from trio_udp import Connection

from ..project.conftest import TIMEOUT, Start, without_signals
from .conftest import load, program

coap_server = load("coap_server")

LONG = bytes(random.Random(5).choices(range(256), k=70_001))

StartServer = Callable[..., Awaitable[Connection]]


def message(code: Any, path: str = "", mid: int = 1, *, mtype: Any = CON, **options: Any) -> bytes:
    made = Message(_mtype=mtype, _mid=mid, _token=b"t", code=code, payload=options.pop("payload", b""))
    if path:
        made.opt.uri_path = tuple(path.split("/"))
    for name, value in options.items():
        setattr(made.opt, name, value)
    return bytes(made.encode())


async def receive(connection: Connection) -> Any:
    return Message.decode(await connection.receive())


async def ask(connection: Connection, payload: bytes) -> Any:
    await connection.send(payload)
    return await receive(connection)


# Other programs as clients.


def libcoap(uri: str, *options: str, name: str = "coap-client-notls") -> bytes:
    command = [program(name, "libcoap3-bin"), "-B", "15", *options, uri]
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT)
    assert done.returncode == 0, done
    return (done.stdout + done.stderr).strip()


@without_signals
def test_libcoap(start: Start) -> None:
    """libcoap's client writes, reads, lists and deletes, and waits for a late answer."""
    example = start("coap_server", "--host", "127.0.0.1", "--slow", "0.7")
    base = f"coap://127.0.0.1:{example.port}"
    assert libcoap(f"{base}/a/note", "-m", "put", "-e", "hello") == b""
    assert libcoap(f"{base}/a/note") == b"hello"
    assert libcoap(f"{base}/a/note", "-N") == b"hello"  # non-confirmable
    assert libcoap(f"{base}/.well-known/core") == b"</a/note>;obs"
    assert libcoap(f"{base}/slow") == b"at last"
    assert libcoap(f"{base}/a/note", "-m", "delete") == b""
    assert libcoap(f"{base}/a/note").startswith(b"4.04")
    assert libcoap(f"{base}/a/note", "-m", "post", "-e", "x").startswith(b"4.05")
    assert libcoap(f"{base}/a/note", "-O", "2049,x").startswith(b"4.02")  # an unknown critical option


@without_signals
@pytest.mark.parametrize("size", ["16", "1024"])
def test_libcoap_blocks(start: Start, tmp_path: Path, size: str) -> None:
    """libcoap's client writes and reads in blocks of any size."""
    example = start("coap_server", "--host", "127.0.0.1")
    content = LONG[: 70 * int(size) + 1]
    (tmp_path / "original").write_bytes(content)
    uri = f"coap://127.0.0.1:{example.port}/long"
    libcoap(uri, "-m", "put", "-b", size, "-f", str(tmp_path / "original"))
    libcoap(uri, "-b", size, "-o", str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == content
    libcoap(uri, "-o", str(tmp_path / "another"))
    assert (tmp_path / "another").read_bytes() == content


@without_signals
def test_libcoap_through_loss(start: Start, tmp_path: Path) -> None:
    """libcoap's client repeats lost datagrams, and each request is done once."""
    example = start("coap_server", "--host", "127.0.0.1")
    (tmp_path / "original").write_bytes(LONG[:3_000])
    uri = f"coap://127.0.0.1:{example.port}/long"
    libcoap(uri, "-m", "put", "-b", "1024", "-l", "2", "-f", str(tmp_path / "original"))
    libcoap(uri, "-l", "1", "-o", str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == LONG[:3_000]


@without_signals
def test_libcoap_observes(start: Start) -> None:
    """An observer gets the content, each change, and the end."""
    example = start("coap_server", "--host", "127.0.0.1")
    uri = f"coap://127.0.0.1:{example.port}/note"
    libcoap(uri, "-m", "put", "-e", "one")
    command = [program("coap-client-notls", "libcoap3-bin"), "-s", "15", "-w", uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as observer:
        assert observer.stdout is not None
        try:
            assert observer.stdout.readline() == "one\n"
            for content in ("two", "three"):
                libcoap(uri, "-m", "put", "-e", content)
                assert observer.stdout.readline() == f"{content}\n"
            libcoap(uri, "-m", "delete")
            assert "4.04" in observer.stdout.readline()
        finally:
            observer.kill()


@without_signals
def test_aiocoap(start: Start, tmp_path: Path) -> None:
    """aiocoap's client writes and reads in blocks."""
    example = start("coap_server", "--host", "127.0.0.1")
    (tmp_path / "original").write_bytes(LONG[:20_000].hex().encode())
    command = [sys.executable, "-m", "aiocoap.cli.client", "-q", f"coap://127.0.0.1:{example.port}/long"]
    writing = [*command, "-m", "PUT", "--payload", f"@{tmp_path / 'original'}"]
    subprocess.run(writing, check=True, capture_output=True, timeout=TIMEOUT)
    got = subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT).stdout
    assert got.strip() == LONG[:20_000].hex().encode()


@without_signals
def test_dtls(start: Start, tmp_path: Path) -> None:
    """Over DTLS, libcoap's client trusts the certificate, writes and reads."""
    client, openssl = program("coap-client-openssl", "libcoap3-bin"), program("openssl", "openssl")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    make = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", *subject]
    subprocess.run([openssl, *make, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    example = start("coap_server", "--host", "127.0.0.1", "--cert", str(certificate), "--key", str(key))
    uri = f"coaps://localhost:{example.port}/long"
    (tmp_path / "original").write_bytes(LONG[:5_000])
    for options in (("-m", "put", "-f", str(tmp_path / "original")), ("-o", str(tmp_path / "copy"))):
        libcoap(uri, "-C", str(certificate), "-b", "512", *options, name=os.path.basename(client))
    assert (tmp_path / "copy").read_bytes() == LONG[:5_000]


# The protocol itself, in virtual time.


async def test_a_duplicate_is_answered_alike_and_done_once(udp_server: StartServer) -> None:
    """A repeated message gets the same answer; a new message with the same request is done again."""
    connection = await udp_server(coap_server.Store().handler)
    put = message(PUT, "note", 7, payload=b"hello")
    answers = [await ask(connection, put) for _ in range(2)]
    assert [(answer.code, answer.mtype, answer.mid, answer.token) for answer in answers] == [
        (CREATED, ACK, 7, b"t")
    ] * 2
    assert (await ask(connection, message(PUT, "note", 8, payload=b"hello"))).code == CHANGED


async def test_separate_response(udp_server: StartServer, autojump_clock: MockClock) -> None:
    """A late answer follows the ACK as a separate message, and is repeated until the client acknowledges it."""
    connection = await udp_server(coap_server.Store(slow=10).handler)
    first = await ask(connection, message(GET, "slow"))
    assert (first.mtype, first.code, first.mid, trio.current_time()) == (ACK, EMPTY, 1, 0.5)
    again = await ask(connection, message(GET, "slow"))
    assert (again.mtype, again.code) == (ACK, EMPTY)
    late = [await receive(connection) for _ in range(3)]
    assert {(each.mtype, each.code, each.mid, each.token, each.payload) for each in late} == {
        (CON, CONTENT, late[0].mid, b"t", b"at last")
    }
    assert 10 + 2 + 4 <= trio.current_time() <= 10 + 3 + 6
    await connection.send(message(EMPTY, mtype=ACK, mid=late[0].mid))
    with trio.move_on_after(100):
        raise AssertionError(await connection.receive())


async def test_observation(udp_server: StartServer, autojump_clock: MockClock) -> None:
    """Notifications have growing numbers; one that waits for its ACK delays all but the latest; RST ends them."""
    store = coap_server.Store()
    connection = await udp_server(store.handler)
    store.put(("note",), b"one")
    assert (await ask(connection, message(GET, "note", observe=0))).opt.observe == 1
    store.put(("note",), b"two")
    second = await receive(connection)
    for content in (b"three", b"four", b"five"):
        store.put(("note",), content)
    await connection.send(message(EMPTY, mtype=ACK, mid=second.mid))
    third = await receive(connection)
    assert [(each.opt.observe, each.payload, each.mtype) for each in (second, third)] == [
        (2, b"two", CON),
        (5, b"five", CON),
    ]
    await connection.send(message(EMPTY, mtype=ACK, mid=third.mid))
    await trio.sleep(80_000)  # an observer may be silent for long
    store.put(("note",), b"six")
    await connection.send(message(EMPTY, mtype=RST, mid=(await receive(connection)).mid))
    await trio.sleep(1)
    store.put(("note",), b"seven")
    with trio.move_on_after(100):
        raise AssertionError(await connection.receive())


async def test_an_observer_that_is_gone(udp_server: StartServer, autojump_clock: MockClock) -> None:
    """A notification without an ACK is sent five times; then the observation ends, and later the client."""
    store = coap_server.Store()
    connection = await udp_server(store.handler)
    store.put(("note",), b"one")
    await ask(connection, message(GET, "note", observe=0))
    store.put(("note",), b"two")
    assert len({(await receive(connection)).mid for _ in range(5)}) == 1
    await trio.sleep(100)
    store.put(("note",), b"three")
    with trio.move_on_after(1_000):
        raise AssertionError(await connection.receive())


async def test_end_of_an_observation(udp_server: StartServer, autojump_clock: MockClock) -> None:
    """A client that cancels an observation gets no more notifications; deleting the resource ends it too."""
    store = coap_server.Store()
    connection = await udp_server(store.handler)
    store.put(("note",), b"one")
    await ask(connection, message(GET, "note", 1, observe=0))
    assert (await ask(connection, message(GET, "note", 2, observe=1))).opt.observe is None
    store.put(("note",), b"two")
    await ask(connection, message(GET, "note", 3, observe=0))
    store.delete(("note",))
    last = await receive(connection)
    assert (last.code, last.mtype) == (NOT_FOUND, CON)


async def test_bounds(udp_server: StartServer, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks must follow each other, and resources and requests are bounded."""
    monkeypatch.setattr(coap_server, "MOST_BYTES", 100)
    monkeypatch.setattr(coap_server, "MOST_REQUESTS", 2)
    connection = await udp_server(coap_server.Store().handler)
    block = bytes(64)
    codes = [
        (await ask(connection, message(PUT, path, mid, payload=block, block1=(number, True, 2)))).code.dotted
        for mid, (path, number) in enumerate([("a", 0), ("a", 2), ("b", 1), ("a", 1)])
    ]
    assert codes == ["2.31", "4.08", "4.08", "4.13"]
    await connection.send_many([message(GET, "slow", mid, mtype=NON) for mid in (11, 12, 13)])
    assert (await receive(connection)).code.dotted == "5.03"


async def test_garbage(udp_server: StartServer) -> None:
    """Junk and replies to nothing are ignored, pings are answered with RST, and the conversation goes on."""
    connection = await udp_server(coap_server.Store().handler)
    random_ = random.Random(6)
    whole = message(PUT, "note", 9, payload=b"x", block1=(0, False, 2))
    for _ in range(3_000):
        junk = bytearray(whole)
        for _ in range(random_.randint(0, 6)):
            junk[random_.randrange(len(junk))] = random_.randrange(256)
        junk[0] |= 0x10  # not confirmable
        await connection.send(bytes(junk[: random_.randint(0, len(junk))]))
    await connection.send(message(EMPTY, mtype=ACK, mid=1))
    await connection.send(message(CONTENT, mtype=NON, mid=2))
    await connection.send(b"\x40\0\x12\x34")
    while (answer := await receive(connection)).mtype != RST:
        pass
    assert (answer.code, answer.mid) == (EMPTY, 0x1234)


async def test_a_request_may_end_while_the_server_stops(
    udp_server: StartServer, autojump_clock: MockClock, simulated_network: Any
) -> None:
    """A request that runs when the server stops is answered, and its answer acknowledged."""
    servers: list[trio_udp.Server] = []
    store = coap_server.Store(slow=3)

    async def handler(client: trio_udp.Client) -> None:
        servers.append(client.server)
        await store.handler(client)

    connection = await udp_server(handler, drain_timeout=60)
    assert (await ask(connection, message(GET, "slow"))).code == EMPTY
    servers[0].stop()
    late = await receive(connection)
    assert (late.payload, trio.current_time()) == (b"at last", 3)
    await connection.send(message(EMPTY, mtype=ACK, mid=late.mid))
    await trio.sleep(0.1)
    assert servers[0].statistics().clients == 0
