"""Tell the time to anyone who sends a datagram, even an empty one.

``datagram_handler`` makes a handler of a plain function that returns the answer to one datagram: no clients, no tasks.

    python examples/time_server.py      (or: trio-udp examples/time_server.py:tell_time)
    nc -u 127.0.0.1 9999        (in another terminal: press Enter)

A protocol of your own should answer only requests, and with something that is no request. This server answers
anything: a forged datagram could make two of its kind answer each other for ever (CVE-2024-2169).
"""

import logging
import signal
import sys
import time
from functools import partial

import trio

import trio_udp


@trio_udp.datagram_handler
def tell_time(datagram: trio_udp.Datagram) -> bytes:
    return time.ctime().encode()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    port = int(sys.argv[1]) if sys.argv[1:] else 9999
    trio.run(partial(trio_udp.serve, tell_time, port, stop_signals={signal.SIGINT, signal.SIGTERM}))
