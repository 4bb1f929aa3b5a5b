"""The game in a browser: Playwright drives Debian's Chromium, which plays over WebTransport with a player over UDP."""

from __future__ import annotations

import base64
import hashlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest

pytest.importorskip("aioquic", minversion="1.7", reason="needs aioquic 1.7, which needs Python 3.11")
from game_bots import View
from game_server import HELLO, INPUT, INPUT_LAYOUT, JOIN, JOIN_HEAD, SNAPSHOT, WELCOME

from ..project.conftest import TIMEOUT, Example, Start, without_signals
from .conftest import program
from .http3_client import Certificate, certificate as certificate

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
expect = playwright.expect

pytestmark = without_signals

WIDE = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}

# Each element whose content is wider than its box, or that extends beyond the window.
CUT_OFF = """() => [...document.querySelectorAll("body *")].filter((element) => {
  const box = element.getBoundingClientRect()
  return element.scrollWidth > element.clientWidth + 1 || box.right > innerWidth + 0.5 || box.left < -0.5
}).map((element) => element.outerHTML)"""


@attrs.define
class Web:
    """A running game, and the addresses of its page."""

    example: Example
    url: str
    file: str


@pytest.fixture
def web(start: Start, certificate: Certificate) -> Web:
    paths = ["--cert", str(certificate.certificate), "--key", str(certificate.key)]
    example = start("game_web", "--web-port", "0", "--host", "127.0.0.1", *paths)
    assert example.next_line().startswith("listening on 127.0.0.1:")
    return Web(example, example.next_line().removeprefix("play at "), example.next_line().removeprefix("or at "))


@pytest.fixture
def open_page() -> Iterator[Callable[..., Any]]:
    """Open a page in a browser of its own. The browser's console must stay empty."""
    said: list[str] = []
    with playwright.sync_playwright() as driver:

        def open_page(url: str, *options: str) -> Any:
            browser = driver.chromium.launch(
                executable_path=program("chromium", "chromium"),
                timeout=TIMEOUT * 1000,
                args=["--disable-gpu", "--disable-background-networking", *options],
                chromium_sandbox=False,
            )
            page = browser.new_page(viewport=WIDE)
            page.set_default_timeout(TIMEOUT * 1000)
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.goto(url)
            return page

        yield open_page
    assert said == []


@attrs.define
class Player:
    """A player over UDP."""

    peer: socket.socket
    key: bytes
    number: int = 0
    last_input: int = 0

    @classmethod
    def join(cls, example: Example, name: bytes, room: bytes = b"lobby") -> Player:
        player = cls(example.peer(), name.rjust(8))
        player.peer.send(HELLO)
        token = player.peer.recv(2_000)[1:]
        player.peer.send(JOIN_HEAD.pack(JOIN, token, player.key, len(room)) + room + name)
        welcome = player.peer.recv(2_000)
        assert welcome[:1] == WELCOME
        player.number = welcome[-1]
        return player

    def wait_until(self, condition: Callable[[View], bool]) -> View:
        """Send inputs, and return the first snapshot that meets a condition."""
        while True:
            payload = self.peer.recv(2_000)
            if payload[:1] == SNAPSHOT:
                self.last_input += 1
                self.peer.send(INPUT_LAYOUT.pack(INPUT, self.key, self.last_input, 0, 0))
                if condition(view := View.read(payload)):
                    return view


def names(view: View) -> list[str]:
    return sorted(dot.name for dot in view.dots.values())


def place(view: View, name: str) -> tuple[int, int]:
    [found] = [(dot.x, dot.y) for dot in view.dots.values() if dot.name == name]
    return found


def test_a_browser_plays_over_http3(web: Web, open_page: Callable[..., Any], certificate: Certificate) -> None:
    """A page loaded over HTTP/3 joins, is steered with keys and a pointer, and leaves when it is closed.

    A player over UDP sees all of that, and the page sees the player.
    """
    ada = Player.join(web.example, b"ada")
    port = web.url.rstrip("/").rpartition(":")[2]
    page = open_page(
        web.url,
        "--enable-quic",
        f"--origin-to-force-quic-on=127.0.0.1:{port}",
        f"--ignore-certificate-errors-spki-list={base64.b64encode(hashlib.sha256(certificate.spki).digest()).decode()}",
    )
    page.get_by_label("Your name").fill("bob <b>")
    page.get_by_role("button", name="Play").click()
    expect(page.locator("li")).to_have_count(2)
    assert sorted(page.locator("li span").all_inner_texts()) == ["ada", "bob <b>"]
    expect(page.locator("li.me")).to_contain_text("bob <b>")
    view = ada.wait_until(lambda view: len(view.dots) == 2)
    assert names(view) == ["ada", "bob <b>"]

    x, y = place(view, "bob <b>")
    inward = 1 if x < 500 else -1
    page.keyboard.down("ArrowRight" if x < 500 else "a")
    ada.wait_until(lambda view: (place(view, "bob <b>")[0] - x) * inward >= 60)
    assert place(view, "bob <b>")[1] == y
    page.keyboard.up("ArrowRight" if x < 500 else "a")
    box = page.locator("canvas").bounding_box()  # the field with a margin of 32 on every side
    page.mouse.move(box["x"] + box["width"] * (x + 32) / 1064, box["y"] + box["height"] * (y + 32) / 1064)
    page.mouse.down()
    ada.wait_until(lambda view: abs(place(view, "bob <b>")[0] - x) < 15)
    page.mouse.up()

    page.set_viewport_size(PHONE)
    assert page.evaluate(CUT_OFF) == []
    page.close()
    ada.wait_until(lambda view: names(view) == ["ada"])
    web.example.stop()


def test_a_page_that_is_a_file(web: Web, open_page: Callable[..., Any]) -> None:
    """With a self-signed certificate, the page works as a file. It shows why a game ended, and can start another."""
    page = open_page(web.file + "&name=bob&room=tea")
    for size in (WIDE, PHONE):
        page.set_viewport_size(size)
        assert page.evaluate(CUT_OFF) == []
    page.get_by_role("button", name="Play").click()
    expect(page.locator("li.me")).to_contain_text("bob")
    ada = Player.join(web.example, b"ada", b"tea")
    expect(page.locator("li")).to_have_count(2)
    page.set_viewport_size(WIDE)
    assert page.evaluate(CUT_OFF) == []
    web.example.stop()
    expect(page.get_by_role("status")).to_have_text("stopping")
    expect(page.get_by_role("button", name="Play")).to_be_visible()
    assert ada.peer.recv(2_000)


def test_a_full_room(web: Web, open_page: Callable[..., Any]) -> None:
    """A page shows that the room is full."""
    for number in range(40):
        Player.join(web.example, b"bot %d" % number)
    page = open_page(web.file + "&name=bob&play")
    expect(page.get_by_role("status")).to_have_text("the room is full")
    web.example.stop()
