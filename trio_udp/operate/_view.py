"""The picture of the live view: a pure function of the moments of the last minute and of the size of the screen.

At 80 x 24, from top to bottom: addresses; rates with sparklines of one minute; clients; on the left losses and errors,
on the right workers and the busiest clients; the log. A smaller screen gets shorter rows and shorter lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, zip_longest

from rich.text import Text

from ._moments import Moment, printable, rate, show_address

MINUTE = 60

BLOCKS = " ▁▂▃▄▅▆▇█"
ASCII_BLOCKS = " .:-=+*#@"

LOG_LINES = 8  # at most, on a tall screen


def picture(moments: Sequence[Moment], log: Sequence[str], width: int, height: int, *, blocks: str = BLOCKS) -> Text:
    """Return the whole screen, line by line, no line longer than ``width``.

    Args:
      moments: The moments of the last minute, one for each second; at least one.
      log: The last lines of output.
    """
    tall = height >= 24
    lines = [
        _title(moments[-1], width),
        *_traffic("in", "received", moments, width, 2 if tall else 1, blocks),
        *_traffic("out", "sent", moments, width, 2 if tall else 1, blocks),
        *_clients(moments, width),
    ]
    log_lines = min(LOG_LINES, max(1, height - 23))
    room = max(height - len(lines) - log_lines, 0)
    left_width = min((width - 2) * 52 // 100, 46)
    right_width = width - 2 - left_width
    left = _lost(moments, left_width, room)
    workers = _workers(moments, right_width, max(2, room - 5))
    right = [*workers, *_busiest(moments[-1], right_width, room - len(workers))]
    for one, other in zip_longest(left[:room], right[:room], fillvalue=Text()):
        lines.append(_fit(one, left_width) + Text("  ") + _fit(other, right_width))
    lines += [Text()] * (height - log_lines - len(lines))
    lines += [Text(printable(line), style="dim") for line in log[-log_lines:]]
    lines += [Text()] * (height - len(lines))
    return Text("\n").join(_cut(line, width) for line in lines[:height])


def _title(moment: Moment, width: int) -> Text:
    state = Text(
        " ready " if moment.ready else " stopping ", style="bold black on green" if moment.ready else "reverse"
    )
    where = Text("trio-udp ", style="bold") + Text(", ".join(moment.addresses))
    return _fit(where, max(width - len(state), 0)) + state


def _traffic(label: str, field: str, moments: Sequence[Moment], width: int, rows: int, blocks: str) -> list[Text]:
    """Datagrams and bytes a second, and a sparkline of the last minute's datagrams, ``rows`` high."""

    def datagrams(moment: Moment) -> int:
        return int(getattr(moment.total, field))

    def octets(moment: Moment) -> int:
        return int(getattr(moment.total, f"bytes_{field}"))

    now = f"{label:<4}{short(rate(moments, datagrams), 7):>7}/s"
    volume = f"{volume_of(rate(moments, octets)):>13}"
    steps = [
        max(datagrams(after) - datagrams(before), 0) / (after.time - before.time)
        for before, after in pairwise(moments)
        if after.time > before.time
    ]
    steps = ([0.0] * MINUTE + steps)[-MINUTE:]
    columns = max(width - 14 - 6, 0)
    if columns < MINUTE:
        steps = [(one + other) / 2 for one, other in zip(steps[::2], steps[1::2], strict=True)]
    most = max(steps)
    spark = sparkline(steps, most, rows, blocks)
    peak = f"{short(most, 5):>5}"
    if rows == 1:
        return [Text.assemble((now, "bold"), volume[3:], " ", (spark[0], "cyan"))]
    return [
        Text.assemble((now, "bold"), " ", (spark[0], "cyan"), " ", (peak, "dim")),
        Text.assemble(volume, " ", (spark[1], "cyan")),
    ]


def sparkline(values: Sequence[float], most: float, rows: int, blocks: str = BLOCKS) -> list[str]:
    """Draw values as columns, from the top row to the bottom row. Every value except 0 is visible."""
    steps = len(blocks) - 1
    heights = [max(round(value / most * rows * steps), 1) if value else 0 for value in values]
    return [
        "".join(blocks[min(max(height - row * steps, 0), steps)] for height in heights) for row in reversed(range(rows))
    ]


def _clients(moments: Sequence[Moment], width: int) -> list[Text]:
    total = moments[-1].total
    clients = {
        "now": total.clients,
        "started": total.clients_started,
        "expired": total.clients_expired,
        "evicted": total.clients_evicted,
        "waiting": total.waiting,
    }
    line = Text("clients  ", style="bold")
    for name, count in clients.items():
        line += _labelled(name, count, width)
    handlers = {"errors": "handler_errors", "cancelled": "handlers_cancelled", "timed out": "requests_timed_out"}
    troubles = Text("handlers ", style="bold")
    for name, field in handlers.items():
        growth = rate(moments, lambda moment, field=field: getattr(moment.total, field))  # type: ignore[misc]
        troubles += _labelled(name, getattr(total, field), width, "red" if growth else "not bold")
    return [line, troubles]


