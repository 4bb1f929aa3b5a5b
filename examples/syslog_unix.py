"""A syslog server on a Unix-domain socket: it prints a line for each message, with the process that sent it.

The kernel says which process sent a message, so no process can pose as root. Programs that log never wait for an
answer, and most have no name to which an answer could go. So this is a ``datagram_handler``: it sees the messages of
all processes in arrival order.

    python examples/syslog_unix.py syslog.sock
    logger -u syslog.sock -p daemon.warning "disk is nearly full"        (in another terminal)
"""

import argparse
import re
import signal
from functools import partial

import trio

import trio_udp

# RFC 5424 section 6.2.1: a message begins with <8 * facility + severity>.
FACILITIES = (
    "kern user mail daemon auth syslog lpr news uucp cron authpriv ftp ntp audit alert clock "
    "local0 local1 local2 local3 local4 local5 local6 local7"
).split()
SEVERITIES = "emerg alert crit err warning notice info debug".split()
PRIORITY = re.compile(rb"<(0|[1-9]\d{0,2})>")
DEFAULT_PRIORITY = 13  # user.notice, for a message without one (RFC 3164 section 4.3.3)


def parse(message: bytes) -> tuple[str, str]:
    """Return the priority of a message, such as "daemon.warning", and its text without control characters."""
    match = PRIORITY.match(message)
    number = int(match[1]) if match else DEFAULT_PRIORITY
    if match and number < 8 * len(FACILITIES):
        message = message[match.end() :]
    else:
        number = DEFAULT_PRIORITY
    # Some senders end a message with a line feed or a zero byte. A line feed inside could forge another line.
    text = message.rstrip(b"\n\0").decode(errors="backslashreplace")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return f"{FACILITIES[number // 8]}.{SEVERITIES[number % 8]}", text


@trio_udp.datagram_handler
def log(datagram: trio_udp.Datagram) -> None:
    priority, text = parse(datagram.payload)
    sender = datagram.credentials
    assert sender is not None  # credentials=True below
    print(f"{priority} pid={sender.pid} uid={sender.uid}: {text}", flush=True)


async def main(path: str, mode: int) -> None:
    endpoint = await trio_udp.open_unix_endpoint(path, mode=mode, credentials=True)
    stop_signals = {signal.SIGINT, signal.SIGTERM}
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(trio_udp.serve_endpoints, log, [endpoint], stop_signals=stop_signals))
        print(f"listening on {endpoint.local_address}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path", nargs="?", default="syslog.sock", help="of the socket's file (default: %(default)s)")
    parser.add_argument(
        "--mode",
        type=partial(int, base=8),
        default=0o666,
        metavar="OCTAL",
        help="permissions of the file; a process that may write to it can log (default: 666)",
    )
    arguments = parser.parse_args()
    trio.run(main, arguments.path, arguments.mode)
