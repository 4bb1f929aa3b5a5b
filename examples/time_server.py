"""Answer every datagram, even an empty one, with the current time.

``datagram_handler`` turns a plain function into a handler. The function returns the answer to one datagram; there are
no clients and no tasks.

    python examples/time_server.py      (or: trio-udp examples/time_server.py:tell_time)
    nc -u 127.0.0.1 9999        (in another terminal: press Enter)

Your own protocol should answer only requests, with an answer that is not a request. This server answers anything, so a
forged datagram could make two such servers answer each other for ever (CVE-2024-2169).
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
