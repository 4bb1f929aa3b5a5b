"""Publish a name and a service of this machine by multicast DNS (RFC 6762, RFC 6763), with python-zeroconf's codec.

Questions to the group are answered on the interface that they came in on, with our address there: to the group, or to
the peer alone if it asks for that. It does not probe for the name, announce it, or leave out answers that are known.

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
    """Let other programs of this machine have the port too."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def own_address(datagram: trio_udp.Datagram) -> str:
    """Return our own address for the peer. Over IPv6 a group's datagrams do not tell it; the routes do."""
    if ":" not in datagram.peer_address[0]:
        return datagram.local_address[0]
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.connect(datagram.peer_address)
        return str(sock.getsockname()[0])


class Responder:
    def __init__(self, name: str, service: str, port: int) -> None:
        self.name, self.type, self.port = name, f"{service}.local.", port

    def answer(self, datagram: trio_udp.Datagram) -> bytes | None:
        """Answer one question of any peer. What is returned goes to the peer alone."""
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
        knows_multicast = datagram.peer_address[1] == PORT  # others want a usual answer: with the question and number
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
        with suppress(OSError, trio.WouldBlock):  # the interface is gone, or the send buffer full: it will ask again
            send_to_group(payload, datagram)
        return None


def send_to_group(payload: bytes, datagram: trio_udp.Datagram) -> None:
    """Send to the group on the interface that a datagram came in on."""
    if ":" in datagram.peer_address[0]:
        datagram.endpoint.send_to_nowait(payload, (GROUP_IPV6, PORT, 0, datagram.interface or 0))
    else:
        datagram.endpoint.send_to_nowait(payload, (GROUP, PORT), local_address=datagram.local_address)


async def main(name: str, service: str, port: int) -> None:
    endpoints = await trio_udp.open_endpoints(PORT, configure=share)
    for endpoint in endpoints:
        endpoint.multicast_hops = 255
        for _, interface in socket.if_nameindex():
            with suppress(OSError):  # it does not have this family
                endpoint.join_group(GROUP if len(endpoint.local_address) == 2 else GROUP_IPV6, interface=interface)
        print("listening on {}:{}".format(*endpoint.local_address), flush=True)
    handler = trio_udp.datagram_handler(Responder(name, service, port).answer)
    await trio_udp.serve_endpoints(handler, endpoints, stop_signals={signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name", help="of this machine, before .local")
    parser.add_argument("service", help="such as _http._tcp")
    parser.add_argument("port", type=int, help="of the service")
    arguments = parser.parse_args()
    trio.run(main, arguments.name, arguments.service, arguments.port)
