"""aioquic's client on the simulated network, and certificates, for the tests of the HTTP/3 server."""

from __future__ import annotations

import datetime
import ipaddress
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
import trio
from aioquic.h3 import events as h3_events
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.quic import events as quic_events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import trio_udp
from trio_udp.testing import SimulatedNetwork


@attrs.frozen
class Certificate:
    """A self-signed certificate for localhost as PEM files, and its SPKI hash for Chromium."""

    certificate: Path
    key: Path
    spki: bytes

    @classmethod
    def make(cls, folder: Path) -> Certificate:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
        now = datetime.datetime.now(datetime.timezone.utc)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=9))
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(key, hashes.SHA256())
        )
        pem, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        made = cls(
            folder / "cert.pem",
            folder / "key.pem",
            key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
        )
        made.certificate.write_bytes(certificate.public_bytes(pem))
        made.key.write_bytes(key.private_bytes(pem, private, serialization.NoEncryption()))
        return made


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Certificate.make(tmp_path_factory.mktemp("http3"))


@attrs.define
class Answer:
    """The answer received on a stream so far."""

    status: int = 0
    body: bytes = b""
    ended: bool = False
    reset: int | None = None


@attrs.define(eq=False)
class HTTP3Client:
    """A client, with one address at a time. It runs in a nursery until its connection is over.

    Attributes:
      answers: The answers by stream.
      datagrams: The WebTransport datagrams by session.
      raw: Streams that carry no HTTP frames. aioquic does not recognize those that its own client has begun.
      control: The bytes that the server has sent on its control stream.
      here: The clients at this address.
      end: Why the connection is over.
    """

    network: SimulatedNetwork
    server: trio_udp.Address
    certificate: Certificate
    nursery: trio.Nursery
    quic: QuicConnection = attrs.field(init=False)
    h3: H3Connection = attrs.field(init=False)
    connection: trio_udp.Connection = attrs.field(init=False)
    answers: defaultdict[int, Answer] = attrs.field(factory=lambda: defaultdict(Answer))
    datagrams: defaultdict[int, list[bytes]] = attrs.field(factory=lambda: defaultdict(list))
    raw: set[int] = attrs.field(factory=set)
    control: bytearray = attrs.field(factory=bytearray)
    end: quic_events.ConnectionTerminated | None = None
    here: list[HTTP3Client] = attrs.field(default=attrs.Factory(lambda self: [self], takes_self=True))
    _pause: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    _news: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)

    async def connect(self, sharing: HTTP3Client | None = None) -> None:
        """Connect, from a new address or from that of another client."""
        configuration = QuicConfiguration(
            alpn_protocols=H3_ALPN, server_name="localhost", max_datagram_frame_size=65_536
        )
        configuration.load_verify_locations(str(self.certificate.certificate))
        self.quic = QuicConnection(configuration=configuration)
        if sharing is None:
            await self.change_address()
        else:
            self.connection, self.here = sharing.connection, sharing.here
            self.here.append(self)
        self.quic.connect(self.server, trio.current_time())
        self.nursery.start_soon(self._keep_time)
        await self.until(lambda: hasattr(self, "h3") or self.end is not None)

    async def change_address(self) -> None:
        """Continue from another port, as behind a NAT that has lost the mapping. The client does not notice."""
        if hasattr(self, "connection"):
            self.connection.close()
        self.connection = await self.network.connect(*self.server)
        self.nursery.start_soon(self._receive, self.connection)

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            await self._news.park()

    def begin(self, method: str, path: str, *headers: tuple[bytes, bytes], end: bool = True) -> int:
        """Send a request's headers, and return its stream."""
        stream = self.quic.get_next_available_stream_id()
        fields = {":method": method, ":scheme": "https", ":authority": "localhost", ":path": path}
        self.h3.send_headers(
            stream, [*((name.encode(), value.encode()) for name, value in fields.items()), *headers], end_stream=end
        )
        self.flush()
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = True) -> None:
        self.h3.send_data(stream, data, end)
        self.flush()

    def flush(self) -> None:
        """Transmit the packets that are due."""
        self._pause.cancel()

    async def answer(self, stream: int) -> Answer:
        answer = self.answers[stream]
        await self.until(lambda: answer.ended or answer.reset is not None or self.end is not None)
        return answer

    async def get(self, path: str) -> Answer:
        return await self.answer(self.begin("GET", path))

    async def open_session(self, path: str) -> int:
        """Begin a WebTransport session, and return its stream."""
        session = self.begin("CONNECT", path, (b":protocol", b"webtransport"), end=False)
        await self.until(lambda: self.answers[session].status)
        return session

    async def _receive(self, connection: trio_udp.Connection) -> None:
        try:
            while True:
                try:
                    packets = await connection.receive_many()
                except ConnectionRefusedError:
                    continue
                for client in self.here:  # a packet for another connection is ignored
                    for packet in packets:
                        client.quic.receive_datagram(packet, self.server, trio.current_time())
                    client._take_events()
                    client._pause.cancel()
        except trio.ClosedResourceError:
            pass

    async def _keep_time(self) -> None:
        while True:
            self._pause = trio.CancelScope()
            for packet, _ in self.quic.datagrams_to_send(trio.current_time()):
                try:
                    await self.connection.send(packet)
                except ConnectionRefusedError:
                    pass
            due = self.quic.get_timer()
            if due is None:
                break
            self._pause.deadline = due + 1e-6
            with self._pause:
                await trio.sleep_forever()
            if trio.current_time() > due:
                self.quic.handle_timer(trio.current_time())
                self._take_events()
        if self.here == [self]:
            self.connection.close()

    def _take_events(self) -> None:
        while (event := self.quic.next_event()) is not None:
            if isinstance(event, quic_events.ProtocolNegotiated):
                self.h3 = H3Connection(self.quic, enable_webtransport=True)
            elif isinstance(event, quic_events.ConnectionTerminated):
                self.end = event
            elif isinstance(event, quic_events.StreamReset):
                self.answers[event.stream_id].reset = event.error_code
            elif isinstance(event, quic_events.StreamDataReceived) and event.stream_id == 3:
                self.control += event.data
            elif isinstance(event, quic_events.StreamDataReceived) and event.stream_id in self.raw:
                self.answers[event.stream_id].body += event.data
                self.answers[event.stream_id].ended |= event.end_stream
                continue
            for each in self._http_events(event):
                if isinstance(each, h3_events.DatagramReceived):
                    self.datagrams[each.stream_id].append(each.data)
                elif isinstance(each, h3_events.HeadersReceived):
                    self.answers[each.stream_id].status = int(dict(each.headers)[b":status"])
                    self.answers[each.stream_id].ended |= each.stream_ended
                elif isinstance(each, (h3_events.DataReceived, h3_events.WebTransportStreamDataReceived)):
                    self.answers[each.stream_id].body += each.data
                    self.answers[each.stream_id].ended |= each.stream_ended
        self._news.unpark_all()

    def _http_events(self, event: quic_events.QuicEvent) -> Iterator[h3_events.H3Event]:
        if hasattr(self, "h3"):
            yield from self.h3.handle_event(event)
