"""The DNS server among the examples: its replies, first as a pure function, then to dig over a socket."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import dns.tsig
import dns.zone
import pytest
from hypothesis import given, settings, strategies as st

from .conftest import EXAMPLES, Example, Start, ask as ask_server, without_signals

SCRIPT = EXAMPLES / "dns_server.py"
ZONE_FILE = EXAMPLES / "example.zone"

spec = importlib.util.spec_from_file_location("example_dns_server", SCRIPT)
assert spec is not None
assert spec.loader is not None
dns_server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dns_server)

ZONE: dns.zone.Zone = dns_server.load_zone(str(ZONE_FILE))
ORIGIN = dns.name.from_text("example.com.")


# The content of a reply, in a form that suits dig's output and dnspython's messages.

Records = frozenset[tuple[dns.name.Name, int, dns.rdata.Rdata]]


class Reply(NamedTuple):
    status: str
    flags: str
    edns: str | None
    question: str
    answer: Records
    authority: Records
    additional: Records


def records(*lines: str) -> Records:
    """Parse lines such as ``www 3600 CNAME web``. Names may be relative to the example's zone, in any case."""
    found = []
    for line in lines:
        owner, ttl, rdtype, rdata = line.replace(" IN ", " ").split(None, 3)
        parsed = dns.rdata.from_text("IN", rdtype, rdata, ORIGIN, relativize=False)
        found.append((dns.name.from_text(owner, ORIGIN), int(ttl), parsed))
    assert len(found) == len(set(found)), f"the same record twice: {lines}"
    return frozenset(found)


def read_wire(wire: bytes | None) -> Reply:
    assert wire is not None
    message = dns.message.from_wire(wire, one_rr_per_rrset=True)  # merging would hide duplicate records
    extended = " do" if message.ednsflags & dns.flags.DO else ""
    return Reply(
        dns.rcode.to_text(message.rcode()),
        dns.flags.to_text(dns.flags.Flag(message.flags & 0x87F0)).lower(),  # without opcode and rcode
        f"version: {message.edns}, flags:{extended}; udp: {message.payload}" if message.edns >= 0 else None,
        "".join(rrset.to_text() for rrset in message.question),
        *(
            records(*(line for rrset in section for line in rrset.to_text().splitlines()))
            for section in (message.answer, message.authority, message.additional)
        ),
    )


def read_dig(output: str) -> list[Reply]:
    replies = []
    for block in output.split(";; ->>HEADER<<- ")[1:]:
        sections: dict[str, list[str]] = {"QUESTION": [], "ANSWER": [], "AUTHORITY": [], "ADDITIONAL": []}
        section = None
        for line in map(" ".join, map(str.split, block.splitlines())):
            if heading := re.fullmatch(";; ([A-Z]+) SECTION:", line):
                section = heading[1]
            elif not line:
                section = None
            elif section is not None:
                sections[section].append(line)
        status = re.search(r"status: (\w+)", block)
        flags = re.search(r";; flags: ([a-z ]*);", block)
        edns = re.search(r"; EDNS: (.*)", block)
        assert status
        assert flags
        replies.append(
            Reply(
                status[1],
                flags[1],
                edns and edns[1],
                "".join(sections["QUESTION"]).removeprefix(";"),
                *(records(*sections[name]) for name in ("ANSWER", "AUTHORITY", "ADDITIONAL")),
            )
        )
    return replies


# Replies to questions without EDNS, for the example's zone file: status and flags, then the three sections.

SOA_RDATA = "SOA ns1 hostmaster 2026010101 7200 3600 1209600 300"
NOTHING_HERE = [f"@ 300 {SOA_RDATA}"]
WEB_A = ["web 300 A 192.0.2.10", "web 300 A 192.0.2.11"]
WEB_AAAA = ["web 300 AAAA 2001:db8::10"]
FTP_CHAIN = ["ftp 3600 CNAME download", "download 600 CNAME mirror", "mirror 3600 CNAME web"]
NS1 = ["ns1 3600 A 192.0.2.1", "ns1 3600 AAAA 2001:db8::1"]
NS2 = ["ns2 3600 A 192.0.2.2", "ns2 3600 AAAA 2001:db8::2"]
MAIL = ["mail 3600 A 192.0.2.25", "mail 3600 AAAA 2001:db8::25"]
LAB = ["lab 3600 NS ns1.lab", "lab 3600 NS ns2.lab"]
LAB_GLUE = ["ns1.lab 3600 A 192.0.2.129", "ns1.lab 3600 AAAA 2001:db8:1::1", "ns2.lab 3600 A 192.0.2.130"]
CLOUD = ["cloud 3600 NS ns1.example.net.", "cloud 3600 NS ns2.example.net."]

Sections = tuple[str, list[str], list[str], list[str]]

