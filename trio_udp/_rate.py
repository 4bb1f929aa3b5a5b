"""Token buckets: how many datagrams a part of the network may send, in a table that strangers cannot make grow."""

from __future__ import annotations

import math
from weakref import WeakValueDictionary

import attrs

from ._endpoints import host_key, network_of
from ._limits import RateLimit

# Tolerance for rounding, in tokens: far less than one datagram.
EPSILON = 1e-3


@attrs.define(eq=False)
class Bucket:
    """What one source may still send.

    Kept as the moment, counted in tokens, at which the bucket will be full again: one addition for each datagram, and
    nothing to refill (the "virtual scheduling algorithm" of ITU-T I.371).
    """

    key: bytes
    full_at: float = -math.inf


NO_BUCKET = Bucket(b"")  # of those for whom there is no limit; nobody takes from it


@attrs.define(eq=False)
class RateLimiter:
    """The buckets of one server.

    One half of the table is of this generation, the other of the one before. When this one's half is full, the older is
    forgotten; whoever is seen again before that moves over. So a flood of new sources makes the table forget those that
    have been quiet, and not those that are busy. The bucket of a client is not forgotten while there is the client.
    """

    _limit: RateLimit
    _young: dict[bytes, Bucket] = attrs.field(factory=dict, init=False)
    _old: dict[bytes, Bucket] = attrs.field(factory=dict, init=False)
    _in_use: WeakValueDictionary[bytes, Bucket] = attrs.field(factory=WeakValueDictionary, init=False)

    def bucket_of(self, host: bytes) -> Bucket:
        """Return the bucket that all hosts of one part of the network share."""
        return self._find(network_of(host, self._limit.ipv4_prefix, self._limit.ipv6_prefix))

    def bucket_of_host(self, host: bytes) -> Bucket:
        """Return the bucket of a validated client, and of all others on its host."""
        return self.keep(self._find(b"host" + host_key(host)))

    def keep(self, bucket: Bucket) -> Bucket:
        """Remember a bucket for as long as somebody, a client, holds on to it; return it."""
        self._in_use[bucket.key] = bucket
        return bucket

    def _find(self, key: bytes) -> Bucket:
        bucket = self._young.get(key)
        if bucket is None:
            if len(self._young) >= self._limit.buckets // 2:
                self._old, self._young = self._young, {}
            bucket = self._old.pop(key, None) or self._in_use.get(key) or Bucket(key)
            self._young[key] = bucket
        return bucket

    def take(self, bucket: Bucket, time: float) -> bool:
        """Take a token from a bucket, if there is one."""
        now = time * self._limit.per_second  # in units of what one token takes to come back
        full_at = bucket.full_at
        if full_at < now:
            full_at = now
        if full_at + 1 - now > self._limit.burst + EPSILON:
            return False
        bucket.full_at = full_at + 1
        return True
