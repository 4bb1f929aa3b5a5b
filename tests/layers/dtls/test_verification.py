"""Verification of the other end: names, authorities, client certificates, versions and ciphers."""

from __future__ import annotations

import math
import re
import ssl

import pytest
import trio
import trio.testing
from OpenSSL import SSL

from trio_udp.dtls import DTLSChannel, connect, secure

from .conftest import NAME, Authority, Identity, Start, echo


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that neither end trusts."""
    return Authority.make(tmp_path_factory.mktemp("stranger") / "authority", "Stranger")


@pytest.mark.parametrize("name", [NAME, "localhost", "127.0.0.1", "::1", "SERVER.TEST", "server.test."])
async def test_a_right_name(start: Start, name: str) -> None:
    """A server is accepted if its certificate has the expected name or address."""
    secured = await start()
    async with secured.connected(server_hostname=name) as channel:
        await channel.send(b"x")
        assert await channel.receive() == b"x"


@pytest.mark.parametrize("name", ["other.test", "127.0.0.2", "::2", "a.server.test", "test"])
async def test_a_wrong_name(start: Start, name: str) -> None:
    """A certificate for another name fails the handshake at both ends, and the client says why."""
    secured = await start()
    channel = await secured.open(server_hostname=name)
    with pytest.raises(trio.BrokenResourceError, match=f"the certificate is not for '{re.escape(name)}'"):
        await channel.do_handshake()
    with pytest.raises(trio.BrokenResourceError):
        await channel.receive()
    with pytest.raises(trio.BrokenResourceError):
        await channel.send(b"x")
    channel.close()
    await trio.testing.wait_all_tasks_blocked()
    assert (secured.handler.handshakes, secured.handler.handshakes_failed) == (0, 1)
    assert "alert" in str(secured.handler.last_error)
    assert list(secured.server.clients) == []


async def test_wildcards(start: Start, authority: Authority) -> None:
    """A wildcard matches one label."""
    secured = await start(context=authority.context(authority.issue("*.wild.test")))
    async with secured.connected(server_hostname="a.wild.test"):
        pass
    for name in ("wild.test", "a.b.wild.test"):
        with pytest.raises(trio.BrokenResourceError, match="is not for"):
            await (await secured.open(server_hostname=name)).do_handshake()


async def test_an_unknown_authority(start: Start, stranger: Authority) -> None:
    """A certificate from an authority that the client does not trust fails the handshake."""
    secured = await start(context=stranger.context(stranger.issue(NAME)))
    channel = await secured.open()
    with pytest.raises(trio.BrokenResourceError, match="not valid: self signed cert in chain"):
        await channel.do_handshake()
    await trio.testing.wait_all_tasks_blocked()
    assert "unknown ca" in str(secured.handler.last_error)


async def test_an_expired_certificate(start: Start, authority: Authority) -> None:
    """An expired certificate fails the handshake."""
    secured = await start(context=authority.context(authority.issue(NAME, days=-1)))
    with pytest.raises(trio.BrokenResourceError, match="not valid: cert has expired"):
        await (await secured.open()).do_handshake()


async def test_verification_that_is_left_to_the_context(start: Start, stranger: Authority) -> None:
    """Without a name, only the context decides what is verified: by pyOpenSSL's default, nothing."""
    secured = await start(context=stranger.context(stranger.issue("whoever")))
    async with secured.connected(server_hostname=None) as channel:
        await channel.send(b"x")
        assert await channel.receive() == b"x"
        assert channel.session is not None
        assert channel.session.server_hostname is None


async def test_a_client_with_a_certificate(start: Start, authority: Authority, client_identity: Identity) -> None:
    """The handler can read the certificate that was requested from its client."""
    names: list[str] = []

    async def handler(channel: DTLSChannel) -> None:
        certificate = channel.peer_certificate
        assert certificate is not None
        names.append(certificate.subject.rfc4514_string())
        await echo(channel)  # type: ignore[arg-type]

    secured = await start(handler, authority.context(authority.issue(NAME), verify=True))
    async with secured.connected(context=authority.context(client_identity)) as channel:
        await channel.send(b"x")
        assert await channel.receive() == b"x"
    assert names == ["CN=client.test"]


@pytest.mark.parametrize("has_one", [False, True], ids=["none", "of an unknown authority"])
async def test_a_client_without_a_valid_certificate(
    start: Start, authority: Authority, stranger: Authority, has_one: bool
) -> None:
    """A client without a certificate, or with one that is not trusted, gets no handler, and both ends know why."""
    secured = await start(context=authority.context(authority.issue(NAME), verify=True))
    context = SSL.Context(SSL.DTLS_METHOD)
    context.load_verify_locations(str(authority.certificate))
    if has_one:
        identity = stranger.issue("client.test")
        context.use_certificate_chain_file(str(identity.certificate))
        context.use_privatekey_file(str(identity.key))
    with pytest.raises(trio.BrokenResourceError, match="alert"):
        await (await secured.open(context=context)).do_handshake()
    assert secured.handler.handshakes_failed == 1
    reason = "certificate verify failed" if has_one else "peer did not return a certificate"
    assert reason in str(secured.handler.last_error)