CASES: dict[str, Sections] = {
    # The apex, and plain data.
    "@ SOA": ("NOERROR aa", [f"@ 3600 {SOA_RDATA}"], [], []),
    "@ NS": ("NOERROR aa", ["@ 3600 NS ns1", "@ 3600 NS ns2"], [], NS1 + NS2),
    "@ A": ("NOERROR aa", ["@ 3600 A 192.0.2.10"], [], []),
    "@ AAAA": ("NOERROR aa", ["@ 3600 AAAA 2001:db8::10"], [], []),
    "@ MX": ("NOERROR aa", ["@ 3600 MX 10 mail", "@ 3600 MX 20 mail.example.net."], [], MAIL),
    "@ TXT": ("NOERROR aa", ['@ 3600 TXT "v=spf1 mx -all"'], [], []),
    "@ CAA": ("NOERROR aa", ['@ 3600 CAA 0 issue "ca.example.net"'], [], []),
    "@ ANY": ("NOERROR aa", [f"@ 3600 {SOA_RDATA}"], [], []),
    "ns1 A": ("NOERROR aa", ["ns1 3600 A 192.0.2.1"], [], []),
    "ns2 AAAA": ("NOERROR aa", ["ns2 3600 AAAA 2001:db8::2"], [], []),
    "web A": ("NOERROR aa", WEB_A, [], []),
    "web ANY": ("NOERROR aa", WEB_A, [], []),
    "_sip._tcp SRV": ("NOERROR aa", ["_sip._tcp 3600 SRV 10 60 5060 sip"], [], ["sip 3600 A 192.0.2.60"]),
    "_dmarc TXT": ("NOERROR aa", ['_dmarc 3600 TXT "v=DMARC1; p=reject; rua=mailto:dmarc@example.com"'], [], []),
    # The name exists, but not the type; or there are only names below it.
    "@ SRV": ("NOERROR aa", [], NOTHING_HERE, []),
    "@ DS": ("NOERROR aa", [], NOTHING_HERE, []),
    "mail MX": ("NOERROR aa", [], NOTHING_HERE, []),
    "mail TYPE65280": ("NOERROR aa", [], NOTHING_HERE, []),
    "_domainkey TXT": ("NOERROR aa", [], NOTHING_HERE, []),
    "_tcp SRV": ("NOERROR aa", [], NOTHING_HERE, []),
    "_tcp ANY": ("NOERROR aa", [], NOTHING_HERE, []),
    # The name does not exist.
    "nowhere A": ("NXDOMAIN aa", [], NOTHING_HERE, []),
    "nowhere ANY": ("NXDOMAIN aa", [], NOTHING_HERE, []),
    "a.b.c.nowhere TXT": ("NXDOMAIN aa", [], NOTHING_HERE, []),
    "below.mail A": ("NXDOMAIN aa", [], NOTHING_HERE, []),
    "_udp.sip SRV": ("NXDOMAIN aa", [], NOTHING_HERE, []),
    # Aliases.
    "www A": ("NOERROR aa", ["www 3600 CNAME web", *WEB_A], [], []),
    "www AAAA": ("NOERROR aa", ["www 3600 CNAME web", *WEB_AAAA], [], []),
    "www CNAME": ("NOERROR aa", ["www 3600 CNAME web"], [], []),
    "www ANY": ("NOERROR aa", ["www 3600 CNAME web"], [], []),
    "www TXT": ("NOERROR aa", ["www 3600 CNAME web"], NOTHING_HERE, []),
    "ftp A": ("NOERROR aa", FTP_CHAIN + WEB_A, [], []),
    "ftp AAAA": ("NOERROR aa", FTP_CHAIN + WEB_AAAA, [], []),
    "ftp MX": ("NOERROR aa", FTP_CHAIN, NOTHING_HERE, []),
    "cdn A": ("NOERROR aa", ["cdn 3600 CNAME example-com.cdn.example.net."], [], []),
    "old A": ("NXDOMAIN aa", ["old 3600 CNAME retired"], NOTHING_HERE, []),
    "hen A": ("NOERROR aa", ["hen 3600 CNAME egg", "egg 3600 CNAME hen"], [], []),
    "blog A": ("NOERROR aa", ["blog 3600 CNAME blog.pages", "blog.pages 3600 A 192.0.2.80"], [], []),
    "intranet A": ("NOERROR aa", ["intranet 3600 CNAME portal.lab"], LAB, LAB_GLUE),
    # Wildcards, and names that they do not match.
    "bob.pages A": ("NOERROR aa", ["bob.pages 3600 A 192.0.2.80"], [], []),
    "very.deep.below.pages A": ("NOERROR aa", ["very.deep.below.pages 3600 A 192.0.2.80"], [], []),
    "bob.pages TXT": ("NOERROR aa", ['bob.pages 3600 TXT "a page of the user bob"'], [], []),
    "*.pages A": ("NOERROR aa", ["*.pages 3600 A 192.0.2.80"], [], []),
    "bob.pages AAAA": ("NOERROR aa", [], NOTHING_HERE, []),
    "alice.pages AAAA": ("NOERROR aa", ["alice.pages 3600 AAAA 2001:db8::80"], [], []),
    "alice.pages A": ("NOERROR aa", [], NOTHING_HERE, []),
    "pages A": ("NOERROR aa", [], NOTHING_HERE, []),
    "team.pages A": ("NOERROR aa", [], NOTHING_HERE, []),
    "build.team.pages A": ("NOERROR aa", ["build.team.pages 3600 A 192.0.2.81"], [], []),
    "other.team.pages A": ("NXDOMAIN aa", [], NOTHING_HERE, []),
    "below.alice.pages A": ("NXDOMAIN aa", [], NOTHING_HERE, []),
    "below.*.pages A": ("NXDOMAIN aa", [], NOTHING_HERE, []),
    "carol.users A": ("NOERROR aa", ["carol.users 3600 CNAME web", *WEB_A], [], []),
    "carol.users CNAME": ("NOERROR aa", ["carol.users 3600 CNAME web"], [], []),
    # Delegations.
    "lab NS": ("NOERROR", [], LAB, LAB_GLUE),
    "lab A": ("NOERROR", [], LAB, LAB_GLUE),
    "lab ANY": ("NOERROR", [], LAB, LAB_GLUE),
    "ns1.lab A": ("NOERROR", [], LAB, LAB_GLUE),
    "a.b.lab TXT": ("NOERROR", [], LAB, LAB_GLUE),
    "below.lab DS": ("NOERROR", [], LAB, LAB_GLUE),
    "lab DS": ("NOERROR aa", [], NOTHING_HERE, []),
    "host.cloud A": ("NOERROR", [], CLOUD, []),
    # Queries that this server, or any server over UDP, must not answer.
    "com. NS": ("REFUSED", [], [], []),
    ". NS": ("REFUSED", [], [], []),
    "example.net. A": ("REFUSED", [], [], []),
    "notexample.com. A": ("REFUSED", [], [], []),
    "@ MAILA": ("REFUSED", [], [], []),
    "@ OPT": ("REFUSED", [], [], []),
    # Too long without EDNS.
    "mail2026._domainkey TXT": ("NOERROR aa tc", [], [], []),
    "verification TXT": ("NOERROR aa tc", [], [], []),
}


