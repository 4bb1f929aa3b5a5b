"""One DTLS association, without I/O: datagrams in, payloads and datagrams out.

It drives one ``SSL.Connection`` over memory BIOs. Time is the channel's matter: it says when to repeat a flight. A
*flight* is what one end sends in a handshake before it must wait for the other (RFC 6347 section 4.2.4).

A server's association begins with a ClientHello whose cookie is valid. Until then there is no ``SSL.Connection``, and
nothing that a stranger sends costs more than a cookie.
"""

from __future__ import annotations

import enum

import attrs
import trio
from OpenSSL import SSL

from ._context import reason_of
from ._cookies import Cookies
from ._identity import Identity
from ._records import (
    is_client_hello,
    is_of_handshake,
    is_one_record,
    is_unprotected,
    number_of,
    pack,
    parse_client_hello,
    renumber,
    split,
)

# Longest payload of a record (RFC 5246 section 6.2.1), and the most that OpenSSL adds to one, rounded up.
MAX_PAYLOAD = 16_384
OVERHEAD = 256

# Bytes to ask OpenSSL for at once: enough for a flight. (A buffer of 64 KB for a moment would cost 4 KB of memory for each
# client, by fragmentation.)
CHUNK = 2_048

# Least time between two repetitions of the last flight, in seconds: anybody can ask for one with a forged datagram.
REPEAT_EVERY = 0.5


class Stage(enum.Enum):
    """What an association is in; each stage leads only to later ones."""

    HANDSHAKE = enum.auto()
    ESTABLISHED = enum.auto()
    ENDED = enum.auto()  # by the peer
    BROKEN = enum.auto()  # by an error
    CLOSED = enum.auto()  # by us


HANDSHAKE, ESTABLISHED, ENDED, BROKEN, CLOSED = Stage


