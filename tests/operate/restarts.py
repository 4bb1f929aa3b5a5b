"""Play systemd: hold a socket, and start and stop a service on it: ``python restarts.py 20``.

It prints the port, and ``restarted`` when the last service is ready. That service ends when standard input does. A
service is a process of its own. It is forked from this one, to save the time of imports.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from functools import partial

import trio

from trio_udp import Client, endpoints_from_systemd, serve_endpoints
from trio_udp.operate.systemd import ServiceManager


async def echo(client: Client) -> None:
    async for payload in client:
        await client.send(payload)


async def serve() -> None:
    manager = ServiceManager.from_environment()
    async with trio.open_nursery() as nursery:
        endpoints = endpoints_from_systemd()
        await nursery.start(partial(serve_endpoints, echo, endpoints, stop_signals={signal.SIGTERM}))
        manager.notify(READY=1)


def main(restarts: int) -> None:
    address = f"trio-udp-{os.getpid()}"
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices,
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_194_304)
        sock.bind(("127.0.0.1", 0))
        notices.bind("\0" + address)
        print(sock.getsockname()[1], flush=True)
        for restart in range(restarts + 1):
            pid = os.fork()
            if pid == 0:
                # Both sockets have descriptors from 3 on: this may close either of them here, but not in the parent.
                os.dup2(sock.fileno(), 3)
                os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", NOTIFY_SOCKET=f"@{address}")
                trio.run(serve)
                os._exit(0)
            assert notices.recv(100) == b"READY=1"
            if restart < restarts:
                time.sleep(0.05)  # as long as it serves
            else:
                print("restarted", flush=True)
                sys.stdin.read()
            os.kill(pid, signal.SIGTERM)
            assert os.waitpid(pid, 0)[1] == 0


if __name__ == "__main__":
    main(int(sys.argv[1]))