def question(case: str) -> tuple[dns.name.Name, str]:
    name, rdtype = case.split()
    return dns.name.from_text(name, ORIGIN), rdtype


def expected(case: str, asked: str, *, edns: str | None = None, rd: bool = True) -> Reply:
    status_and_flags, *sections = CASES[case]
    status, *flags = status_and_flags.split()
    answer, authority, additional = (records(*section) for section in sections)
    all_flags = ["qr", *flags, *["rd"] * rd]
    return Reply(status, " ".join(all_flags), edns, asked, answer, authority, additional)


def ask(name: str, rdtype: str = "A", *, zone: dns.zone.Zone = ZONE, **options: Any) -> Reply:
    query = dns.message.make_query(dns.name.from_text(name, ORIGIN), rdtype, **options)
    return read_wire(dns_server.answer(zone, query.to_wire()))


def load(tmp_path: Path, text: str, origin: str | None = None) -> dns.zone.Zone:
    path = tmp_path / "zone"
    path.write_text(text)
    zone: dns.zone.Zone = dns_server.load_zone(str(path), origin)
    return zone


# The pure part.


@pytest.mark.parametrize("case", CASES)
def test_answer(case: str) -> None:
    """Status, flags and all three sections follow the RFCs for this zone."""
    name, rdtype = question(case)
    query = dns.message.make_query(name, rdtype)
    assert read_wire(dns_server.answer(ZONE, query.to_wire())) == expected(case, f"{name} IN {rdtype}")


def test_question_keeps_its_case() -> None:
    """Names match in any letter case, and the reply repeats the question bit by bit."""
    query = dns.message.make_query("wWw.eXaMPLe.cOm", "A")
    reply = dns_server.answer(ZONE, query.to_wire())
    assert reply[12:33] == query.to_wire()[12:33]
    assert read_wire(reply) == expected("www A", "wWw.eXaMPLe.cOm. IN A")


@pytest.mark.parametrize(
    ("asked", "status", "answer"),
    [
        ("host3.example. MX", "NOERROR", ["host3.example. 3600 MX 10 host1.example."]),
        ("host3.example. A", "NOERROR", []),
        ("foo.bar.example. TXT", "NOERROR", ['foo.bar.example. 3600 TXT "this is a wildcard"']),
        ("host1.example. MX", "NOERROR", []),
        ("sub.*.example. MX", "NOERROR", []),
        ("_telnet._tcp.host1.example. SRV", "NXDOMAIN", []),
        ("ghost.*.example. MX", "NXDOMAIN", []),
    ],
)
def test_wildcards_of_rfc_4592(tmp_path: Path, asked: str, status: str, answer: list[str]) -> None:
    """The zone and the questions of RFC 4592, 2.2.1, get the answers given there."""
    zone = load(
        tmp_path,
        """\
        $ORIGIN example.
        example. 3600 IN SOA ns.example.com. hostmaster.example.com. 1 2 3 4 5
        example. 3600 NS ns.example.com.
        example. 3600 NS ns.example.net.
        *.example. 3600 TXT "this is a wildcard"
        *.example. 3600 MX 10 host1.example.
        sub.*.example. 3600 TXT "this is not a wildcard"
        host1.example. 3600 A 192.0.2.1
        _ssh._tcp.host1.example. 3600 SRV 0 0 22 host1.example.
        _ssh._tcp.host2.example. 3600 SRV 0 0 22 host2.example.
        subdel.example. 3600 NS ns.example.com.
        subdel.example. 3600 NS ns.example.net.
        """.replace("        ", ""),
    )
    name, rdtype = asked.split()
    reply = ask(name, rdtype, zone=zone)
    assert (reply.status, reply.flags, reply.answer) == (status, "qr aa rd", records(*answer))
    referral = ask("host.subdel.example.", "A", zone=zone)
    assert (referral.flags, len(referral.authority)) == ("qr rd", 2)


