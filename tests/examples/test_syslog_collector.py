"""The syslog collector: messages of logger and loggen, bursts, a stop in the middle, and a slow database."""

from __future__ import annotations

import re
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from itertools import count
from pathlib import Path
from signal import SIGCONT, SIGSTOP, SIGTERM

import pytest
from hypothesis import given, strategies as st

from ..project.conftest import TIMEOUT, Example, Start, without_signals
from .conftest import load, program

syslog_collector = load("syslog_collector")

pytestmark = without_signals

Query = Callable[[str], list[tuple[object, ...]]]


@pytest.fixture
def query(tmp_path: Path) -> Query:
    """Run a query on the collector's database."""

    def query(sql: str) -> list[tuple[object, ...]]:
        with closing(sqlite3.connect(tmp_path / "syslog.db", timeout=TIMEOUT)) as database:
            return database.execute(sql).fetchall()

    return query


def figures(lines: list[str]) -> dict[str, int]:
    """Read the figures that the collector prints at its end."""
    return {name: int(number) for name, number in (line.split(": ") for line in lines)}


def logger(example: Example, *arguments: str) -> None:
    command = [program("logger", "bsdutils"), "-d", "-n", "127.0.0.1", "-P", str(example.port), *arguments]
    subprocess.run(command, check=True, timeout=TIMEOUT)


def test_fields_of_both_formats(start: Start, query: Query) -> None:
    """Messages of logger, in the new format and in the old one, are stored with all their fields."""
    example = start("syslog_collector", "--host", "127.0.0.1")
    common = ["-p", "local3.warning", "-t", "tag", "--id=77"]
    logger(
        example, *common, "--rfc5424=notime", "--msgid", "M1", "--sd-id", "x@1", "--sd-param", r'a="b\]c"', "new one"
    )
    logger(example, *common, "--rfc3164", "old: one")
    assert figures(example.stop()) == {"stored": 2, "too long": 0, "dropped by the kernel": 0}
    columns = "source, facility, severity, app, process, type, data, message"
    assert query(f"select {columns} from messages order by id") == [
        ("127.0.0.1", 19, 4, "tag", "77", "M1", r'[x@1 a="b\]c"]', "new one"),
        ("127.0.0.1", 19, 4, "tag", "77", None, None, "old: one"),
    ]
    assert query("select count(*) from messages where arrived between strftime('%s') - 60 and strftime('%s') + 1") == [
        (2,)
    ]
    [[new_time], [old_time]] = query("select time from messages order by id")
    assert new_time is None
    assert re.fullmatch(r"[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d", str(old_time))


def test_100_000_messages_and_a_stop_in_the_middle(start: Start, query: Query, tmp_path: Path) -> None:
    """Of bursts by logger and loggen, all messages that arrived before the stop are stored, each once."""
    example = start("syslog_collector", "--host", "127.0.0.1")
    lines = tmp_path / "lines"
    lines.write_text("".join(f"line {number}\n" for number in range(20_000)))
    logger(example, "-t", "burst", "-f", str(lines))
    loggen = [program("loggen", "syslog-ng-core"), "--dgram", "--inet", "--quiet", "-r", "30000", "-n", "80000"]
    with subprocess.Popen([*loggen, "127.0.0.1", str(example.port)], stderr=subprocess.DEVNULL) as sending:
        while query("select count(*) from messages where app != 'burst'") < [(5_000,)]:
            assert sending.poll() is None
        stopped = figures(example.stop())
        sending.kill()
    rows = [str(message) for (message,) in query("select message from messages order by id")]
    assert stopped["stored"] == len(rows)
    burst = [int(row.removeprefix("line ")) for row in rows if row.startswith("line ")]
    generated = [int(row[5:15]) for row in rows if row.startswith("seq: ")]
    assert len(burst) + len(generated) == len(rows)
    for numbers in (burst, generated):
        assert numbers == sorted(set(numbers))
    missing = 20_000 - len(burst) + generated[-1] + 1 - len(generated)
    assert missing <= stopped["dropped by the kernel"]  # if that is 0, as where root runs this: none
    assert 5_000 <= len(generated) < 80_000


