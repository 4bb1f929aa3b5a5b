"""The picture of the live view: its contents at every size."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from rich.text import Text

from trio_udp import ServerStatistics, WorkerStatus
from trio_udp.operate._moments import Moment, rate, summary
from trio_udp.operate._slot import NOTHING
from trio_udp.operate._view import ASCII_BLOCKS, picture, short, sparkline, volume_of


def worker(number: int, **values: Any) -> WorkerStatus:
    defaults: dict[str, Any] = {"state": "serving", "restarts": 0, "killed": 0, "statistics": NOTHING}
    return WorkerStatus(number=number, pid=40_000 + number, **(defaults | values))


def seen(*totals: ServerStatistics, **values: Any) -> list[Moment]:
    """Return one moment for each of these totals, one second apart."""
    defaults: dict[str, Any] = {"addresses": ("192.0.2.1:53",), "ready": True, "workers": (worker(1),)}
    return [Moment(time=float(t), total=total, **(defaults | values)) for t, total in enumerate(totals)]


def counts(**values: Any) -> ServerStatistics:
    return attrs.evolve(NOTHING, **values)


def lines(moments: list[Moment], width: int = 80, height: int = 24, log: tuple[str, ...] = ()) -> list[str]:
    return picture(moments, log, width, height).plain.split("\n")


def style_of(text: Text, line: str) -> str:
    """The style of the first line that begins with this text."""
    for found in text.split("\n"):
        if found.plain.startswith(line):
            return " ".join(str(span.style) for span in found.spans if found.plain[span.start : span.end].strip())
    raise AssertionError(f"no line begins with {line}")


def test_a_screen_of_80_by_24() -> None:
    """A screen of 80 x 24 shows rates, clients, every loss, errors, workers, busiest clients and the log."""
    before = counts(received=1_000, sent=900, bytes_received=100_000, errors={"EPERM": 1})
    after = counts(
        received=3_000,
        bytes_received=1_600_000,
        sent=2_900,
        bytes_sent=1_500_000,
        clients=12,
        clients_started=34_567,
        clients_expired=5,
        clients_evicted=6,
        waiting=7,
        handler_errors=8,
        handlers_cancelled=9,
        requests_timed_out=10,
        refused_full=11,
        kernel_dropped=1_234_567,
        errors={"EPERM": 3, "ENOBUFS": 40},
    )
    workers = (worker(1, restarts=3), worker(2, state="draining"))
    busiest = ((("192.0.2.7", 1_000), 321.0), (("2001:db8::1", 2_000, 0, 0), 0.5))
    shown = lines(seen(before, after, workers=workers, busiest=busiest), log=("an older line", "a log line"))
    assert "\n".join(line.rstrip() for line in shown) == SCREEN


SCREEN = """\
trio-udp 192.0.2.1:53                                                     ready
in    2,000/s                                                            █ 2,000
     1.5 MB/s                                                            █
out   2,000/s                                                            █ 2,000
     1.5 MB/s                                                            █
clients   now 12 started 34,567 expired 5 evicted 6 waiting 7
handlers  errors 8 cancelled 9 timed out 10
lost                   /s          total   #     pid worker   restarts   in/s
dropped_inbox_full      0              0   1   40001 serving         3      0
dropped_at_end          0              0   2   40002 draining        0      0
truncated               0              0  busiest clients                   in/s
refused_malformed       0              0  192.0.2.7:1000                     321
refused_source          0              0  [2001:db8::1]:2000                 0.5
refused_by_rate         0              0
refused_by_accept       0              0
refused_full           11             11
refused_stopping        0              0
sends_withheld          0              0
send_errors             0              0
kernel_dropped       1.2M      1,234,567
ENOBUFS                40             40
EPERM                   2              3

