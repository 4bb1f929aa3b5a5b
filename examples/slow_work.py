"""Do slow work without making other clients wait.

Blocking calls go to a thread, long computations to a worker process. One client's answers come in the order of its
requests; those of different clients as soon as each is ready. (With ``concurrency=``, ``request_handler`` answers one
client's requests in that way too.) Needs ``trio-parallel``.

    python examples/slow_work.py
    nc -u 127.0.0.1 9999        (in two more terminals: type "sleep 3" in one and "ping" in the other,
                                 or "prime 1000003"; what takes longer than --timeout gets no answer)
"""

import argparse
import math
import signal
import time
from functools import partial

import trio
import trio_parallel  # type: ignore[import-untyped]

import trio_udp

# A thread cannot be stopped, only abandoned, and keeps its place here until it is done: however many requests time
# out, no more than this many threads ever run. Worker processes are killed; by default there are as many as CPUs.
THREADS = trio.CapacityLimiter(8)


def is_prime(number: int) -> bool:
    """Plain trial division: what a worker process, which imports this module, runs."""
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


async def main(host: str | None, port: int, seconds: float) -> None:
    handler = trio_udp.request_handler(work, timeout=seconds)
    stop_signals = {signal.SIGINT, signal.SIGTERM}
    async with trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(
            partial(trio_udp.serve, handler, port, host=host, drain_timeout=seconds, stop_signals=stop_signals)
        )
        for endpoint in server.endpoints:
            print("listening on {}:{}".format(*endpoint.local_address), flush=True)


# Worker processes import this module: without this line each of them would start a server.
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", nargs="?", type=int, default=9999)
    parser.add_argument("--host", help="name or address to bind; all interfaces by default")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS", help="for each request")
    arguments = parser.parse_args()
    trio.run(main, arguments.host, arguments.port, arguments.timeout)
