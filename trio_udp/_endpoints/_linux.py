"""The engine for Linux: up to 64 messages for one system call, in both directions.

recvmmsg(2) and sendmmsg(2), called through ctypes, read and write arrays of C structures. Nearly all that stands in
these never changes. So they are laid out once for each thread, and a call touches only what differs, a column of an
array at a time: 0.2 µs for a datagram in a batch of 64, each way, where the kernel needs more than 1.

Two things let the kernel move many datagrams as one, see udp(7). Sending: consecutive datagrams of one size to one peer
leave as the *segments* of a single message (GSO, ``UDP_SEGMENT``), which saves a third of an echo at four a client.
Receiving: what a sender on this machine or a network card has joined arrives in a single buffer, together with the size
of its segments (GRO, ``UDP_GRO``).

A route is the raw socket address of the peer followed, on a socket bound to all addresses, by the raw control message
that names our own: what the kernel wrote, and what it wants back with a reply. It is decoded only when somebody asks.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import struct
import sys
import threading
from array import array
from collections import deque
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from typing import Any, NoReturn, TypeAlias, cast

import attrs
import trio

from .._log import warn_once
from .._statistics import SendTally
from ._address import MAX_PAYLOAD_IPV4, Address, is_mapped, pack_address, unpack_address
from ._engine import BATCH, Datagram, Outgoing, Route
from ._pktinfo import (
    CMSG_HEADER,
    CONTROL_SIZE,
    IP_PKTINFO,
    IPV6_PKTINFO,
    NO_MAPPED_ADDRESS,
    ReplyControl,
    needs_local_address,
    pack_control,
    reply_control,
    unpack_control,
)
from ._socket import UDP_GRO, UDP_SEGMENT, SocketEngine

# Kernels before 6.9 divide a message into no more segments than this.
MAX_SEGMENTS = 64
SEGMENT_SIZE = struct.Struct("@H")

# It may be merging that has failed, not sending: no checksum in hardware (EIO), or a segment too long for the way to
# this peer (EMSGSIZE, on older kernels EINVAL). A datagram sent singly may be cut into fragments; a segment may not.
MERGING_FAILED = {errno.EIO, errno.EINVAL, errno.EMSGSIZE}

# How a kernel, an emulator or a seccomp filter says that it does not have a system call, or not for us.
NO_SUCH_CALL = {errno.ENOSYS, errno.EPERM, errno.EINVAL}

# Room for one message: the longest datagram, or row of segments. Not a round 65,536: all payloads would then begin in
# the same few sets of the processor's cache.
BUFFER_SIZE = 65_536 + 192


class IOVec(ctypes.Structure):
    """struct iovec, see readv(2)."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class MsgHdr(ctypes.Structure):
    """struct msghdr as the kernel has it, see recvmsg(2)."""

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


@attrs.frozen(eq=False)
class Layout:
    """What the routes of a socket look like: a socket address, padded, and at the end perhaps a control message."""

    name_size: int
    control_offset: int
    default_end: bytes = b""  # that control message, where it leaves the choice to the kernel; only on wildcard sockets

    @property
    def route_size(self) -> int:
        return self.control_offset + len(self.default_end)

    def end(self, reply: ReplyControl) -> bytes:
        """The end of a route, from the control message for a reply."""
        return pack_control(*reply[0]) if reply else self.default_end

    def understand(self, control: Iterable[tuple[int, int, bytes]]) -> tuple[bytes, int]:
        """Turn the control messages of a message into the end of its route, and the size of its segments or 0."""
        messages = list(control)
        sizes = [data for level, kind, data in messages if (level, kind) == (socket.IPPROTO_UDP, UDP_GRO)]
        segment_size = int.from_bytes(sizes[0], sys.byteorder) if sizes else 0
        return self.end(reply_control(messages)) if self.default_end else b"", segment_size


