"""What a server may hold at once, and for how long: plain values, checked when they are made."""

from contextlib import suppress
from typing import Any, Literal

import attrs


def _positive_int(_: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{attribute.name} must be an int, not {value!r}")
    if value < 1:
        raise ValueError(f"{attribute.name} must be at least 1, not {value!r}")


def check_seconds(name: str, seconds: object, *, zero: bool = False) -> float:
    """Return a number of seconds, if it is one and is greater than 0, or where that is allowed 0."""
    if not isinstance(seconds, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {seconds!r}")
    with suppress(OverflowError):  # of an int that no float can hold
        if float(seconds) > 0 or (seconds == 0 and zero):
            return float(seconds)
    raise ValueError(f"{name} must be {'at least' if zero else 'greater than'} 0, not {seconds!r}")


@attrs.frozen(kw_only=True)
class Limits:
    """How much a server holds for strangers, so that a flood cannot make it grow without bound.

    At most ``max_clients`` handlers run; with ``"evict_idle"`` up to 64 more, until the evicted ones have taken their
    leave. The payloads that wait in all inboxes together never exceed ``total_bytes``, nor ``inbox_datagrams`` for each
    handler.

    Attributes:
      max_clients: Handlers alive at once, those that linger after their client ended included.
      when_full: What a stranger meets at ``max_clients``. ``"refuse"``: its datagram is refused and counted.
        ``"evict_idle"``: the client that has been waiting the longest ends to make room; where every handler is at
        work or in a transaction, the stranger is refused. (To enter or leave a transaction begins the wait anew.)
      inbox_datagrams: Datagrams waiting for one client.
      inbox_bytes: Payload bytes waiting for one client.
      total_bytes: Payload bytes waiting for all clients of the server.
      when_inbox_full: Which datagram is dropped at a full inbox: ``"drop_newest"``, the one that arrives, or
        ``"drop_oldest"``, those that have been waiting the longest for the same client.
    """

    max_clients: int = attrs.field(default=10_000, validator=_positive_int)
    when_full: Literal["refuse", "evict_idle"] = attrs.field(
        default="refuse", validator=attrs.validators.in_(("refuse", "evict_idle"))
    )
    inbox_datagrams: int = attrs.field(default=256, validator=_positive_int)
    inbox_bytes: int = attrs.field(default=1_048_576, validator=_positive_int)
    total_bytes: int = attrs.field(default=67_108_864, validator=_positive_int)
    when_inbox_full: Literal["drop_newest", "drop_oldest"] = attrs.field(
        default="drop_newest", validator=attrs.validators.in_(("drop_newest", "drop_oldest"))
    )