def test_everything_that_has_reached_the_machine(start: Start, query: Query) -> None:
    """Messages that have arrived when the stop begins are stored, even if the collector has not read them."""
    example = start("syslog_collector", "--host", "127.0.0.1")
    peer = example.peer()
    example.signal(SIGSTOP)
    for number in range(300):
        peer.send(b"<14>Nov 26 12:00:00 host app: %d" % number)
    example.signal(SIGTERM)
    example.signal(SIGCONT)
    assert figures(example.wait()) == {"stored": 300, "too long": 0, "dropped by the kernel": 0}
    assert query("select message from messages order by id") == [(str(number),) for number in range(300)]


def test_slow_database(start: Start, query: Query, tmp_path: Path) -> None:
    """While the database is locked, messages wait, within bounds; each is later stored, or counted as dropped."""
    example = start("syslog_collector", "--host", "127.0.0.1")
    peer = example.peer()
    sent = count()
    message = b"<14>Nov 26 12:00:00 host app: %d" + b" long" * 400
    with closing(sqlite3.connect(tmp_path / "syslog.db", isolation_level=None)) as database:
        database.execute("begin immediate")
        for _ in range(60_000):
            peer.send(message % next(sent))
        example.signal(SIGTERM)
        peer.close()
        database.execute("rollback")
    stopped = figures(example.wait())
    assert stopped["stored"] + stopped["dropped by the kernel"] == 60_000
    assert stopped["stored"] < 60_000
    rows = [int(str(text).split()[0]) for (text,) in query("select message from messages order by id")]
    assert len(rows) == stopped["stored"]
    assert rows == sorted(set(rows))


NOTHING = (None,) * 6
STRUCTURED = '[ex@1 iut="3"][ex@2 class="high"]'


@pytest.mark.parametrize(
    ("payload", "row"),
    [
        # The examples of RFC 5424, 6.5, and of RFC 3164, 5.4.
        (
            b"<34>1 2003-10-11T22:14:15.003Z mymachine.example.com su - ID47 - \xef\xbb\xbf'su root' failed",
            (4, 2, "2003-10-11T22:14:15.003Z", "mymachine.example.com", "su", None, "ID47", None, "'su root' failed"),
        ),
        (
            b'<165>1 2003-10-11T22:14:15.003Z mymachine.example.com app - ID47 [ex@1 iut="3"][ex@2 class="high"]',
            (20, 5, "2003-10-11T22:14:15.003Z", "mymachine.example.com", "app", None, "ID47", STRUCTURED, ""),
        ),
        (
            b"<34>Oct 11 22:14:15 mymachine su: 'su root' failed for lonvick",
            (4, 2, "Oct 11 22:14:15", "mymachine", "su", None, None, None, "'su root' failed for lonvick"),
        ),
        (b"Use the BFG!", (1, 5, *NOTHING, "Use the BFG!")),
        (
            b"<13>Feb  5 17:32:18 10.0.0.99 Use the BFG!",
            (1, 5, "Feb  5 17:32:18", "10.0.0.99", *NOTHING[2:], "Use the BFG!"),
        ),
        (b"<13>Feb  5 17:32:18 app[7]: hello\n", (1, 5, "Feb  5 17:32:18", None, "app", "7", None, None, "hello")),
        (b"<192>hello", (1, 5, *NOTHING, "<192>hello")),
        (b"<0>\xff", (0, 0, *NOTHING, "\ufffd")),
        (b"", (1, 5, *NOTHING, "")),
    ],
)
def test_parsing(payload: bytes, row: tuple[object, ...]) -> None:
    """Messages of both formats, and other payloads, have the fields that the RFCs give them."""
    assert syslog_collector.parse(payload) == row


@given(st.binary(max_size=100), st.sampled_from([b"", b"<14>", b"<14>1 - - - - - ", b"<14>Feb  5 17:32:18 "]))
def test_garbage(payload: bytes, start: bytes) -> None:
    """Any bytes become a row that the database accepts."""
    row = syslog_collector.parse(start + payload)
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute(syslog_collector.SCHEMA)
        syslog_collector.store(database, [(0.0, "192.0.2.1", *row)])
        assert database.execute("select facility, severity, message from messages").fetchall() == [(*row[:2], row[-1])]
