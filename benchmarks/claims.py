"""The claims of the documentation about speed and memory, and the figure behind each.

Every claim in the documentation has to be in this list. ``tests/project/test_benchmarks.py`` checks that the words are
there. The last table of results.md compares the figures with the latest measurement.
"""

from __future__ import annotations

from typing import NamedTuple

from figures import Figure, Results, Spread, beyond, ratio, value
from tables import table

SHOWN = 72  # the most characters of a claim in the table


class Claim(NamedTuple):
    document: str
    words: str
    said: float | None  # None: the claim has no figure, so the reader compares
    unit: str
    row: str  # of the results, which has the figure
    measured: Figure


def table_of(results: Results) -> str:
    rows = []
    for claim in CLAIMS:
        spread = claim.measured(results)
        measured = spread and spread.middle
        shown = "not measured" if measured is None else f"{measured:,.3g} {claim.unit}".strip()
        if measured is not None and claim.said is not None and not 0.85 < measured / claim.said < 1.18:
            shown = f"**{shown}**"
        words = claim.words.strip("| ").replace("|", "·")
        words = words if len(words) < SHOWN else words[:SHOWN] + " …"
        said = "" if claim.said is None else f"{claim.said:g}"
        rows.append([f"`{claim.document}`", f"*{words}*", claim.row, said, shown])
    return table(["document", "claim", "row of the results", "claimed", "measured"], rows)


def _handshake_in_echoes(results: Results) -> Spread | None:
    turns = results.turns("dtls", "trio_udp")
    return Spread.of(figures["µs for each handshake"] / figures["µs for each echo"] for figures in turns)


# With rare full collections, as the command line and the workers set, and the documentation recommends.
RARE = "trio_udp gc.set_threshold"

README_ROW = (
    "| CPU time per echo, uvloop = 1: four datagrams in flight for each client; one "
    "| 0.75; 1.07 | 1.5; 1.5 | 1.8 or 5.1; 1.7 or 4.9 | 9.0; 9.4 | 4.1; 4.4 |"
)
OPERATING = "docs/operating.md"
DTLS = "docs/dtls.md"

