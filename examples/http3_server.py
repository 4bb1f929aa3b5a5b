"""An HTTP/3 server (RFC 9114) with WebTransport, on the QUIC connections of quic_connections.py.

    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 10 -subj /CN=localhost \\
        -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout key.pem -out cert.pem
    python examples/http3_server.py --cert cert.pem --key key.pem 4433
    gtlsclient --change-local-addr=1s --quiet 127.0.0.1 4433 https://localhost/bytes/100000000

``application``, near the end, is called for each request, each WebTransport session, and each stream of a session. When
the server stops, a GOAWAY tells clients to send no more requests, and requests that have begun are answered.
"""

import logging
import signal
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

import attrs
import trio
from aioquic.buffer import encode_uint_var
from aioquic.h3.connection import H3_ALPN, ErrorCode, FrameType, encode_frame
from aioquic.h3.events import DatagramReceived, DataReceived, H3Event, HeadersReceived, WebTransportStreamDataReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated, ProtocolNegotiated, QuicEvent, StopSendingReceived, StreamReset
from http3_command import make_parser, port, run
from http3_frames import BoundedH3Connection
from quic_connections import Connection, serve

import trio_udp

PAGE = Path(__file__).with_name("http3_page.html")
IDLE_TIMEOUT = 30.0  # seconds of silence that end a connection
MAX_UNREAD, PIECE = 4_000_000, 100  # bytes of a connection that wait for the application; what a piece adds to them
MAX_UNSENT, MAX_DATAGRAM = 256, 1_100  # datagrams of a connection that wait to be sent; bytes of one

Application = Callable[["Stream"], Awaitable[object]]
Kind = Literal["request", "session", "stream"]


@attrs.define(eq=False)
class Stream(trio.abc.Channel[bytes]):
    """A channel for one call of the application. Its ``kind`` says what it carries:

    - ``"request"``: receives the request's body; sends the body of the answer, after ``respond``.
    - ``"session"``: the datagrams of a WebTransport session, after ``respond`` has accepted it. They may get lost.
    - ``"stream"``: the bytes of a stream of a session, in pieces of any size.

    When the application returns, our side of the stream ends. When the server stops, ``receive`` raises
    ``EndOfChannel``, except in requests. If the peer resets the stream, the application is cancelled.
    """

    connection: "HTTP3"
    number: int
    kind: Kind
    headers: dict[bytes, bytes]  # of the request that began it, or began its session
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    incoming: deque[bytes] = attrs.field(factory=deque)
    arrived: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)
    ended: bool = False

    @property
    def path(self) -> str:
        return self.headers.get(b":path", b"").decode(errors="replace")

    def put(self, piece: bytes, ended: bool) -> None:
        self.ended |= ended
        if piece and self.connection.unread < MAX_UNREAD:
            self.incoming.append(piece)
            self.connection.unread += len(piece) + PIECE
        elif piece and self.kind != "session":
            self.scope.cancel()  # aioquic cannot make the peer wait
        self.arrived.unpark_all()

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self.incoming:
            if self.ended or (self.connection.server.stopping.is_set() and self.kind != "request"):
                raise trio.EndOfChannel
            await self.arrived.park()
        piece = self.incoming.popleft()
        self.connection.unread -= len(piece) + PIECE
        return piece

    async def respond(self, status: int, *headers: tuple[bytes, bytes]) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        self.connection.h3.send_headers(self.number, [(b":status", b"%d" % status), *headers])
        self.connection.pause.cancel()

    async def send(self, value: bytes) -> None:
        if self.kind != "session":
            return await self.write(value)
        if len(value) > MAX_DATAGRAM:
            raise ValueError(f"a datagram has at most {MAX_DATAGRAM} bytes, not {len(value)}")
        await trio.lowlevel.checkpoint_if_cancelled()
        if len(self.connection.quic._datagrams_pending) < MAX_UNSENT:  # otherwise it is dropped
            self.connection.h3.send_datagram(self.number, value)
            self.connection.pause.cancel()

    async def write(self, value: bytes, end: bool = False) -> None:
        await self.connection.wait_for_room()
        if self.kind == "stream":
            self.connection.quic.send_stream_data(self.number, value, end)
        else:
            self.connection.h3.send_data(self.number, value, end)
        self.connection.pause.cancel()

    async def aclose(self) -> None:
        await self.write(b"", end=True)


