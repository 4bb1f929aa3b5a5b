"""DTLS records and cookies: payloads of strangers, and records of our own OpenSSL."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given, strategies as st
from OpenSSL import SSL

from trio_udp.layers.dtls._cookies import Cookies
from trio_udp.layers.dtls._records import (
    hello_verify_request,
    is_client_hello,
    is_of_handshake,
    is_unprotected,
    number_of,
    pack,
    parse_client_hello,
    renumber,
    split,
)

ALICE = ("192.0.2.1", 1000)
BOB = ("192.0.2.2", 1000)


def hello(*, cookie: bytes = b"", message_number: int = 0, session: bytes = b"", random: bytes = bytes(32)) -> bytes:
    """Make the shortest possible ClientHello."""
    lists = b"\x00\x02\xc0\x2b\x01\x00"
    body = b"\xfe\xfd%b%c%b%c%b%b" % (random, len(session), session, len(cookie), cookie, lists)
    length = len(body).to_bytes(3, "big")
    message = b"\x01%b%b\0\0\0%b%b" % (length, message_number.to_bytes(2, "big"), length, body)
    return b"\x16\xfe\xff\0\0\0\0\0\0\0\x07%b%b" % (len(message).to_bytes(2, "big"), message)


def record(number: int, content: bytes = b"x", *, epoch: int = 0, kind: int = 22) -> bytes:
    header = bytes([kind]) + b"\xfe\xfd" + epoch.to_bytes(2, "big") + number.to_bytes(6, "big")
    return header + len(content).to_bytes(2, "big") + content


@pytest.fixture
def cookies() -> Cookies:
    return Cookies()


def test_a_hello_of_openssl_is_parsed() -> None:
    """A ClientHello from OpenSSL is parsed, and its part without the cookie is the same each time."""
    connection = SSL.Connection(SSL.Context(SSL.DTLS_METHOD))
    connection.set_ciphertext_mtu(1232)
    connection.set_connect_state()
    with pytest.raises(SSL.WantReadError):
        connection.do_handshake()
    first = parse_client_hello(connection.bio_read(2000))
    assert first is not None
    assert (first.message_number, first.record_number, first.cookie) == (0, bytes(6), b"")
    connection.bio_write(hello_verify_request(first, b"a cookie"))
    with pytest.raises(SSL.WantReadError):
        connection.do_handshake()
    second = parse_client_hello(connection.bio_read(2000))
    assert second is not None
    assert (second.message_number, second.record_number, second.cookie) == (1, b"\0\0\0\0\0\1", b"a cookie")
    assert second.essence == first.essence


@pytest.mark.parametrize(
    "change",
    [
        lambda whole: whole[:-1],
        lambda whole: whole[:66],
        lambda whole: whole[:13],
        lambda whole: b"\x17" + whole[1:],  # not a handshake record
        lambda whole: whole[:4] + b"\x01" + whole[5:],  # another epoch
        lambda whole: whole[:13] + b"\x02" + whole[14:],  # a ServerHello
        lambda whole: whole[:19] + b"\0\0\1" + whole[22:],  # a fragment from the middle
        lambda whole: whole[:14] + b"\0\1\0" + whole[17:],  # the first fragment of more
        lambda whole: whole[:59] + b"\xff" + whole[60:],  # a session ID beyond the end
        lambda whole: whole[:60] + b"\xff" + whole[61:],  # a cookie beyond the end
    ],
)
def test_malformed_hellos(change: object) -> None:
    """Truncated, fragmented and contradictory ClientHellos, and other records, are rejected."""
    assert parse_client_hello(hello()) is not None
    assert callable(change)
    assert parse_client_hello(change(hello())) is None


@given(st.binary(max_size=150))
def test_any_bytes_can_be_looked_at(junk: bytes) -> None:
    """No bytes make the parser raise, whether alone, as the body of a ClientHello, or in place of its end."""
    for datagram in (junk, hello()[:13] + junk, hello()[:59] + junk, b"\x16\xfe\xfd" + bytes(8) + junk):
        parse_client_hello(datagram)
        for look in (is_client_hello, is_of_handshake, is_unprotected):
            assert look(datagram) in (True, False)
        assert b"".join(split(datagram)) == datagram


@given(st.lists(st.tuples(st.integers(0, 1), st.binary(max_size=300)), max_size=20), st.integers(300, 1500))
def test_records_are_divided_renumbered_and_packed(contents: list[tuple[int, bytes]], size: int) -> None:
    """Records are split from a stream and packed into datagrams unchanged, except for new numbers in epoch 0."""
    records = [record(5, content, epoch=epoch) for epoch, content in contents]
    assert split(b"".join(records)) == records
    renumbered, following = renumber(records, 100)
    plain = [number_of(one) for one, (epoch, _) in zip(renumbered, contents, strict=True) if epoch == 0]
    assert plain == list(range(100, following))
    assert [one[13:] for one in renumbered] == [content for _, content in contents]
    assert {number_of(one) for one, (epoch, _) in zip(renumbered, contents, strict=True) if epoch} <= {5}
    datagrams = pack(renumbered, size)
    assert b"".join(datagrams) == b"".join(renumbered)
    assert all(len(datagram) <= max(size, 313) for datagram in datagrams)


async def test_a_cookie_is_for_one_address_and_one_hello(cookies: Cookies) -> None:
    """The first ClientHello is answered with a cookie, which is valid only for that address and ClientHello."""
    question = cookies.judge(hello(), ALICE)
    assert isinstance(question, bytes)
    cookie = question[28:]
    assert question[:1] + question[3:5] + question[13:14] == b"\x16\0\0\x03"
    assert question[5:11] == hello()[5:11]  # the record's number
    assert cookies.judge(hello(cookie=cookie, message_number=1), ALICE) is True
    assert cookies.judge(hello(cookie=cookie, message_number=1), BOB) is False
    assert cookies.judge(hello(cookie=cookie, message_number=1, random=bytes(31) + b"1"), ALICE) is False
    assert cookies.judge(hello(cookie=cookie[::-1], message_number=1), ALICE) is False
    assert cookies.judge(hello(cookie=cookie[:-1], message_number=1), ALICE) is False
    assert Cookies().judge(hello(cookie=cookie, message_number=1), ALICE) is False


async def test_a_second_hello_is_never_answered_with_a_cookie(cookies: Cookies) -> None:
    """Only a client's first ClientHello is answered with a cookie, even if it has one; a third one is refused."""
    question = cookies.judge(hello(), ALICE)
    assert isinstance(question, bytes)
    assert isinstance(cookies.judge(hello(cookie=question[28:]), ALICE), bytes)
    assert cookies.judge(hello(message_number=1), ALICE) is False
    assert cookies.judge(hello(cookie=question[28:], message_number=2), ALICE) is False


async def test_the_answer_is_shorter_than_the_hello(cookies: Cookies) -> None:
    """A cookie cannot be used for amplification: even the shortest ClientHello is longer."""
    question = cookies.judge(hello(), ALICE)
    assert isinstance(question, bytes)
    assert (len(question), len(hello())) == (48, 67)


async def test_a_cookie_is_valid_for_half_a_minute_to_a_minute(
    cookies: Cookies, autojump_clock: trio.testing.MockClock
) -> None:
    """A cookie is valid in the period of 30 seconds in which it was made, and in the next one."""
    await trio.sleep(29)
    question = cookies.judge(hello(), ALICE)
    assert isinstance(question, bytes)
    answer = hello(cookie=question[28:], message_number=1)
    await trio.sleep(30.5)
    assert cookies.judge(answer, ALICE) is True
    await trio.sleep(1)
    assert cookies.judge(answer, ALICE) is False