@attrs.define(eq=False)
class Association:
    """Both ends of DTLS: a client's has its ``SSL.Connection`` from the beginning, a server's from the hello on.

    Attributes:
      address: The peer's; what a cookie is for.
      payloads: Received, and not yet taken.
      reason: Why it is broken.
      flights: How many flights we have sent, repetitions not counted.
      confirmed: The peer has finished the handshake too.
      replaced: The peer has begun another one.
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
    _cookie: bytes = attrs.field(default=b"", init=False)  # of the hello that began it
    _repeated_at: float = attrs.field(default=float("-inf"), init=False)

    def __attrs_post_init__(self) -> None:
        self.is_server = self.ssl is None
        if self.ssl is not None:
            self.ssl.set_ciphertext_mtu(self.mtu)
            self.ssl.set_connect_state()

    @property
    def is_begun(self) -> bool:
        """Whether a handshake is under way or done; a server's waits for a hello with a valid cookie."""
        return self.ssl is not None

    def begin(self) -> list[bytes]:
        """Return the datagrams to begin with, or to go on with after an interruption."""
        return self._shake_hands() if self.ssl is not None and not self._flight else self.repeat()

    def take(self, datagram: bytes) -> list[bytes]:
        """Take in a datagram that has arrived; return datagrams to send. ``stage`` and ``payloads`` say what it was."""
        ssl, stage = self.ssl, self.stage
        if stage is ESTABLISHED:
            if not is_unprotected(datagram):
                assert ssl is not None
                ssl.bio_write(datagram)
                return self._read(len(datagram), only_one=is_one_record(datagram))
            # What anybody can forge does not reach OpenSSL, which would believe some of it.
            if self.is_server and is_client_hello(datagram):
                return self._take_hello(datagram)
            return self._repeat_last_flight() if is_of_handshake(datagram) else []
        if stage is HANDSHAKE and datagram:
            if self.is_server and is_client_hello(datagram):
                return self._take_hello(datagram)
            if ssl is not None:
                ssl.bio_write(datagram)
                return self._shake_hands()
        return []

    def repeat(self) -> list[bytes]:
        """Return the current flight of the handshake once more: there was no answer in time."""
        if self.ssl is None:
            return []
        try:
            # OpenSSL has a timer of its own, on the real clock. If it is due too, OpenSSL makes new records. Peers other
            # than us need these: they take an old Finished for a replay.
            self.ssl.DTLSv1_handle_timeout()
        except SSL.Error:
            self.fail("the peer does not answer")
            return []
        records = self._output()
        if records:
            self._flight = records
        else:
            self._flight, self._next_number = renumber(self._flight, self._next_number)
        return pack(self._flight, self.mtu)

    def protect(self, payload: bytes) -> bytes:
        """Return the datagram that carries a payload, of 1 to ``MAX_PAYLOAD`` bytes; only while ``ESTABLISHED``."""
        assert self.ssl is not None
        self.ssl.send(payload)
        return self.ssl.bio_read(len(payload) + OVERHEAD)

    def fail(self, reason: str) -> None:
        """Break the association."""
        self.stage = BROKEN
        self.reason = reason

    def close(self) -> list[bytes]:
        """End the association; return what tells the peer."""
        goodbye = self._say_goodbye() if self.stage is ESTABLISHED else []
        self.stage = CLOSED
        return goodbye

    def _take_hello(self, datagram: bytes) -> list[bytes]:
        verdict = self.cookies.judge(datagram, self.address)
        if isinstance(verdict, bytes):
            return [verdict]
        hello = parse_client_hello(datagram)
        if not verdict or hello is None:
            return []
        if self.ssl is None:
            self._cookie = hello.cookie
            return self._accept(datagram)
        if hello.cookie != self._cookie:
            # The peer lost its state and has shown that it has this address (RFC 6347 section 4.2.8).
            self.replaced = True
            self.reason = "the peer began another handshake"
            self.stage = ENDED if self.stage is ESTABLISHED else BROKEN
            return []
        return self._repeat_last_flight() if self.stage is ESTABLISHED else []

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
        return self._shake_hands()

    def _shake_hands(self) -> list[bytes]:
        """Let OpenSSL go on with the handshake."""
        assert self.ssl is not None
        try:
            self.ssl.do_handshake()
        except SSL.WantReadError:
            records = self._output()
            if records:
                self._begin_flight(records)
            return pack(records, self.mtu)
        except SSL.Error as error:
            return self._after_error(error)
        # If this last step has made nothing, then the other end's flight was the last one, and there is nothing that
        # we would have to repeat.
        self.stage = ESTABLISHED
        records = self._output()
        self._begin_flight(records)
        # Datagrams that overtook the end of the handshake are in OpenSSL already.
        return [*pack(records, self.mtu), *self._read(MAX_PAYLOAD, only_one=False)]

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
            goodbye = self._say_goodbye()
            self.stage = ENDED
            return goodbye
        except SSL.Error as error:
            return self._after_error(error)

    def _after_error(self, error: SSL.Error) -> list[bytes]:
        """Return the alert that OpenSSL wants to send. Unless its state is an error, it was junk, and nothing happened."""
        assert self.ssl is not None
        records = self._output()
        if isinstance(error, SSL.ZeroReturnError):
            self.fail("the peer closed the connection")
        elif self.ssl.get_state_string() == b"error":
            self.fail((self.identity and self.identity.objection) or reason_of(error))
        return pack(records, self.mtu)

    def _say_goodbye(self) -> list[bytes]:
        assert self.ssl is not None
        try:
            self.ssl.shutdown()
        except SSL.Error:
            return []
        return self._output()

    def _repeat_last_flight(self) -> list[bytes]:
        """Answer a repeated flight: the last one, which is ours, may be lost."""
        now = trio.current_time()
        if now < self._repeated_at + REPEAT_EVERY:
            return []
        self._repeated_at = now
        self._flight, self._next_number = renumber(self._flight, self._next_number)
        return pack(self._flight, self.mtu)

    def _begin_flight(self, records: list[bytes]) -> None:
        self._flight = records
        self.flights += 1

    def _output(self) -> list[bytes]:
        """Return the records that OpenSSL has written."""
        assert self.ssl is not None
        written = []
        try:
            while True:
                written.append(self.ssl.bio_read(CHUNK))
        except SSL.WantReadError:
            pass
        if not written:
            return []
        records, self._next_number = renumber(split(b"".join(written)), self._next_number)
        return records
