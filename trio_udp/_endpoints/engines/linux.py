"""The engine for Linux: up to 64 messages per system call, in both directions.

recvmmsg(2) and sendmmsg(2) are called through ctypes, with the structures of linux_structures.py.

The kernel can move many datagrams as one message, see udp(7). Sending: consecutive datagrams of one size to one peer
leave as the *segments* of a single message (GSO, ``UDP_SEGMENT``), which saves a third of an echo's time at four
datagrams for each client. Receiving: datagrams that a network card or a sender on this machine has coalesced arrive in
one buffer, together with the size of its segments (GRO, ``UDP_GRO``).

A route is the raw socket address of the peer. Where the kernel tells destinations, a raw control message that names our
own address follows it; see linux_routes.py. It is decoded only on demand.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Sequence
from operator import eq
from typing import NoReturn

import trio

from ..._log import warn_once
from . import coalescing, segmentation
from ._engine import BATCH, Received, Route
from .linux_routes import RawRoutes
from .linux_structures import IncomingMessages, this_thread
from .pktinfo import UDP_SEGMENT

# Datagrams to consider for one call where neighbours can be merged.
MERGE_AT_ONCE = 4 * BATCH

# These errors may concern merging only: the hardware computes no checksum (EIO), or a segment is longer than the path
# MTU to this peer (EMSGSIZE, on older kernels EINVAL). The kernel may fragment a single datagram, but not a segment.
MERGING_FAILED = {errno.EIO, errno.EINVAL, errno.EMSGSIZE}

# Errors with which a kernel, an emulator or a seccomp filter denies a system call.
NO_SUCH_CALL = {errno.ENOSYS, errno.EPERM, errno.EINVAL}

# AttributeError if the C library lacks these functions; see engine_for().
_libc = ctypes.CDLL(None, use_errno=True)
_recvmmsg, _sendmmsg, _sendto = _libc.recvmmsg, _libc.sendmmsg, _libc.sendto


def _raise(code: int) -> NoReturn:
    raise OSError(code, os.strerror(code))


def can_serve(sock: trio.socket.SocketType) -> bool:
    """Whether this engine can serve a socket: UDP over IPv4 or IPv6, on a 64-bit machine that has the system calls."""
    # The C library of a 32-bit machine may have two layouts of these structures, for times before and after 2038.
    if (
        ctypes.sizeof(ctypes.c_void_p) != 8
        or sock.family not in (socket.AF_INET, socket.AF_INET6)
        or sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL) != socket.IPPROTO_UDP
    ):
        return False
    fileno, flags = sock.fileno(), socket.MSG_DONTWAIT
    # Try both calls with no messages: an emulator or a seccomp filter may deny them.
    if _recvmmsg(fileno, None, 0, flags, None) < 0 or _sendmmsg(fileno, None, 0, flags) < 0:
        code = ctypes.get_errno()
        if code in NO_SUCH_CALL:
            name = errno.errorcode[code]
            warn_once("recvmmsg or sendmmsg cannot be used (%s): each datagram takes a system call", name)
            return False
    return True


class LinuxEngine(RawRoutes):
    """A UDP socket that is read and written in batches."""

    def __init__(self, sock: trio.socket.SocketType, max_datagram_size: int, *, shared: bool = False) -> None:
        super().__init__(sock, max_datagram_size)
        # The kernel reports the refusal of an earlier datagram once, and sendmmsg reports no error after the first
        # message. So each message of a connected socket has a call of its own.
        self._at_once = 1 if self.connected else BATCH
        # A kernel before Linux 4.18 would ignore the control message. A previous owner may have set the option.
        self._merges = self._get(UDP_SEGMENT) is not None if shared else self._can_set(UDP_SEGMENT, 0)
        self._has_merged = False
        self._coalescing = None if shared else coalescing.switch_on(self._socket)
        self._ask = BATCH  # messages to read at once
        self._drained = False  # the last read returned fewer

    # Receiving.

    def receive(self, batch: list[Received]) -> bool:
        if self._ahead and not self.closed:
            return self._take_from_ahead(batch)
        memory = this_thread.incoming(self._layout)
        memory.reset()
        asked = self._ask
        count: int = _recvmmsg(self._socket.fileno(), memory.pointer, asked, socket.MSG_DONTWAIT, None)
        if count < 0:
            code = ctypes.get_errno()
            if code == errno.EAGAIN:
                return True
            _raise(code)
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
        """Read ahead a batch in which some messages are coalesced or have unusual control messages."""
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
        """Count a batch, and remove the datagrams that are longer than ``max_datagram_size``."""
        self.counts.received += len(batch)
        self.counts.bytes_received += sum(sizes)
        if max(sizes) > self._longest:
            self.counts.truncated += sum(size > self._longest for size in sizes)
            batch[:] = [datagram for datagram in batch if len(datagram[0]) <= self._longest]

    # Sending.

    def send(self, payloads: Sequence[bytes], sizes: Sequence[int], routes: Sequence[Route]) -> int:
        if not self._tells_destination and (len(payloads) == 1 or (self.connected and not self._begins_alike(sizes))):
            # Without ctypes structures, a single reply is 10 % faster. The route is the peer's address, or empty.
            fileno, name, name_size = self._socket.fileno(), routes[0] or None, self._layout.name_size
            if _sendto(fileno, payloads[0], sizes[0], socket.MSG_DONTWAIT, name, name_size) < 0:
                _raise(ctypes.get_errno())
            return 1
        memory = this_thread.outgoing(self._layout)
        # Compare routes for equality, not identity: each received datagram has its own route object. The first two
        # nearly always decide; comparing all costs a tenth as much as the layout.
        merges = self._merges and len(routes) > 1 and routes[0] == routes[1]
        most = MERGE_AT_ONCE if merges else BATCH
        if len(routes) > most:
            payloads, sizes, routes = payloads[:most], sizes[:most], routes[:most]
        code = 0
        if merges or (self._merges and len(routes) > 2 and any(map(eq, routes, routes[1:]))):
            datagrams, to, message_sizes, segment_sizes = segmentation.merge(routes, sizes, self._at_once)
            memory.lay_out(to, b"".join(payloads[: sum(datagrams)]), message_sizes, segment_sizes)
            sent: int = _sendmmsg(self._socket.fileno(), memory.pointer, len(datagrams), socket.MSG_DONTWAIT)
            if sent >= 0:
                taken = sum(datagrams[:sent])
                self._has_merged |= taken > sent
                return taken
            code = ctypes.get_errno()
            if code not in MERGING_FAILED or datagrams[0] == 1:
                _raise(code)
            # The kernel may still take the datagrams one by one.
            most = self._at_once
            payloads, sizes, routes = payloads[:most], sizes[:most], routes[:most]
        memory.lay_out(routes, b"".join(payloads), sizes)
        sent = _sendmmsg(self._socket.fileno(), memory.pointer, len(payloads), socket.MSG_DONTWAIT)
        if sent < 0:
            _raise(ctypes.get_errno())
        if code:
            self._merging_has_failed(code)
        return sent

    def _begins_alike(self, sizes: Sequence[int]) -> bool:
        """Whether the first two datagrams of a connected socket can be merged."""
        return self._merges and 0 < sizes[1] <= sizes[0]

    def _merging_has_failed(self, code: int) -> None:
        """Stop merging if it is not supported: the kernel has just taken the same datagrams one by one."""
        # A segment longer than the path MTU to one peer says nothing about other peers; on older kernels it gives
        # EINVAL.
        if code == errno.EIO or (code == errno.EINVAL and not self._has_merged):
            self._merges = False
            warn_once("UDP_SEGMENT does not work here (%s): datagrams are sent one by one", errno.errorcode[code])

    def close(self) -> None:
        if self._coalescing is not None:
            coalescing.switch_off(self._socket, self._coalescing)
            self._coalescing = None
        super().close()
