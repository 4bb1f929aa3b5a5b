"""What a server may hold at once, and for how long: plain values, checked when they are made."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import attrs

# Datagrams moved between two looks at the other tasks. Larger batches gain little (a checkpoint is 3 µs, 64 datagrams
# about 250) and make every timer of the program wait longer.
BATCH = 64

# Bytes of memory in CPython, rounded up: a client with its task, its inbox, and a handler that does nothing but wait;
# the object around a payload, and its place in an inbox; a bucket.
CLIENT = 5_500
DATAGRAM = 64
BUCKET = 250


MOST = 1e12  # of anything

# A request of a request_handler with concurrency: its task, and the function that waits for something.
REQUEST = 3_500


def _positive_int(_: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{attribute.name} must be an int, not {value!r}")
    if not 1 <= value <= MOST:
        raise ValueError(f"{attribute.name} must be at least 1, and at most {MOST:g}, not {value!r}")


def check_seconds(name: str, seconds: object, *, zero: bool = False) -> float:
    """Return a number of seconds, if it is one and is greater than 0, or where that is allowed 0."""
    if not isinstance(seconds, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {seconds!r}")
    with suppress(OverflowError):  # of an int that no float can hold
        if float(seconds) > 0 or (seconds == 0 and zero):
            return float(seconds)
    raise ValueError(f"{name} must be {'at least' if zero else 'greater than'} 0, not {seconds!r}")


def _positive_number(_: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{attribute.name} must be a number, not {value!r}")
    if not 0 < value <= MOST:
        raise ValueError(f"{attribute.name} must be greater than 0, and at most {MOST:g}, not {value!r}")


def _one_of(*choices: str) -> "Callable[[object, attrs.Attribute[str], str], None]":
    def check(_: object, attribute: "attrs.Attribute[str]", value: str) -> None:
        if value not in choices:
            raise ValueError(f"{attribute.name} must be {' or '.join(map(repr, choices))}, not {value!r}")

    return check


def _prefix(most: int) -> "Callable[[object, attrs.Attribute[int], int], None]":
    def check(_: object, attribute: "attrs.Attribute[int]", value: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{attribute.name} must be an int, not {value!r}")
        if not 1 <= value <= most:
            raise ValueError(f"{attribute.name} must be from 1 to {most}, not {value!r}")

    return check


def _rate_limit(_: object, attribute: "attrs.Attribute[RateLimit]", value: object) -> None:
    if not isinstance(value, RateLimit):
        raise TypeError(f"{attribute.name} must be a RateLimit or None, not {value!r}")


def _buckets(instance: object, attribute: "attrs.Attribute[int]", value: int) -> None:
    _positive_int(instance, attribute, value)
    if value < 2:
        raise ValueError(f"{attribute.name} must be at least 2, not {value!r}")


@attrs.frozen
class RateLimit:
    """How many datagrams each part of the network may send to a server, on average and at once: a token bucket.

    For ``Limits(rate_limit=...)``. All addresses with the same prefix share one bucket, since whoever has one of them
    usually has the others too. Datagrams beyond it are refused before anything else is looked at, and counted as
    ``refused_by_rate``; those of clients too, whether they wrote them or somebody forged their address. The clients of
    a host that their handlers have validated have a bucket of their own; see :meth:`Client.validate`.

    Attributes:
      per_second: Datagrams per second, in the long run.
      burst: Datagrams at once, by a source that has been silent.
      ipv4_prefix, ipv6_prefix: Bits of an address that tell sources apart.
      buckets: The most to keep in memory, about 250 bytes each, besides one for each client. A source is forgotten, and
        its bucket full again, once half as many others have come since it was last seen: let that be more than can
        come in ``burst / per_second`` seconds.
    """

    per_second: float = attrs.field(validator=_positive_number)
    burst: int = attrs.field(default=100, validator=_positive_int)
    ipv4_prefix: int = attrs.field(default=24, validator=_prefix(32))
    ipv6_prefix: int = attrs.field(default=56, validator=_prefix(128))
    buckets: int = attrs.field(default=65_536, validator=_buckets)


@attrs.frozen(kw_only=True)
class Limits:
    """How much a server holds for strangers, so that a flood cannot make it grow without bound.

    At most ``max_clients`` handlers run; where clients are evicted up to 64 more, until the evicted ones have ended.
    The payloads that wait in all inboxes together never exceed ``total_bytes``, nor ``inbox_datagrams`` for each
    handler.

    Attributes:
      max_clients: Handlers alive at once, those that linger after their client ended included.
      when_full: What a stranger meets at ``max_clients``. ``"refuse"``: its datagram is refused and counted.
        ``"evict_idle"``: about the client that has been waiting the longest ends to make room. Never evicted are those
        whose handler is at work or has datagrams waiting, those in a transaction, and validated ones; if there is
        nobody else the stranger is refused. A client of a :func:`request_handler` makes room under both.
      clients_per_host: Clients of one host (an IPv4 address, an IPv6 /64) at once; what goes beyond is refused as if
        the table were full. Some real hosts stand for many users (NAT, proxies), so there is no such limit by default.
      inbox_datagrams: Datagrams waiting for one client.
      inbox_bytes: Payload bytes waiting for one client.
      total_bytes: Payload bytes waiting for all clients of the server.
      when_inbox_full: Which datagram is dropped at a full inbox: ``"drop_newest"``, the one that arrives, or
        ``"drop_oldest"``, those that have been waiting the longest for the same client.
      rate_limit: Datagrams per second from one part of the network; by default any number.
      amplification: How many times the bytes received from a client may be sent to it, until its handler calls
        :meth:`Client.validate`. What would be more is not sent, and counted as ``sends_withheld``. Without it, somebody
        who forges a victim's address can make the server flood the victim. RFC 9000 section 8.1 has 3. By default
        there is no such limit; ``Server.send_to`` never has one.
    """

    max_clients: int = attrs.field(default=10_000, validator=_positive_int)
    when_full: Literal["refuse", "evict_idle"] = attrs.field(
        default="refuse", validator=_one_of("refuse", "evict_idle")
    )
    clients_per_host: int | None = attrs.field(default=None, validator=attrs.validators.optional(_positive_int))
    inbox_datagrams: int = attrs.field(default=256, validator=_positive_int)
    inbox_bytes: int = attrs.field(default=1_048_576, validator=_positive_int)
    total_bytes: int = attrs.field(default=67_108_864, validator=_positive_int)
    when_inbox_full: Literal["drop_newest", "drop_oldest"] = attrs.field(
        default="drop_newest", validator=_one_of("drop_newest", "drop_oldest")
    )
    rate_limit: RateLimit | None = attrs.field(default=None, validator=attrs.validators.optional(_rate_limit))
    amplification: float | None = attrs.field(default=None, validator=attrs.validators.optional(_positive_number))

    def worst_case_memory(self, *, concurrency: int = 1) -> int:
        """Bytes that a server holds at most for strangers, whatever they send: ``print(limits.worst_case_memory())``.

        For each client its task and its inbox, for each datagram that may wait in one the object around its payload,
        all payloads together, the buckets, and the requests that a :func:`request_handler` runs at once::

            clients * (CLIENT + inbox_datagrams * DATAGRAM + requests * REQUEST) + total_bytes + buckets * BUCKET

        What handlers keep comes on top, and buffers: 4 MB for each thread and kind of socket, up to 8 MB for each
        endpoint.

        Args:
          concurrency: As given to ``request_handler``.
        """
        clients = self.max_clients + BATCH  # evicted handlers may linger for one batch
        requests = concurrency if concurrency > 1 else 0
        buckets = self.rate_limit.buckets if self.rate_limit else 0
        of_client = CLIENT + self.inbox_datagrams * DATAGRAM + requests * REQUEST
        return clients * of_client + self.total_bytes + buckets * BUCKET
