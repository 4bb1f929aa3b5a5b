"""Limits on the memory of a server and on the datagrams of strangers: plain values, checked when they are made."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import attrs

# Datagrams moved between two checkpoints. Larger batches gain little (a checkpoint takes 3 µs, 64 datagrams about 250)
# and delay every timer of the program.
BATCH = 64

# Bytes of memory in CPython, rounded up. CLIENT: a client with its task, its inbox and a handler that only waits.
# DATAGRAM: the object around a payload, and its place in an inbox. BUCKET: one bucket of a rate limit.
CLIENT = 5_500
DATAGRAM = 64
BUCKET = 250


MOST = 1e12  # the largest value of any limit

# Bytes of memory for a running request of a request_handler with concurrency: its task and its waiting function.
REQUEST = 3_500


def _positive_int(_: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{attribute.name} must be an int, not {value!r}")
    if not 1 <= value <= MOST:
        raise ValueError(f"{attribute.name} must be at least 1, and at most {MOST:g}, not {value!r}")


def check_seconds(name: str, seconds: object, *, zero: bool = False) -> float:
    """Return ``seconds`` as a float; raise unless it is greater than 0, or 0 where ``zero`` allows that."""
    if not isinstance(seconds, (int, float)):
        hint = ": use math.inf for no limit" if seconds is None else ""
        raise TypeError(f"{name} must be a number of seconds, not {seconds!r}{hint}")
    with suppress(OverflowError):  # from an int that no float can hold
        if float(seconds) > 0 or (seconds == 0 and zero):
            return float(seconds)
    raise ValueError(f"{name} must be {'at least' if zero else 'greater than'} 0, not {seconds!r}")


def check_number(name: str, number: object) -> float:
    """Return ``number``; raise unless it is a number."""
    if not isinstance(number, (int, float)) or isinstance(number, bool):
        raise TypeError(f"{name} must be a number, not {number!r}")
    return number


def _positive_number(_: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
    if not 0 < check_number(attribute.name, value) <= MOST:
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

    For ``Limits(rate_limit=...)``. All addresses with the same prefix share one bucket, because the owner of one
    address usually owns its neighbours too. The limit refuses datagrams before ``accept`` sees them, and counts them as
    ``refused_by_rate``. It applies to clients too, and a forged datagram uses up the bucket of the address that it
    claims. The validated clients of a host share a bucket of their own; see :meth:`Client.validate`.

    Attributes:
      per_second: Datagrams per second, in the long run.
      burst: Datagrams that a source may send at once after a silence.
      ipv4_prefix, ipv6_prefix: Leading bits of an address that identify a source.
      buckets: Maximum number of buckets in memory, about 250 bytes each, besides one for each client. The server
        forgets a source, which then has a full bucket again, once ``buckets / 2`` other sources have come since its
        last datagram. Choose more than twice the number of sources that can come in ``burst / per_second`` seconds, the
        time in which an empty bucket fills.
    """

    per_second: float = attrs.field(validator=_positive_number)
    burst: int = attrs.field(default=100, validator=_positive_int)
    ipv4_prefix: int = attrs.field(default=24, validator=_prefix(32))
    ipv6_prefix: int = attrs.field(default=56, validator=_prefix(128))
    buckets: int = attrs.field(default=65_536, validator=_buckets)


@attrs.frozen(kw_only=True)
class Limits:
    """How much a server holds for strangers, so that a flood cannot make it grow without bound.

    At most ``max_clients`` handlers run. Where clients are evicted, up to 64 more run until the evicted ones have
    ended. The payloads in all inboxes together never exceed ``total_bytes``, nor ``inbox_datagrams`` for each handler.

    Attributes:
      max_clients: Handlers alive at once, including those that still run after their client has ended.
      when_full: What happens to a stranger at ``max_clients``. ``"refuse"``: its datagram is refused and counted.
        ``"evict_idle"``: approximately the client that has waited the longest ends to make room. A client is never
        evicted while its handler is at work, while it has datagrams waiting, in a transaction, or once validated; if
        no other client is left, the stranger is refused. A waiting client of a :func:`request_handler` makes room
        under both.
      clients_per_host: Clients of one host (an IPv4 address, an IPv6 /64) at once. Further ones are refused as if the
        table were full. There is no such limit by default, because one host may serve many users (NAT, proxies).
      inbox_datagrams: Datagrams waiting for one client.
      inbox_bytes: Payload bytes waiting for one client.
      total_bytes: Payload bytes waiting for all clients of the server.
      when_inbox_full: Which datagram a full inbox drops: ``"drop_newest"``, the one that arrives, or
        ``"drop_oldest"``, those of the same client that have waited the longest.
      rate_limit: Datagrams per second from one part of the network; by default there is no limit.
      amplification: How many times the bytes received from a client may be sent to it, until its handler calls
        :meth:`Client.validate`. Anything beyond that is not sent, and counted as ``sends_withheld``. Without this
        limit an attacker who forges a victim's address can make the server flood the victim. RFC 9000 section 8.1 uses
        3. By default there is no limit; ``Server.send_to`` never has one.
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

    def worst_case_memory(self, *, concurrency: int = 1, handler_bytes: int = 0) -> int:
        """Return the most bytes that strangers can make a server hold: ``print(limits.worst_case_memory())``.

        The sum counts the task and the inbox of each client, the object around each payload that may wait in an inbox,
        all payloads together, the buckets, and the requests that a :func:`request_handler` runs at once::

            clients * (CLIENT + handler_bytes + inbox_datagrams * DATAGRAM + requests * REQUEST)
                + total_bytes + buckets * BUCKET

        It leaves out other memory that handlers hold, and buffers: 4 MB for each thread and kind of socket, up to 8 MB
        for each endpoint.

        Args:
          concurrency: As given to ``request_handler``.
          handler_bytes: Bytes that the handler of one client holds; 75,000 for :func:`trio_udp.dtls.secure`.
        """
        clients = self.max_clients + BATCH  # evicted handlers may linger for one batch
        requests = concurrency if concurrency > 1 else 0
        buckets = self.rate_limit.buckets if self.rate_limit else 0
        of_client = CLIENT + handler_bytes + self.inbox_datagrams * DATAGRAM + requests * REQUEST
        return clients * of_client + self.total_bytes + buckets * BUCKET