def test_longest_name() -> None:
    """A wildcard matches a name of 255 bytes, the longest possible one."""
    name = "a." * 118 + "pages.example.com."
    assert len(name) + 1 == 255  # on the wire: a length before each label, and a zero at the end
    assert ask(name).answer == records(f"{name} 3600 A 192.0.2.80")


def test_negative_ttl_is_the_lower_of_two(tmp_path: Path) -> None:
    """A negative answer has a TTL of the SOA's TTL or its last field, whichever is lower (RFC 2308)."""
    zone = load(tmp_path, "@ 60 SOA ns.example.net. hostmaster 1 2 3 4 900\n@ 60 NS ns.example.net.\n", "example.com.")
    assert ask("nowhere", zone=zone).authority == records("@ 60 SOA ns.example.net. hostmaster 1 2 3 4 900")


def test_ds_comes_from_the_parent(tmp_path: Path) -> None:
    """The DS record of a delegated zone is the delegating zone's own data (RFC 4035, 3.1.4.1)."""
    ds = f"child 60 DS 12345 13 2 {'AB' * 32}"
    text = (
        f"@ 60 SOA ns.example.net. hostmaster 1 2 3 4 5\n@ 60 NS ns.example.net.\nchild 60 NS ns.example.net.\n{ds}\n"
    )
    zone = load(tmp_path, text, "example.com.")
    assert ask("child", "DS", zone=zone)[1:5] == ("qr aa rd", None, "child.example.com. IN DS", records(ds))
    assert ask("child", "A", zone=zone)[1:6] == (
        "qr rd",
        None,
        "child.example.com. IN A",
        records(),
        records("child 60 NS ns.example.net."),
    )


def test_zone_file_without_origin(tmp_path: Path) -> None:
    """Loading a zone file without $ORIGIN and without an origin fails with dnspython's own error."""
    with pytest.raises(dns.exception.DNSException, match="origin"):
        load(tmp_path, "@ 60 SOA ns.example.net. hostmaster 1 2 3 4 5\n@ 60 NS ns.example.net.\n")


# EDNS and size.


def test_edns() -> None:
    """A query with OPT gets a reply with OPT that offers 1232 bytes and repeats the DO bit; others get no OPT."""
    assert ask("web").edns is None
    assert ask("web", use_edns=0).edns == "version: 0, flags:; udp: 1232"
    assert ask("web", use_edns=0, want_dnssec=True).edns == "version: 0, flags: do; udp: 1232"
    assert ask("nowhere", use_edns=0, payload=4096).edns == "version: 0, flags:; udp: 1232"
    assert ask("example.net.", use_edns=0).edns == "version: 0, flags:; udp: 1232"


def test_unknown_edns_flags() -> None:
    """The reply repeats only DO of the query's EDNS flags; undefined flags are zero (RFC 6891, 6.1.4)."""
    query = dns.message.make_query("web.example.com", "A", want_dnssec=True, ednsflags=0x7FFF)
    assert dns.message.from_wire(dns_server.answer(ZONE, query.to_wire())).ednsflags == dns.flags.DO


def test_unknown_edns_version() -> None:
    """Any EDNS version but 0 gets BADVERS and nothing else (RFC 6891, 6.1.3)."""
    for version in (1, 2, 255):
        assert ask("web", use_edns=version) == Reply(
            "BADVERS",
            "qr rd",
            "version: 0, flags:; udp: 1232",
            "web.example.com. IN A",
            *[records()] * 3,
        )


def test_padding_option_is_not_answered_with_padding() -> None:
    """Padding is for encrypted transports (RFC 7830, 6): a padded query gets the same reply as any other."""
    plain = dns.message.make_query("web.example.com", "A", use_edns=0, id=1)
    padded = dns.message.make_query("web.example.com", "A", use_edns=0, id=1, pad=468)
    assert len(dns_server.answer(ZONE, padded.to_wire())) == len(dns_server.answer(ZONE, plain.to_wire()))


