"""Other DTLS programs over loopback: OpenSSL, GnuTLS and CoAP clients on both, as clients and as servers."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import attrs
import pytest
import trio
from OpenSSL import SSL

import trio_udp
from trio_udp.dtls import DTLSChannel, SecuredHandler, connect, secure

from ...conftest import check_adds_up, free_port, port_of
from .conftest import Authority, Identity, echo

# Seconds that a conversation with another program may take.
PATIENCE = 20

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


@attrs.define
class Program:
    """Another program with pipes, and all its output."""

    process: trio.Process
    written: str = ""

    async def until(self, text: str) -> str:
        """Wait until the program has printed a text; return all its output."""
        assert self.process.stdout is not None
        with trio.fail_after(PATIENCE):
            while text not in self.written:
                some = await self.process.stdout.receive_some()
                assert some, f"the program ended without {text!r}: {self.written}"
                self.written += some.decode(errors="replace")
        return self.written

    async def until_end(self) -> str:
        assert self.process.stdout is not None
        with trio.fail_after(PATIENCE):
            async for some in self.process.stdout:
                self.written += some.decode(errors="replace")
        return self.written

    async def write(self, text: str) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send_all(text.encode())

    async def end_of_input(self) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.aclose()


@asynccontextmanager
async def running(*command: object) -> AsyncIterator[Program]:
    process = await trio.lowlevel.open_process(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        yield Program(process)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdin.aclose()
        await process.stdout.aclose()


Serve = Callable[..., Awaitable[tuple[trio_udp.Server, SecuredHandler]]]


@pytest.fixture
async def serve(nursery: trio.Nursery, server_context: SSL.Context) -> AsyncIterator[Serve]:
    """Return a function that serves a secured handler on loopback. At the end its counters must add up."""
    servers: list[trio_udp.Server] = []

    async def serve(handler: Any = echo, context: SSL.Context | None = None) -> tuple[trio_udp.Server, SecuredHandler]:
        secured = secure(handler, context or server_context)
        server = await nursery.start(partial(trio_udp.serve, secured, 0, host="127.0.0.1"))
        servers.append(server)
        return server, secured

    yield serve

    for server in servers:
        await trio.testing.wait_all_tasks_blocked()
        check_adds_up(server)
        assert server.statistics().handler_errors == 0


def s_client(
    server: trio_udp.Server, authority: Authority, *options: object, version: str = "-dtls1_2"
) -> tuple[object, ...]:
    trust = ("-CAfile", authority.certificate, "-verify_return_error", "-verify_hostname", "localhost")
    return ("openssl", "s_client", version, "-connect", f"127.0.0.1:{port_of(server)}", *trust, *options)


def of(identity: Identity) -> tuple[object, ...]:
    return "-cert", identity.certificate, "-key", identity.key


async def test_openssl_s_client(serve: Serve, authority: Authority) -> None:
    """OpenSSL's client verifies the server and gets its answers; when it closes, the handler ends."""
    server, secured = await serve()
    async with running(*s_client(server, authority)) as client:
        await client.until("Verification: OK")
        await client.write("hello\n")
        await client.until("\nhello\n")
        assert len(server.clients) == 1
        await client.end_of_input()
        await client.until_end()
    await trio.testing.wait_all_tasks_blocked()
    assert (secured.handshakes, secured.handshakes_failed) == (1, 0)


async def test_openssl_resumes_a_session(serve: Serve, authority: Authority, client_identity: Identity) -> None:
    """OpenSSL's client resumes its session, with a certificate of its own."""
    server, secured = await serve(context=authority.context(authority.issue("localhost"), verify=True))
    kept = authority.folder / "session.pem"
    for option, expected in (("-sess_out", "New, TLSv1.2"), ("-sess_in", "Reused, TLSv1.2")):
        async with running(*s_client(server, authority, *of(client_identity), option, kept)) as client:
            await client.until(expected)
            await client.write("hello\n")
            await client.until("hello")
            await client.write("Q\n")
            await client.until_end()
    assert (secured.handshakes, secured.handshakes_failed) == (2, 0)


