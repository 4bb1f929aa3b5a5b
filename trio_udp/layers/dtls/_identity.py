"""Verifying the server's certificate: it must be trusted, and be for the host that the user named (RFC 9525)."""

from __future__ import annotations

import ipaddress

import attrs
from OpenSSL import SSL, crypto
from service_identity import VerificationError
from service_identity.cryptography import extract_patterns
from service_identity.hazmat import DNS_ID, IPAddress_ID, verify_service_identity


@attrs.define(eq=False)
class Identity:
    """Verifies a server's certificate for one name, as OpenSSL's callback during the handshake.

    After the handshake would be too late: the server would take the connection for established.

    Attributes:
      objection: The fault of the certificate; empty if there is none so far.
    """

    host: str
    objection: str = attrs.field(default="", init=False)

    def verify(self, _: SSL.Connection, certificate: crypto.X509, error: int, depth: int, fine: int) -> bool:
        """Check one certificate of the chain; the server's own comes last (depth 0)."""
        if not fine:
            self.objection = f"the certificate is not valid: {_meaning_of(error)}"
            return False
        if depth == 0:
            self.objection = self._object_to_name(certificate)
        return not self.objection

    def _object_to_name(self, certificate: crypto.X509) -> str:
        try:
            verify_service_identity(extract_patterns(certificate.to_cryptography()), [_service_id(self.host)], [])
        except VerificationError:
            return f"the certificate is not for {self.host!r}"
        except Exception as error:  # of several kinds, from both libraries that read the certificate
            return f"the certificate has no usable name: {error}"
        return ""


def check_host(host: str) -> str:
    """Return a host in the form that certificates use; raise ``ValueError`` if no certificate can be for it."""
    if not isinstance(host, str):
        raise TypeError(f"server_hostname must be a str, not {host!r}")
    host = host.partition("%")[0].rstrip(".")  # no scope ID, no root
    if not host:
        raise ValueError("server_hostname must not be empty")
    try:
        _service_id(host)
    except ValueError as error:
        raise ValueError(f"server_hostname is neither a host name nor an address, {host!r}: {error}") from None
    return host


def sni_of(host: str) -> bytes | None:
    """Return the name to send to the server (SNI); ``None`` for numeric addresses, which RFC 6066 excludes."""
    identity = _service_id(host)
    return identity.hostname if isinstance(identity, DNS_ID) else None


def _service_id(host: str) -> DNS_ID | IPAddress_ID:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return DNS_ID(host)
    return IPAddress_ID(host)


def _meaning_of(error: int) -> str:
    """Return OpenSSL's name for an error code, in words."""
    for name, code in vars(SSL.X509VerificationCodes).items():
        if code == error and name.startswith("ERR_"):
            return name.removeprefix("ERR_").replace("_", " ").lower()
    return f"error {error}"
