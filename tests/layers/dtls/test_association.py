"""Associations under attack: datagrams lost, duplicated, reordered, damaged and forged at any moment."""

from __future__ import annotations

import pytest
import trio
from hypothesis import HealthCheck, given, settings, strategies as st
from OpenSSL import SSL

from trio_udp.layers.dtls._association import BROKEN, ENDED, ESTABLISHED, HANDSHAKE, Association
from trio_udp.layers.dtls._context import DTLS_1_2, prepare
from trio_udp.layers.dtls._records import longest_message, split

from .conftest import Authority, Identity
from .test_records import hello, record

MTU = 1_232


class Pair:
    """A client and a server with a network between them that is a list of datagrams for each."""

    def __init__(self, client_context: SSL.Context, server_context: SSL.Context) -> None:
        cookies = prepare(client_context)
        connection = SSL.Connection(client_context)
        connection.set_ciphertext_mtu(MTU)
        connection.set_connect_state()
        self.client = Association(client_context, cookies, MTU, "server", connection)
        self.server = Association(server_context, prepare(server_context), MTU, "client")
        self.to_server = self.client.begin()
        self.to_client: list[bytes] = []
        self.seen: list[bytes] = []

    def deliver(self) -> None:
        """Let all datagrams arrive, and those that they cause."""
        while self.to_server or self.to_client:
            self.seen += self.to_server + self.to_client
            arriving, self.to_server = self.to_server, []
            for datagram in arriving:
                self.to_client += self.server.take(datagram)
            arriving, self.to_client = self.to_client, []
            for datagram in arriving:
                self.to_server += self.client.take(datagram)

    @property
    def stages(self) -> tuple[object, object]:
        return self.client.stage, self.server.stage


@pytest.fixture(scope="module")
def contexts(authority: Authority, identity: Identity) -> tuple[SSL.Context, SSL.Context]:
    contexts = authority.context(), authority.context(identity)
    for context in contexts:
        prepare(context)
    return contexts


junk = st.one_of(
    st.binary(max_size=80),
    st.builds(
        record,
        st.integers(0, 2**48 - 1),
        st.binary(max_size=60),
        epoch=st.integers(0, 3),
        kind=st.sampled_from([20, 21, 22, 23, 24, 25]),
    ),
)


