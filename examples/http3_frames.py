"""aioquic's HTTP/3 with bounds on what a stranger can make it keep and compute; http3_server.py uses it.

Without them, a HEADERS frame may have any length and is kept until its last byte, and a byte of it may stand for an
entry of 4 KB in QPACK's dynamic table: 20 KB become 80 MB.
"""

import pylsqpack
from aioquic.h3.connection import ErrorCode, H3Connection, Headers, ProtocolError
from aioquic.h3.events import H3Event
from aioquic.quic.events import StreamDataReceived

MAX_HEADERS = 16_384  # bytes of a HEADERS frame, or of any other that aioquic keeps until it is complete


class ExcessiveLoad(ProtocolError):
    """Ends the connection."""

    error_code = ErrorCode.H3_EXCESSIVE_LOAD


class BoundedH3Connection(H3Connection):
    """A connection whose peer has no dynamic table, and can send no long frames but those that are not kept."""

    def _init_connection(self) -> None:
        self._max_table_capacity = self._blocked_streams = 0
        self._decoder = pylsqpack.Decoder(0, 0)
        super()._init_connection()

    def _receive_stream_data(self, event: StreamDataReceived) -> list[H3Event]:
        events = super()._receive_stream_data(event)
        stream = self._stream.get(event.stream_id)
        if stream is not None and len(stream.buffer) > MAX_HEADERS:
            raise ExcessiveLoad
        return events

    def _decode_headers(self, stream_id: int, frame_data: bytes | None) -> Headers:
        if frame_data is not None and len(frame_data) > MAX_HEADERS:
            raise ExcessiveLoad
        return super()._decode_headers(stream_id, frame_data)
