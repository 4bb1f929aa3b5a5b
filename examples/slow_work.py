"""Do slow work without making other clients wait.

A blocking call runs in a thread, and a long computation in a worker process. One client gets its answers in the order
of its requests. Different clients get theirs as soon as each is ready. (With ``concurrency=``, one client gets its
answers as soon as each is ready, too.) Needs ``trio-parallel``.

    TIMEOUT=10 python examples/slow_work.py     (or: trio-udp --drain 10 examples/slow_work.py:handler)
    nc -u 127.0.0.1 9999        (in two more terminals: type "sleep 3" in one and "ping" in the other, or
                                 "prime 1000003"; a request that takes longer than TIMEOUT seconds gets no answer)
"""

import logging
import math
import os
import signal
import sys
import time
from functools import partial

import trio
import trio_parallel  # type: ignore[import-untyped]

import trio_udp

TIMEOUT = float(os.environ.get("TIMEOUT", "10"))  # seconds for each request

# A thread cannot be stopped, only abandoned, and it counts here until it ends. So no more than this many threads ever
# run, however many requests time out. Worker processes are killed; by default there is one for each CPU.
THREADS = trio.CapacityLimiter(8)


def is_prime(number: int) -> bool:
    """Check a number by trial division. A worker process imports this module and runs this function."""
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


async def work(payload: bytes, client: trio_udp.Client) -> bytes:
    try:
        match payload.split():
            case [b"sleep", seconds]:
                await trio.to_thread.run_sync(time.sleep, float(seconds), abandon_on_cancel=True, limiter=THREADS)
                return b"slept %b s\n" % seconds
            case [b"prime", number]:
                prime = await trio_parallel.run_sync(is_prime, int(number), kill_on_cancel=True)
                return b"%b is %b\n" % (number, b"prime" if prime else b"not prime")
            case _:
                return payload
    except (ValueError, OverflowError) as error:
        return f"{error}\n".encode()


handler = trio_udp.request_handler(work, timeout=TIMEOUT)

# Worker processes import this module. Without this line, each of them would start a server.
if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    port = int(sys.argv[1]) if sys.argv[1:] else 9999
    stop_signals = {signal.SIGINT, signal.SIGTERM}
    trio.run(partial(trio_udp.serve, handler, port, drain_timeout=TIMEOUT, stop_signals=stop_signals))
