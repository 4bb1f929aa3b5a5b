"""Echoes: what a server sends to a group or a broadcast address, and hears itself.

The kernel gives a copy to all members on the machine, the sender included. The address alone does not tell an echo:
another program may share our port, as all mDNS programs do, and then it has our address too. So a server remembers,
for a few seconds, a hash of each payload that it sends to many machines at a port of its own, and how often.
"""

from __future__ import annotations

import attrs

from .engines import Engine

# Seconds until an echo is no longer expected. The receive loop may be that late.
LIFETIME = 5.0

# Most payloads to remember.
MOST = 1_000


@attrs.define(eq=False)
class Sent:
    """A payload that the server has sent.

    Attributes:
      times: How often.
      until: When to forget it.
      heard: How often each socket has heard it.
    """

    times: int
    until: float
    heard: dict[Engine, int] = attrs.field(factory=dict, init=False)


@attrs.define(eq=False)
class Echoes:
    """The echoes that one server may hear.

    Attributes:
      ports: Those of its endpoints. What goes to any other port is not heard here.
      expected: By the hash of the payload, the one to be forgotten first coming first. Usually empty: check that
        before anything else.
    """

    ports: set[int] = attrs.field(factory=set, init=False)
    expected: dict[int, Sent] = attrs.field(factory=dict, init=False)

    def expect(self, payload: bytes, now: float) -> None:
        """Remember a payload that is sent now to one of ``ports``."""
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
        """Return whether a payload from our own address is an echo, which a socket hears once for each sending."""
        sent = self.expected.get(hash(payload))
        if sent is None or sent.heard.get(engine, 0) >= sent.times:
            return False
        sent.heard[engine] = sent.heard.get(engine, 0) + 1
        return True