CONNECTED = Layout(0, 0)
IPV4 = Layout(16, 16)
IPV6 = Layout(28, 32)
IPV4_WILDCARD = Layout(16, 16, pack_control(socket.IPPROTO_IP, IP_PKTINFO or 0, bytes(12)))
IPV6_WILDCARD = Layout(28, 32, pack_control(socket.IPPROTO_IPV6, IPV6_PKTINFO or 0, bytes(20)))


def _memory(size: int) -> mmap.mmap:
    """Memory whose slices are bytes, and of which only what is used becomes real; a forked child has its own."""
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
        # Columns of the arrays; "L" is what C calls size_t.
        self.lengths = self.headers.cast("I")[MMsgHdr.length.offset // 4 :: ctypes.sizeof(MMsgHdr) // 4]
        self.control_sizes = self.headers.cast("L")[MsgHdr.control_length.offset // 8 :: ctypes.sizeof(MMsgHdr) // 8]
        words = memoryview(self._iovecs).cast("B").cast("L")
        self.payload_pointers, self.payload_sizes = words[0::2], words[1::2]


class IncomingMessages(Messages):
    """Where recvmmsg writes."""

    def __init__(self, layout: Layout) -> None:
        record_size = layout.control_offset + CONTROL_SIZE
        super().__init__(layout, record_size, CONTROL_SIZE)
        self.template = memoryview(bytes(self.headers))
        self.used = BATCH  # headers that are not as in the template any more, or may not be
        self.payloads = _memory(BATCH * BUFFER_SIZE)
        self.starts = list(range(0, BATCH * BUFFER_SIZE, BUFFER_SIZE))
        first = _address_of(self.payloads)
        self.payload_pointers[:] = array("L", [first + start for start in self.starts])
        self.payload_sizes[:] = array("L", [65_535] * BATCH)
        # Where the socket addresses stand, and if there is nothing else, the control messages for our own.
        self.names = [
            slice(record, record + layout.control_offset) for record in range(0, len(self.records), record_size)
        ]
        self.controls = [slice(name.stop, name.stop + len(layout.default_end)) for name in self.names]
        self.usual_control_sizes = memoryview(array("L", [len(layout.default_end)] * BATCH))

    def reset(self) -> None:
        """Undo what the kernel has written into the headers."""
        size = self.used * ctypes.sizeof(MMsgHdr)
        self.headers[:size] = self.template[:size]
        self.used = BATCH


class OutgoingMessages(Messages):
    """What sendmmsg reads."""

    def __init__(self, layout: Layout) -> None:
        # A record is a route followed by this, which the kernel reads only if the message is merged from datagrams.
        self.separator = pack_control(socket.IPPROTO_UDP, UDP_SEGMENT, SEGMENT_SIZE.pack(0))
        self.plain_control_size = len(layout.default_end)
        self.record_size = layout.route_size + len(self.separator)
        super().__init__(layout, self.record_size, self.plain_control_size)
        self.records[:] = (bytes(layout.route_size) + self.separator) * BATCH
        self._segment_size_offset = layout.route_size + CMSG_HEADER.size
        self._merged: list[int] = []
        # What is put here stays where it is until it is replaced, and can be asked for its address.
        self._payloads = ctypes.c_char_p()
        self._payloads_address = memoryview(self._payloads).cast("B").cast("L")

    def lay_out(self, routes: list[Any], payloads: bytes, sizes: list[int]) -> None:
        """Prepare as many messages as there are routes, with payloads that follow on one another."""
        while self._merged:
            self.control_sizes[self._merged.pop()] = self.plain_control_size
        records = self.separator.join(routes)
        self.records[: len(records)] = records
        self._payloads.value = payloads
        address = self._payloads_address[0]
        count = len(sizes)
        if count == 1:  # as the next three lines would, for half of the cost
            self.payload_sizes[0], self.payload_pointers[0] = sizes[0], address
        else:
            self.payload_sizes[:count] = array("L", sizes)
            self.payload_pointers[:count] = array("L", accumulate(sizes[:-1], initial=address))

    def merge(self, number: int, segment_size: int) -> None:
        """Have the kernel cut a message into datagrams of this size; the last may be smaller."""
        SEGMENT_SIZE.pack_into(self.records, number * self.record_size + self._segment_size_offset, segment_size)
        self.control_sizes[number] = self.plain_control_size + len(self.separator)
        self._merged.append(number)


class ThisThread(threading.local):
    """The memory that system calls of this thread use; no call leaves anything there that is needed afterwards.

    All sockets of a thread share it. Threads do not: others run while a call goes on.
    """

    def __init__(self) -> None:
        self.incoming: dict[Layout, IncomingMessages] = {}
        self.outgoing: dict[Layout, OutgoingMessages] = {}


this_thread = ThisThread()

# An AttributeError here says that the C library does not have them; see engine_for().
_libc = ctypes.CDLL(None, use_errno=True)
_recvmmsg, _sendmmsg, _sendto = _libc.recvmmsg, _libc.sendmmsg, _libc.sendto


def _raise(code: int) -> NoReturn:
    raise OSError(code, os.strerror(code))


def can_serve(sock: trio.socket.SocketType) -> bool:
    """Whether this engine is for a socket: of UDP, over IPv4 or IPv6, on a 64-bit machine."""
    # The C library of 32-bit machines may know two layouts of these structures, for times before and after 2038.
    return (
        ctypes.sizeof(ctypes.c_void_p) == 8
        and sock.family in (socket.AF_INET, socket.AF_INET6)
        and sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL) == socket.IPPROTO_UDP
    )


# A message to send: how many datagrams, their bytes, the size of each (the last may be smaller), and who sends them. A
# list, since an object would cost 5 % of an echo.
Message: TypeAlias = "list[Any]"


class LinuxEngine(SocketEngine):
    """A UDP socket that is read and written in batches."""

    def __init__(self, sock: trio.socket.SocketType, max_datagram_size: int) -> None:
        super().__init__(sock)
        self._longest = max_datagram_size
        if self.connected:
            self._layout = CONNECTED
            self._peer_address: Address = sock.getpeername()
        elif self.family == socket.AF_INET:
            self._layout = IPV4_WILDCARD if needs_local_address(sock) else IPV4
        else:
            self._layout = IPV6_WILDCARD if needs_local_address(sock) else IPV6
        # A machine has few addresses. To take the same bytes apart each time would be a tenth of an echo.
        layout = self._layout
        self._understand = lru_cache(maxsize=1_000)(lambda control: layout.understand(unpack_control(control)))
        # On a connected socket, sending may fail with the answer to an earlier datagram, and sendmmsg does not tell why
        # it has stopped in the middle. So there each message has a call of its own.
        self._messages_at_once = 1 if self.connected else BATCH
        self._merges = self._can_set(UDP_SEGMENT, 0)  # before Linux 4.18 the control message would be ignored
        self._has_merged = False
        self._can_set(UDP_GRO, 1)
        self._ask = BATCH  # messages to read at once
        self._ahead: list[Datagram] = []  # read, but more than a batch
        self._one_by_one = False

    def receive(self, batch: list[Datagram]) -> bool:
        if self._ahead and not self.closed:
            return self._take_from_ahead(batch)
        if self._one_by_one:
            return self._receive_one_by_one(batch)
        memory = this_thread.incoming.get(self._layout)
        if memory is None:
            memory = this_thread.incoming[self._layout] = IncomingMessages(self._layout)
        memory.reset()
        asked = self._ask
        count: int = _recvmmsg(self._socket.fileno(), memory.pointer, asked, socket.MSG_DONTWAIT, None)
        if count < 0:
            return self._receive_failed(ctypes.get_errno())
        memory.used = count
        sizes = memory.lengths[:count].tolist()
        where = zip(memory.starts, sizes, memory.names, memory.controls)
        payloads, records, understand = memory.payloads, memory.records, self._understand
        if memory.control_sizes[:count] != memory.usual_control_sizes[:count]:
            # Something is joined, or somebody has asked for time stamps or the like.
            for (start, size, name, control), control_size in zip(where, memory.control_sizes):
                raw_control = records[control.start : control.start + control_size]
                self._put_ahead(payloads[start : start + size], records[name], understand(raw_control))
            # The next call is to read about one batch of datagrams, so that they are not ahead for long.
            self._ask = max(1, BATCH * count // len(self._ahead))
            return self._take_from_ahead(batch)
        if self._layout.default_end:
            batch += [
                (payloads[start : start + size], records[name] + understand(records[control])[0])
                for start, size, name, control in where
            ]
        else:
            batch += [(payloads[start : start + size], records[name]) for start, size, name, _ in where]
        self._ask = BATCH
        self._count_received(batch, sizes)
        return count < asked

    def _put_ahead(self, payload: bytes, name: bytes, understood: tuple[bytes, int]) -> None:
        end, segment_size = understood
        route = name + end
        step = segment_size or len(payload) or 1
        self._ahead += [(payload[start : start + step], route) for start in range(0, len(payload) or 1, step)]

    def _take_from_ahead(self, batch: list[Datagram]) -> bool:
        batch += self._ahead[:BATCH]
        del self._ahead[:BATCH]
        self._count_received(batch, [len(payload) for payload, _ in batch])
        return False

    def _count_received(self, batch: list[Datagram], sizes: list[int]) -> None:
        """Count a batch, and take out what was longer than allowed."""
        self.tally.received += len(batch)
        self.tally.bytes_received += sum(sizes)
        if max(sizes) > self._longest:
            self.tally.truncated += sum(size > self._longest for size in sizes)
            batch[:] = [datagram for datagram in batch if len(datagram[0]) <= self._longest]

    def _receive_failed(self, code: int) -> bool:
        if code == errno.EAGAIN:
            return True
        if code in NO_SUCH_CALL:
            self._do_without_batches(code)
            return False
        _raise(code)

    def send(self, outbox: deque[Outgoing]) -> None:
        if self._one_by_one:
            return self._send_one_by_one(outbox)
        if len(outbox) == 1 and not self._layout.default_end:
            return self._send_lone(outbox)
        memory = this_thread.outgoing.get(self._layout)
        if memory is None:
            memory = this_thread.outgoing[self._layout] = OutgoingMessages(self._layout)
        merges, failure = self._merges, 0
        while outbox:
            messages = self._lay_out(memory, outbox, merges)
            count: int = _sendmmsg(self._socket.fileno(), memory.pointer, len(messages), socket.MSG_DONTWAIT)
            if count < 0:
                code = ctypes.get_errno()
                if code in MERGING_FAILED and messages[0][0] > 1:
                    merges, failure = False, code
                    continue
                if code in NO_SUCH_CALL and _sendmmsg(self._socket.fileno(), memory.pointer, 0, 0) < 0:
                    self._do_without_batches(code)
                    return self.send(outbox)
                _raise(code)
            self._remove_sent(outbox, messages[:count])
            if failure:
                self._merging_has_failed(failure)
            merges, failure = self._merges, 0

    def _send_lone(self, outbox: deque[Outgoing]) -> None:
        """Send a single datagram: without structures the answer to a lone question comes 10 % sooner."""
        payload, route, tally = outbox[0]
        size = len(payload)
        # The route is the address; a connected socket, where it is empty, takes none.
        address, fileno = cast("bytes", route) or None, self._socket.fileno()
        if _sendto(fileno, payload, size, socket.MSG_DONTWAIT, address, self._layout.name_size) < 0:
            _raise(ctypes.get_errno())
        self._remove_sent(outbox, [[1, size, size, tally]])

    def _lay_out(self, memory: OutgoingMessages, outbox: deque[Outgoing], merges: bool) -> list[Message]:
        """Prepare a call for the first datagrams of ``outbox``."""
        messages: list[Message] = []
        routes: list[Route] = []
        payloads: list[bytes] = []
        last_route: Route = self  # none
        last_tally: SendTally | None = None
        datagrams = total = 0  # in the last message, and their bytes
        room = 0  # bytes: the longest datagram that can become one more segment of it
        for payload, route, tally in outbox:
            size = len(payload)
            if 0 < size <= room and route is last_route and tally is last_tally:
                datagrams += 1
                total += size
                if size < room or datagrams == MAX_SEGMENTS or total + size > MAX_PAYLOAD_IPV4:
                    room = 0
            elif len(messages) == self._messages_at_once:
                break
            else:
                if datagrams > 1:
                    messages[-1][:2] = datagrams, total
                messages.append([1, size, size, tally])
                routes.append(route)
                last_route, last_tally = route, tally
                datagrams, total = 1, size
                room = size if merges and 2 * size <= MAX_PAYLOAD_IPV4 else 0
            payloads.append(payload)
        if datagrams > 1:
            messages[-1][:2] = datagrams, total
        memory.lay_out(routes, b"".join(payloads), [size for _, size, _, _ in messages])
        if len(payloads) > len(messages):
            for number, (datagrams, _, segment_size, _) in enumerate(messages):
                if datagrams > 1:
                    memory.merge(number, segment_size)
        return messages

    def _remove_sent(self, outbox: deque[Outgoing], messages: list[Message]) -> None:
        total = total_size = 0
        for datagrams, size, _, tally in messages:
            tally.sent += datagrams
            tally.bytes_sent += size
            total += datagrams
            total_size += size
        self.tally.sent += total
        self.tally.bytes_sent += total_size
        self._has_merged |= total > len(messages)
        if total == len(outbox):
            outbox.clear()
        else:
            for _ in range(total):
                outbox.popleft()

    def _merging_has_failed(self, code: int) -> None:
        """The kernel has taken as single datagrams what it has refused as one message."""
        # A segment too long for the way to one peer says nothing about the others, and may be EINVAL on older kernels.
        if code == errno.EIO or (code == errno.EINVAL and not self._has_merged):
            self._merges = False
            warn_once("UDP_SEGMENT does not work here (%s): datagrams are sent singly", errno.errorcode[code])

    def _do_without_batches(self, code: int) -> None:
        warn_once("recvmmsg or sendmmsg cannot be used (%s): a system call for each datagram", errno.errorcode[code])
        self._one_by_one = True

    def _receive_one_by_one(self, batch: list[Datagram]) -> bool:
        try:
            while len(self._ahead) < BATCH:
                payload, control, _, address = self._socket.recvmsg(65_535, CONTROL_SIZE)
                name = b"" if self.connected else pack_address(address, self.family)
                self._put_ahead(payload, name, self._layout.understand(control))
        except BlockingIOError:
            pass
        finally:
            drained = len(self._ahead) < BATCH
            if self._ahead:
                self._take_from_ahead(batch)
        return drained

    def _send_one_by_one(self, outbox: deque[Outgoing]) -> None:
        while outbox:
            payload, route, tally = outbox[0]
            address = None if self.connected else self.peer_address(route)
            self._socket.sendmsg((payload,), self._reply_control(route), 0, address)
            self._remove_sent(outbox, [[1, len(payload), 0, tally]])

    def route(self, address: Address) -> Route:
        if self.connected:
            return b""
        end = self._layout.default_end
        if end and is_mapped(address):
            end = self._layout.end(NO_MAPPED_ADDRESS)
        return pack_address(address, self.family) + end

    def peer_address(self, route: Route) -> Address:
        return self._peer_address if self.connected else unpack_address(cast("bytes", route))

    def local_address(self, route: Route) -> Address:
        return self._local_address(self._reply_control(route))

    def _reply_control(self, route: Route) -> ReplyControl:
        return reply_control(unpack_control(cast("bytes", route)[self._layout.control_offset :]))

    def close(self) -> None:
        # Others may have the same socket open, and not expect joined datagrams.
        self._can_set(UDP_GRO, 0)
        super().close()
