"""The user's ``SSL.Context``, and its settings for DTLS."""

from __future__ import annotations

from weakref import WeakKeyDictionary, WeakSet

from OpenSSL import SSL

from ._cookies import Cookies

# SSL_OP_NO_ENCRYPT_THEN_MAC and DTLS1_2_VERSION, for which pyOpenSSL has no names.
NO_ENCRYPT_THEN_MAC = 1 << 19
DTLS_1_2 = 0xFEFD

_prepared: WeakKeyDictionary[SSL.Context, Cookies] = WeakKeyDictionary()
_have_certificates: WeakSet[SSL.Context] = WeakSet()


def prepare(context: SSL.Context) -> Cookies:
    """Set up a context for DTLS, once; return the cookies of the servers that use it.

    Raises:
      TypeError: It is not a context of pyOpenSSL.
      ValueError: It is not for DTLS, or can no longer be changed.
    """
    if not isinstance(context, SSL.Context):
        raise TypeError(f"context must be an OpenSSL.SSL.Context, not {context!r}")
    cookies = _prepared.get(context)
    if cookies is None:
        _set_up(context)
        cookies = _prepared[context] = Cookies()
    return cookies


def check_has_certificate(context: SSL.Context) -> None:
    """Raise ``ValueError`` unless a context has a certificate and its key, as a server needs."""
    if context not in _have_certificates:  # the check takes OpenSSL 10 µs
        try:
            context.check_privatekey()
        except SSL.Error as error:
            raise ValueError(f"the context has no certificate with its private key ({reason_of(error)})") from None
        _have_certificates.add(context)


def reason_of(error: SSL.Error) -> str:
    """Return OpenSSL's text for an error, without numbers and names of functions."""
    queue = error.args[0] if error.args and isinstance(error.args[0], list) else []
    reasons = [str(entry[-1]) for entry in queue if entry and entry[-1]]
    return ", ".join(dict.fromkeys(reasons)) or "no reason given"


def _set_up(context: SSL.Context) -> None:
    try:
        # DTLS 1.0 is deprecated (RFC 8996), and pyOpenSSL has no DTLS 1.3.
        context.set_max_proto_version(DTLS_1_2)
        context.set_min_proto_version(DTLS_1_2)
    except ValueError:  # since pyOpenSSL 26.2
        raise ValueError(
            "the context has been used for a connection and can no longer be changed: make another one, and give it "
            "to trio_udp.dtls before anything else"
        ) from None
    # We set the MTU, since OpenSSL has no socket to ask. A renegotiation would give attackers one handshake more. With
    # encrypt-then-MAC, which only the old CBC ciphers use, OpenSSL gives up at the first forged record.
    context.set_options(SSL.OP_NO_QUERY_MTU | SSL.OP_NO_RENEGOTIATION | NO_ENCRYPT_THEN_MAC)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)
    # Resumption needs this if clients have certificates.
    context.set_session_id(b"trio_udp.dtls")
    # DTLSv1_listen() calls these; Cookies has already checked the cookie.
    context.set_cookie_generate_callback(lambda _: b"unused")
    context.set_cookie_verify_callback(lambda *_: True)
    if SSL.Connection(context).get_protocol_version() != DTLS_1_2:
        raise ValueError("the context is not for DTLS: make it with SSL.Context(SSL.DTLS_METHOD)")
