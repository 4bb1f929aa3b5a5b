"""Refuse datagrams: those of strangers in ``accept``, those of clients in the handler.

The server calls ``accept`` for strangers only. A datagram that is not a request gets no answer: the source may be
forged, and an answer that is answered in turn could go on for ever (CVE-2024-2169). A request from a network that is
not allowed gets an answer, but the server keeps nothing. The server prints its counters when it stops.

    ALLOW="127.0.0.0/8 192.168.0.0/16" python examples/refusing.py
    trio-udp --accept examples/refusing.py:gate.accept examples/refusing.py:handler     (the same)
    nc -u 127.0.0.1 9999        (in another terminal: type "EX1 hello", then "hello" twice)
"""

import logging
import os
import signal
import sys
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

import trio

import trio_udp

MAGIC = b"EX1 "


@dataclass
class Gate:
    """Decides which datagrams to serve, and counts those that the handler refuses."""

    networks: list[IPv4Network | IPv6Network]
    turned_out: int = 0

    def accept(self, datagram: trio_udp.Datagram) -> bool | bytes:
        if not datagram.payload.startswith(MAGIC):  # the cheaper check first
            return False
        peer = ip_address(datagram.peer_address[0])
        if any(peer in network for network in self.networks):
            return True
        return b"not here\n"  # does not start like a request; sent if at most 3 times as long as the datagram

    async def handler(self, client: trio_udp.Client) -> None:
        async for payload in client:
            if not payload.startswith(MAGIC):
                self.turned_out += 1
                await client.send(b"refused\n")
                client.close()  # drops its waiting datagrams; its next one is a stranger's, and goes to accept again
                return
            await client.send(payload.removeprefix(MAGIC))


gate = Gate([ip_network(network) for network in os.environ.get("ALLOW", "127.0.0.0/8 ::1/128").split()])
handler = gate.handler


async def main(port: int) -> None:
    async with trio.open_nursery() as nursery:
        serve = partial(trio_udp.serve, handler, port, accept=gate.accept, stop_signals={signal.SIGINT, signal.SIGTERM})
        server: trio_udp.Server = await nursery.start(serve)
    statistics = server.statistics()
    print(f"received: {statistics.received}")
    print(f"refused by accept: {statistics.refused_by_accept}")
    print(f"answered by accept: {statistics.answered_by_accept}")
    print(f"turned out by the handler: {gate.turned_out}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    trio.run(main, int(sys.argv[1]) if sys.argv[1:] else 9999)
