"""A DNS forwarder with a cache: it asks another server for answers that it does not have yet.

A ``request_handler`` with ``concurrency`` answers several queries of one client at a time. If the same question arrives
again while the first is being answered, both get the same answer. Each question leaves over its own connection, so from
a random port, with a random ID and in rANdOM caSe. ``trio_udp.request`` accepts only an answer that matches, so a
forger would have to guess all of these (RFC 5452). The cache also holds absent names (RFC 2308), and for one second the
fact that the other server did not answer (RFC 9520).

    python examples/dns_server.py --port 5354 examples/example.zone
    python examples/dns_forwarder.py --to 127.0.0.1 5354 --port 5353
    dig @127.0.0.1 -p 5353 www.example.com

It only serves this machine, unless ``--host`` says otherwise: attackers abuse a forwarder that is open to all. Left
out: TCP, DNSSEC validation (the result of the other server is passed on), several servers to ask.
"""

import argparse
import random
import signal
import struct
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial

import attrs
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rdatatype
import dns.rrset
import trio
from dns.rcode import Rcode
from dns.rdataclass import RdataClass
from dns.rdatatype import RdataType

import trio_udp

PAYLOAD = 1232  # bytes; the largest payload that crosses any IPv6 path in one packet
ENTRIES = 10_000  # answers in the cache
ON_THE_WAY = 500  # questions at a time, each with a socket
LONGEST = 86_400  # seconds to keep an answer
LONGEST_ABSENCE = 10_800  # seconds to keep the absence of a name (RFC 2308, 5)
FAILURE = 1.0  # seconds to remember that there was no answer
WAITS = (0.4, 0.8, 1.6)  # seconds for an answer; clients usually ask again after 5

Question = tuple[dns.name.Name, RdataClass, RdataType, bool]  # name, in any case; with DNSSEC
Connect = Callable[[], Awaitable[trio_udp.Connection]]


@attrs.frozen
class Answer:
    """The other server's answer, or the fact that there was none."""

    rcode: Rcode
    flags: int = 0  # AD and TC
    answer: tuple[dns.rrset.RRset, ...] = ()
    authority: tuple[dns.rrset.RRset, ...] = ()
    since: float = attrs.field(factory=trio.current_time)
    seconds: float = FAILURE  # how long to keep it

    @classmethod
    def of(cls, message: dns.message.Message) -> "Answer":
        records = [*message.answer, *message.authority]
        seconds = float(min([LONGEST, *(rrset.ttl for rrset in records)]))
        if message.rcode() not in (Rcode.NOERROR, Rcode.NXDOMAIN):
            seconds = FAILURE
        elif message.flags & dns.flags.TC:
            seconds = 0
        elif not message.answer or message.rcode() == Rcode.NXDOMAIN:  # RFC 2308, 5
            found = [rrset for rrset in message.authority if rrset.rdtype == dns.rdatatype.SOA]
            for rrset in found:
                rrset.ttl = min(rrset.ttl, rrset[0].minimum, LONGEST_ABSENCE)
            seconds = float(min([seconds, *(rrset.ttl for rrset in found)])) if found else 0
        flags = message.flags & (dns.flags.AD | dns.flags.TC)
        return cls(message.rcode(), flags, tuple(message.answer), tuple(message.authority), seconds=seconds)

    @property
    def is_fresh(self) -> bool:
        return trio.current_time() < self.since + self.seconds

    def fill(self, reply: dns.message.Message) -> None:
        """Put the records into a reply, with the rest of their TTL."""
        reply.set_rcode(self.rcode)
        reply.flags |= self.flags
        asked, age = reply.question[0].name, int(trio.current_time() - self.since)
        for section, rrsets in ((reply.answer, self.answer), (reply.authority, self.authority)):
            for rrset in rrsets:
                name = asked if rrset.name == asked else rrset.name  # with the client's upper and lower case
                section.append(dns.rrset.from_rdata_list(name, max(0, rrset.ttl - age), list(rrset)))


