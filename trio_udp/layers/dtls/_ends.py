"""Making the two ends of an association from the arguments of users."""

from __future__ import annotations

from contextlib import suppress
from typing import final

import attrs
from OpenSSL import SSL

from ._association import Association
from ._context import check_has_certificate, prepare
from ._identity import Identity, check_host, sni_of
from ._records import split

# Bytes in a datagram: the smallest MTU of IPv6, 1,280, less 48 bytes of headers.
MTU = 1_232

# Bounds of the MTU: the datagram that every host can receive over IPv4 (RFC 791), and the longest. A ClientHello must
# fit.
LEAST_MTU, MOST_MTU = 548, 65_507


@final
@attrs.frozen(eq=False)
class Session:
    """A session that a client can resume, with a shorter handshake in which no certificate is sent.

    It comes from :attr:`DTLSChannel.session` and is for ``session=``, with the same context. Keep it secret: it holds
    keys.

    Attributes:
      server_hostname: The name that the server's certificate was verified for, or ``None``. The session can be resumed
        for this name only, because a resumed handshake shows no certificate.
    """

    server_hostname: str | None
    _session: SSL.Session = attrs.field(repr=False)

    def apply(self, connection: SSL.Connection) -> None:
        """Let a connection resume this session."""
        connection.set_session(self._session)


def server_end(context: SSL.Context, mtu: int, address: object) -> Association:
    cookies = prepare(context)
    check_mtu(mtu)
    check_has_certificate(context)
    return Association(context, cookies, mtu, address)


def client_end(
    context: SSL.Context, mtu: int, address: object, server_hostname: str | None, session: Session | None
) -> Association:
    cookies = prepare(context)
    check_mtu(mtu)
    identity = None if server_hostname is None else Identity(check_host(server_hostname))
    if session is not None:
        if not isinstance(session, Session):
            raise TypeError(f"session must be a trio_udp.dtls.Session, not {session!r}")
        name = host_of(identity)
        if name != session.server_hostname:
            raise ValueError(f"the session is for {session.server_hostname!r}, not for {name!r}")
        if not _hello_fits(_connection(context, mtu, identity, session)):
            session = None
    return Association(context, cookies, mtu, address, _connection(context, mtu, identity, session), identity)


def host_of(identity: Identity | None) -> str | None:
    return None if identity is None else identity.host


def check_mtu(mtu: object) -> None:
    if not isinstance(mtu, int) or isinstance(mtu, bool):
        raise TypeError(f"mtu must be an int, not {mtu!r}")
    if not LEAST_MTU <= mtu <= MOST_MTU:
        raise ValueError(f"mtu must be from {LEAST_MTU} to {MOST_MTU} bytes, not {mtu!r}")


def _connection(context: SSL.Context, mtu: int, identity: Identity | None, session: Session | None) -> SSL.Connection:
    """Make a client's connection, before its handshake."""
    connection = SSL.Connection(context)
    connection.set_ciphertext_mtu(mtu)
    connection.set_connect_state()
    if identity is not None:
        connection.set_verify(SSL.VERIFY_PEER, identity.verify)
        name = sni_of(identity.host)
        if name is not None:
            connection.set_tlsext_host_name(name)
    if session is not None:
        session.apply(connection)
    return connection


def _hello_fits(connection: SSL.Connection) -> bool:
    """Whether a client's hello is one record. A long session ticket may split it, and then no server answers."""
    with suppress(SSL.WantReadError):
        connection.do_handshake()
    return len(split(connection.bio_read(1 << 16))) == 1