async def test_no_common_cipher(start: Start, authority: Authority) -> None:
    """Two ends without a common cipher suite both learn that."""
    secured = await start()
    context = authority.context()
    context.set_cipher_list(b"ECDHE-RSA-AES128-GCM-SHA256")
    with pytest.raises(trio.BrokenResourceError, match="handshake failure"):
        await (await secured.open(context=context)).do_handshake()
    assert "no shared cipher" in str(secured.handler.last_error)


async def test_failed_handshakes_are_not_errors_of_the_handler(start: Start) -> None:
    """A failed handshake reaches neither the handler nor on_error, and leaves no memory in use."""
    errors: list[object] = []
    secured = await start(on_error=lambda client, error: errors.append(error))
    for _ in range(3):
        with pytest.raises(trio.BrokenResourceError):
            await (await secured.open(server_hostname="other.test")).do_handshake()
    await trio.testing.wait_all_tasks_blocked()
    statistics = secured.server.statistics()
    assert (errors, secured.handler.handshakes_failed, statistics.handler_errors) == ([], 3, 0)
    assert (statistics.clients, statistics.clients_started) == (0, 3)
    assert secured.handler.last_error is not None
    assert secured.handler.last_error.__traceback__ is None


def test_contexts_that_cannot_be_used(authority: Authority, identity: Identity) -> None:
    """Contexts for TLS, used ones, those without a certificate and other objects are refused, with advice."""
    with pytest.raises(TypeError, match=r"context must be an OpenSSL\.SSL\.Context, not <ssl\.SSLContext"):
        secure(echo, ssl.create_default_context())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"not for DTLS: make it with SSL\.Context\(SSL\.DTLS_METHOD\)"):
        secure(echo, SSL.Context(SSL.TLS_METHOD))
    with pytest.raises(ValueError, match="has no certificate with its private key"):
        secure(echo, authority.context())
    used = authority.context(identity)
    SSL.Connection(used)
    with pytest.raises(ValueError, match=r"has been used .* make another one"):
        secure(echo, used)


async def test_a_context_can_serve_many(start: Start, server_context: SSL.Context) -> None:
    """One context can be passed to secure, clients and channels any number of times."""
    secured = await start(context=server_context)
    secure(echo, server_context)
    server_context_as_client = await secured.open(context=server_context, server_hostname=None)
    await server_context_as_client.do_handshake()
    async with server_context_as_client as channel:
        await channel.send(b"x")
        assert await channel.receive() == b"x"


def test_invalid_hosts_and_sizes(client_context: SSL.Context, server_context: SSL.Context) -> None:
    """Invalid arguments raise when the channel or the handler is made."""
    transport: trio.abc.Channel[bytes] = object()  # type: ignore[assignment]
    for name in ("", "a b", "."):
        with pytest.raises(ValueError, match="server_hostname"):
            DTLSChannel(transport, client_context, server_hostname=name)
    with pytest.raises(TypeError, match="server_hostname must be a str"):
        DTLSChannel(transport, client_context, server_hostname=b"host")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="are for clients"):
        DTLSChannel(transport, server_context, server_side=True, server_hostname=NAME)
    for mtu in (100, 70_000):
        with pytest.raises(ValueError, match="mtu must be from 548 to 65507"):
            DTLSChannel(transport, client_context, mtu=mtu)
    with pytest.raises(TypeError, match="mtu must be an int"):
        secure(echo, server_context, mtu=1e3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="handshake_timeout must be greater than 0"):
        secure(echo, server_context, handshake_timeout=0)


async def test_connecting_checks_its_arguments_first(client_context: SSL.Context) -> None:
    """connect raises before it sends anything, for a missing host or a wait of zero; it always verifies."""
    with pytest.raises(TypeError, match="server_hostname must be a str, not None"):
        await connect(None, 9, client_context)  # type: ignore[arg-type]
    for seconds in (0, -1, math.nan):
        with pytest.raises(ValueError, match="retransmit_timeout must be greater than 0"):
            await connect("127.0.0.1", 9, client_context, retransmit_timeout=seconds)
    transport: trio.abc.Channel[bytes] = object()  # type: ignore[assignment]
    with pytest.raises(TypeError, match="retransmit_timeout must be a number of seconds"):
        await DTLSChannel(transport, client_context).do_handshake(retransmit_timeout=None)  # type: ignore[arg-type]


async def test_a_function_of_the_context_that_raises(
    start: Start, authority: Authority, identity: Identity, client_identity: Identity
) -> None:
    """on_error gets an exception that a function of the user's context raises, with the channel."""
    errors: list[tuple[object, str]] = []

    def verify(*_: object) -> bool:
        raise LookupError("no such user")

    context = authority.context(identity)
    context.set_verify(SSL.VERIFY_PEER, verify)
    secured = await start(context=context, on_error=lambda client, error: errors.append((type(client), str(error))))
    channel = await secured.open(context=authority.context(client_identity))
    async with channel, trio.open_nursery() as nursery:
        nursery.start_soon(channel.do_handshake)
        await trio.testing.wait_all_tasks_blocked()
        assert errors == [(DTLSChannel, "no such user")]
        assert (secured.handler.handshakes_failed, list(secured.server.clients)) == (1, [])
        nursery.cancel_scope.cancel()
