"""An authoritative DNS server over UDP for one zone file.

    python examples/dns_server.py --port 5353 examples/example.zone
    ZONE_FILE=examples/example.zone trio-udp --port 5353 --workers 2 examples/dns_server.py:handler     (the same)
    dig @127.0.0.1 -p 5353 www.example.com

Behind dnsdist with ``newServer{address="...", useProxyProtocol=true}``, add ``--proxy`` with dnsdist's network.

``answer`` turns a query into a reply and uses no sockets. ``main`` serves it with ``datagram_handler``, because a query
needs no client and no task: almost every query comes from another port (RFC 5452). dnspython reads the zone file and
the wire format. Left out: TCP, DNSSEC, TSIG, DNAME, zone transfer, rate limits.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import struct
from functools import partial
from ipaddress import IPv4Network, IPv6Network, ip_network

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.node
import dns.opcode
import dns.rdataset
import dns.rdatatype
import dns.rrset
import dns.zone
import trio
from dns.flags import AA, DO, TC
from dns.rcode import Rcode
from dns.rdataclass import IN
from dns.rdatatype import AAAA, ANY, CNAME, DS, MX, NS, SOA, SRV, A

import trio_udp

MAX_PAYLOAD = 1232  # The largest that crosses any IPv6 path in one packet: 1280 less the headers of IPv6 and UDP.
WILDCARD = dns.name.Name(["*"])
TARGET_FIELDS = {NS: "target", MX: "exchange", SRV: "target"}  # the additional section has the addresses of these


def load_zone(path: str, origin: str | None = None) -> dns.zone.Zone:
    """Read a zone file. A name that only has names below it gets an empty node (RFC 4592, 2.2.2)."""
    zone = dns.zone.from_file(path, origin, relativize=False)
    for name in list(zone):
        while name != zone.origin:
            name = name.parent()
            zone.find_node(name, create=True)
    return zone


def answer(zone: dns.zone.Zone, payload: bytes) -> bytes | None:
    """Return the reply to one datagram, or ``None`` for no reply. No payload makes this function raise."""
    # Too short for a header, or itself a response: answering a response could go on for ever.
    if len(payload) < 12 or payload[2] & 0x80:
        return None
    try:
        # A query needs no more than a question, OPT and a signature. An attacker can make 1 kB of records that take
        # dnspython 0.2 s to parse, and the server answers nothing else meanwhile.
        if sum(struct.unpack_from("!4H", payload, 4)) > 3:
            raise dns.exception.FormError
        query = dns.message.from_wire(payload)
    except dns.exception.DNSException:
        # Only a header, with the query's ID, opcode and RD: never longer than the malformed query.
        rcode = Rcode.NOTIMP if payload[2] & 0x78 else Rcode.FORMERR
        return payload[:2] + bytes([0x80 | payload[2] & 0x79, rcode]) + bytes(8)
    reply = dns.message.make_response(query)
    if query.edns >= 0:
        reply.use_edns(0, query.ednsflags & DO, MAX_PAYLOAD)  # here, because make_response() would also pad
    reply.set_rcode(resolve(zone, query, reply))
    add_addresses(zone, reply)
    return to_wire(reply, min(max(query.payload, 512), MAX_PAYLOAD))


def resolve(zone: dns.zone.Zone, query: dns.message.Message, reply: dns.message.Message) -> Rcode:
    """Fill the answer and authority sections (RFC 1034, 4.3.2); return the reply's code."""
    if query.opcode() != dns.opcode.QUERY or len(query.question) != 1:
        reply.question = []  # a copy of many questions could make the reply longer than the query
        return Rcode.FORMERR if query.opcode() == dns.opcode.QUERY else Rcode.NOTIMP
    if query.edns > 0:
        return Rcode.BADVERS
    assert zone.origin is not None
    name, rdtype = query.question[0].name, query.question[0].rdtype
    if query.question[0].rdclass != IN or not name.is_subdomain(zone.origin):
        return Rcode.REFUSED
    if dns.rdatatype.is_metatype(rdtype) and rdtype != ANY:
        return Rcode.REFUSED  # a zone transfer, or a type that no zone can hold

    reply.flags |= AA  # about the first name, wherever CNAMEs lead from there (RFC 1035, 4.1.1)
    while True:
        owner, node = find(zone, name)
        if node is None:
            reply.authority.append(negative_soa(zone))
            return Rcode.NXDOMAIN
        delegation = node.get_rdataset(IN, NS)
        if delegation and owner != zone.origin and not (owner == name and rdtype == DS):  # DS is the parent's own
            reply.authority.append(to_rrset(owner, delegation))
            if not reply.answer:
                reply.flags &= ~AA
            return Rcode.NOERROR
        found = node.get_rdataset(IN, CNAME) or node.get_rdataset(IN, rdtype)
        if rdtype == ANY and not found:
            found = next(iter(node), None)  # any one RRset is enough (RFC 8482, 4.1)
        if not found:
            reply.authority.append(negative_soa(zone))
            return Rcode.NOERROR
        reply.answer.append(to_rrset(name, found))
        if found.rdtype != CNAME or rdtype in (CNAME, ANY):
            return Rcode.NOERROR
        name = found[0].target
        if not name.is_subdomain(zone.origin) or any(name == rrset.name for rrset in reply.answer):
            return Rcode.NOERROR  # the resolver goes on elsewhere, or detects the loop


