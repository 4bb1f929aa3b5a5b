from __future__ import annotations

import datetime
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL

import trio_udp
from trio_udp.dtls import DTLSChannel, SecuredHandler, secure
from trio_udp.testing import SimulatedNetwork

from ...conftest import SERVER, check_adds_up

NAME = "server.test"


@attrs.frozen
class Identity:
    """A certificate with its key, as PEM files."""

    certificate: Path
    key: Path


@attrs.frozen
class Authority:
    """A certification authority in a folder, and contexts that trust it."""

    folder: Path
    _name: x509.Name
    _key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, folder: Path, name: str) -> Authority:
        authority = cls(folder, _name(name), ec.generate_private_key(ec.SECP256R1()))
        extension = x509.BasicConstraints(ca=True, path_length=None)
        folder.mkdir()
        authority._sign(authority._name, authority._key, extension, authority.certificate, days=30)
        return authority

    @property
    def certificate(self) -> Path:
        return self.folder / "authority.pem"

    def issue(self, *names: str, days: int = 30) -> Identity:
        """Issue a certificate for names and addresses; one for -1 days has expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = f"{len(list(self.folder.iterdir()))}"
        paths = Identity(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        alternatives = x509.SubjectAlternativeName([_general_name(name) for name in names])
        self._sign(_name(names[0]), key, alternatives, paths.certificate, days=days)
        private = serialization.PrivateFormat.PKCS8
        pem = key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption())
        paths.key.write_bytes(pem)
        return paths

    def context(self, identity: Identity | None = None, *, verify: bool = False) -> SSL.Context:
        """Make a context that trusts this authority, has an identity, and requests the peer's certificate."""
        context = SSL.Context(SSL.DTLS_METHOD)
        context.load_verify_locations(str(self.certificate))
        if identity is not None:
            context.use_certificate_chain_file(str(identity.certificate))
            context.use_privatekey_file(str(identity.key))
        if verify:
            context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
        return context

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, extension: Any, path: Path, *, days: int
    ) -> None:
        now = datetime.datetime.now(datetime.timezone.utc)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=2))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
            .sign(self._key, hashes.SHA256())
        )
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("dtls") / "authority", "Authority")


@pytest.fixture(scope="session")
def identity(authority: Authority) -> Identity:
    """The identity of the server."""
    return authority.issue(NAME, "localhost", "127.0.0.1", "::1")


@pytest.fixture(scope="session")
def client_identity(authority: Authority) -> Identity:
    return authority.issue("client.test")


@pytest.fixture
def server_context(authority: Authority, identity: Identity) -> SSL.Context:
    return authority.context(identity)


@pytest.fixture
def client_context(authority: Authority) -> SSL.Context:
    return authority.context()


@attrs.define
class SecuredServer:
    """A secured handler on a simulated network, and methods to reach it."""

    network: SimulatedNetwork
    server: trio_udp.Server
    handler: SecuredHandler
    client_context: SSL.Context

    async def open(self, *, port: int = 0, host: str = "198.51.100.1", **options: Any) -> DTLSChannel:
        """Open a channel to the server, before the handshake. By default it verifies the server's name."""
        options = {"context": self.client_context, "server_hostname": NAME, **options}
        connection = await self.network.connect(*SERVER, local_address=(host, port))
        return DTLSChannel(connection, options.pop("context"), **options)

    @asynccontextmanager
    async def connected(self, **options: Any) -> AsyncIterator[DTLSChannel]:
        channel = await self.open(**options)
        await channel.do_handshake()
        async with channel:
            yield channel


Start = Callable[..., Awaitable[SecuredServer]]


@pytest.fixture
async def start(
    nursery: trio.Nursery,
    simulated_network: SimulatedNetwork,
    server_context: SSL.Context,
    client_context: SSL.Context,
) -> AsyncIterator[Start]:
    """Return a function that serves a secured handler on a simulated network. At the end its counters must add up."""
    servers = []

    async def start(handler: Any = echo, context: SSL.Context | None = None, **options: Any) -> SecuredServer:
        of_secure = {name: options.pop(name) for name in ("mtu", "handshake_timeout") if name in options}
        secured = secure(handler, context or server_context, **of_secure)
        endpoint = simulated_network.endpoint(*SERVER)
        options = {"on_error": trio_udp.raise_error, **options}
        server = await nursery.start(partial(trio_udp.serve_endpoints, secured, [endpoint], **options))
        servers.append(server)
        return SecuredServer(simulated_network, server, secured, client_context)

    yield start

    for server in servers:
        await trio.testing.wait_all_tasks_blocked()
        check_adds_up(server)


async def echo(client: trio_udp.Client) -> None:
    async for payload in client:
        await client.send(payload)


@pytest.fixture
def records_of(simulated_network: SimulatedNetwork) -> Callable[[str], list[bytes]]:
    """Return a function that returns the datagrams a host has sent."""
    return lambda host: [
        event.payload for event in simulated_network.events if (event.fate, event.source[0]) == ("sent", host)
    ]