@pytest.mark.parametrize("has_one", [True, False], ids=["with", "without"])
async def test_certificates_of_openssl_clients(
    serve: Serve, authority: Authority, client_identity: Identity, has_one: bool
) -> None:
    """A server that requests certificates serves OpenSSL's client with one, and refuses it without."""
    server, secured = await serve(context=authority.context(authority.issue("localhost"), verify=True))
    options = of(client_identity) if has_one else ()
    async with running(*s_client(server, authority, *options)) as client:
        if has_one:
            await client.write("hello\n")
            await client.until("hello")
        else:
            await client.until("handshake failure")
            await client.until_end()
            assert "peer did not return a certificate" in str(secured.last_error)
    assert secured.handshakes == has_one


async def test_an_old_version(serve: Serve, authority: Authority) -> None:
    """A client that only has DTLS 1.0 gets an alert that says so, and is counted."""
    server, secured = await serve()
    async with running(*s_client(server, authority, "-cipher", "DEFAULT@SECLEVEL=0", version="-dtls1")) as client:
        await client.until("protocol version")
        await client.until_end()
    assert "unsupported protocol" in str(secured.last_error)
    assert (secured.handshakes, secured.handshakes_failed) == (0, 1)


async def test_no_common_cipher(serve: Serve, authority: Authority) -> None:
    """A client without a common cipher suite gets an alert that says so, and is counted."""
    server, secured = await serve()
    async with running(*s_client(server, authority, "-cipher", "ECDHE-RSA-AES128-GCM-SHA256")) as client:
        await client.until("handshake failure")
        await client.until_end()
    assert "no shared cipher" in str(secured.last_error)


async def test_a_client_that_does_not_trust_us(serve: Serve, tmp_path: Any, authority: Authority) -> None:
    """If the client does not trust the server's authority, both ends know the reason."""
    other = Authority.make(tmp_path / "other", "Other")
    server, secured = await serve()
    async with running(*s_client(server, other)) as client:
        assert "verify error" in await client.until_end()
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert "unknown ca" in str(secured.last_error)


@needs("gnutls-cli")
async def test_gnutls_cli(serve: Serve, authority: Authority) -> None:
    """GnuTLS's client verifies the server and gets its answers."""
    server, secured = await serve()
    command = "gnutls-cli", "--udp", "--port", port_of(server), "--x509cafile", authority.certificate, "localhost"
    async with running(*command) as client:
        await client.until("Handshake was completed")
        await client.write("hello\n")
        await client.until("\nhello\n")
        await client.end_of_input()
        await client.until_end()
    await trio.testing.wait_all_tasks_blocked()
    assert (secured.handshakes, secured.handshakes_failed, list(server.clients)) == (1, 0, [])


async def coap(client: trio_udp.Client) -> None:
    """Answer each confirmable request of CoAP (RFC 7252) with 2.05 Content."""
    async for request in client:
        token = request[4 : 4 + (request[0] & 15)]
        if request[0] >> 4 == 4 and request[1]:
            await client.send(bytes([0x60 | len(token), 0x45]) + request[2:4] + token + b"\xffhello from CoAP")


@pytest.mark.parametrize("program", ["coap-client-openssl", "coap-client-gnutls"])
async def test_coap_clients(serve: Serve, authority: Authority, program: str) -> None:
    """The CoAP clients on OpenSSL and GnuTLS get an answer over coaps."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    server, secured = await serve(coap)
    uri = f"coaps://localhost:{port_of(server)}/hello"
    async with running(program, "-m", "get", "-R", authority.certificate, uri) as client:
        assert "hello from CoAP" in await client.until_end()
    assert (secured.handshakes, secured.handshakes_failed) == (1, 0)


@asynccontextmanager
async def talking_to(command: tuple[object, ...], port: int, ready: str, context: SSL.Context, **options: Any) -> Any:
    """Run another program's server, and yield it with a channel to it."""
    async with running(*command) as program:
        await program.until(ready)
        with trio.fail_after(PATIENCE):
            channel = await connect("127.0.0.1", port, context, server_hostname="localhost", **options)
        async with channel:
            yield program, channel