def find(zone: dns.zone.Zone, name: dns.name.Name) -> tuple[dns.name.Name, dns.node.Node | None]:
    """Return the delegation above or at ``name``, or else ``name``, and the node that holds its records, if any."""
    assert zone.origin is not None
    for labels in range(len(zone.origin) + 1, len(name) + 1):
        _, ancestor = name.split(labels)
        node = zone.get_node(ancestor)
        if node is None:
            return name, zone.get_node(WILDCARD + ancestor.parent())
        if node.get_rdataset(IN, NS):
            return ancestor, node
    return name, zone.get_node(name)


def to_rrset(owner: dns.name.Name, rdataset: dns.rdataset.Rdataset) -> dns.rrset.RRset:
    return dns.rrset.from_rdata_list(owner, rdataset.ttl, list(rdataset))


def negative_soa(zone: dns.zone.Zone) -> dns.rrset.RRset:
    """Return the SOA. Its TTL says how long to remember that a name or type is absent (RFC 2308, 3)."""
    soa = zone.find_rrset("@", SOA)
    soa.update_ttl(soa[0].minimum)  # the lower of the two
    return soa


def add_addresses(zone: dns.zone.Zone, reply: dns.message.Message) -> None:
    """Add the zone's addresses of hosts in the reply, such as glue, to save the resolver a query."""
    for rrset in reply.answer + reply.authority:
        for rdata in rrset if rrset.rdtype in TARGET_FIELDS else ():
            for rdtype in (A, AAAA):
                addresses = zone.get_rrset(getattr(rdata, TARGET_FIELDS[rrset.rdtype]), rdtype)
                if addresses and addresses not in reply.additional:
                    reply.additional.append(addresses)


def to_wire(reply: dns.message.Message, limit: int) -> bytes:
    """Encode a reply in ``limit`` bytes. If it is too long, leave out optional records, or set TC in an empty reply."""
    try:
        return reply.to_wire(max_size=limit)
    except dns.exception.TooBig:
        # The glue of a referral is not optional: without it the resolver may not reach the next server (RFC 9471).
        if reply.additional and not any(rrset.rdtype == NS for rrset in reply.authority):
            reply.additional = []
        else:
            reply.flags |= TC
            reply.answer, reply.authority, reply.additional = [], [], []
        return to_wire(reply, limit)


@functools.cache
def zone_of_environment() -> dns.zone.Zone:
    return load_zone(os.environ.get("ZONE_FILE") or os.path.join(os.path.dirname(__file__), "example.zone"))


@trio_udp.datagram_handler
def handler(datagram: trio_udp.Datagram) -> bytes | None:
    """Answer from the zone file in the variable ``ZONE_FILE``. This is the handler for ``trio-udp``."""
    return answer(zone_of_environment(), datagram.payload)


async def main(zone: dns.zone.Zone, host: str, port: int, proxies: list[IPv4Network | IPv6Network]) -> None:
    """Serve ``zone`` until SIGINT or SIGTERM."""

    @trio_udp.datagram_handler
    def answer_from_zone(datagram: trio_udp.Datagram) -> bytes | None:
        return answer(zone, datagram.payload)

    serve = partial(
        trio_udp.serve,
        answer_from_zone,
        port,
        host=host,
        max_datagram_size=MAX_PAYLOAD,  # the size that the server advertises
        proxies=proxies,
        stop_signals=(signal.SIGINT, signal.SIGTERM),
    )
    async with trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(serve)
        for endpoint in server.endpoints:
            host, port = endpoint.local_address[:2]
            print(f"listening on [{host}]:{port}" if ":" in host else f"listening on {host}:{port}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve a DNS zone over UDP.")
    parser.add_argument("zone_file", metavar="ZONEFILE")
    parser.add_argument("--origin", help="name of the zone, if the file has no $ORIGIN")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5353)
    help_proxy = "network of load balancers that put a PROXY header in front of queries; may be repeated"
    parser.add_argument("--proxy", metavar="NETWORK", type=ip_network, action="append", default=[], help=help_proxy)
    arguments = parser.parse_args()
    try:
        zone = load_zone(arguments.zone_file, arguments.origin)
    except (OSError, dns.exception.DNSException) as error:
        parser.error(f"cannot load {arguments.zone_file}: {error}")
    trio.run(main, zone, arguments.host, arguments.port, arguments.proxy)
