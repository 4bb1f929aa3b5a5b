"""The game of game_server.py, for browsers too: over UDP and WebTransport at once, in the same rooms.

    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 10 -subj /CN=localhost \\
        -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout key.pem -out cert.pem
    python examples/game_web.py --cert cert.pem --key key.pem   (then open the address that it prints in a browser)
    python examples/game_bots.py 127.0.0.1 --bots 5             (in another terminal: bots to play with)

The page is served over HTTP/3, which needs a certificate that the browser trusts. Without one, open the page as a file:
it trusts the certificate whose hash is in its address, if the certificate is valid for less than two weeks.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

import attrs
import game_server
import trio
from game_server import Game, Peer
from http3_command import make_parser, port, run
from http3_server import IDLE_TIMEOUT, Stream, serve_http3

import trio_udp

PAGE = Path(__file__).with_name("game_page.html")


@attrs.define(eq=False)
class Session:
    """A WebTransport session, with the interface of a client that the game uses. QUIC has verified its address."""

    stream: Stream
    server: Sessions
    idle_timeout: float = IDLE_TIMEOUT
    ended: Literal["idle", "evicted", "stopping"] | None = None
    closed: bool = False
    waiting: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    @property
    def peer_address(self) -> trio_udp.Address:
        address: trio_udp.Address | None = self.stream.connection.quic.get_peer_address()
        assert address is not None
        return address

    def __aiter__(self) -> Session:
        return self

    async def __anext__(self) -> bytes:
        try:
            with trio.move_on_after(self.idle_timeout) as self.waiting:
                if not self.closed:
                    return await self.stream.receive()
            if self.closed:
                raise trio.ClosedResourceError
            self.ended = "idle"
        except trio.EndOfChannel:
            if self.stream.connection.server.stopping.is_set():
                self.ended = "stopping"
        raise StopAsyncIteration

    async def send(self, payload: bytes) -> None:
        await self.stream.send(payload)

    async def send_many(self, payloads: Iterable[bytes]) -> None:
        for payload in payloads:
            await self.stream.send(payload)

    def validate(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True
        self.waiting.cancel()


class Sessions:
    """The server of all sessions."""

    async def send_to_all(self, payload: bytes, sessions: Iterable[Peer]) -> None:
        for session in sessions:
            await session.send(payload)


def is_only_session(stream: Stream) -> bool:
    """Say whether its connection has no other, so that a connection is one player, as an address is over UDP."""
    return [each for each in stream.connection.streams.values() if each.kind == "session"] == [stream]


async def application(game: Game, sessions: Sessions, stream: Stream) -> None:
    match stream.kind, stream.path.partition("?")[0]:
        case "request", "/":
            await stream.respond(200, (b"content-type", b"text/html"))
            await stream.send(PAGE.read_bytes())
        case "session", "/game" if is_only_session(stream):
            await stream.respond(200)
            with suppress(trio.ClosedResourceError):  # the player continues in another session
                await game.handler(Session(stream, sessions))
            # A browser ends the session when it has read our goodbye. Then it drops the connection, which was only for
            # this session, without closing it. So close it here, rather than wait for the browser.
            with trio.move_on_after(1):
                while not stream.ended:
                    await stream.arrived.park()
            stream.connection.close()
        case _:
            await stream.respond(404)


def sha256(certificate: str) -> str:
    """Return the hash of a certificate, by which a page can trust it."""
    first, _, _ = Path(certificate).read_text().partition(ssl.PEM_FOOTER)
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(first + ssl.PEM_FOOTER)).hexdigest()


async def main(host: str | None, port: int, web_port: int, cert: str, key: str) -> None:
    game = Game()
    async with trio.open_nursery() as beside:
        beside.start_soon(game.run)
        async with trio.open_nursery() as nursery:
            udp: trio_udp.Server = await nursery.start(partial(game_server.serve, game.handler, port, host=host))
            limits = trio_udp.Limits(max_clients=2_000, clients_per_host=100)
            serve_web = partial(trio_udp.serve, port=web_port, host=host, limits=limits)
            web: trio_udp.Server = await nursery.start(
                serve_http3, partial(application, game, Sessions()), cert, key, serve_web
            )
            for server in (udp, web):
                print("listening on {}:{}".format(*server.endpoints[0].local_address), flush=True)
            url = f"https://{host or 'localhost'}:{web.endpoints[0].local_address[1]}"
            print(f"play at {url}/")
            print(f"or at {PAGE.as_uri()}#server={url}&hash={sha256(cert)}", flush=True)
            await udp.wait_stopping()
            web.stop()
        beside.cancel_scope.cancel()


if __name__ == "__main__":
    parser = make_parser()
    parser.add_argument("port", nargs="?", type=port, default=9999, help="of the game over UDP")
    parser.add_argument("--web-port", type=port, default=4433, help="of the page and of WebTransport")
    run(main, parser)