@attrs.define
class Forwarder:
    """A cache in front of another server.

    Attributes:
      connect: Opens a connection to the other server.
      nursery: Runs the questions, so that all clients get the answer, even if the first to ask has gone.
    """

    connect: Connect
    nursery: trio.Nursery
    asked: int = 0
    _answers: OrderedDict[Question, Answer] = attrs.field(factory=OrderedDict)  # the least recently used first
    _on_the_way: dict[Question, trio.Event] = attrs.field(factory=dict)

    async def handler(self, payload: bytes, client: trio_udp.Client) -> bytes | None:
        """Answer a query."""
        if len(payload) < 12 or payload[2] & 0x80:
            return None  # not a query; answering an answer could go on for ever
        try:
            if sum(struct.unpack_from("!4H", payload, 4)) > 3:  # a question, OPT and a signature; see dns_server.py
                raise dns.exception.FormError
            query = dns.message.from_wire(payload)
            if query.opcode() == dns.opcode.QUERY and len(query.question) != 1:
                raise dns.exception.FormError
        except dns.exception.DNSException:
            return payload[:2] + bytes([0x80 | payload[2] & 0x79, Rcode.FORMERR]) + bytes(8)
        reply = dns.message.make_response(query, recursion_available=True)
        if query.edns >= 0:
            reply.use_edns(0, query.ednsflags & dns.flags.DO, PAYLOAD)
        if query.opcode() != dns.opcode.QUERY:
            reply.set_rcode(Rcode.NOTIMP)
        elif query.edns > 0:
            reply.set_rcode(Rcode.BADVERS)
        elif dns.rdatatype.is_metatype(query.question[0].rdtype) and query.question[0].rdtype != dns.rdatatype.ANY:
            reply.set_rcode(Rcode.REFUSED)
        else:
            asked = query.question[0]
            wants_dnssec = bool(query.ednsflags & dns.flags.DO)
            (await self._find((asked.name, asked.rdclass, asked.rdtype, wants_dnssec))).fill(reply)
        try:
            return reply.to_wire(max_size=min(max(query.payload, 512), PAYLOAD))
        except dns.exception.TooBig:
            reply.flags |= dns.flags.TC
            reply.answer, reply.authority = [], []
            return reply.to_wire()

    async def _find(self, question: Question) -> Answer:
        """Return an answer from the cache, or ask the other server, once for all clients with the same question."""
        if question in self._answers and self._answers[question].is_fresh:
            self._answers.move_to_end(question)
            return self._answers[question]
        if question not in self._on_the_way:
            if len(self._on_the_way) >= ON_THE_WAY:
                return Answer(Rcode.SERVFAIL)
            self._on_the_way[question] = trio.Event()
            self.nursery.start_soon(self._ask, question)
        await self._on_the_way[question].wait()
        return self._answers.get(question, Answer(Rcode.SERVFAIL))

    async def _ask(self, question: Question) -> None:
        self.asked += 1
        try:
            self._answers[question] = await self._ask_the_other(question)
        except (trio_udp.NoAnswerError, OSError, dns.exception.DNSException):
            self._answers[question] = Answer(Rcode.SERVFAIL)
        self._answers.move_to_end(question)
        while len(self._answers) > ENTRIES:
            self._answers.popitem(last=False)
        self._on_the_way.pop(question).set()

    async def _ask_the_other(self, question: Question) -> Answer:
        name, rdclass, rdtype, wants_dnssec = question
        mixed = dns.name.Name([bytes(map(in_random_case, label)) for label in name.labels])
        query = dns.message.make_query(
            mixed, rdtype, rdclass, use_edns=0, want_dnssec=wants_dnssec, payload=PAYLOAD, id=RANDOM.getrandbits(16)
        )
        wire: bytes = query.to_wire()
        asked = wire[12:-11]  # without the OPT record

        def matches(payload: bytes) -> bool:
            is_answer = len(payload) > 12 and payload[2] & 0x80 != 0
            return is_answer and payload[:2] == wire[:2] and payload[12:].startswith(asked)

        async with await self.connect() as other:
            return Answer.of(dns.message.from_wire(await trio_udp.request(other, wire, matches, waits=WAITS)))


RANDOM = random.SystemRandom()


def in_random_case(letter: int) -> int:
    return letter ^ 0x20 if chr(letter).isalpha() and letter < 128 and RANDOM.getrandbits(1) else letter


async def main(host: str, port: int, to: tuple[str, int]) -> None:
    async with trio.open_nursery() as asking, trio.open_nursery() as nursery:
        forwarder = Forwarder(partial(trio_udp.connect, *to, receive_buffer=65_536), asking)
        serve = partial(
            trio_udp.serve,
            trio_udp.request_handler(concurrency=100)(forwarder.handler),
            port,
            host=host,
            max_datagram_size=PAYLOAD,
            idle_timeout=10,
            stop_signals={signal.SIGINT, signal.SIGTERM},
        )
        server: trio_udp.Server = await nursery.start(serve)
        for endpoint in server.endpoints:
            print("listening on {}:{}".format(*endpoint.local_address), flush=True)
    print(f"answers: {server.statistics().sent}")
    print(f"questions: {forwarder.asked}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--to", nargs=2, default=["127.0.0.1", "5354"], metavar=("HOST", "PORT"), help="server to ask")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5353)
    arguments = parser.parse_args()
    trio.run(main, arguments.host, arguments.port, (arguments.to[0], int(arguments.to[1])))
