"""Cookies: a client shows that it gets what is sent to its address before anything is kept of it.

RFC 6347 section 4.2.1, by hand: OpenSSL would need an object of its own for every stranger.
"""

from __future__ import annotations

import hmac
import os
from hashlib import blake2b

import attrs
import trio

from ._records import ClientHello, hello_verify_request, parse_client_hello

# Seconds in which a cookie is made from the same time. One is valid until the next such period is over.
PERIOD = 30

# Bytes. With this much, a HelloVerifyRequest (48) is never longer than the ClientHello it answers (67 at least).
LENGTH = 20


@attrs.define(eq=False)
class Cookies:
    """Makes and checks cookies, with a key that only this object has."""

    _key: bytes = attrs.field(factory=lambda: os.urandom(32), init=False, repr=False)

    def judge(self, datagram: bytes, address: object) -> bool | bytes:
        """Decide about a stranger's datagram: what to answer, ``True`` for a valid cookie, ``False`` for anything else.

        The second hello of a client is never answered with another cookie: the number of the third one would be 2, for
        which OpenSSL begins no handshake.
        """
        hello = parse_client_hello(datagram)
        if hello is None:
            return False
        period = int(trio.current_time() / PERIOD)
        if hello.message_number == 0:
            return hello_verify_request(hello, self._cookie(hello, address, period))
        if hello.message_number != 1 or len(hello.cookie) != LENGTH:
            return False
        return any(
            hmac.compare_digest(hello.cookie, self._cookie(hello, address, when)) for when in (period, period - 1)
        )

    def _cookie(self, hello: ClientHello, address: object, period: int) -> bytes:
        # A keyed BLAKE2 is a MAC (RFC 7693), and takes a third of the time of an HMAC.
        return blake2b(b"%d %a " % (period, address) + hello.essence, key=self._key, digest_size=LENGTH).digest()