CLAIMS = [
    *(
        Claim("README.md", README_ROW, said, "", f"{shape}, {server}", ratio(shape, server))
        for server, *both in (
            ("trio_udp", 0.75, 1.07),
            ("socketserver", 1.5, 1.5),
            ("asyncio keeping memory", 1.8, 1.7),
            ("asyncio", 5.1, 4.9),
            ("easynetwork", 9.0, 9.4),
            ("trio", 4.1, 4.4),
        )
        for shape, said in zip(("64x4", "256x1"), both, strict=True)
    ),
    Claim("docs/index.md", "**Fast, in pure Python.**", None, "of uvloop", "64x4, trio_udp", ratio("64x4", "trio_udp")),
    Claim(
        "docs/performance.md",
        "A single round trip costs more CPU time than with uvloop, but takes about as long",
        None,
        "of uvloop",
        "ping-pong, round trip p50, trio_udp",
        ratio("ping-pong", "trio_udp", key="round_trip_p50"),
    ),
    Claim(
        "docs/performance.md",
        "The receive loop could run the steps of woken handlers itself",
        None,
        "of uvloop",
        "256x1, trio_udp: the figure to improve on",
        ratio("256x1", "trio_udp"),
    ),
    Claim(
        "docs/design.md",
        "decoding an address costs more than looking it up",
        None,
        "times as much without",
        "without raw addresses, 64x4",
        ratio("64x4", "trio_udp", to="trio_udp", without="raw addresses"),
    ),
    Claim(
        "docs/design.md",
        "The server in C takes hardly more than the kernel",
        None,
        "µs beyond C",
        "256x1, trio_udp and C",
        beyond("256x1", "trio_udp", "C"),
    ),
    Claim(
        "docs/design.md",
        "With four in flight for each of 64, one wake-up serves four datagrams",
        None,
        "µs beyond C",
        "64x4, trio_udp and C",
        beyond("64x4", "trio_udp", "C"),
    ),
    Claim("docs/design.md", "takes 2.3 KB", 2.3, "KB", "crowd, idle client", value("crowd", RARE, "bytes", 1e-3)),
    Claim(OPERATING, "an idle client | 2.3 KB", 2.3, "KB", "crowd, idle client", value("crowd", RARE, "bytes", 1e-3)),
    Claim(
        OPERATING,
        "an idle client over DTLS | 70 KB",
        70,
        "KB",
        "dtls, idle client",
        value("dtls", "trio_udp", "KB for each idle client"),
    ),
    Claim(OPERATING, "6.5 µs for an echo with uvloop", 6.5, "µs", "256x1, uvloop", value("256x1", "uvloop")),
    Claim(OPERATING, "7.5 µs; 5 µs if four arrive at once", 7.5, "µs", "256x1, trio_udp", value("256x1", "trio_udp")),
    Claim(OPERATING, "7.5 µs; 5 µs if four arrive at once", 5, "µs", "64x4, trio_udp", value("64x4", "trio_udp")),
    Claim(
        OPERATING,
        "with a `datagram_handler` | 5.5 µs",
        5.5,
        "µs",
        "256x1, trio_udp datagram_handler",
        value("256x1", "trio_udp datagram_handler"),
    ),
    Claim(
        OPERATING,
        "about 20 µs; 1 ms over DTLS",
        20,
        "µs",
        "crowd, new client",
        value("crowd", RARE, "new_micros"),
    ),
    Claim(
        OPERATING,
        "about 20 µs; 1 ms over DTLS",
        1_000,
        "µs",
        "dtls, handshake",
        value("dtls", "trio_udp", "µs for each handshake"),
    ),
    Claim(
        OPERATING,
        "330,000 datagrams a second, which is the work of two and a half cores",
        2.5,
        "cores",
        "256x1, trio_udp",
        value("256x1", "trio_udp", factor=0.33),
    ),
    Claim(
        OPERATING,
        "625,000 new clients take 12 seconds of its core",
        12,
        "s",
        "crowd, new client",
        value("crowd", RARE, "new_micros", 0.625),
    ),
    Claim(
        OPERATING,
        "takes 0.3 s with 100,000 clients",
        0.3,
        "s",
        "crowd, longest collection, default thresholds",
        value("crowd", "trio_udp", "new_collection"),
    ),
    Claim(
        OPERATING,
        "two workers carry one and a half times to twice as much as one",
        1.7,
        "times the rate",
        "workers-work, 2 workers",
        ratio("workers-work", "2 workers", "1 worker", "rate"),
    ),
    Claim(
        OPERATING,
        "Under light load a datagram costs more CPU time in several workers",
        None,
        "times the CPU time",
        "workers-light, 2 workers",
        ratio("workers-light", "2 workers", "1 worker"),
    ),
    Claim(
        OPERATING,
        "with four workers takes less than 1 % of a core",
        0.8,
        "%",
        "workers-idle",
        value("workers-idle", "4 workers", "share_of_a_core", 100),
    ),
    Claim(
        DTLS,
        "75 KB for each client",
        75,
        "KB",
        "dtls, idle client",
        value("dtls", "trio_udp", "KB for each idle client"),
    ),
    Claim(
        DTLS,
        "cost about 15 µs each",
        15,
        "µs",
        "dtls, forged ClientHello",
        value("dtls", "trio_udp", "µs for each forged ClientHello"),
    ),
    Claim(
        DTLS,
        "costs about 1 ms of CPU time",
        1_000,
        "µs",
        "dtls, handshake",
        value("dtls", "trio_udp", "µs for each handshake"),
    ),
    Claim(
        "docs/SECURITY.md",
        "a handshake costs as much CPU time as 40 echoes",
        40,
        "times",
        "dtls, handshake and echo",
        _handshake_in_echoes,
    ),
    Claim(
        "docs/SECURITY.md",
        "a client takes up to 75 KB",
        75,
        "KB",
        "dtls, idle client",
        value("dtls", "trio_udp", "KB for each idle client"),
    ),
    Claim(
        "docs/proxy-protocol.md",
        "0.7 µs for each datagram",
        0.7,
        "µs",
        "proxied beyond 256x1, trio_udp",
        beyond("proxied", "trio_udp", "trio_udp", "256x1"),
    ),
    Claim(
        "docs/unix.md",
        "Reading credentials costs 1.3 µs",
        1.3,
        "µs",
        "unix, trio_udp with credentials",
        beyond("unix", "trio_udp with credentials", "trio_udp"),
    ),
    Claim(
        "docs/unix.md",
        "uvloop takes less CPU time than trio_udp",
        None,
        "of uvloop",
        "unix, trio_udp",
        ratio("unix", "trio_udp"),
    ),
    Claim(
        "docs/howto/broadcasting.md",
        "sends up to 64 datagrams with one system call",
        None,
        "of a loop of send in a handler",
        "fan-out, trio_udp send_to_all",
        ratio("fan-out", "trio_udp send_to_all", "trio_udp"),
    ),
]
