"""Examples over DTLS: dtls_echo.py, and the unchanged handlers of other examples."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

import trio_udp

from ...examples.conftest import load
from ...project.conftest import EXAMPLES, TIMEOUT, Start as StartExample, start as start_example, without_signals
from .conftest import Authority, Identity, Start
from .test_peers import needs

__all__ = ["start_example"]  # a fixture


async def test_uppercase(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    """The handler of uppercase.py works over DTLS."""
    secured = await start(load("uppercase").uppercase)
    async with secured.connected() as channel:
        await channel.send(b"hello")
        assert await channel.receive() == b"HELLO"
    assert capsys.readouterr().out == "('198.51.100.1', 49152) wrote b'hello'\n"


async def test_echo_options(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    """The handler of echo_options.py works over DTLS."""
    secured = await start(load("echo_options").echo)
    async with secured.connected() as channel:
        await channel.send(b"hello")
        assert await channel.receive() == b"hello"
    assert len(capsys.readouterr().out.splitlines()) == 2


async def test_login(start: Start, autojump_clock: trio.testing.MockClock) -> None:
    """The handler of login.py works over DTLS: steps, time limits, its own idle timeout, and a goodbye."""
    secured = await start(load("login").handler)
    async with secured.connected() as channel:
        for line, answer in (
            (b"", b"user name? "),
            (b"ada", b"password? "),
            (b"wrong", b"wrong\nuser name? "),
            (b"ada", b"password? "),
            (b"lovelace", b"welcome, ada\n"),
            (b"hello", b"ada: hello"),
        ):
            await channel.send(line or b"anything")
            assert await channel.receive() == answer
        assert [payload async for payload in channel] == [b"goodbye: idle\n"]
        assert 600 <= trio.current_time() <= 750


async def test_login_while_the_server_stops(start: Start) -> None:
    """A login in progress can finish while the server drains."""
    secured = await start(load("login").handler)
    async with secured.connected() as channel:
        await channel.send(b"anything")
        assert await channel.receive() == b"user name? "
        secured.server.stop()
        for line, answer in ((b"ada", b"password? "), (b"lovelace", b"welcome, ada\n")):
            await channel.send(line)
            assert await channel.receive() == answer
        assert [payload async for payload in channel] == [b"goodbye: stopping\n"]


async def test_errors(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """With errors.py over DTLS, an error is logged, and answered encrypted, before the client ends."""
    example = load("errors")
    secured = await start(example.handler, on_error=example.on_error)
    async with secured.connected() as channel:
        answers = []
        for line in (b'{"add": 6}', b"rubbish", b'{"divide": 0}'):
            await channel.send(line)
            answers.append(json.loads(await channel.receive()))
        assert answers[0] == {"total": 6}
        assert [list(answer) for answer in answers[1:]] == [["error"], ["error"]]
        assert answers[2] == {"error": "internal"}
        with pytest.raises(trio.EndOfChannel):
            await channel.receive()
    assert [record.getMessage() for record in caplog.records] == ["Handler of client ('198.51.100.1', 49152) failed"]
    assert not any(b"internal" in event.payload for event in secured.network.events)


async def test_lobby(start: Start) -> None:
    """With lobby.py over DTLS, send_to_all sends each line to all members, encrypted for each."""
    lobby = load("lobby").Lobby()
    secured = await start(lobby.handler)
    names = [b"ada", b"bob", b"eve"]
    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(secured.connected()) for _ in names]
        for channel, name in zip(channels, names, strict=True):
            await channel.send(name)
            await trio.testing.wait_all_tasks_blocked()
        await channels[0].send(b"hello")
        await trio.testing.wait_all_tasks_blocked()
        heard = [await channel.receive_many() for channel in channels]
        assert [lines[-1] for lines in heard] == [b"ada: hello\n"] * 3
        assert heard[0] == [b"ada joins\n", b"bob joins\n", b"eve joins\n", b"ada: hello\n"]
        await secured.server.send_to_all(b"to everybody")
        assert [await channel.receive() for channel in channels] == [b"to everybody"] * 3
        assert {type(client).__name__ for client in secured.server.clients} == {"DTLSChannel"}
        assert all(client in secured.server.clients for client in lobby.names)
        assert "somebody" not in secured.server.clients  # type: ignore[comparison-overlap]
        with pytest.raises(ValueError, match="DTLS has no empty payloads"):
            await secured.server.send_to_all(b"")
    assert not any(word in event.payload for event in secured.network.events for word in (b"hello", b"everybody"))


async def test_send_to_all_sends_nothing_in_the_clear(start: Start, autojump_clock: trio.testing.MockClock) -> None:
    """send_to_all skips clients whose handshake is not complete."""
    secured = await start()
    secured.network.latency = (0.1, 0.1)
    channel = await secured.open()
    with trio.move_on_after(0.35):
        await channel.do_handshake()
    assert len(secured.server.clients) == 1
    await secured.server.send_to_all(b"in the clear?")
    await channel.do_handshake()
    async with channel:
        await secured.server.send_to_all(b"encrypted")
        assert await channel.receive() == b"encrypted"
    assert not any(b"clear" in event.payload for event in secured.network.events)
    assert secured.server.statistics().send_errors == 1


async def test_slow_work(start: Start) -> None:
    """The request handler of slow_work.py works over DTLS, with its timeout and thread."""
    handler = trio_udp.request_handler(load("slow_work").work, timeout=10)
    secured = await start(handler)
    async with secured.connected() as channel:
        await channel.send(b"sleep 0.01")
        assert await channel.receive() == b"slept 0.01 s\n"


async def test_service(start: Start) -> None:
    """The handler of service.py works over DTLS, with its database."""
    example = load("service")
    async with example.open_notes(":memory:") as notes:
        secured = await start(partial(example.handler, notes))
        async with secured.connected() as channel:
            await channel.send(b"remember this")
            assert await channel.receive() == b"note 1\n"


def run_client(port: int, trusted: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / "dtls_echo.py"), "--ask", "hello", "--trust", str(trusted)]
    arguments = (*arguments, str(port))
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=TIMEOUT, check=False)


@without_signals
@needs("openssl")
def test_dtls_echo(start_example: StartExample, authority: Authority, identity: Identity) -> None:
    """dtls_echo.py answers OpenSSL's client and its own client, which prints an error message if something fails."""
    files = ("--cert", str(identity.certificate), "--key", str(identity.key))
    server = start_example("dtls_echo", "--host", "127.0.0.1", *files)
    command = ["openssl", "s_client", "-dtls1_2", "-connect", f"127.0.0.1:{server.port}", "-quiet"]
    trust = ["-CAfile", str(authority.certificate), "-verify_return_error"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*command, *trust], **pipes, text=True) as client:  # type: ignore[call-overload]
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write("hello from OpenSSL\n")
        client.stdin.flush()
        assert client.stdout.readline() == "hello from OpenSSL\n"
        client.kill()
    result = run_client(server.port, authority.certificate)
    assert (result.stdout, result.stderr, result.returncode) == ("hello\n", "", 0)
    result = run_client(server.port, identity.certificate, "--host", "127.0.0.1")
    assert result.returncode == 1
    assert "the certificate is not valid" in result.stderr
    printed = server.stop()
    assert printed[:2] == [r"127.0.0.1 wrote b'hello from OpenSSL\n'", "127.0.0.1 wrote b'hello'"]
    assert printed[2].startswith("handshakes: 2, failed: 1 (last: ")
    result = run_client(server.port, authority.certificate)
    assert (result.stderr, result.returncode) == (f"nothing listens on localhost port {server.port}\n", 1)