@pytest.mark.parametrize(
    ("name", "payload", "truncated"),
    [
        ("mail2026._domainkey", None, True),
        ("mail2026._domainkey", 0, True),
        ("mail2026._domainkey", 512, True),
        ("mail2026._domainkey", 834, True),
        ("mail2026._domainkey", 835, False),
        ("mail2026._domainkey", 1232, False),
        ("mail2026._domainkey", 65535, False),
        ("verification", None, True),
        ("verification", 1232, True),
        ("verification", 4096, True),
        ("verification", 65535, True),
        ("_dmarc", 0, False),
    ],
)
def test_truncation(name: str, payload: int | None, truncated: bool) -> None:
    """A reply longer than the client's size (512 bytes without EDNS, 1232 at most) omits whole records and sets TC."""
    reply = ask(name, "TXT", use_edns=None if payload is None else 0, payload=payload)
    assert (reply.flags, len(reply.answer)) == (("qr aa tc rd", 0) if truncated else ("qr aa rd", 1))


BIG_ZONE = f"""\
$TTL 60
@ SOA ns.example.net. hostmaster 1 2 3 4 5
@ NS ns.example.net.
{"".join(f"@ MX {i} mail{i}{chr(10)}mail{i} AAAA 2001:db8::{i}{chr(10)}" for i in range(1, 13))}
{"".join(f"child NS ns{i}.child{chr(10)}ns{i}.child AAAA 2001:db8::{i}{chr(10)}" for i in range(1, 13))}
"""


def test_additional_addresses_are_left_out_without_truncation(tmp_path: Path) -> None:
    """Addresses of mail hosts that do not fit are omitted without TC, because the answer is whole without them."""
    zone = load(tmp_path, BIG_ZONE, "example.com.")
    small, large = ask("@", "MX", zone=zone), ask("@", "MX", zone=zone, use_edns=0)
    assert (small.flags, len(small.answer), len(small.additional)) == ("qr aa rd", 12, 0)
    assert (large.flags, len(large.answer), len(large.additional)) == ("qr aa rd", 12, 12)


def test_additional_addresses_come_once(tmp_path: Path) -> None:
    """A host that two records name has its addresses in the reply once."""
    soa = "@ 60 SOA ns.example.net. hostmaster 1 2 3 4 5\n@ 60 NS ns.example.net.\n"
    zone = load(tmp_path, soa + "@ 60 MX 1 mail\n@ 60 MX 2 mail\nmail 60 A 192.0.2.25\n", "example.com.")
    assert ask("@", "MX", zone=zone).additional == records("mail 60 A 192.0.2.25")


def test_glue_is_not_left_out_without_truncation(tmp_path: Path) -> None:
    """A referral whose glue does not fit has TC set (RFC 9471)."""
    zone = load(tmp_path, BIG_ZONE, "example.com.")
    small, large = ask("host.child", "A", zone=zone), ask("host.child", "A", zone=zone, use_edns=0)
    assert (small.flags, len(small.authority), len(small.additional)) == ("qr tc rd", 0, 0)
    assert (large.flags, len(large.authority), len(large.additional)) == ("qr rd", 12, 12)


# Unusual and malformed queries.

EMPTY = Reply("FORMERR", "qr rd", None, "", records(), records(), records())
OFFER = "version: 0, flags:; udp: 1232"


@pytest.mark.parametrize("opcode", range(1, 16))
def test_other_opcodes(opcode: int) -> None:
    """Every opcode but QUERY gets NOTIMP, with the opcode repeated."""
    for use_edns, offer in ((None, None), (0, OFFER)):
        query = dns.message.make_query("example.com", "SOA", use_edns=use_edns)
        query.set_opcode(opcode)  # type: ignore[arg-type]
        reply = dns_server.answer(ZONE, query.to_wire())
        assert dns.message.from_wire(reply).opcode() == opcode
        assert read_wire(reply) == EMPTY._replace(status="NOTIMP", edns=offer)


def test_no_question_or_several() -> None:
    """Zero questions, or more than one, get FORMERR without any (RFC 9619)."""
    query = dns.message.make_query("web.example.com", "A", use_edns=0)
    query.question = []
    assert read_wire(dns_server.answer(ZONE, query.to_wire())) == EMPTY._replace(edns=OFFER)
    query = dns.message.make_query("web.example.com", "A")
    query.question *= 2
    assert read_wire(dns_server.answer(ZONE, query.to_wire())) == EMPTY


def test_superfluous_records() -> None:
    """Superfluous records in a query are ignored, but a query with more than three records is not even parsed."""
    query = dns.message.make_query("web.example.com", "A", use_edns=0)
    query.additional.append(dns.rrset.from_text("ns1.example.com.", 60, "IN", "A", "192.0.2.1"))
    assert read_wire(dns_server.answer(ZONE, query.to_wire())) == expected("web A", "web.example.com. IN A", edns=OFFER)
    query.answer.append(dns.rrset.from_text("ns1.example.com.", 60, "IN", "A", "192.0.2.1"))
    assert read_wire(dns_server.answer(ZONE, query.to_wire())) == EMPTY