@attrs.define(eq=False)
class HTTP3(Connection):
    """An HTTP/3 connection: runs the application for each of its streams."""

    application: Application = attrs.field(kw_only=True)
    h3: BoundedH3Connection = attrs.field(init=False)
    control_stream: int = attrs.field(init=False, default=-1)
    streams: dict[int, Stream] = attrs.field(factory=dict)
    next_request: int = 0
    unread: int = 0

    def take_event(self, event: QuicEvent) -> None:
        match event:
            case ProtocolNegotiated():
                self.control_stream = self.quic.get_next_available_stream_id(is_unidirectional=True)
                self.h3 = BoundedH3Connection(self.quic, enable_webtransport=True)
            case StreamReset(stream_id=number) | StopSendingReceived(stream_id=number) if number in self.streams:
                self.streams[number].scope.cancel()
            case ConnectionTerminated():
                return
        for h3_event in self.h3.handle_event(event):
            self.take_h3_event(h3_event)

    def take_h3_event(self, event: H3Event) -> None:
        match event:
            case HeadersReceived(stream_id=number, headers=headers, stream_ended=ended):
                kind: Kind = "session" if (b":protocol", b"webtransport") in headers else "request"
                self.put(number, kind, dict(headers), b"", ended)
            case DataReceived(stream_id=number, data=data, stream_ended=ended) if number in self.streams:
                self.streams[number].put(data if self.streams[number].kind == "request" else b"", ended)
            case DatagramReceived(stream_id=number, data=data) if number in self.streams:
                self.streams[number].put(data, False)
            case WebTransportStreamDataReceived(session_id=session, stream_id=number, data=data, stream_ended=ended):
                if session in self.streams and number % 4 == 0:  # unidirectional streams are ignored
                    self.put(number, "stream", self.streams[session].headers, data, ended)

    def put(self, number: int, kind: Kind, headers: dict[bytes, bytes], data: bytes, ended: bool) -> None:
        """Put data into a stream. If the stream is new, run the application for it."""
        if number not in self.streams:
            if (known := self.quic._streams.get(number)) is None or known.sender._reset_error_code is not None:
                return  # the peer has said already that it wants no answer
            if self.server.stopping.is_set() and number >= self.next_request:
                return self.quic.reset_stream(number, ErrorCode.H3_REQUEST_REJECTED)
            self.next_request = max(self.next_request, number + 4)
            self.streams[number] = Stream(self, number, kind, headers)
            self.nursery.start_soon(self.answer, self.streams[number])
        self.streams[number].put(data, ended)

    async def answer(self, stream: Stream) -> None:
        """Run the application for a stream, and wait until the peer has acknowledged all of the answer."""
        try:
            with stream.scope:
                with suppress(trio.EndOfChannel):
                    await self.application(stream)
                await stream.aclose()
        except Exception:
            logging.exception("the application failed on %r", stream.path)
            stream.scope.cancel()
        if stream.scope.cancel_called:
            self.quic.reset_stream(stream.number, ErrorCode.H3_REQUEST_CANCELLED)
        if not stream.ended and stream.number in self.quic._streams:
            self.quic.stop_stream(stream.number, ErrorCode.H3_NO_ERROR)
        self.pause.cancel()
        while stream.number in self.quic._streams:
            await self.progress.park()
        del self.streams[stream.number]
        self.unread -= sum(len(piece) + PIECE for piece in stream.incoming)
        self.progress.unpark_all()

    async def go_away(self) -> None:
        if self.control_stream >= 0:
            frame = encode_frame(FrameType.GOAWAY, encode_uint_var(self.next_request))
            self.quic.send_stream_data(self.control_stream, frame)
            self.pause.cancel()
            for stream in self.streams.values():
                stream.arrived.unpark_all()
            while self.streams or self.unacknowledged():
                await self.progress.park()
        self.close(ErrorCode.H3_NO_ERROR)


async def application(stream: Stream) -> None:
    """Answer some requests; echo the datagrams and streams of WebTransport sessions."""
    match stream.kind, stream.headers[b":method"], stream.path.split("/")[1:]:
        case "request", b"GET", [""]:
            await stream.respond(200, (b"content-type", b"text/html"))
            await stream.send(PAGE.read_bytes())
        case "request", b"GET", ["number", number]:
            await stream.respond(200)
            await stream.send(number.encode())
        case "request", b"GET", ["bytes", count] if count.isascii() and count.isdecimal() and len(count) < 11:
            await stream.respond(200, (b"content-length", count.encode()))
            for start in range(0, int(count), 65_536):
                await stream.send(bytes(min(65_536, int(count) - start)))
        case "request", b"POST", ["length"]:
            length = 0
            async for piece in stream:
                length += len(piece)
            await stream.respond(200)
            await stream.send(b"%d\n" % length)
        case "session" | "stream", _, ["echo"]:
            if stream.kind == "session":
                await stream.respond(200)
            async for piece in stream:
                await stream.send(piece)
        case _:
            await stream.respond(404)


async def serve_http3(
    application: Application,
    certificate: str,
    key: str,
    serve_udp: Callable[..., Awaitable[None]],
    *,
    task_status: trio.TaskStatus[trio_udp.Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve HTTP/3 with an application. ``serve_udp`` is a ``partial`` of ``trio_udp.serve`` that has a port."""
    configuration = QuicConfiguration(H3_ALPN, is_client=False, idle_timeout=IDLE_TIMEOUT)
    configuration.max_datagram_frame_size = 65_536
    configuration.load_cert_chain(certificate, key)
    await serve(partial(HTTP3, application=application), configuration, serve_udp, task_status=task_status)


async def main(host: str | None, port: int, cert: str, key: str) -> None:
    limits, stop_signals = trio_udp.Limits(max_clients=4_000, clients_per_host=400), {signal.SIGINT, signal.SIGTERM}
    serve_udp = partial(trio_udp.serve, port=port, host=host, limits=limits, stop_signals=stop_signals)
    async with trio.open_nursery() as nursery:
        server: trio_udp.Server = await nursery.start(serve_http3, application, cert, key, serve_udp)
        for endpoint in server.endpoints:
            print("listening on {}:{}".format(*endpoint.local_address), flush=True)


if __name__ == "__main__":
    parser = make_parser()
    parser.add_argument("port", nargs="?", type=port, default=4433)
    run(main, parser)
