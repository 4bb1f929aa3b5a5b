"""Share state between servers on many machines: the best scores of all players, in Redis.

Any server may get any datagram, and a player's address may change. So the key of the state is the player's name. The
first score for a name sets its secret. (Nothing is encrypted here.) Sending a score twice changes nothing, so a player
who gets no answer just sends it again.

    redis-server --port 6379
    python examples/leaderboard.py 9999      (on another machine: REDIS=redis://ADDRESS:6379)
    nc -u 127.0.0.1 9999        (in another terminal: "score alice wonderland 250", or "top")
"""

import hashlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import coredis
import trio
from coredis.exceptions import RedisError
from coredis.retry import NoRetryPolicy

import trio_udp

# Seconds to connect, and seconds to get an answer. Use coredis's own limits, not trio.fail_after around the calls: in
# coredis 6.9 a task that is cancelled while it connects never gives its place in the pool back.
LIMIT = 1.0

# Redis runs a script in one step, and no other server's script at the same time. So there is one time limit for all of
# it.
SCORE = """
local known = redis.call('HGET', KEYS[1], ARGV[1])
if known and known ~= ARGV[2] then return {} end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], 'GT', ARGV[3], ARGV[1])
return {tonumber(redis.call('ZSCORE', KEYS[2], ARGV[1])), redis.call('ZREVRANK', KEYS[2], ARGV[1])}
"""


@attrs.define
class Leaderboard:
    redis: "coredis.Redis[str]"
    is_reachable: bool = True

    async def score(self, name: bytes, secret: bytes, points: int) -> bytes:
        digest = hashlib.sha256(secret).hexdigest()
        result = await self.redis.eval(SCORE, ["leaderboard:secrets", "leaderboard:scores"], [name, digest, points])
        if not isinstance(result, list) or not result:
            return b"wrong secret\n"
        best, rank = result
        return name + f" has {best} points, place {rank + 1}\n".encode()

    async def top(self) -> bytes:
        best = await self.redis.zrange("leaderboard:scores", 0, 9, rev=True, withscores=True)
        return "".join(f"{name!s} {points:.0f}\n" for name, points in best).encode() or b"no scores yet\n"

    async def answer(self, payload: bytes, client: trio_udp.Client) -> bytes:
        try:
            match payload.split():
                case [b"score", name, secret, points] if is_name(name) and is_points(points):
                    reply = await self.score(name, secret, int(points))
                case [b"top"]:
                    reply = await self.top()
                case _:
                    return b"write: score NAME SECRET POINTS, or: top\n"
        except (RedisError, TimeoutError) as error:
            self.tell(False, f"Redis does not answer: {error}")
            return b"try again later\n"
        self.tell(True, "Redis answers again")
        return reply

    def tell(self, is_reachable: bool, message: str) -> None:
        if is_reachable != self.is_reachable:
            self.is_reachable = is_reachable
            logging.warning(message)


def is_name(text: bytes) -> bool:
    return text.isalnum() and len(text) <= 20


def is_points(text: bytes) -> bool:
    return text.isdigit() and len(text) <= 9


@asynccontextmanager
async def leaderboard() -> AsyncIterator[trio_udp.Handler]:
    """Yield the handler of a server. Redis may start and stop at any time, also before the server starts."""
    logging.getLogger("coredis").setLevel(logging.CRITICAL)  # otherwise a traceback for each failed connection
    url = os.environ.get("REDIS", "redis://127.0.0.1:6379")
    async with coredis.Redis.from_url(
        url,
        decode_responses=True,
        connect_timeout=LIMIT,
        stream_timeout=LIMIT,
        max_idle_time=10,  # seconds after which a silent connection is closed, because its Redis may be gone
        retry_policy=NoRetryPolicy(),  # the player sends again
    ) as redis:
        yield trio_udp.request_handler(Leaderboard(redis).answer)


async def main(port: int) -> None:
    async with leaderboard() as handler:
        await trio_udp.serve(handler, port, stop_signals={signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    trio.run(main, int(sys.argv[1]) if sys.argv[1:] else 9999)