def test_signed_query() -> None:
    """A query with a signature (TSIG) gets FORMERR, as from a server that does not know signatures."""
    query = dns.message.make_query("web.example.com", "A")
    query.use_tsig(dns.tsig.Key("key.", "c2VjcmV0"))
    assert read_wire(dns_server.answer(ZONE, query.to_wire())) == EMPTY


@pytest.mark.parametrize("rdclass", ["CH", "HS", "ANY", "NONE", "CLASS7"])
def test_other_classes(rdclass: str) -> None:
    """A class other than IN is refused."""
    for name in ("example.com.", "version.bind."):
        reply = ask(name, "TXT", rdclass=rdclass)
        assert (reply.status, reply.flags, reply.answer) == ("REFUSED", "qr rd", records())


@pytest.mark.parametrize("rdtype", ["AXFR", "IXFR"])
def test_zone_transfer(rdtype: str) -> None:
    """A zone transfer over UDP is refused."""
    reply = ask("@", rdtype)
    assert (reply.status, reply.flags, reply.answer) == ("REFUSED", "qr rd", records())


QUERY = dns.message.make_query("www.example.com", "A", use_edns=0, id=0x1234).to_wire()


def with_bytes(wire: bytes, position: int, replacement: bytes) -> bytes:
    return wire[:position] + replacement + wire[position + len(replacement) :]


UNANSWERED = {
    "empty": b"",
    "one byte": b"\x00",
    "shorter than a header": QUERY[:11],
    "response": with_bytes(QUERY, 2, b"\x81"),
    "response that cannot be parsed": with_bytes(QUERY[:20], 2, b"\x81"),
    "response with an opcode": with_bytes(QUERY, 2, b"\xa9"),
    "our own reply": dns_server.answer(ZONE, QUERY),
    "header of a response": b"\x12\x34\x80" + bytes(9),
    "all ones": b"\xff" * 100,
}
MALFORMED = {
    "question missing": QUERY[:12],
    "question cut": QUERY[:20],
    "type missing": QUERY[:29],
    "name that points at itself": with_bytes(QUERY, 12, b"\xc0\x0c"),
    "name that points ahead": with_bytes(QUERY, 12, b"\xc0\x20"),
    "label of a type that does not exist": with_bytes(QUERY, 12, b"\x80"),
    "name without end": QUERY[:12] + b"\x3fx" * 400,
    "many questions announced": with_bytes(QUERY, 4, b"\xff\xff"),
    "records announced": with_bytes(QUERY, 6, b"\x00\x01"),
    "option cut": QUERY[:-1],
    "trailing byte": QUERY + b"\x00",
    "two OPT records": with_bytes(QUERY, 10, b"\x00\x02") + QUERY[-11:],
    "text": b"GET / HTTP/1.1\r\nHost: www.example.com\r\n\r\n",
}
# The text happens to have opcode 10, so the answer to it is NOTIMP.
MALFORMED_REPLIES = {name: wire[:2] + b"\x81\x01" + bytes(8) for name, wire in MALFORMED.items()} | {
    "text": b"GE\xd0\x04" + bytes(8)
}


@pytest.mark.parametrize("name", UNANSWERED)
def test_unanswered(name: str) -> None:
    """A payload shorter than a header, and a response, get no reply."""
    assert dns_server.answer(ZONE, UNANSWERED[name]) is None


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name: str) -> None:
    """A payload that cannot be parsed beyond its header gets a header with FORMERR, the query's ID and its RD bit."""
    assert dns_server.answer(ZONE, MALFORMED[name]) == MALFORMED_REPLIES[name]


def check_reply(payload: bytes) -> None:
    """Check the reply to any payload: none if none is due, otherwise one that fits, parses, and does not amplify."""
    reply = dns_server.answer(ZONE, payload)
    if len(payload) < 12 or payload[2] & 0x80:
        assert reply is None
        return
    parsed = dns.message.from_wire(reply)
    assert (parsed.id, parsed.flags & dns.flags.QR) == (int.from_bytes(payload[:2], "big"), dns.flags.QR)
    assert parsed.opcode() == payload[2] >> 3
    assert len(reply) <= 1232
    if parsed.rcode() in (dns.rcode.FORMERR, dns.rcode.NOTIMP):
        assert len(reply) <= len(payload)


@settings(max_examples=400, deadline=None, database=None)
@given(st.binary(max_size=1300))
def test_random_bytes(payload: bytes) -> None:
    """Random bytes get a valid reply or none, and raise nothing."""
    check_reply(payload)


