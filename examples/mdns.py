"""Publish a name and a service of this machine by multicast DNS (RFC 6762, RFC 6763), with python-zeroconf's codec.

The answer to a question leaves on the interface on which the question arrived, with our address on that interface. It
goes to the group, or only to the peer if the peer asks for that. Left out: probing for the name, announcements, and
known-answer suppression.

    pip install zeroconf; python examples/mdns.py demo _http._tcp 8080
    avahi-resolve -n demo.local        avahi-browse --resolve _http._tcp        (on this or another machine)
"""

import argparse
import signal
import socket
from contextlib import suppress

import trio
from zeroconf import DNSIncoming, DNSOutgoing, ServiceInfo  # type: ignore[attr-defined]

import trio_udp

PORT = 5353
GROUP, GROUP_IPV6 = "224.0.0.251", "ff02::fb"
ANSWER = 0x8400  # flags: a response, authoritative


def share(sock: socket.socket) -> None:
    """Share the port with other programs on this machine."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def own_address(datagram: trio_udp.Datagram) -> str:
    """Return our address for the peer. For a datagram to an IPv6 group, only the routing table knows it."""
    if ":" not in datagram.peer_address[0]:
        return datagram.local_address[0]
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.connect(datagram.peer_address)
        return str(sock.getsockname()[0])


class Responder:
    def __init__(self, name: str, service: str, port: int) -> None:
        self.name, self.type, self.port = name, f"{service}.local.", port

    def answer(self, datagram: trio_udp.Datagram) -> bytes | None:
        """Answer one query. The return value goes only to the peer."""
        query = DNSIncoming(datagram.payload)
        if not query.valid or not query.is_query():
            return None
        host, own = f"{self.name}.local.", own_address(datagram)
        service = ServiceInfo(
            self.type, f"{self.name}.{self.type}", self.port, properties=b"\0", server=host, parsed_addresses=[own]
        )
        records = [service.dns_pointer(), service.dns_service(), service.dns_text(), *service.dns_addresses()]
        answers = [record for record in records if any(question.answered_by(record) for question in query.questions)]
        if not answers:
            return None
        knows_multicast = datagram.peer_address[1] == PORT  # other peers expect unicast DNS: with question and ID
        reply = DNSOutgoing(ANSWER, multicast=knows_multicast, id_=query.id)
        for question in () if knows_multicast else query.questions:
            reply.add_question(question)
        for record in records:
            if record in answers:
                reply.add_answer_at_time(record, 0)
            else:
                reply.add_additional_answer(record)
        payload = reply.packets()[0]
        if not knows_multicast or all(question.unicast for question in query.questions):
            return payload
        with suppress(OSError, trio.WouldBlock):  # no such interface, or a full send buffer: the peer asks again
            send_to_group(payload, datagram)
        return None


def send_to_group(payload: bytes, datagram: trio_udp.Datagram) -> None:
    """Send to the group, on the interface on which a datagram arrived."""
    if ":" in datagram.peer_address[0]:
        datagram.endpoint.send_to_nowait(payload, (GROUP_IPV6, PORT, 0, datagram.interface or 0))
    else:
        datagram.endpoint.send_to_nowait(payload, (GROUP, PORT), local_address=datagram.local_address)


async def main(name: str, service: str, port: int) -> None:
    endpoints = await trio_udp.open_endpoints(PORT, configure=share)
    for endpoint in endpoints:
        endpoint.multicast_hops = 255
        for _, interface in socket.if_nameindex():
            with suppress(OSError):  # the interface does not have this family
                endpoint.join_group(GROUP if len(endpoint.local_address) == 2 else GROUP_IPV6, interface=interface)
        print("listening on {}:{}".format(*endpoint.local_address), flush=True)
    handler = trio_udp.datagram_handler(Responder(name, service, port).answer)
    await trio_udp.serve_endpoints(handler, endpoints, stop_signals={signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name", help="name of this machine, without .local")
    parser.add_argument("service", help="type of the service, such as _http._tcp")
    parser.add_argument("port", type=int, help="port of the service")
    arguments = parser.parse_args()
    trio.run(main, arguments.name, arguments.service, arguments.port)
