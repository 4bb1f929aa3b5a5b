"""Turn datagrams away: strangers' before anything is kept of them, known clients' in the handler.

``accept`` is asked about strangers only. What is no request at all gets no answer: it would go to the address that the
sender claims to have, and an answer that is answered again goes on for ever (CVE-2024-2169). A request from a network
that is not allowed is answered, and still nothing is kept of it. The counters are printed when the server stops.

    python examples/refusing.py --allow 127.0.0.0/8 --allow 192.168.0.0/16
    nc -u 127.0.0.1 9999        (in another terminal: type "EX1 hello", then "hello" twice)
"""

import argparse
import signal
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

import trio

import trio_udp

MAGIC = b"EX1 "


@dataclass
class Gate:
    """What decides is also what counts: an object whose methods the server calls."""

    networks: list[IPv4Network | IPv6Network]
    turned_out: int = 0

    def accept(self, datagram: trio_udp.Datagram) -> bool | bytes:
        if not datagram.payload.startswith(MAGIC):  # the cheaper question first
            return False
        peer = ip_address(datagram.peer_address[0])
        if any(peer in network for network in self.networks):
            return True
        return b"not here\n"  # begins otherwise than a request; at most 3 times as long as the datagram is sent

    async def handler(self, client: trio_udp.Client) -> None:
        async for payload in client:
            if not payload.startswith(MAGIC):
                self.turned_out += 1
                await client.send(b"refused\n")
                client.close()  # drops what else it has sent; its next datagram is a stranger's, up to accept again
                return
            await client.send(payload.removeprefix(MAGIC))


async def main(host: str | None, port: int, networks: list[IPv4Network | IPv6Network]) -> None:
    gate = Gate(networks)
    stop_signals = {signal.SIGINT, signal.SIGTERM}
    async with trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(
            partial(trio_udp.serve, gate.handler, port, host=host, accept=gate.accept, stop_signals=stop_signals)
        )
        for endpoint in server.endpoints:
            print("listening on {}:{}".format(*endpoint.local_address), flush=True)
    statistics = server.statistics()
    print(f"received: {statistics.received}")
    print(f"refused by accept: {statistics.refused_by_accept}")
    print(f"answered by accept: {statistics.answered_by_accept}")
    print(f"turned out by the handler: {gate.turned_out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", nargs="?", type=int, default=9999)
    parser.add_argument("--host", help="name or address to bind; all interfaces by default")
    parser.add_argument("--allow", type=ip_network, action="append", metavar="NETWORK", help="loopback by default")
    arguments = parser.parse_args()
    loopback = [ip_network("127.0.0.0/8"), ip_network("::1/128")]
    trio.run(main, arguments.host, arguments.port, arguments.allow or loopback)