@settings(max_examples=400, deadline=None, database=None)
@given(
    st.binary(min_size=2, max_size=2),
    st.sampled_from([b"\x00\x00", b"\x01\x00", b"\x01\x20", b"\x28\x00", b"\x20\x00"]),
    st.lists(st.sampled_from([b"\x00\x00", b"\x00\x01", b"\x00\x02"]), min_size=4, max_size=4),
    st.lists(
        st.one_of(
            st.binary(max_size=20),
            st.sampled_from(
                [
                    b"\x03www\x07example\x03com\x00",
                    b"\xc0\x0c",
                    b"\x00",
                    b"\x00\x01\x00\x01",
                    b"\x00\x00\x29\x04\xd0\x00\x00\x00\x00\x00\x00",
                    b"\x00\x00\xfa\x00\xff\x00\x00\x00\x00\x00\x00",
                    b"\x00\x06\x00\x01",
                ]
            ),
        ),
        max_size=12,
    ),
)
def test_random_bodies(ident: bytes, flags: bytes, counts: list[bytes], body: list[bytes]) -> None:
    """Pieces of messages in random order behind a valid header get a valid reply or none, and raise nothing."""
    check_reply(ident + flags + b"".join(counts + body))


SEEDS = [
    dns.message.make_query(name, rdtype, use_edns=use_edns, want_dnssec=bool(use_edns), id=7).to_wire()
    for case in CASES
    for name, rdtype in [question(case)]
    for use_edns in (None, 0)
] + [dns.message.make_query("example.com", "MX", use_edns=0, pad=128, id=7).to_wire()]


@settings(max_examples=500, deadline=None, database=None)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 150), st.integers(0, 4), st.binary(max_size=4)), max_size=4),
)
def test_mutated_queries(query: bytes, mutations: list[tuple[int, int, bytes]]) -> None:
    """Queries with overwritten, inserted and removed bytes get a valid reply or none, and raise nothing."""
    for position, removed, inserted in mutations:
        query = query[:position] + inserted + query[position + removed :]
    check_reply(query)


@settings(max_examples=300, deadline=None, database=None)
@given(st.sampled_from(sorted(CASES)), st.none() | st.integers(0, 65535))
def test_size_limit(case: str, payload: int | None) -> None:
    """The reply to any question at any size fits, and is either whole or marked as truncated."""
    name, rdtype = question(case)
    query = dns.message.make_query(name, rdtype, use_edns=None if payload is None else 0, payload=payload)
    reply = dns_server.answer(ZONE, query.to_wire())
    assert len(reply) <= min(max(payload or 0, 512), 1232)
    read = read_wire(reply)
    assert ("tc" in read.flags) == (not read.answer and not read.authority and read.status != "REFUSED")


# The whole server, as a process of its own.


def start_dns(start: Start, zone_file: Path = ZONE_FILE, *arguments: str) -> Example:
    """Start the example on a free port."""
    return start("dns_server", "--port", "0", *arguments, str(zone_file), port=None)


@pytest.fixture
def dig() -> str:
    if sys.platform == "darwin":
        pytest.skip("the dig that comes with macOS is too old for these options")
    path = shutil.which("dig")
    if path is None:
        message = "dig is missing: install Debian's package bind9-dnsutils"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path


def exchange(sock: socket.socket, *payloads: bytes) -> list[bytes]:
    """Send payloads, then a valid query; return the replies up to the one to that query.

    The server answers one client's datagrams in order, so after the reply to the last one no other will follow.
    """
    last = b"\xee\xee"  # an ID that nothing else here has
    for payload in (*payloads, last + QUERY[2:]):
        sock.send(payload)
    replies = []
    while (reply := sock.recv(65535))[:2] != last:
        replies.append(reply)
    return replies


# Options of dig; the name in the reply; whether RD is set; the reply's EDNS.
VARIANTS: list[tuple[str, Callable[[str], str], bool, str | None]] = [
    ("+noedns", str, True, None),
    ("+noedns +norecurse", str.upper, False, None),
    ("+noedns +nocookie", str.title, True, None),
    ("+bufsize=512", str, True, OFFER),
    ("+bufsize=512 +dnssec +norecurse", str.swapcase, False, "version: 0, flags: do; udp: 1232"),
    ("+bufsize=512 +nsid +subnet=192.0.2.0/24 +padding=128", str.title, True, OFFER),
]


