"""One DTLS association, without I/O: datagrams in, payloads and datagrams out.

It drives one ``SSL.Connection`` over memory BIOs. The channel keeps time: it says when to repeat a flight. A *flight*
is the datagrams that one end sends in a handshake before it must wait for the other (RFC 6347 section 4.2.4).

A server's association begins with a ClientHello that has a valid cookie. Until then there is no ``SSL.Connection``, and
no datagram from a stranger costs more than a cookie.
"""

from __future__ import annotations

import enum
from contextlib import suppress

import attrs
import trio
from OpenSSL import SSL

from ._context import reason_of
from ._cookies import Cookies
from ._identity import Identity
from ._records import (
    is_client_hello,
    is_of_handshake,
    is_unprotected,
    longest_message,
    message_number_of,
    number_of,
    pack,
    parse_client_hello,
    renumber,
    split,
)

# The longest payload of a record (RFC 5246 section 6.2.1), and the most bytes that OpenSSL adds to one, rounded up.
MAX_PAYLOAD = 16_384
OVERHEAD = 256

# The longest handshake message that a server accepts from a client, in bytes: enough for a chain of certificates.
# OpenSSL would reserve 100,000 for each of ten messages as soon as a fragment arrives.
LONGEST_MESSAGE = 16_384

# The most bytes that a client may send in a handshake, including repetitions.
LONGEST_HANDSHAKE = 262_144

# Bytes to read from OpenSSL at once: enough for most flights. (A buffer of 64 KB, even for a moment, would fragment the
# heap so that each client takes 4 KB more.)
CHUNK = 1_280

# The least time between two repetitions of the last flight, in seconds: a forged datagram is enough to cause one.
REPEAT_EVERY = 0.5

# Copies of each datagram when a flight is repeated; see Association.repeat().
REPEAT_COPIES = 2


class Stage(enum.Enum):
    """The stage of an association. Each stage leads only to later ones."""

    HANDSHAKE = enum.auto()
    ESTABLISHED = enum.auto()
    ENDED = enum.auto()  # by the peer
    BROKEN = enum.auto()  # by an error
    CLOSED = enum.auto()  # by us


HANDSHAKE, ESTABLISHED, ENDED, BROKEN, CLOSED = Stage


