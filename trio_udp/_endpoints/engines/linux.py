"""The engine for Linux: up to 64 messages for one system call, in both directions.

recvmmsg(2) and sendmmsg(2) are called through ctypes, with the structures of linux_structures.py.

The kernel can move many datagrams as one message, see udp(7). Sending: consecutive datagrams of one size to one peer
leave as the *segments* of a single message (GSO, ``UDP_SEGMENT``), which saves a third of an echo's time at four
datagrams for each client. Receiving: datagrams that a sender on this machine or a network card has coalesced arrive in
one buffer, together with the size of its segments (GRO, ``UDP_GRO``).

A route is the raw socket address of the peer followed, where the kernel tells destinations, by a raw control message
that names our own address; see linux_routes.py. It is decoded only on demand.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Sequence
from itertools import starmap
from operator import and_, eq, ge
from typing import Any, NoReturn, cast

import trio

from ..._log import warn_once
from .._address import MAX_PAYLOAD_IPV4, Address, host_bytes, pack_address, unpack_address
from . import coalescing
from ._engine import BATCH, Outgoing, Received, Route
from ._socket import SocketEngine, tells_destination
from .linux_routes import CONNECTED, IPV4, IPV4_WILDCARD, IPV6, IPV6_WILDCARD, Ends
from .linux_structures import IncomingMessages, OutgoingMessages, this_thread
from .pktinfo import CONTROL_SIZE, MAPPED, UDP_SEGMENT, ReplyControl, is_doubtful_host, pack_control

# Kernels before 6.9 divide a message into no more segments than this.
MAX_SEGMENTS = 64

# Datagrams to look at for one call, where neighbours can be merged.
MERGE_AT_ONCE = 4 * BATCH

# These errors may concern merging only: no checksum in hardware (EIO), or a segment longer than the path MTU of this
# peer (EMSGSIZE, on older kernels EINVAL). The kernel may fragment a single datagram, but not a segment.
MERGING_FAILED = {errno.EIO, errno.EINVAL, errno.EMSGSIZE}

# Errors by which a kernel, an emulator or a seccomp filter denies a system call.
NO_SUCH_CALL = {errno.ENOSYS, errno.EPERM, errno.EINVAL}

# AttributeError if the C library lacks these functions; see engine_for().
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


class LinuxEngine(SocketEngine):
    """A UDP socket that is read and written in batches."""

    def __init__(self, sock: trio.socket.SocketType, max_datagram_size: int, *, shared: bool = False) -> None:
        super().__init__(sock, max_datagram_size)
        self._tells_destination = tells_destination(sock)
        if self.connected:
            self._layout = CONNECTED
            self._peer_address: Address = sock.getpeername()
        elif self.family == socket.AF_INET:
            self._layout = IPV4_WILDCARD if self._tells_destination else IPV4
        else:
            self._layout = IPV6_WILDCARD if self._tells_destination else IPV6
        self._ends = Ends(self._layout)
        # The kernel reports the refusal of an earlier datagram once, and sendmmsg does not report an error after the
        # first message. So each message of a connected socket has a call of its own.
        self._at_once = 1 if self.connected else BATCH
        # Before Linux 4.18 the kernel would ignore the control message. The previous owner may have set the option.
        self._merges = self._get(UDP_SEGMENT) is not None if shared else self._can_set(UDP_SEGMENT, 0)
        self._has_merged = False
        self._coalescing = None if shared else coalescing.switch_on(self._socket)
        self._ask = BATCH  # messages to read at once
        self._drained = False  # the last read found fewer
        self._one_by_one = False
        self._ports: frozenset[bytes] = frozenset()
        self._host = slice(4, 8) if self.family == socket.AF_INET else slice(8, 24)  # in a socket address
        self._first_byte = self._host.start
        self._peer_is_doubtful = False  # of a connected socket

    # Receiving.

    def receive(self, batch: list[Received]) -> bool:
        if self._ahead and not self.closed:
            return self._take_from_ahead(batch)
        if self._one_by_one:
            return self._receive_one_by_one(batch)
        memory = this_thread.incoming(self._layout)
        memory.reset()
        asked = self._ask
        count: int = _recvmmsg(self._socket.fileno(), memory.pointer, asked, socket.MSG_DONTWAIT, None)
        if count < 0:
            return self._receive_failed(ctypes.get_errno())
        memory.used = count
        self.counts.messages += count
        sizes = memory.lengths[:count].tolist()
        if memory.control_sizes[:count] != memory.usual_control_sizes[:count]:
            self._put_messages_ahead(memory, sizes)
            # The next call reads about one batch of datagrams, so that few are read ahead.
            self._ask = max(1, BATCH * count // len(self._ahead))
            self._drained = count < asked
            return self._take_from_ahead(batch)
        payloads, records, ends = memory.payloads, memory.records, self._ends
        if self._tells_destination:
            batch += [
                (payloads[start : start + size], records[name] + ends[records[control]], ())
                for start, size, name, control in zip(memory.starts, sizes, memory.names, memory.controls)
            ]
        else:
            batch += [
                (payloads[start : start + size], records[name], ())
                for start, size, name in zip(memory.starts, sizes, memory.names)
            ]
        self._ask = BATCH
        self._count_received(batch, sizes)
        return count < asked

    def _put_messages_ahead(self, memory: IncomingMessages, sizes: list[int]) -> None:
        """Read ahead messages of which some are coalesced, or have unusual control messages."""
        payloads, records, understand = memory.payloads, memory.records, self._ends.understand
        where = zip(memory.starts, sizes, memory.names, memory.controls, memory.control_sizes)
        for start, size, name, control, control_size in where:
            end, segment_size, ancillary = understand(records[control.start : control.start + control_size])
            self._put_ahead(payloads[start : start + size], records[name] + end, segment_size, ancillary)

    def _take_from_ahead(self, batch: list[Received]) -> bool:
        batch += self._ahead[:BATCH]
        del self._ahead[:BATCH]
        self._count_received(batch, [len(payload) for payload, _, _ in batch])
        return self._drained and not self._ahead

    def _count_received(self, batch: list[Received], sizes: list[int]) -> None:
        """Count a batch, and remove datagrams that are longer than allowed."""
        self.counts.received += len(batch)
        self.counts.bytes_received += sum(sizes)
        if max(sizes) > self._longest:
            self.counts.truncated += sum(size > self._longest for size in sizes)
            batch[:] = [datagram for datagram in batch if len(datagram[0]) <= self._longest]

    def _receive_failed(self, code: int) -> bool:
        if code == errno.EAGAIN:
            return True
        if code in NO_SUCH_CALL:
            self._do_without_batches(code)
            return False
        _raise(code)

    # Sending.

    def send(self, outgoing: Sequence[Outgoing]) -> int:
        if self._one_by_one:
            return self._send_one_by_one(outgoing)
        if not self._tells_destination and (
            len(outgoing) == 1 or (self.connected and not self._begins_alike(outgoing))
        ):
            return self._send_single(outgoing[0])
        memory = this_thread.outgoing(self._layout)
        # Routes are compared for equality, not identity: each received datagram has its own route object. The first two
        # nearly always decide; comparing all costs as much as a tenth of the layout.
        merges = self._merges and len(outgoing) > 1 and outgoing[0][1] == outgoing[1][1]
        payloads, routes, _ = zip(*outgoing[: MERGE_AT_ONCE if merges else BATCH])
        code = 0
        if merges or (self._merges and len(routes) > 2 and any(map(eq, routes, routes[1:]))):
            datagrams = self._lay_out_merged(memory, payloads, routes)
            sent: int = _sendmmsg(self._socket.fileno(), memory.pointer, len(datagrams), socket.MSG_DONTWAIT)
            if sent >= 0:
                taken = sum(datagrams[:sent])
                self._has_merged |= taken > sent
                return taken
            code = ctypes.get_errno()
            if code not in MERGING_FAILED or datagrams[0] == 1:
                return self._send_failed(code, outgoing)
            # The kernel may still take the datagrams singly.
            payloads, routes = payloads[: self._at_once], routes[: self._at_once]
        memory.lay_out(routes, b"".join(payloads), list(map(len, payloads)))
        sent = _sendmmsg(self._socket.fileno(), memory.pointer, len(payloads), socket.MSG_DONTWAIT)
        if sent < 0:
            return self._send_failed(ctypes.get_errno(), outgoing)
        if code:
            self._merging_has_failed(code)
        return sent

    def _begins_alike(self, outgoing: Sequence[Outgoing]) -> bool:
        """Whether the first two datagrams of a connected socket can be merged."""
        return self._merges and 0 < len(outgoing[1][0]) <= len(outgoing[0][0])

    def _send_single(self, outgoing: Outgoing) -> int:
        """Send one datagram without structures, which makes a single reply 10 % faster."""
        payload, route, _ = outgoing
        # The route is the peer address; on a connected socket it is empty.
        size, fileno = len(payload), self._socket.fileno()
        if _sendto(fileno, payload, size, socket.MSG_DONTWAIT, route or None, self._layout.name_size) < 0:
            _raise(ctypes.get_errno())
        return 1

    def _lay_out_merged(
        self, memory: OutgoingMessages, payloads: Sequence[bytes], routes: Sequence[Route]
    ) -> list[int]:
        """Prepare messages for the first datagrams, neighbours merged; return the number of datagrams in each."""
        sizes = list(map(len, payloads))
        datagrams: list[int] = []
        message_routes: list[Route] = []
        message_sizes: list[int] = []
        segment_sizes: list[int] = []  # 0 for a message of one datagram
        start = 0
        for run in runs_alike(routes, sizes)[: self._at_once]:
            end = start + run
            while start < end:
                size = sizes[start]
                if end - start == 1:
                    count, segment_size = 1, 0
                else:
                    count = segments_in(sizes, start, end)
                    segment_size = size if count > 1 else 0
                    size = size * (count - 1) + sizes[start + count - 1]
                datagrams.append(count)
                message_routes.append(routes[start])
                message_sizes.append(size)
                segment_sizes.append(segment_size)
                start += count
        for column in (datagrams, message_routes, message_sizes, segment_sizes):
            del column[self._at_once :]
        memory.lay_out(message_routes, b"".join(payloads[: sum(datagrams)]), message_sizes, segment_sizes)
        return datagrams

    def _send_failed(self, code: int, outgoing: Sequence[Outgoing]) -> int:
        memory = this_thread.outgoing(self._layout)
        if code in NO_SUCH_CALL and _sendmmsg(self._socket.fileno(), memory.pointer, 0, 0) < 0:
            self._do_without_batches(code)
            return self.send(outgoing)
        _raise(code)

    def _merging_has_failed(self, code: int) -> None:
        """Stop merging if the kernel, which has taken these datagrams singly, does not support it."""
        # A segment longer than one peer's path MTU says nothing about the other peers; on older kernels it gives
        # EINVAL.
        if code == errno.EIO or (code == errno.EINVAL and not self._has_merged):
            self._merges = False
            warn_once("UDP_SEGMENT does not work here (%s): datagrams are sent singly", errno.errorcode[code])

    # Without recvmmsg and sendmmsg.

    def _do_without_batches(self, code: int) -> None:
        warn_once("recvmmsg or sendmmsg cannot be used (%s): a system call for each datagram", errno.errorcode[code])
        self._one_by_one = True

    def _receive_one_by_one(self, batch: list[Received]) -> bool:
        self._drained = False
        try:
            while len(self._ahead) < BATCH:
                payload, control, _, address = self._socket.recvmsg(65_535, CONTROL_SIZE)
                self.counts.messages += 1
                end, segment_size, ancillary = self._ends.understand(b"".join(starmap(pack_control, control)))
                name = b"" if self.connected else pack_address(address, self.family)[: self._layout.end_offset]
                self._put_ahead(payload, name + end, segment_size, ancillary)
        except BlockingIOError:
            self._drained = True
        finally:
            if self._ahead:
                self._take_from_ahead(batch)
        return self._drained and not self._ahead

    def _send_one_by_one(self, outgoing: Sequence[Outgoing]) -> int:
        payload, route, _ = outgoing[0]
        reply, _ = self._end_of(route)
        self._socket.sendmsg((payload,), reply, 0, None if self.connected else self.peer_address(route))
        return 1

    # Routes.

    def route(self, address: Address, local_address: Address | None = None) -> Route:
        reply = self._control_from(address, local_address)
        if self.connected:
            return b""
        name = pack_address(address, self.family)[: self._layout.end_offset]
        return name + self._ends.pack(reply) if self._tells_destination else name

    def peer_address(self, route: Route) -> Address:
        return self._peer_address if self.connected else unpack_address(cast("bytes", route))

    def host(self, route: Route) -> bytes:
        if self.connected:
            return host_bytes(self._peer_address)
        host = cast("bytes", route)[self._host]
        return host[12:] if host.startswith(MAPPED) else host

    def _end_of(self, route: Route) -> tuple[ReplyControl, bytes]:
        return self._ends.take_apart(cast("bytes", route))

    # Untrusted sources.

    def watch_ports(self, ports: frozenset[int]) -> None:
        self._ports = frozenset(port.to_bytes(2, "big") for port in ports)
        if self.connected:
            self._peer_is_doubtful = self._is_doubtful(self._peer_address, ports)

    def doubtful_source(self, route: Route) -> bool:
        if self.connected:
            return self._peer_is_doubtful
        name: Any = route
        if name[2:4] in self._ports:
            return True
        # The first byte clears nearly all addresses; fe80::1 and ::1 need the other bytes.
        return not 0 < name[self._first_byte] < 224 and is_doubtful_host(name[self._host])

    def close(self) -> None:
        if self._coalescing is not None:
            coalescing.switch_off(self._socket, self._coalescing)
            self._coalescing = None
        super().close()


def runs_alike(routes: Sequence[Route], sizes: list[int]) -> list[int]:
    """Lengths of the runs of datagrams that have equal routes and do not grow."""
    # Compares neighbours in C; a Python loop costs twice as much. A 0 ends a run.
    alike = map(eq, routes, routes[1:])
    if sizes.count(sizes[0]) < len(sizes):
        alike = map(and_, alike, map(ge, sizes, sizes[1:]))
    return [len(run) + 1 for run in bytes(alike).split(b"\0")]


def segments_in(sizes: list[int], start: int, end: int) -> int:
    """How many datagrams of a run one message can carry: all of one size but the last, which may be smaller."""
    size, count = sizes[start], end - start
    if size == sizes[end - 2] and sizes[end - 1] and count <= MAX_SEGMENTS and size * count <= MAX_PAYLOAD_IPV4:
        return count
    if not size:
        return 1
    most = min(end, start + MAX_SEGMENTS, start + MAX_PAYLOAD_IPV4 // size)
    position = start + 1
    while position < most and sizes[position] == size:
        position += 1
    if position < most and sizes[position]:  # smaller, since sizes do not grow
        position += 1
    return position - start