@without_signals
def test_dig(start: Start, dig: str, tmp_path: Path) -> None:
    """dig gets the right reply to every query, while another client sends all kinds of garbage."""
    example = start_dns(start)
    garbage = example.peer()
    lines, wanted = [], []
    for options, change_case, rd, edns in VARIANTS:
        for case in CASES:
            name, rdtype = question(case)
            asked = change_case(str(name))
            lines.append(f"@{example.host} -p {example.port} {options} -q {asked} -t {rdtype} -c IN\n")
            wanted.append(expected(case, f"{asked} IN {rdtype}", edns=edns, rd=rd))
    batch = tmp_path / "batch"
    batch.write_text("".join(lines))
    command = [dig, "-r", "+notcp", "+ignore", "+tries=1", "+time=2", "-f", str(batch)]
    with (tmp_path / "output").open("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                replies = exchange(garbage, *UNANSWERED.values(), *MALFORMED.values())
                assert replies == list(MALFORMED_REPLIES.values())
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        got = read_dig(output.read())
    assert len(got) == len(wanted)
    for line, reply, want in zip(lines, got, wanted, strict=True):
        assert reply == want, line
    assert process.returncode == 0


@without_signals
def test_dig_oddities(start: Start, dig: str) -> None:
    """dig gets the right replies for unusual sizes, versions, opcodes and classes, and without a question."""
    queries = {
        "+bufsize=512 mail2026._domainkey.example.com TXT": ("NOERROR", "qr aa tc rd", 0),
        "+bufsize=1232 mail2026._domainkey.example.com TXT": ("NOERROR", "qr aa rd", 1),
        "+bufsize=4096 mail2026._domainkey.example.com TXT": ("NOERROR", "qr aa rd", 1),
        "+noedns mail2026._domainkey.example.com TXT": ("NOERROR", "qr aa tc rd", 0),
        "+noedns verification.example.com TXT": ("NOERROR", "qr aa tc rd", 0),
        "+bufsize=1232 verification.example.com TXT": ("NOERROR", "qr aa tc rd", 0),
        "+bufsize=4096 verification.example.com TXT": ("NOERROR", "qr aa tc rd", 0),
        "+edns=1 +noednsnegotiation www.example.com A": ("BADVERS", "qr rd", 0),
        "+edns=255 +noednsnegotiation www.example.com A": ("BADVERS", "qr rd", 0),
        "+edns=1 +ednsnegotiation www.example.com A": ("NOERROR", "qr aa rd", 3),
        "+ednsopt=65001:c0ffee www.example.com A": ("NOERROR", "qr aa rd", 3),
        "+ednsflags=0x7fff www.example.com A": ("NOERROR", "qr aa rd", 3),
        "+aaflag +cdflag +noadflag www.example.com A": ("NOERROR", "qr aa rd", 3),
        "+header-only": ("FORMERR", "qr rd", 0),
        "+header-only +noedns": ("FORMERR", "qr rd", 0),
        "+opcode=notify example.com SOA": ("NOTIMP", "qr rd", 0),
        "+opcode=status +noedns example.com A": ("NOTIMP", "qr rd", 0),
        "+opcode=update example.com SOA": ("NOTIMP", "qr rd", 0),
        "+opcode=15 example.com A": ("NOTIMP", "qr rd", 0),
        "-c CH version.bind TXT": ("REFUSED", "qr rd", 0),
        "-c ANY example.com TXT": ("REFUSED", "qr rd", 0),
        "-x 192.0.2.1": ("REFUSED", "qr rd", 0),
    }
    example = start_dns(start)
    batch = "".join(f"@{example.host} -p {example.port} {query}\n" for query in queries)
    command = [dig, "-r", "+notcp", "+ignore", "+tries=1", "+time=2", "-f", "-"]
    done = subprocess.run(command, input=batch, text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    got = [(reply.status, reply.flags, len(reply.answer)) for reply in read_dig(done.stdout)]
    assert dict(zip(queries, got, strict=True)) == queries


@without_signals
def test_answers_in_order_and_ignores_the_rest(start: Start) -> None:
    """Queries among a client's many datagrams are answered in order; the other datagrams get no reply."""
    example = start_dns(start)
    peer = example.peer()
    assert exchange(peer, *UNANSWERED.values()) == []
    for name, payload in MALFORMED.items():
        assert exchange(peer, payload) == [MALFORMED_REPLIES[name]]
    too_long = QUERY + bytes(1233 - len(QUERY))  # one byte more than the server accepts
    assert exchange(peer, too_long, too_long[:-1]) == [b"\x12\x34\x81\x01" + bytes(8)]
    queries = [bytes([9, i]) + QUERY[2:] for i in range(100)]
    assert [reply[:2] for reply in exchange(peer, *queries)] == [query[:2] for query in queries]
    assert example.stop() == []


@without_signals
def test_stops_at_sigint(start: Start) -> None:
    """Ctrl-C ends the server as SIGTERM does: without a traceback, with status 0. By default it serves loopback."""
    example = start_dns(start)
    assert example.listening == f"listening on 127.0.0.1:{example.port}"
    assert example.stop(signal.SIGINT) == []


@without_signals
def test_origin_and_host_from_the_command_line(start: Start, tmp_path: Path) -> None:
    """``--origin`` names a zone whose file does not, and ``--host`` may be an IPv6 address."""
    path = tmp_path / "zone"
    path.write_text("@ 60 SOA ns hostmaster 1 2 3 4 5\n@ 60 NS ns\nns 60 A 192.0.2.7\n")
    example = start_dns(start, path, "--origin", "example.org", "--host", "::1")
    assert example.listening == f"listening on [::1]:{example.port}"
    reply = ask_server(example.peer(), dns.message.make_query("ns.example.org", "A").to_wire())
    assert read_wire(reply).answer == records("ns.example.org. 60 A 192.0.2.7")


def test_bad_zone_file(tmp_path: Path) -> None:
    """A zone file that cannot be loaded is a usage error with the reason, not a traceback."""
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "none")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "No such file" in done.stderr
    assert "Traceback" not in done.stderr