@given(
    st.lists(
        st.tuples(
            st.booleans(), st.one_of(junk, st.integers(0, 20), st.tuples(st.integers(0, 20), st.integers(0, 200)))
        )
    )
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_hurts_an_established_association(contexts: tuple[SSL.Context, SSL.Context], attack: list) -> None:  # type: ignore[type-arg]
    """Junk, replays and damaged copies of datagrams do not break or end an association, or become payloads."""

    async def main() -> None:
        pair = Pair(*contexts)
        pair.deliver()
        assert pair.stages == (ESTABLISHED, ESTABLISHED)
        pair.to_server.append(pair.client.protect(b"real"))
        pair.deliver()
        for at_server, what in attack:
            if isinstance(what, int):
                datagram = pair.seen[what % len(pair.seen)]
            elif isinstance(what, tuple):
                real = bytearray(pair.seen[what[0] % len(pair.seen)])
                real[what[1] % len(real)] ^= 0x55
                datagram = bytes(real)
            else:
                datagram = what
            (pair.server if at_server else pair.client).take(datagram)
        pair.to_server.append(pair.client.protect(b"ping"))
        pair.to_client.append(pair.server.protect(b"pong"))
        pair.deliver()
        assert pair.stages == (ESTABLISHED, ESTABLISHED)
        assert (pair.server.payloads, pair.client.payloads) == ([b"real", b"ping"], [b"pong"])

    trio.run(main)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_handshake_ends_well_or_says_why(contexts: tuple[SSL.Context, SSL.Context], data: st.DataObject) -> None:
    """A disturbed handshake raises nothing: it is done, goes on, or is broken with a reason."""

    async def main() -> None:
        pair = Pair(*contexts)
        for _ in range(12):
            for mine, theirs in ((pair.server, pair.client), (pair.client, pair.server)):
                waiting = pair.to_server if mine is pair.server else pair.to_client
                arriving = data.draw(st.permutations(waiting)) + data.draw(st.lists(junk, max_size=2))
                waiting.clear()
                for datagram in arriving:
                    answer = mine.take(datagram)
                    (pair.to_client if theirs is pair.client else pair.to_server).extend(answer)
            if data.draw(st.booleans()):
                pair.to_server += pair.client.repeat()
                pair.to_client += pair.server.repeat()
        for end in (pair.client, pair.server):
            assert end.stage in (HANDSHAKE, ESTABLISHED) or end.reason

    trio.run(main)


async def test_a_client_cannot_make_a_server_collect(contexts: tuple[SSL.Context, SSL.Context]) -> None:
    """Fragments of overlong messages, or too many bytes, break a server's handshake."""
    for number, length, count in ((2, 100_000, 1), (2, 16_000, 3_000)):
        pair = Pair(*contexts)
        pair.to_client += pair.server.take(pair.to_server.pop())
        pair.to_server += pair.client.take(pair.to_client.pop())
        pair.server.take(pair.to_server.pop())
        assert pair.server.stage is HANDSHAKE
        fragment = b"\x10" + length.to_bytes(3, "big") + number.to_bytes(2, "big") + bytes(3) + b"\0\0\x64" + bytes(100)
        for sequence in range(count):
            pair.server.take(record(100 + sequence, fragment))
        assert (pair.server.stage, pair.server.reason) == (BROKEN, "the peer sent too many bytes")


def test_a_long_message_cannot_hide() -> None:
    """The announced length of a message is found in any record of a datagram."""
    long = record(5, b"\x0b\x01\x00\x00" + bytes(8))
    assert longest_message(hello() + long) == 65_536
    assert longest_message(record(4, b"") + record(4, b"x" * 30, epoch=1) + long) == 65_536
    assert longest_message(record(5, bytes(12) + long[13:])) == 65_536
    assert longest_message(hello()) == 42
    assert longest_message(b"") == longest_message(b"\x16" * 12) == 0


async def test_a_new_hello_replaces_an_association(contexts: tuple[SSL.Context, SSL.Context]) -> None:
    """Only a ClientHello with its own cookie ends an established association; one without is sent a cookie."""
    pair = Pair(*contexts)
    pair.deliver()
    new = Pair(*contexts)
    answer = pair.server.take(new.to_server.pop())
    assert len(answer) == 1
    assert pair.server.stage is ESTABLISHED
    pair.server.take(new.client.take(answer[0])[0])
    assert (pair.server.stage, pair.server.replaced) == (ENDED, True)


@pytest.mark.parametrize(
    "cipher",
    [
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ECDHE-ECDSA-CHACHA20-POLY1305",
        "ECDHE-ECDSA-AES128-CCM8",
        "ECDHE-ECDSA-AES128-SHA256",
        "ECDHE-ECDSA-AES256-SHA",
    ],
)
async def test_forged_records_of_any_length(authority: Authority, identity: Identity, cipher: str) -> None:
    """Forged records of any length are ignored for each kind of cipher; the shortest genuine records are not."""
    client, server = authority.context(), authority.context(identity)
    for context in (client, server):
        context.set_cipher_list(cipher.encode() + b"@SECLEVEL=0")
    pair = Pair(client, server)
    pair.deliver()
    assert pair.client.ssl is not None
    assert pair.client.ssl.get_cipher_name() == cipher
    for length in range(70):
        for end in (pair.client, pair.server):
            end.take(record(1000, bytes(length), epoch=1, kind=23))
            end.take(record(1000, bytes(60), epoch=1, kind=23) + record(1000, bytes(length), epoch=1, kind=21))
    for payload in (b"x", b"yy"):
        pair.to_server.append(pair.client.protect(payload))
        pair.to_client.append(pair.server.protect(payload))
        pair.deliver()
    assert pair.server.payloads == pair.client.payloads == [b"x", b"yy"]
    pair.to_client += pair.server.close()  # an alert
    pair.deliver()
    assert pair.client.stage is ENDED


async def test_half_a_hello_in_an_association_breaks_it(contexts: tuple[SSL.Context, SSL.Context]) -> None:
    """A peer that sends only a part of a new ClientHello breaks its own association, and no other.

    OpenSSL cannot send anything then, because it waits for the other parts.
    """
    hostile = SSL.Context(SSL.DTLS_METHOD)
    hostile.set_max_proto_version(DTLS_1_2)
    hostile.set_options(SSL.OP_NO_QUERY_MTU)
    hostile.set_alpn_protos([b"x" * 200])  # a long hello
    pair = Pair(*contexts)
    connection = SSL.Connection(hostile)
    connection.set_ciphertext_mtu(MTU)
    connection.set_connect_state()
    pair.client = Association(hostile, prepare(contexts[0]), MTU, "server", connection)
    pair.to_server = pair.client.begin()
    pair.deliver()
    assert pair.stages == (ESTABLISHED, ESTABLISHED)
    connection.set_ciphertext_mtu(260)
    connection.renegotiate()
    with pytest.raises(SSL.WantReadError):
        connection.do_handshake()
    fragments = split(connection.bio_read(2000))
    assert len(fragments) > 1
    assert (pair.server.take(fragments[0]), pair.server.stage) == ([], ESTABLISHED)
    assert pair.server.protect(b"x") == b""
    assert (pair.server.stage, pair.server.reason) == (BROKEN, "the peer tried to renegotiate")
