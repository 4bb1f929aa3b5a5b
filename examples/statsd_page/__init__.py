"""The page of ``statsd_server.py``: serves its files over HTTP, and the server-sent events that its script reads.

This module knows nothing of StatsD. h11 parses the requests and does no I/O; each connection handles one request. A
browser that reconnects sends the number of the last event that it received, and gets the later ones (HTML standard,
"Server-sent events").
"""

import ipaddress
import json
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from urllib.parse import urlsplit

import attrs
import h11
import trio

TIMEOUT = 5.0  # seconds to receive a request, and to send each part of the answer
MAX_CONNECTIONS = 32
MAX_HISTORY = 50_000_000  # bytes of events: 1,000 metrics with long names take 1 MB in each

CONTENT_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = [
    ("Cache-Control", "no-store"),
    ("Connection", "close"),
    ("Content-Security-Policy", "default-src 'self'"),
    ("X-Content-Type-Options", "nosniff"),
]


def is_safe(host: bytes) -> bool:
    """Say whether a Host header has an address, or a name without a dot, such as localhost.

    Any other name could belong to a web page that has pointed it here to read our events (DNS rebinding).
    """
    try:
        name = urlsplit(f"//{host.decode()}").hostname or ""
        return "." not in name or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


@attrs.define(eq=False)
class Page:
    """The files of the page, and its last events."""

    events: deque[tuple[int, bytes]]  # the last ones, with their numbers
    files: dict[str, tuple[str, bytes]]  # by path
    is_over: bool = False
    news: trio.Event = attrs.field(factory=trio.Event)
    connections: int = 0

    @classmethod
    def load(cls, max_events: int) -> "Page":
        paths = [path for path in Path(__file__).parent.iterdir() if path.suffix in CONTENT_TYPES]
        files = {f"/{path.name}": (CONTENT_TYPES[path.suffix], path.read_bytes()) for path in paths}
        return cls(deque(maxlen=max_events), files | {"/": files["/index.html"]})

    def publish(self, figures: dict[str, object]) -> None:
        """Send figures to all open pages. The number of an event is its time, so it also grows across restarts."""
        now = int(time.time() * 1000)
        number = max(now, self.events[-1][0] + 1) if self.events else now
        data = json.dumps({"time": number} | figures, allow_nan=False)
        self.events.append((number, f"id: {number}\ndata: {data}\n\n".encode()))
        while sum(len(event) for _, event in self.events) > MAX_HISTORY:
            self.events.popleft()
        self.wake()

    def close(self) -> None:
        """End the streams of all open pages after the last event."""
        self.is_over = True
        self.wake()

    def wake(self) -> None:
        self.news.set()
        self.news = trio.Event()

    async def answer(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        try:
            if self.connections <= MAX_CONNECTIONS:
                await self.answer_request(stream)
        except (h11.RemoteProtocolError, trio.BrokenResourceError, trio.TooSlowError):
            pass  # the browser has disconnected, is too slow, or sent invalid HTTP
        finally:
            self.connections -= 1

    async def answer_request(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)
        with trio.fail_after(TIMEOUT):
            while (request := connection.next_event()) is h11.NEED_DATA:
                connection.receive_data(await stream.receive_some())
        if isinstance(request, h11.Request):
            async with aclosing(self.respond(request)) as parts:
                async for part in parts:
                    with trio.fail_after(TIMEOUT):
                        await stream.send_all(connection.send(part) or b"")

    async def respond(self, request: h11.Request) -> AsyncGenerator[h11.Event, None]:
        """Yield the parts of the answer to a request."""
        path = request.target.decode().partition("?")[0]
        if request.method not in (b"GET", b"HEAD"):
            yield h11.Response(status_code=405, headers=[("Allow", "GET, HEAD"), ("Content-Length", "0"), *HEADERS])
        elif not is_safe(dict(request.headers).get(b"host", b"")):
            content = b"Open this page by its address: http://127.0.0.1:8126/, for example.\n"
            about = [("Content-Type", "text/plain"), ("Content-Length", str(len(content)))]
            yield h11.Response(status_code=421, headers=[*about, *HEADERS])  # Misdirected Request
            if request.method == b"GET":
                yield h11.Data(data=content)
        elif path == "/events" and request.method == b"GET":
            yield h11.Response(status_code=200, headers=[("Content-Type", "text/event-stream"), *HEADERS])
            yield h11.Data(data=b"retry: 1000\n\n")  # milliseconds until a page reconnects
            last = dict(request.headers).get(b"last-event-id", b"0")
            seen = int(last) if last.isdigit() and len(last) < 20 else 0
            while True:
                news, is_over = self.news, self.is_over
                for number, event in [each for each in self.events if each[0] > seen]:
                    yield h11.Data(data=event)
                    seen = number
                if is_over:
                    break
                await news.wait()
        elif path in self.files:
            content_type, content = self.files[path]
            about = [("Content-Type", f"{content_type}; charset=utf-8"), ("Content-Length", str(len(content)))]
            yield h11.Response(status_code=200, headers=[*about, *HEADERS])
            if request.method == b"GET":
                yield h11.Data(data=content)
        else:
            yield h11.Response(status_code=404, headers=[("Content-Length", "0"), *HEADERS])
        yield h11.EndOfMessage()
