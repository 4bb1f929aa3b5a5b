"""The C structures that recvmmsg(2) and sendmmsg(2) read and write, laid out once for each thread.

Most of their content never changes. A call writes only the columns that differ, each with one operation for the whole
array. That takes 0.2 µs for each datagram of a batch of 64, each way; the kernel takes more than 1 µs.
"""

from __future__ import annotations

import ctypes
import mmap
import socket
import threading
from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ._engine import BATCH
from .linux_routes import Layout
from .pktinfo import CMSG_HEADER, CONTROL_SIZE, UDP_SEGMENT, pack_control

# Room for one message: the longest datagram, or the longest row of segments. Not exactly 65,536, because all payloads
# would then begin in the same few sets of the CPU's cache.
BUFFER_SIZE = 65_536 + 192


class IOVec(ctypes.Structure):
    """struct iovec, see readv(2)."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class MsgHdr(ctypes.Structure):
    """struct msghdr in the kernel's form, see recvmsg(2)."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iov_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class MMsgHdr(ctypes.Structure):
    """struct mmsghdr, see recvmmsg(2)."""

    _fields_ = (("header", MsgHdr), ("length", ctypes.c_uint))


def _memory(size: int) -> mmap.mmap:
    """Return memory whose slices are bytes. The kernel allocates only used pages; a forked child has its own copy."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Messages:
    """An array of ``struct mmsghdr``, with an iovec and a record (a route, and room for control messages) for each."""

    def __init__(self, layout: Layout, record_size: int, control_size: int) -> None:
        self.records = _memory(BATCH * record_size)
        self._headers = (MMsgHdr * BATCH)()
        self._iovecs = (IOVec * BATCH)()
        record = _address_of(self.records)
        for message, iovec in zip(self._headers, self._iovecs):
            header = message.header
            if layout.name_size:
                header.name, header.name_length = record, layout.name_size
            header.iov, header.iov_length = ctypes.addressof(iovec), 1
            header.control, header.control_length = record + layout.control_offset, control_size
            record += record_size
        self.pointer = ctypes.c_void_p(ctypes.addressof(self._headers))
        self.headers = memoryview(self._headers).cast("B")
        # Columns of the arrays; "L" is size_t in C.
        self.lengths = self.headers.cast("I")[MMsgHdr.length.offset // 4 :: ctypes.sizeof(MMsgHdr) // 4]
        self.control_sizes = self.headers.cast("L")[MsgHdr.control_length.offset // 8 :: ctypes.sizeof(MMsgHdr) // 8]
        words = memoryview(self._iovecs).cast("B").cast("L")
        self.payload_pointers, self.payload_sizes = words[0::2], words[1::2]


class IncomingMessages(Messages):
    """The structures that recvmmsg fills."""

    def __init__(self, layout: Layout) -> None:
        record_size = layout.control_offset + CONTROL_SIZE
        super().__init__(layout, record_size, CONTROL_SIZE)
        self._template = memoryview(bytes(self.headers))
        self.used = BATCH  # headers that may differ from the template
        self.payloads = _memory(BATCH * BUFFER_SIZE)
        self.starts = list(range(0, BATCH * BUFFER_SIZE, BUFFER_SIZE))
        first = _address_of(self.payloads)
        self.payload_pointers[:] = array("L", [first + start for start in self.starts])
        self.payload_sizes[:] = array("L", [65_535] * BATCH)
        # The slices of the socket addresses, and of the control messages if each has only the usual one.
        records = range(0, len(self.records), record_size)
        self.names = [slice(record, record + layout.end_offset) for record in records]
        self.controls = [slice(record + layout.control_offset, record + layout.route_size) for record in records]
        self.usual_control_sizes = memoryview(array("L", [len(layout.default_control)] * BATCH))

    def reset(self) -> None:
        """Undo the kernel's changes to the headers."""
        size = self.used * ctypes.sizeof(MMsgHdr)
        self.headers[:size] = self._template[:size]
        self.used = BATCH


class OutgoingMessages(Messages):
    """The structures that sendmmsg reads."""

    def __init__(self, layout: Layout) -> None:
        # A record is a route and this control message, which the kernel reads only for merged datagrams. A size of 0
        # means one datagram.
        self._separator = pack_control(socket.IPPROTO_UDP, UDP_SEGMENT, bytes(2))
        plain_size, record_size = len(layout.default_control), layout.route_size + len(self._separator)
        super().__init__(layout, record_size, plain_size)
        self.records[:] = (bytes(layout.route_size) + self._separator) * BATCH
        self._plain_sizes = memoryview(array("L", [plain_size] * BATCH))
        self._merged_sizes = memoryview(array("L", [plain_size + len(self._separator)] * BATCH))
        self._merged = 0  # messages whose control messages are longer than usual
        offset = layout.route_size + CMSG_HEADER.size
        self._segment_sizes = memoryview(self.records).cast("H")[offset // 2 :: record_size // 2]
        # Keeps the payloads alive until the next call, and gives their address.
        self._payloads = ctypes.c_char_p()
        self._payloads_address = memoryview(self._payloads).cast("B").cast("L")

    def lay_out(
        self, routes: Any, payloads: bytes, sizes: Sequence[int], segment_sizes: list[int] | None = None
    ) -> None:
        """Prepare as many messages as there are routes.

        Args:
          routes: One for each message.
          payloads: The payloads of all messages, one after the other.
          sizes: The length of each payload, in bytes.
          segment_sizes: The kernel cuts each message into datagrams of this size; the last may be smaller. 0 for a
            single datagram, which is the default for all.
        """
        count = len(sizes)
        records = self._separator.join(routes)
        self.records[: len(records)] = records
        self._payloads.value = payloads
        address = self._payloads_address[0]
        if count == 1:  # the same as below, at half the cost
            self.payload_sizes[0], self.payload_pointers[0] = sizes[0], address
        else:
            self.payload_sizes[:count] = array("L", sizes)
            self.payload_pointers[:count] = array("L", accumulate(sizes[:-1], initial=address))
        if segment_sizes:
            self._segment_sizes[:count] = array("H", segment_sizes)
            merged = count
        else:
            merged = 0
        if merged > self._merged:
            self.control_sizes[:merged] = self._merged_sizes[:merged]
        elif merged < self._merged:
            self.control_sizes[merged : self._merged] = self._plain_sizes[merged : self._merged]
        self._merged = merged


class ThisThread(threading.local):
    """The memory for the system calls of this thread; nothing in it is needed after a call.

    All sockets of a thread share it. Threads do not share it, because other threads run during a call.
    """

    def __init__(self) -> None:
        self._incoming: dict[Layout, IncomingMessages] = {}
        self._outgoing: dict[Layout, OutgoingMessages] = {}

    def incoming(self, layout: Layout) -> IncomingMessages:
        memory = self._incoming.get(layout)
        if memory is None:
            memory = self._incoming[layout] = IncomingMessages(layout)
        return memory

    def outgoing(self, layout: Layout) -> OutgoingMessages:
        memory = self._outgoing.get(layout)
        if memory is None:
            memory = self._outgoing[layout] = OutgoingMessages(layout)
        return memory


this_thread = ThisThread()
