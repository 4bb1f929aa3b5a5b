"""DTLS records as bytes (RFC 6347): taken apart, renumbered, packed into datagrams. No I/O, no state, no OpenSSL.

    record     type (1), version (2), epoch (2), sequence number (6), length (2), content
    handshake  type (1), length (3), message number (2), fragment offset (3), fragment length (3), body

The functions of a datagram accept any bytes that a stranger may send, and never raise. The functions of records expect
records that OpenSSL made.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

RECORD_HEADER = 13
MESSAGE_PART = 12  # the header of a handshake message, or of a fragment of one
CHANGE_CIPHER_SPEC, HANDSHAKE = 20, 22
CLIENT_HELLO, HELLO_VERIFY_REQUEST = 1, 3

# HelloVerifyRequest says DTLS 1.0, regardless of the version negotiated later: RFC 6347 section 4.2.1.
DTLS_1_0 = b"\xfe\xff"

# A datagram that begins with a handshake message: type, epoch, number and length of the record; type, length and number
# of the message; offset and length of the fragment.
MESSAGE_HEADER = struct.Struct("!BxxH6sHB3sH3s3s")
BODY = MESSAGE_HEADER.size

# A ClientHello begins with a version and a random number; then comes the length of the session ID.
SESSION_ID = BODY + 2 + 32

# The shortest ClientHello: no session, no cookie, one cipher suite, one compression method.
SHORTEST_HELLO = SESSION_ID + 1 + 1 + 4 + 2


class ClientHello(NamedTuple):
    """A complete ClientHello, in the first record of a datagram.

    Attributes:
      record_number: The six bytes of the record's sequence number.
      message_number: 0 for a client's first hello, 1 for the one that answers a HelloVerifyRequest.
      cookie: Empty in the first hello.
      essence: The body without the cookie. It is the same in both hellos of one client.
    """

    record_number: bytes
    message_number: int
    cookie: bytes
    essence: bytes


def parse_client_hello(datagram: bytes) -> ClientHello | None:
    """Return the ClientHello that a datagram begins with; ``None`` if it is anything else, or only a fragment."""
    size = len(datagram)
    if size < SHORTEST_HELLO:
        return None
    content, epoch, record_number, record_length, message, length, message_number, offset, fragment_length = (
        MESSAGE_HEADER.unpack_from(datagram)
    )
    end = RECORD_HEADER + record_length
    if (
        (content, epoch, message, offset) != (HANDSHAKE, 0, CLIENT_HELLO, b"\0\0\0")
        or length != fragment_length
        or end != BODY + int.from_bytes(length, "big")
        or end > size
    ):
        return None
    cookie = SESSION_ID + 1 + datagram[SESSION_ID]
    if cookie >= end:
        return None
    after = cookie + 1 + datagram[cookie]
    if after >= end:
        return None
    essence = datagram[BODY:cookie] + datagram[after:end]
    return ClientHello(record_number, message_number, datagram[cookie + 1 : after], essence)


def hello_verify_request(hello: ClientHello, cookie: bytes) -> bytes:
    """Return the datagram that asks a client for its hello again, with a cookie."""
    length = (3 + len(cookie)).to_bytes(3, "big")
    message = b"%c%b\0\0\0\0\0%b%b%c%b" % (HELLO_VERIFY_REQUEST, length, length, DTLS_1_0, len(cookie), cookie)
    # The record repeats the number of the client's record, so that several requests cannot use one number twice (RFC
    # 6347 section 4.2.1).
    return b"%c%b\0\0%b%b%b" % (HANDSHAKE, DTLS_1_0, hello.record_number, len(message).to_bytes(2, "big"), message)


def is_unprotected(datagram: bytes) -> bool:
    """Whether a datagram begins with a record that anyone may have made: one of epoch 0, or no record at all."""
    return len(datagram) < RECORD_HEADER or datagram[3:5] == b"\0\0"


def is_client_hello(datagram: bytes) -> bool:
    """Whether a datagram begins with an unprotected ClientHello, or a fragment of one."""
    return datagram[:1] == b"\x16" and datagram[3:5] == b"\0\0" and datagram[13:14] == b"\x01"


def is_of_handshake(datagram: bytes) -> bool:
    """Whether a datagram looks like a repeated part of a handshake: the peer may not have received our last flight."""
    return (
        len(datagram) > RECORD_HEADER
        and datagram[3:5] == b"\0\0"
        and datagram[0] in (CHANGE_CIPHER_SPEC, HANDSHAKE)
        and not is_client_hello(datagram)
    )


def message_number_of(datagram: bytes) -> int | None:
    """Return the number of the unprotected handshake message that a datagram begins with, or None."""
    if len(datagram) < BODY or datagram[0] != HANDSHAKE or datagram[3:5] != b"\0\0":
        return None
    return int.from_bytes(datagram[17:19], "big")


def longest_message(datagram: bytes) -> int:
    """Return the length of the longest unprotected handshake message that a datagram announces, in fragments or not."""
    longest = 0
    for record in split(datagram):
        position = RECORD_HEADER
        while record[0] == HANDSHAKE and record[3:5] == b"\0\0" and position + MESSAGE_PART <= len(record):
            longest = max(longest, int.from_bytes(record[position + 1 : position + 4], "big"))
            position += MESSAGE_PART + int.from_bytes(record[position + 9 : position + 12], "big")
    return longest


def split(datagram: bytes) -> list[bytes]:
    """Split a datagram, or OpenSSL's output, into records; the last one may be incomplete."""
    records = []
    position = 0
    while position < len(datagram):
        end = position + RECORD_HEADER + int.from_bytes(datagram[position + 11 : position + 13], "big")
        records.append(datagram[position:end])
        position = end
    return records


def number_of(record: bytes) -> int:
    """Return a record's sequence number."""
    return int.from_bytes(record[5:11], "big")


def renumber(records: Iterable[bytes], next_number: int) -> tuple[list[bytes], int]:
    """Give the records of epoch 0 numbers that have not been used yet; return them, and the next unused number.

    A peer ignores numbers that it has seen before, even if it could not use the record then. In later epochs the number
    is protected like the content.
    """
    renumbered = []
    for record in records:
        if is_unprotected(record):
            record = record[:5] + next_number.to_bytes(6, "big") + record[11:]
            next_number += 1
        renumbered.append(record)
    return renumbered, next_number


def pack(records: Iterable[bytes], size: int) -> list[bytes]:
    """Put records into as few datagrams of at most ``size`` bytes as their order allows.

    A flight of the handshake in fewer datagrams is likelier to survive a lossy network.
    """
    datagrams: list[bytes] = []
    for record in records:
        if datagrams and len(datagrams[-1]) + len(record) <= size:
            datagrams[-1] += record
        else:
            datagrams.append(record)
    return datagrams