def _labelled(name: str, count: int, width: int, style: str = "not bold") -> Text:
    return Text.assemble((f" {name} ", "dim"), (short(count, 7 if width >= 76 else 5), style))


def _lost(moments: Sequence[Moment], width: int, room: int) -> list[Text]:
    """Every reason for loss, then socket errors by name; red while they grow."""
    total = moments[-1].total
    name_width, rate_width = 18, 6 if width >= 34 else 4
    count_width = max(width - name_width - rate_width - 2, 3)

    def row(name: str, count: int, growth: float) -> Text:
        style = "red" if growth else "" if count else "dim"
        figures = f" {short(growth, rate_width):>{rate_width}} {short(count, count_width):>{count_width}}"
        return Text(f"{name:<{name_width}.{name_width}}{figures}", style=style)

    header = f"{'lost':<{name_width}} {'/s':>{rate_width}} {'total':>{count_width}}"
    rows = [Text(header, style="bold")]
    for name, count in total.lost.items():
        rows.append(row(name, count, rate(moments, lambda moment, name=name: getattr(moment.total, name))))  # type: ignore[misc]
    errors = sorted(total.errors.items(), key=lambda item: -item[1])
    space = max(room - len(rows), 1)
    shown = errors if len(errors) <= space else errors[: space - 1]
    for name, count in shown:
        rows.append(row(name, count, rate(moments, lambda moment, name=name: moment.total.errors.get(name, 0))))  # type: ignore[misc]
    if hidden := [name for name, _ in errors[len(shown) :]]:

        def others(moment: Moment) -> int:
            return sum(moment.total.errors.get(name, 0) for name in hidden)

        rows.append(row(f"{len(hidden)} {'other ' if shown else ''}errors", others(moments[-1]), rate(moments, others)))
    return rows


def _workers(moments: Sequence[Moment], width: int, room: int) -> list[Text]:
    """One line for each worker. If there is no room for all, prefer those that do not serve or restarted most often."""
    workers = list(moments[-1].workers)
    shown = workers
    if len(workers) > room - 1:
        by_interest = sorted(workers, key=lambda worker: (worker.state == "serving", -worker.restarts))
        shown = sorted(by_interest[: max(room - 2, 0)], key=lambda worker: worker.number)
    wide = width >= 37
    rate_header = f" {'in/s':>6}" if wide else ""
    rows = [Text(f"{'#':>2} {'pid':>7} {'worker':<8} restarts{rate_header}", style="bold")]
    for worker in shown:
        growth = rate(moments, _received_by(worker.number))
        figures = f" {short(growth, 6):>6}" if wide else ""
        text = f"{worker.number:>2} {worker.pid:>7} {worker.state:<8} {short(worker.restarts, 8):>8}{figures}"
        rows.append(Text(text, style="" if worker.state == "serving" else "yellow"))
    if hidden := len(workers) - len(shown):
        serving = sum(worker.state == "serving" for worker in workers if worker not in shown)
        rows.append(Text(f"   and {hidden} more, {serving} serving", style="dim"))
    return rows


def _received_by(number: int) -> Callable[[Moment], int]:
    return lambda moment: sum(w.statistics.received for w in moment.workers if w.number == number)


def _busiest(moment: Moment, width: int, room: int) -> list[Text]:
    address_width = max(width - 7, 3)
    rows = [Text(f"{'busiest clients':<{address_width}.{address_width}} {'in/s':>6}", style="bold")]
    for peer, growth in moment.busiest[: max(room - 1, 0)]:
        address = show_address(peer)
        if len(address) > address_width:
            address = address[: address_width - 7] + "…" + address[-6:]  # keep the port visible
        rows.append(Text(f"{address:<{address_width}} {short(growth, 6):>6}"))
    return rows


def short(number: float, width: int) -> str:
    """Format a number in at most ``width`` characters (at least 3): 12,345 or 12k, and 0.3 if it is small."""
    if 0 < number < 9.95 and number != int(number):
        return f"{max(number, 0.1):.1f}"
    text = f"{number:,.0f}"
    if len(text) <= width:
        return text
    for unit in "kMGTP":
        number /= 1_000
        if number < 9.95 and width >= 4:
            return f"{number:.1f}{unit}"
        if number < 999.5 and len(f"{number:.0f}{unit}") <= width:
            return f"{number:.0f}{unit}"
    return "lots"[:width]


def volume_of(octets: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if octets < 999.5 or unit == "GB":
            break
        octets /= 1_000
    return f"{octets:.{0 if unit == 'B' or octets >= 99.5 else 1}f} {unit}/s"


def _fit(line: Text, width: int) -> Text:
    line = _cut(line, width)
    line.pad_right(max(width - line.cell_len, 0))
    return line


def _cut(line: Text, width: int) -> Text:
    line = line.copy()
    line.truncate(max(width, 0), overflow="ellipsis")
    return line
