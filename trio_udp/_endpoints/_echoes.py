"""Echoes: datagrams that a server sends to a group or a broadcast address and receives back.

The kernel gives a copy to all members on the machine, including the sender. The address alone does not show that a
datagram is an echo: another program may share our port, as all mDNS programs do, and then it has our address too. So a
server remembers, for a few seconds, a hash of each payload that it sends to many machines at one of its own ports, and
how often it has sent it.
"""

from __future__ import annotations

import attrs

from .engines import Engine

# Seconds until an echo is no longer expected. The receive loop may be late by that much.
LIFETIME = 5.0

# The most payloads to remember.
MOST = 1_000


@attrs.define(eq=False)
class Sent:
    """A payload that the server has sent.

    Attributes:
      times: How often it was sent.
      until: When to forget it.
      received: How often each socket has received it.
    """

    times: int
    until: float
    received: dict[Engine, int] = attrs.field(factory=dict, init=False)


@attrs.define(eq=False)
class Echoes:
    """The echoes that one server may receive.

    Attributes:
      ports: The ports of its endpoints. Datagrams to any other port do not come back.
      expected: Sent payloads by their hash, in the order in which they are forgotten. Usually empty: check that before
        anything else.
    """

    ports: set[int] = attrs.field(factory=set, init=False)
    expected: dict[int, Sent] = attrs.field(factory=dict, init=False)

    def expect(self, payload: bytes, now: float) -> None:
        """Remember a payload that is being sent to one of ``ports``."""
        key = hash(payload)
        sent = self.expected.pop(key, None) or Sent(0, now)
        sent.times += 1
        sent.until = now + LIFETIME
        self.expected[key] = sent
        if len(self.expected) > MOST:
            del self.expected[next(iter(self.expected))]

    def forget(self, now: float) -> None:
        """Forget payloads whose time has passed."""
        for key, sent in list(self.expected.items()):
            if sent.until > now:
                return
            del self.expected[key]

    def take(self, payload: bytes, engine: Engine) -> bool:
        """Whether a payload from our own address is an echo. A socket receives one for each time it was sent."""
        sent = self.expected.get(hash(payload))
        if sent is None or sent.received.get(engine, 0) >= sent.times:
            return False
        sent.received[engine] = sent.received.get(engine, 0) + 1
        return True
