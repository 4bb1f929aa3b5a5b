"""Token buckets: how many datagrams each part of the network may send, in a table of bounded size."""

from __future__ import annotations

import math
from weakref import WeakValueDictionary

import attrs

from ._endpoints import host_key
from ._limits import RateLimit

# Tolerance for rounding, in tokens: far less than one datagram.
EPSILON = 1e-3


@attrs.define(eq=False)
class Bucket:
    """The tokens that one source has left.

    The bucket stores the time at which it will be full again, in units of one token's refill time. Taking a token is
    one addition, and nothing has to refill it (the "virtual scheduling algorithm" of ITU-T I.371).
    """

    key: bytes
    full_at: float = -math.inf
    kept: bool = False  # in RateLimiter._in_use, for as long as something refers to it


NO_BUCKET = Bucket(b"")  # a placeholder for clients of a server without a rate limit; no token is taken from it


@attrs.define(eq=False)
class RateLimiter:
    """The buckets of one server.

    The table has two generations of buckets, young and old. When the young half is full, the old one is discarded and
    the young one becomes old. A source that is seen again moves to the young half. So a flood of new sources discards
    the buckets of quiet sources, not those of busy ones. The bucket of a client lives as long as the client.
    """

    _limit: RateLimit
    _per_second: float = attrs.field(init=False)
    _most: float = attrs.field(init=False)  # tokens in a full bucket, with the tolerance
    _young: dict[bytes, Bucket] = attrs.field(factory=dict, init=False)
    _old: dict[bytes, Bucket] = attrs.field(factory=dict, init=False)
    _in_use: WeakValueDictionary[bytes, Bucket] = attrs.field(factory=WeakValueDictionary, init=False)

    @_per_second.default
    def _(self) -> float:
        return self._limit.per_second

    @_most.default
    def _(self) -> float:
        return self._limit.burst + EPSILON

    def bucket_of(self, key: bytes) -> Bucket:
        """Return the bucket with a key: that of a part of the network (see ``network_of``), or of one host."""
        bucket = self._young.get(key)
        if bucket is None:
            if len(self._young) >= self._limit.buckets // 2:
                self._old, self._young = self._young, {}
            bucket = self._old.pop(key, None) or self._in_use.get(key) or Bucket(key)
            self._young[key] = bucket
        return bucket

    def bucket_of_host(self, host: bytes) -> Bucket:
        """Return the bucket that all validated clients of one host share."""
        return self.keep(self.bucket_of(b"host" + host_key(host)))

    def keep(self, bucket: Bucket) -> Bucket:
        """Keep a bucket in the table while a client refers to it; return it."""
        if not bucket.kept:  # entering it takes 0.8 µs
            bucket.kept = True
            self._in_use[bucket.key] = bucket
        return bucket

    def take(self, bucket: Bucket, time: float) -> bool:
        """Take a token from a bucket; False if it has none."""
        now = time * self._per_second  # in units of the time that refills one token
        full_at = bucket.full_at
        full_at = (full_at if full_at > now else now) + 1
        if full_at - now > self._most:
            return False
        bucket.full_at = full_at
        return True