async def test_openssl_s_server(authority: Authority, identity: Identity, client_identity: Identity) -> None:
    """DTLSChannel verifies OpenSSL's server, sends a certificate, exchanges payloads, resumes a session, and closes."""
    port = free_port()
    trust = ("-CAfile", authority.certificate, "-Verify", "1", "-verify_return_error")
    command = ("openssl", "s_server", "-dtls1_2", "-port", port, *of(identity), *trust)
    context = authority.context(client_identity)
    async with talking_to(command, port, "ACCEPT", context) as (program, channel):
        await channel.send(b"hello\n")
        await program.until("hello")
        await program.write("answer\n")
        with trio.fail_after(PATIENCE):
            assert await channel.receive() == b"answer\n"
        session = channel.session
        await channel.aclose()
        await program.until("DONE" if "DONE" in program.written else "ACCEPT")
    async with talking_to(command, port, "ACCEPT", context, session=session) as (program, channel):
        await channel.send(b"hello\n")
        await program.until("hello")


@needs("gnutls-serv")
async def test_gnutls_serv(authority: Authority, identity: Identity) -> None:
    """DTLSChannel verifies GnuTLS's server, which echoes its payloads."""
    port = free_port()
    files = ("--x509certfile", identity.certificate, "--x509keyfile", identity.key)
    command = ("gnutls-serv", "--udp", "--echo", "--port", port, *files, "--disable-client-cert")
    async with talking_to(command, port, "done", authority.context()) as (_, channel):
        await channel.send(b"hello\n")
        with trio.fail_after(PATIENCE):
            assert await channel.receive() == b"hello\n"


async def test_connecting_to_a_closed_port(client_context: SSL.Context) -> None:
    """Connecting to a closed port fails at once with the kernel's error, and leaves no socket."""
    with trio.fail_after(PATIENCE), pytest.raises(ConnectionRefusedError):
        await connect("127.0.0.1", free_port(), client_context)


async def test_a_name_is_verified_by_default(serve: Serve, client_context: SSL.Context) -> None:
    """connect verifies that the certificate is for the given host, here an address."""
    server, _ = await serve()
    with trio.fail_after(PATIENCE):
        async with await connect("127.0.0.1", port_of(server), client_context) as channel:
            await channel.send(b"x")
            assert await channel.receive() == b"x"
        with pytest.raises(trio.BrokenResourceError, match=r"not for 'example\.org'"):
            await connect("127.0.0.1", port_of(server), client_context, server_hostname="example.org")


async def test_fifty_clients_at_once(serve: Serve, client_context: SSL.Context) -> None:
    """Fifty clients do handshakes and talk at the same time, and each gets its own answers."""
    server, secured = await serve()
    answers: dict[int, list[bytes]] = {}

    async def talk(number: int) -> None:
        async with await connect("127.0.0.1", port_of(server), client_context) as channel:
            answers[number] = []
            for turn in range(5):
                await channel.send(b"%d %d" % (number, turn))
                answers[number].append(await channel.receive())

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(talk, number)
    assert answers == {number: [b"%d %d" % (number, turn) for turn in range(5)] for number in range(50)}
    assert (secured.handshakes, secured.handshakes_failed) == (50, 0)


async def test_over_unix_domain_datagrams(authority: Authority, identity: Identity, tmp_path: Any) -> None:
    """A secured handler can be served on a Unix-domain socket."""
    if not hasattr(socket, "AF_UNIX"):
        pytest.skip("needs Unix-domain sockets")
    path = tmp_path / "socket"
    handler = secure(echo, authority.context(identity))
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            endpoint = await trio_udp.open_unix_endpoint(path)
            server = await nursery.start(trio_udp.serve_endpoints, handler, [endpoint])
            connection = await trio_udp.connect_unix(path)
            async with DTLSChannel(connection, authority.context(), server_hostname="localhost") as channel:
                await channel.send(b"x")
                assert await channel.receive() == b"x"
            server.stop()
    check_adds_up(server)