a log line"""


@pytest.mark.parametrize("height", [1, 2, 5, 10, 20, 24, 60])
@pytest.mark.parametrize("width", [1, 5, 20, 60, 80, 200])
def test_every_size(width: int, height: int) -> None:
    """The picture fits every screen; if there is room, it shows each reason of loss."""
    total = counts(received=10**12, kernel_dropped=10**11, clients=10**7, errors={f"E{n}": n for n in range(30)})
    busiest = tuple((("2001:db8:1111:2222:3333:4444:5555:6666", 65_535, 0, 0), 1e6) for _ in range(50))
    moments = seen(NOTHING, total, workers=tuple(worker(number) for number in range(64)), busiest=busiest)
    shown = lines(moments, width, height, ("x" * 500, "\N{GRINNING FACE}" * 100, "tab\there"))
    assert len(shown) == height
    assert max(Text(line).cell_len for line in shown) <= width
    if width >= 60 and height >= 20:
        for name in total.lost:
            assert sum(name in line for line in shown) == 1


def test_losses_are_red_while_they_grow() -> None:
    """A count of lost datagrams is red while it has grown in the last seconds, and plain afterwards."""
    grows = picture(seen(NOTHING, counts(refused_full=1, errors={"EPERM": 1})), (), 80, 24)
    assert [style_of(grows, name) for name in ("refused_full", "EPERM", "truncated")] == ["red", "red", "dim"]
    stands = picture(seen(NOTHING, *[counts(refused_full=1, errors={"EPERM": 1})] * 9), (), 80, 24)
    assert [style_of(stands, name) for name in ("refused_full", "EPERM", "truncated")] == ["", "", "dim"]


def test_more_errors_than_room() -> None:
    """Errors for which there is no room are added up in the last line."""
    errors = {"EPERM": 5, "ENOBUFS": 50, "EIO": 1, "EINVAL": 2, "EACCES": 3, "ENETDOWN": 4}
    shown = [line.split()[:5] for line in lines(seen(NOTHING, counts(errors=errors)))]
    names = [line[0] for line in shown if line and line[0].isupper()]
    assert names == ["ENOBUFS", "EPERM", "ENETDOWN"][: len(names)]
    hidden = len(errors) - len(names)
    rest = sum(sorted(errors.values())[:hidden])
    assert [str(hidden), "other", "errors"] in [line[:3] for line in shown]
    assert any(line[:3] == [str(hidden), "other", "errors"] and line[4] == str(rest) for line in shown if len(line) > 4)


def test_more_workers_than_room() -> None:
    """If there are many workers, those that do not serve or restarted most are shown, and the number of the others."""
    workers = tuple(
        worker(n, state="dead" if n == 30 else "serving", restarts=n if n in (20, 25) else 0) for n in range(1, 33)
    )
    shown = "\n".join(lines(seen(NOTHING, NOTHING, workers=workers)))
    for pid in ("40020", "40025", "40030"):
        assert pid in shown
    listed = sum(f"400{n:02}" in shown for n in range(1, 33))
    assert f"and {32 - listed} more, {32 - listed} serving" in shown


def test_a_long_address_keeps_its_port() -> None:
    """An address that is too long is shortened in the middle, and keeps its port."""
    busiest = ((("2001:db8:1111:2222:3333:4444:5555:6666", 65_535, 0, 0), 1.5),)
    assert any("…" in line and ":65535" in line for line in lines(seen(NOTHING, busiest=busiest), 60, 20))


def test_nothing_in_the_log_is_obeyed_by_the_terminal() -> None:
    """Control characters in the log do not reach the terminal."""
    shown = lines(seen(NOTHING), log=("\x1b[2Jbell\x07 caf\u00e9",))
    assert shown[-1].rstrip() == "\u00b7[2Jbell\u00b7 caf\u00e9"


def test_sparkline() -> None:
    """Heights are proportional, in one row or two; any value above 0 is visible, also in ASCII."""
    assert sparkline([0, 1, 50, 100], 100, 1) == [" ▁▄█"]
    assert sparkline([0, 1, 50, 75, 100], 100, 2) == ["   ▄█", " ▁███"]
    assert sparkline([0, 0], 0, 1) == ["  "]
    assert sparkline([0, 1, 100], 100, 1, ASCII_BLOCKS) == [" .@"]


def test_a_minute_of_traffic() -> None:
    """The sparkline has a column for each second of the last minute, or for half as many on a narrow screen."""
    totals = [counts(received=100 * n) for n in range(61)]
    assert lines(seen(*totals))[1].count("█") == 60
    assert lines(seen(*totals), 60, 20)[1].count("█") == 30
    assert lines(seen(*totals[:11]))[1].count("█") == 10


def test_rates_are_of_the_last_seconds() -> None:
    """A rate is the growth over the last 3 seconds or more, and is never negative."""

    def received(moment: Moment) -> int:
        return moment.total.received

    moments = seen(*[counts(received=count) for count in (0, 0, 30, 60, 90)])
    assert rate(moments, received) == 30
    assert rate(moments[:1], received) == 0
    assert rate([moments[0], attrs.evolve(moments[-1], time=10.0)], received) == 9
    assert rate([moments[-1], moments[0]], received) == 0


def test_short_numbers() -> None:
    """Numbers are shortened to fit their columns."""
    written = [short(n, 5) for n in (0, 0.04, 0.3, 7, 9.94, 12.4, 999, 12_345, 99_999, 100_000, 1_234_567, 999_999_999)]
    assert written == ["0", "0.1", "0.3", "7", "9.9", "12", "999", "12k", "100k", "100k", "1.2M", "1.0G"]
    assert [short(n, 4) for n in (1_000, 12_345, 1_000_000, 10**13)] == ["1.0k", "12k", "1.0M", "10T"]
    assert short(1_234_567, 11) == "1,234,567"
    assert [volume_of(n) for n in (0, 999, 1_000, 123_456, 2_500_000, 10**13)] == [
        "0 B/s",
        "999 B/s",
        "1.0 kB/s",
        "123 kB/s",
        "2.5 MB/s",
        "10000 GB/s",
    ]


def test_summary_for_a_log() -> None:
    """Without a terminal, one line has the changes since the last line, without zeros."""
    before, after = counts(received=100), counts(received=400, bytes_received=3_000, clients=2, refused_full=30)
    moments = seen(before, attrs.evolve(after, errors={"EPERM": 2}))
    moments[1] = attrs.evolve(moments[1], time=10.0, workers=(worker(1), worker(2, state="dead", restarts=4)))
    assert summary(moments) == (
        "in 30/s, 300 B/s, out 0/s, 0 B/s, clients 2, refused_full 30 (3.0/s), EPERM 2, "
        "workers 1 of 2 serving, restarts 4"
    )