@attrs.define(eq=False)
class Association:
    """One end of DTLS. A client has its ``SSL.Connection`` from the beginning, a server from the hello on.

    Attributes:
      address: The peer's address, for which a cookie is valid.
      ssl: ``None`` at a server that waits for a hello with a valid cookie.
      payloads: Payloads received and not yet taken.
      reason: Why the association is broken.
      flights: The number of flights that we have sent, without repetitions.
      confirmed: The peer has finished the handshake too.
      replaced: The peer has begun another association.
    """

    context: SSL.Context
    cookies: Cookies
    mtu: int
    address: object = None
    ssl: SSL.Connection | None = None
    identity: Identity | None = None
    stage: Stage = attrs.field(default=HANDSHAKE, init=False)
    payloads: list[bytes] = attrs.field(factory=list, init=False)
    reason: str = attrs.field(default="", init=False)
    flights: int = attrs.field(default=0, init=False)
    confirmed: bool = attrs.field(default=False, init=False)
    replaced: bool = attrs.field(default=False, init=False)
    is_server: bool = attrs.field(init=False)
    _flight: list[bytes] = attrs.field(factory=list, init=False)  # records
    _next_number: int = attrs.field(default=0, init=False)  # of a record of epoch 0
    # Bytes of a record without payload. A shorter record is forged, and would make OpenSSL 3.5 give up.
    _shortest: int = attrs.field(default=0, init=False)
    _handshake_bytes: int = attrs.field(default=0, init=False)  # from the peer
    _seen: int = attrs.field(default=-1, init=False)  # the peer's last handshake message
    _answered: int = attrs.field(default=-1, init=False)  # the value of _seen when our flight began
    _cookie: bytes = attrs.field(default=b"", init=False)  # of the hello that began the handshake
    _repeated_at: float = attrs.field(default=float("-inf"), init=False)

    def __attrs_post_init__(self) -> None:
        self.is_server = self.ssl is None

    def begin(self) -> list[bytes]:
        """Return the datagrams with which to begin, or to continue after an interruption."""
        return self._continue_handshake() if self.ssl is not None and not self._flight else self.repeat()

    def take(self, datagram: bytes) -> list[bytes]:
        """Process a datagram that has arrived; return datagrams to send. ``stage`` and ``payloads`` show the result."""
        ssl, stage = self.ssl, self.stage
        if stage is ESTABLISHED and not is_unprotected(datagram):
            records = split(datagram)
            if ssl is None or min(map(len, records)) < self._shortest:
                return []
            ssl.bio_write(datagram)
            return self._read(len(datagram), only_one=len(records) == 1)
        if not datagram or stage not in (HANDSHAKE, ESTABLISHED):
            return []
        if self.is_server and is_client_hello(datagram):
            return self._take_hello(datagram)
        if stage is ESTABLISHED:
            # Datagrams that anyone can forge do not reach OpenSSL, which would act on some of them.
            return self._repeat_soon() if is_of_handshake(datagram) else []
        return [] if ssl is None else self._take_handshake(datagram)

    def repeat(self) -> list[bytes]:
        """Return the current flight of the handshake again, because no answer came in time.

        Each datagram is in it twice. The waits double, so after a few losses another loss costs a minute. At 30 % loss,
        1 to 2 % of handshakes took more than 150 seconds with single datagrams, and one in 1,800 with double ones.
        """
        if not self._renew_flight():
            self._flight, self._next_number = renumber(self._flight, self._next_number)
        return REPEAT_COPIES * pack(self._flight, self.mtu)

    def protect(self, payload: bytes) -> bytes:
        """Return the datagram that carries a payload of 1 to ``MAX_PAYLOAD`` bytes; empty unless ``ESTABLISHED``."""
        ssl = self.ssl
        if self.stage is not ESTABLISHED or ssl is None:
            return b""
        try:
            ssl.send(payload)
        except SSL.Error:
            # OpenSSL has read a fragment of a hello in a record of this association, and waits for the rest of it.
            self.fail("the peer tried to renegotiate")
            return b""
        return ssl.bio_read(len(payload) + OVERHEAD)

    def fail(self, reason: str) -> None:
        """Break the association."""
        self.stage = BROKEN
        self.reason = reason

    def close(self) -> list[bytes]:
        """End the association; return the datagrams that tell the peer."""
        goodbye = self._shut_down() if self.stage is ESTABLISHED else []
        self.stage = CLOSED
        self.payloads.clear()
        return goodbye

    def _take_hello(self, datagram: bytes) -> list[bytes]:
        verdict = self.cookies.judge(datagram, self.address)
        if isinstance(verdict, bytes):
            return [verdict]
        hello = parse_client_hello(datagram)
        if not verdict or hello is None:
            return []
        if self.ssl is None:
            self._cookie, self._seen = hello.cookie, hello.message_number
            return self._accept(datagram)
        if hello.cookie != self._cookie:
            # The peer has lost its state, and has proved its address (RFC 6347 section 4.2.8).
            self.replaced = True
            self.reason = "the peer began another handshake"
            self.stage = ENDED if self.stage is ESTABLISHED else BROKEN
            return []
        if self.stage is ESTABLISHED:
            return self._repeat_soon()
        return self._take_handshake(datagram)  # OpenSSL has the hello, but more may follow it in the datagram

    def _accept(self, datagram: bytes) -> list[bytes]:
        """Begin a server's handshake with a hello whose cookie is valid."""
        self.ssl = ssl = SSL.Connection(self.context)
        ssl.set_ciphertext_mtu(self.mtu)
        ssl.set_accept_state()
        ssl.bio_write(datagram)
        try:
            ssl.DTLSv1_listen()
        except SSL.Error as error:
            self.fail(f"malformed ClientHello: {reason_of(error)}")
            return []
        self._next_number = number_of(datagram)
        return self._continue_handshake()

    def _take_handshake(self, datagram: bytes) -> list[bytes]:
        """Process a datagram of the handshake."""
        assert self.ssl is not None
        self._handshake_bytes += len(datagram)
        if self.is_server and (
            self._handshake_bytes > LONGEST_HANDSHAKE or longest_message(datagram) > LONGEST_MESSAGE
        ):
            self.fail("the peer sent too many bytes")
            return []
        self._renew_flight()
        number = message_number_of(datagram)
        if number is not None:
            self._seen = max(self._seen, number)
        flights = self.flights
        self.ssl.bio_write(datagram)
        answer = self._continue_handshake()
        if number is not None and number <= self._answered and self.flights == flights and not answer:
            # The peer repeats a flight that we have answered: the answer may be lost (RFC 6347 section 4.2.4, figure
            # 3).
            return self._repeat_soon()
        return answer

    def _continue_handshake(self) -> list[bytes]:
        """Let OpenSSL continue the handshake."""
        assert self.ssl is not None
        try:
            self.ssl.do_handshake()
        except SSL.WantReadError:
            return self._begin_flight()
        except SSL.Error as error:
            return self._after_error(error)
        # If this last step has written nothing, the peer's flight was the last one, and we have nothing to repeat.
        self.stage = ESTABLISHED
        self._shortest = self.mtu - self.ssl.get_cleartext_mtu()
        last = self._begin_flight()
        # Datagrams that overtook the end of the handshake are in OpenSSL already.
        return [*last, *self._read(MAX_PAYLOAD, only_one=False)]

    def _read(self, size: int, *, only_one: bool) -> list[bytes]:
        """Move the payloads that OpenSSL has to ``payloads``; return datagrams to send."""
        assert self.ssl is not None
        try:
            while True:
                payload = self.ssl.recv(size)
                self.confirmed = True
                if payload:
                    self.payloads.append(payload)
                if only_one:
                    return []
        except SSL.WantReadError:  # junk, or no more
            return self._output()
        except SSL.ZeroReturnError:
            goodbye = self._shut_down()
            self.stage = ENDED
            return goodbye
        except SSL.Error as error:
            return self._after_error(error)

    def _after_error(self, error: SSL.Error) -> list[bytes]:
        """Return the alert that OpenSSL wants to send. Unless its state is an error, the datagram was only junk."""
        assert self.ssl is not None
        records = self._output()
        if isinstance(error, SSL.ZeroReturnError):
            self.fail("the peer closed the connection")
        elif self.ssl.get_state_string() == b"error":
            self.fail((self.identity and self.identity.objection) or reason_of(error))
        return pack(records, self.mtu)

    def _shut_down(self) -> list[bytes]:
        assert self.ssl is not None
        try:
            self.ssl.shutdown()
        except SSL.Error:
            return []
        return self._output()

    def _repeat_soon(self) -> list[bytes]:
        """Return our flight again because the peer repeats its own; but not too often."""
        now = trio.current_time()
        if now < self._repeated_at + REPEAT_EVERY:
            return []
        self._repeated_at = now
        return self.repeat()

    def _begin_flight(self) -> list[bytes]:
        """Return the datagrams that a step of the handshake has written: our next flight, if there are any."""
        records = self._output()
        if records or self.stage is ESTABLISHED:
            self._flight = records
            self._answered = self._seen
            self.flights += 1
        return pack(records, self.mtu)

    def _renew_flight(self) -> bool:
        """Let OpenSSL write the current flight again if its timer, on the real clock, is due; return whether it did.

        Other implementations sometimes need new records: they take an old Finished for a replay. It must not happen in
        the middle of a step, where the old flight could not be told from the next one.
        """
        if self.ssl is None:
            return False
        try:
            if not self.ssl.DTLSv1_handle_timeout():
                return False
        except SSL.Error:
            self.fail("the peer does not answer")
            return True
        records = self._output()
        self._flight = records or self._flight
        return bool(records)

    def _output(self) -> list[bytes]:
        """Return the records that OpenSSL has written."""
        assert self.ssl is not None
        written = b""
        with suppress(SSL.WantReadError):
            while len(written) % CHUNK == 0:
                written += self.ssl.bio_read(CHUNK)
        records, self._next_number = renumber(split(written), self._next_number)
        return records
