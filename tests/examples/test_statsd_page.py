"""The StatsD server's page in a browser: Playwright drives Debian's Chromium."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from signal import SIGCONT, SIGSTOP
from typing import Any

import attrs
import pytest

from ..project.conftest import TIMEOUT, Example, Start, without_signals
from .conftest import program

pytest.importorskip("h11")
playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
expect = playwright.expect
expect.set_options(timeout=TIMEOUT * 1000)

pytestmark = without_signals

WIDE = {"width": 1440, "height": 1000}
PHONE = {"width": 360, "height": 740}

# Each element whose content is wider than its box, or that extends beyond the window.
CUT_OFF = """() => [...document.querySelectorAll("body *")].filter((element) => {
  const box = element.getBoundingClientRect();
  const isWider = element.clientWidth && element.scrollWidth > element.clientWidth + 1;
  return isWider || box.right > innerWidth + 0.5 || box.left < -0.5;
}).map((element) => element.outerHTML.slice(0, 200))"""

# Each text of a chart that extends beyond the chart, or overlaps another one.
OVERLAPPING = """() => [...document.querySelectorAll("svg[role=img]")].flatMap((svg) => {
  const frame = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll("text")];
  const boxes = texts.map((text) => text.getBoundingClientRect());
  return texts.filter((text, i) => {
    const box = boxes[i];
    const isOver = (other) => box.left < other.right - 0.5 && other.left < box.right - 0.5
      && box.top < other.bottom - 4 && other.top < box.bottom - 4;
    return box.left < frame.left - 0.5 || box.right > frame.right + 0.5 || boxes.slice(0, i).some(isOver);
  }).map((text) => text.textContent);
})"""


# Each text with too little contrast.
PALE = """() => {
  const light = (color) => {
    const shares = color.match(/[\\d.]+/g).map((number) => number / 255);
    const [r, g, b] = shares.map((share) => share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    const color = getComputedStyle(element).backgroundColor;
    return color === "rgba(0, 0, 0, 0)" && element.parentElement ? ground(element.parentElement) : color;
  };
  return [...document.querySelectorAll("body *")].filter((element) => element.checkVisibility()
    && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())).map((element) => {
      const style = getComputedStyle(element), color = element.closest("svg") ? style.fill : style.color;
      const [dark, bright] = [light(color), light(ground(element))].sort((one, other) => one - other);
      return [element.textContent, (bright + 0.05) / (dark + 0.05)];
    }).filter(([text, contrast]) => !(contrast >= 4.5));
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = program("chromium", "chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, timeout=TIMEOUT * 1000)
        yield browser
        browser.close()


@attrs.define
class Watched:
    """A running StatsD server, and its page in a browser."""

    example: Example
    page: Any
    start: Callable[..., Example]
    said: list[str]

    def restart(self) -> None:
        """Stop the server, wait until the page notices, and start it on the same ports."""
        self.example.stop()
        expect(self.page.locator("#status")).to_have_text("Server is away, trying again…")
        self.page.wait_for_event("console")  # it has tried again
        self.example = self.start(self.page.url.rstrip("/").rpartition(":")[2], self.example.port)
        expect(self.page.locator("#status")).to_have_text("Live")
        assert {text.rpartition("net::")[2] for text in self.said} <= {"ERR_CONNECTION_REFUSED"}
        self.said.clear()

    def send(self, *lines: str) -> None:
        peer = self.example.peer()
        for line in lines:
            peer.send(line.encode())

    def card(self, metric: str) -> Any:
        """Return the card of a metric: ``card("counter:tea.cups")``."""
        return self.page.locator(f"article[data-metric='{metric}']")

    def server_card(self, title: str) -> Any:
        return self.page.locator("#server article").filter(has=self.page.get_by_role("heading", name=title, exact=True))


Open = Callable[..., Any]


@pytest.fixture
def watch(chromium: Any, start: Start) -> Iterator[Open]:
    """Open the page of a StatsD server that reports five times a second. The browser's console must stay empty."""
    said: list[str] = []

    def run(page_port: str = "0", port: int = 0) -> Example:
        return start("statsd_server", "--page-port", page_port, "--interval", "0.2", port=port)

    @contextmanager
    def watch() -> Iterator[Watched]:
        example = run()
        with chromium.new_context(viewport=WIDE) as context:
            context.set_default_timeout(TIMEOUT * 1000)
            page = context.new_page()
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.goto(example.next_line().removeprefix("page on "))
            expect(page.get_by_role("status")).to_have_text("Live")
            yield Watched(example, page, run, said)

    yield watch
    assert said == []


def figures(card: Any) -> dict[str, str]:
    """Return the small figures of a card, by name."""
    return dict(zip(card.locator("dt").all_inner_texts(), card.locator("dd").all_inner_texts(), strict=True))


def test_values_are_those_that_were_sent(watch: Open) -> None:
    """Each kind of metric, and the counts of the server, show exactly the values that were sent."""
    with watch() as watched:
        expect(watched.page.locator("#empty")).to_contain_text(f"nc -u -w0 127.0.0.1 {watched.example.port}")
        timings = "\n".join(f"checkout:{value}|ms" for value in range(1, 201))
        watched.send("tea.cups:1234567|c", "tea.cups:3|c|@0.1\nlevel:-7.25|g", timings, "<b>broken</b>")
        watched.send("users:ada|s\nusers:grace|s\nusers:ada|s", "size:0.5|h")

        expect(watched.card("gauge:level").locator(".figure b")).to_have_text("-7.25")
        expect(watched.card("histogram:size").locator(".figure b")).to_have_text("0.5")
        expect(watched.card("timer:checkout").locator(".figure b")).to_have_text("190")
        shown = figures(watched.card("timer:checkout"))
        rate = shown.pop("Rate")
        assert re.fullmatch(r"[\d,]+ /s", rate)
        texts = ["100", "190", "198", "1", "100.5", "200", "200"]
        assert shown == dict(zip(["p50", "p95", "p99", "Min", "Mean", "Max", "Count"], texts, strict=True))
        assert figures(watched.card("set:users")) == {"Max": "2"}
        assert figures(watched.card("counter:tea.cups"))["Since start"] == "1,234,597"

        expect(watched.server_card("Lines").locator("dd")).to_have_text(["207", "1", "0"])
        expect(watched.server_card("Datagrams").locator("dd")).to_have_text(["6", "6"])
        expect(watched.server_card("Metrics").locator(".figure b")).to_have_text("5")
        expect(watched.server_card("Lost datagrams").locator("dd")).to_have_text(["0", "0"])
        expect(watched.page.locator("#malformed code")).to_have_text("<b>broken</b>")


def test_charts_follow_the_traffic(watch: Open) -> None:
    """Charts change when datagrams arrive; axes have units; the pointer shows the values of a point."""
    with watch() as watched:
        watched.send("hits:5|c")
        line = watched.card("counter:hits").locator("path[data-series=rate]")
        received = watched.server_card("Datagrams").locator("path[data-series=received]")
        line.wait_for(state="attached")
        before = line.get_attribute("d"), received.get_attribute("d")
        watched.send(*["hits:5|c"] * 100)
        expect(line).not_to_have_attribute("d", before[0])
        expect(received).not_to_have_attribute("d", before[1])
        expect(watched.card("counter:hits").locator("dd").nth(1)).to_have_text("505")
        expect(watched.card("counter:hits").locator("svg text.unit")).to_have_text("/s")
        expect(watched.server_card("Payload").locator("svg text.unit")).to_have_text("B/s")
        watched.card("counter:hits").locator("svg").hover()
        expect(watched.card("counter:hits").locator("text.read")).to_have_count(2)
        expect(watched.card("counter:hits").locator("text.read").nth(1)).to_have_text(re.compile(r"^[\d,.]+ /s$"))


def test_lost_datagrams_are_shown(watch: Open) -> None:
    """The page says that no data arrives from a hanging server, and later how many datagrams the kernel dropped."""
    with watch() as watched:
        expect(watched.server_card("Datagrams")).to_be_visible()
        watched.example.signal(SIGSTOP)
        watched.send(*["burst:1|c"] * 30_000)
        expect(watched.page.locator("#status")).to_have_text(re.compile(r"^No data for \d+ s$"))
        watched.example.signal(SIGCONT)
        expect(watched.page.locator("#status")).to_have_text("Live")
        card = watched.server_card("Lost datagrams")
        expect(card.locator("dd").first).not_to_have_text("0")
        dropped, by_server = (int(text.replace(",", "")) for text in card.locator("dd").all_inner_texts())
        expect(watched.card("counter:burst").locator("dd").nth(1)).to_have_text(f"{30_000 - dropped:,}")
        assert dropped > 0 == by_server


def test_nothing_is_cut_off(watch: Open) -> None:
    """Long names, and large and small numbers, fit on the page in a wide window and on a phone."""
    with watch() as watched:
        watched.send(f"{'a.very.long.name.' * 11}:1|ms|#region:eu,host:web-17", "x" * 200 + ":999999999999999|g")
        watched.send("tiny:0.0000123|g", "huge:-1e15|g", "count:999999999999|c|@0.001", "x" * 250)
        watched.send("level:1000000001|g", "level:1000000003|g", *["level:+1|g"] * 20)
        expect(watched.page.locator("#metrics article")).to_have_count(6)
        expect(watched.card("gauge:tiny").locator(".figure b")).to_have_text("1.23e-5")
        expect(watched.card("gauge:level").locator(".figure b")).to_have_text("1,000,000,023")
        for viewport in (WIDE, PHONE):
            watched.page.set_viewport_size(viewport)
            width = watched.page.locator("#metrics article svg").first.evaluate(
                "(svg) => svg.parentElement.clientWidth"
            )
            expect(watched.page.locator("#metrics article svg").first).to_have_attribute("width", str(width))
            assert watched.page.evaluate(CUT_OFF) == []
            assert watched.page.evaluate(OVERLAPPING) == []


def test_light_and_dark(watch: Open) -> None:
    """The colours follow the system's setting, and each text has a contrast of at least 4.5:1 (WCAG 2, AA)."""
    with watch() as watched:
        watched.send("a:1|c\na:1|g\na:1|ms\na:1|s\nnonsense")
        expect(watched.page.locator("#metrics article")).to_have_count(4)
        grounds = set()
        for scheme in ("light", "dark"):
            watched.page.emulate_media(color_scheme=scheme)
            grounds.add(watched.page.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert watched.page.evaluate(PALE) == []
        assert len(grounds) == 2


def test_after_a_restart(watch: Open) -> None:
    """The page says that the server is away; after a restart it continues with new counts and a gap in the charts."""
    with watch() as watched:
        watched.send("hits:5|c")
        total = watched.card("counter:hits").locator("dd").nth(1)
        expect(total).to_have_text("5")
        watched.restart()
        watched.send("hits:2|c")
        expect(total).to_have_text("2")
        expect(watched.page.locator("#status")).to_have_text("Live")
        expect(watched.server_card("Datagrams").locator("dd")).to_have_text(["1", "1"])
        expect(watched.server_card("Senders").locator("path")).to_have_attribute("d", re.compile("^M.*M"))


def test_many_metrics_and_the_filter(watch: Open) -> None:
    """The page shows the first 60 metrics; the filter finds the others by name and by kind."""
    with watch() as watched:
        for start in range(0, 100, 50):
            watched.send("\n".join(f"metric.{number:02}:{number}|g" for number in range(start, start + 50)))
        watched.send("other:1|c")
        page = watched.page
        expect(page.locator("#more")).to_have_text("41 more: filter by name to see them.")
        expect(page.locator("#metrics article")).to_have_count(60)
        page.get_by_role("searchbox").fill("RIC.99")
        expect(page.locator("#metrics article")).to_have_count(1)
        expect(watched.card("gauge:metric.99").locator(".figure b")).to_have_text("99")
        page.get_by_role("button", name="Counters 1").click()
        expect(page.locator("#none")).to_have_text("No metric matches.")
        page.get_by_role("searchbox").fill("")
        expect(page.locator("#metrics article h3")).to_have_text(["other"])
