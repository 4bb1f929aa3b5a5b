"""The pipe between the supervisor and its workers."""

from __future__ import annotations

import socket

import attrs
import pytest
import trio
import trio.testing

from trio_udp import Limits, RateLimit, ServerStatistics
from trio_udp.operate._messages import (
    Busiest,
    Failed,
    Message,
    Pipe,
    Ready,
    Report,
    Serve,
    Settings,
    Stop,
    decode,
    encode,
)

SETTINGS = Settings(
    number=1,
    descriptors=[7, 8],
    inherited=False,
    target="app:handler",
    factory=True,
    accept=None,
    app_dir="/srv/ä",
    idle_timeout=float("inf"),
    limits=Limits(max_clients=5, rate_limit=RateLimit(0.5, burst=7), amplification=3),
    drain_timeout=5.0,
    max_datagram_size=1_232,
    log_level=20,
    log_format="json",
    busiest_clients=20,
)
NAMES: list[str] = [field.name for field in attrs.fields(ServerStatistics) if field.name != "errors"]
COUNTS = {name: number for number, name in enumerate(NAMES)}
STATISTICS = ServerStatistics(errors={"EPERM": 2}, **COUNTS)

BUSIEST = Busiest([(("192.0.2.1", 53), 1.5), (("2001:db8::1", 53, 0, 0), 0.5)])
MESSAGES: list[Message] = [
    SETTINGS,
    Ready(),
    Failed("two\nlines", 1),
    Serve(),
    Stop(last=True),
    Report(STATISTICS),
    BUSIEST,
]


@pytest.mark.parametrize("message", MESSAGES, ids=[type(message).__name__ for message in MESSAGES])
def test_a_message_arrives_as_it_was(message: Message) -> None:
    """A message is one line of JSON, which decodes to an equal message."""
    line = encode(message)
    assert line.count(b"\n") == 1
    assert decode(line) == message


async def test_messages_in_pieces() -> None:
    """Messages arrive in order, however the stream cuts them; the end of the other process is ``None``."""
    ours, theirs = socket.socketpair()
    pipe, sent = Pipe(ours), b"".join(map(encode, MESSAGES))
    with theirs, trio.fail_after(5):
        received: list[Message | None] = []

        async def receive() -> None:
            received.extend([await pipe.receive() for _ in range(len(MESSAGES) + 1)])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            for start in range(0, len(sent), 100):
                theirs.sendall(sent[start : start + 100])
                await trio.testing.wait_all_tasks_blocked()
            theirs.close()
    assert received == [*MESSAGES, None]
    await pipe.send(Ready())  # no reader: no error
    pipe.close()


@pytest.mark.parametrize(
    "line", [b"{}\n", b"[]\n", b'["Unknown", {}]\n', b'["Failed", {"reason": "new"}]\n', b"\xff\n"]
)
def test_another_version(line: bytes) -> None:
    """Any message from another version of the package raises one of three errors."""
    with pytest.raises((ValueError, TypeError, KeyError)):
        decode(line)
