"""An SNTP server (RFC 4330, RFC 5905): it tells NTP clients the time of this machine's clock.

Each answer depends on one datagram only, so a ``datagram_handler`` is enough. An answer says when its request arrived.
That is before the handler runs, so ``configure`` makes Linux add a time stamp to each datagram, and the handler reads
it from ``datagram.ancillary``.

    python examples/sntp_server.py --host 127.0.0.1 11123
    chronyd -Q -t 5 'server 127.0.0.1 port 11123 iburst' 'pidfile /tmp/chronyd.pid'

The server answers only requests. An answer is not a request, and not longer than one.
"""

import argparse
import signal
import socket
import struct
import sys
import time
from functools import partial

import trio

import trio_udp

HEADER = struct.Struct("!BBbbII4sQ8sQQ")  # RFC 5905, 7.3
SECONDS_TO_1970 = 2_208_988_800  # since 1900
CLIENT, SERVER = 3, 4
PRECISION = -20  # of our time stamps: 2**-20 seconds
DISPERSION = 2**16 // 100  # of our clock, in seconds * 2**16: a guess, because its quality is unknown
LOCAL_CLOCK = bytes([127, 127, 1, 1])  # the reference ID of a server with no reference but its own clock
SO_TIMESTAMPNS = 35  # on Linux


def to_ntp(nanoseconds: int) -> int:
    """Convert a Unix time to an NTP time stamp: seconds * 2**32 since 1900, which start again at 0 in 2036."""
    return ((nanoseconds + SECONDS_TO_1970 * 10**9 << 32) // 10**9) % 2**64


def arrived(datagram: trio_udp.Datagram) -> int:
    """Return when the kernel received a datagram, in nanoseconds since 1970."""
    for level, kind, data in datagram.ancillary:
        if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS):
            seconds, nanoseconds = struct.unpack("ll", data)
            return int(seconds * 10**9 + nanoseconds)
    return time.time_ns()


def tell_time(stratum: int, datagram: trio_udp.Datagram) -> bytes | None:
    request = datagram.payload
    if len(request) < HEADER.size:
        return None
    version, mode, poll, sent = request[0] >> 3 & 7, request[0] & 7, request[2], request[40:48]
    if mode != CLIENT or not 1 <= version <= 4:
        return None
    first, received = version << 3 | SERVER, to_ntp(arrived(datagram))
    # Repeat the client's time stamp. The client recognizes its answer by it, and a forger does not know it.
    return HEADER.pack(
        first, stratum, min(poll, 17), PRECISION, 0, DISPERSION, LOCAL_CLOCK, received, sent, received,
        to_ntp(time.time_ns()),
    )  # fmt: skip


def ask_for_time_stamps(sock: socket.socket) -> None:
    if sys.platform == "linux":
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)


async def main(host: str | None, port: int, stratum: int) -> None:
    async with trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(
            partial(
                trio_udp.serve,
                trio_udp.datagram_handler(partial(tell_time, stratum)),
                port,
                host=host,
                configure=ask_for_time_stamps,
                limits=trio_udp.Limits(amplification=1),
                stop_signals={signal.SIGINT, signal.SIGTERM},
            )
        )
        for endpoint in server.endpoints:
            print("listening on {}:{}".format(*endpoint.local_address), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", nargs="?", type=int, default=123)
    parser.add_argument("--host", help="name or address to bind; all interfaces by default")
    help_stratum = "distance of this clock from a reference clock; by default 10, so that clients prefer other servers"
    parser.add_argument("--stratum", type=int, default=10, choices=range(1, 16), metavar="1..15", help=help_stratum)
    arguments = parser.parse_args()
    trio.run(main, arguments.host, arguments.port, arguments.stratum)
