"""What a server may hold at once: plain values, validated when they are made."""

from __future__ import annotations

from typing import Any, Literal

import attrs


def _positive_int(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{attribute.name} must be an int, not {value!r}")
    if value < 1:
        raise ValueError(f"{attribute.name} must be at least 1, not {value!r}")


def _one_of(*choices: str) -> Any:
    def validate(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if value not in choices:
            raise ValueError(f"{attribute.name} must be one of {choices}, not {value!r}")

    return validate


@attrs.frozen(kw_only=True)
class Limits:
    """How much a server holds for strangers, so that a flood cannot make it grow without bound.

    The payloads that wait in all inboxes together never exceed ``total_bytes``, in at most
    ``max_clients * inbox_datagrams`` objects; the number of handler tasks never exceeds ``max_clients``
    (by one batch of 64 while evicted handlers take their leave).

    Attributes:
      max_clients: Handlers alive at once, those that linger after their client ended included.
      when_full: What a stranger meets at ``max_clients``. ``"refuse"``: its datagram is refused and counted.
        ``"evict_idle"``: the client that has been waiting the longest ends to make room; where every
        handler is at work, the stranger is refused.
      inbox_datagrams: Datagrams waiting for one client.
      inbox_bytes: Payload bytes waiting for one client.
      total_bytes: Payload bytes waiting for all clients of the server.
      when_inbox_full: Which datagram is lost at a full inbox: ``"drop_newest"``, the one that arrives, or
        ``"drop_oldest"``, the ones that have waited the longest for the same client.
    """

    max_clients: int = attrs.field(default=10_000, validator=_positive_int)
    when_full: Literal["refuse", "evict_idle"] = attrs.field(
        default="refuse", validator=_one_of("refuse", "evict_idle")
    )
    inbox_datagrams: int = attrs.field(default=256, validator=_positive_int)
    inbox_bytes: int = attrs.field(default=1_048_576, validator=_positive_int)
    total_bytes: int = attrs.field(default=67_108_864, validator=_positive_int)
    when_inbox_full: Literal["drop_newest", "drop_oldest"] = attrs.field(
        default="drop_newest", validator=_one_of("drop_newest", "drop_oldest")
    )
