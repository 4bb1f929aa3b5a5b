"""Counters: the snapshots that users read, and the running counts of sockets and senders."""

import errno
from collections import Counter
from collections.abc import Mapping

import attrs


@attrs.frozen(kw_only=True)
class EndpointStatistics:
    """Counts of one socket since it was opened.

    Attributes:
      received: Datagrams read from the kernel, truncated ones included.
      bytes_received: Their payload bytes, without proxy headers; of a truncated datagram the bytes that were read.
      truncated: Datagrams longer than ``max_datagram_size``: never delivered, not even in part.
      refused_malformed: Datagrams from ``proxies`` without a valid PROXY header: never delivered.
      sent: Datagrams that the kernel has taken.
      bytes_sent: Their payload bytes.
      receive_errors: Errors of reading.
      send_errors: Datagrams that the kernel or the network refused to send.
      errors: Both kinds of error by name: ``{"EHOSTUNREACH": 2}``.
      kernel_dropped: Datagrams that the kernel dropped before they were read, nearly always because the receive buffer
        was full. No other count includes them. Coalesced datagrams (GSO, GRO) count as one. Linux only
        (``SO_MEMINFO``); 0 elsewhere.
      kernel_queued: Bytes of kernel memory that hold datagrams not yet read. Linux only; 0 elsewhere.
      receive_buffer: Bytes that the kernel granted, as ``setsockopt`` counts them. Linux lets datagrams fill twice as
        much, to have room for its own structures.
      receive_buffer_requested: Bytes that were asked for; 0 if none were.
    """

    received: int
    bytes_received: int
    truncated: int
    refused_malformed: int = 0
    sent: int
    bytes_sent: int
    receive_errors: int
    send_errors: int
    errors: Mapping[str, int] = attrs.field(hash=False)
    kernel_dropped: int = 0
    kernel_queued: int = 0
    receive_buffer: int = 0
    receive_buffer_requested: int = 0


@attrs.frozen(kw_only=True)
class ConnectionStatistics(EndpointStatistics):
    """Counts of one :class:`Connection`.

    ``received == delivered + waiting + dropped_at_end + truncated``, always.

    Attributes:
      delivered: Datagrams returned by ``receive``.
      waiting: Datagrams read ahead and not yet received; at most one batch of 64.
      dropped_at_end: Datagrams read ahead when the connection was closed.
    """

    delivered: int
    waiting: int
    dropped_at_end: int


@attrs.frozen(kw_only=True)
class ClientStatistics:
    """Counts of the conversation between a server and one client.

    ``received == delivered + waiting + dropped_inbox_full + dropped_at_end``, always.

    Attributes:
      received: Datagrams that arrived for this client.
      bytes_received: Their payload bytes.
      delivered: Datagrams taken by the handler.
      waiting: Datagrams in the inbox now.
      dropped_inbox_full: Datagrams dropped because the inbox, or all inboxes together, were full.
      dropped_at_end: Datagrams that were still in the inbox when the client was closed or cancelled.
      sent: Datagrams to this client that the kernel has taken.
      bytes_sent: Their payload bytes.
      send_errors: Datagrams to this client that the kernel or the network refused.
      requests_timed_out: Requests that :func:`request_handler` cancelled after ``timeout``.
      sends_withheld: Datagrams not sent, because of ``Limits.amplification``.
      errors: Send errors by name: ``{"EHOSTUNREACH": 2}``.
    """

    received: int
    bytes_received: int
    delivered: int
    waiting: int
    dropped_inbox_full: int
    dropped_at_end: int
    sent: int
    bytes_sent: int
    send_errors: int
    requests_timed_out: int
    errors: Mapping[str, int] = attrs.field(hash=False)
    sends_withheld: int = 0


@attrs.frozen(kw_only=True)
class ServerStatistics:
    """Counts of all datagrams that a server has read or sent, by their fate, and of its clients.

    Nothing disappears: ``received == accounted_for``, always. Statistics of several servers can be added, also with
    ``sum()``. ``kernel_dropped`` is not part of ``received``.

    Attributes:
      received, bytes_received, sent, bytes_sent, truncated, refused_malformed, receive_errors, send_errors, errors: As
        in :class:`EndpointStatistics`, over all endpoints of the server, since it began to serve on them.
      delivered: Datagrams taken by handlers.
      waiting: Datagrams in inboxes now.
      dropped_inbox_full: Datagrams dropped because an inbox, or all inboxes together, were full. A stranger's datagram
        that would not fit into an inbox counts here too.
      dropped_at_end: Datagrams still in an inbox when its client was closed or cancelled, or when its handler ended
        without having taken any.
      refused_source: Datagrams that claim to come from the server itself, from a group or from a broadcast address.
      refused_by_rate: Datagrams turned away by ``Limits.rate_limit``, those of clients included.
      refused_by_accept: Strangers' datagrams that ``accept`` turned away.
      answered_by_accept: Strangers' datagrams that ``accept`` answered with bytes, even if a limit withheld the answer.
      refused_full: Strangers' datagrams turned away at ``max_clients`` or ``clients_per_host``.
      refused_stopping: Datagrams that arrived while the server drained.
      clients: Handlers alive now, and clients that ``Server.connect`` made.
      clients_started: Clients so far.
      clients_expired: Clients ended by their idle timeout.
      clients_evicted: Clients ended to make room for a stranger.
      handler_errors: Handlers that raised.
      handlers_cancelled: Handlers that still ran when ``drain_timeout`` was over.
      requests_timed_out: Requests that :func:`request_handler` cancelled after ``timeout``.
      sends_withheld: Datagrams not sent, because of ``Limits.amplification``.
      kernel_dropped: Datagrams that the kernel dropped before the server could read them; see
        :class:`EndpointStatistics`.
    """

    received: int
    bytes_received: int
    sent: int
    bytes_sent: int
    delivered: int
    waiting: int
    dropped_inbox_full: int
    dropped_at_end: int
    truncated: int
    refused_malformed: int
    refused_source: int
    refused_by_rate: int
    refused_by_accept: int
    answered_by_accept: int
    refused_full: int
    refused_stopping: int
    clients: int
    clients_started: int
    clients_expired: int
    clients_evicted: int
    handler_errors: int
    handlers_cancelled: int
    requests_timed_out: int
    sends_withheld: int
    receive_errors: int
    send_errors: int
    errors: Mapping[str, int] = attrs.field(hash=False)
    kernel_dropped: int

    @property
    def accounted_for(self) -> int:
        """The sum of all counts in which a received datagram can end; equal to ``received``."""
        dropped = self.dropped_inbox_full + self.dropped_at_end + self.truncated
        refused = self.refused_malformed + self.refused_source + self.refused_by_rate + self.refused_by_accept
        refused += self.refused_full + self.refused_stopping
        return self.delivered + self.waiting + dropped + refused + self.answered_by_accept

    @property
    def lost(self) -> dict[str, int]:
        """The counts of lost datagrams (received and not handled, or not sent), by the name of the field."""
        names = [field.name for field in attrs.fields(ServerStatistics)]
        return {name: getattr(self, name) for name in names if _is_loss(name)}

    def __add__(self, other: object) -> "ServerStatistics":
        if not isinstance(other, ServerStatistics):
            return NotImplemented
        sums = {
            field.name: getattr(self, field.name) + getattr(other, field.name)
            for field in attrs.fields(ServerStatistics)
            if field.name != "errors"
        }
        return ServerStatistics(errors=Counter(self.errors) + Counter(other.errors), **sums)

    def __radd__(self, other: object) -> "ServerStatistics":
        return self if other == 0 else NotImplemented  # sum() begins with 0


def _is_loss(name: str) -> bool:
    return name.startswith(("dropped_", "refused_")) or name in {
        "truncated",
        "sends_withheld",
        "send_errors",
        "kernel_dropped",
    }


@attrs.frozen(kw_only=True)
class KernelFigures:
    """The kernel's figures for a socket; 0 where the kernel reports none."""

    dropped: int = 0  # datagrams
    queued: int = 0  # bytes
    receive_buffer: int = 0  # bytes


@attrs.define(eq=False)
class ReceiveCounts:
    """Running counts of the datagrams that one socket has received; its engine writes them."""

    messages: int = 0  # as the kernel queued them: coalesced datagrams (GRO) are one message
    received: int = 0
    bytes_received: int = 0
    truncated: int = 0
    refused_malformed: int = 0


@attrs.define(eq=False)
class Sender:
    """Running counts of the datagrams sent by one client, one connection, or the program itself."""

    sent: int = attrs.field(default=0, init=False)
    bytes_sent: int = attrs.field(default=0, init=False)
    send_errors: int = attrs.field(default=0, init=False)
    # By errno name. Built at the first error: most clients never see one, and there may be 100,000 of them.
    _errors: dict[str, int] | None = attrs.field(default=None, init=False)

    @property
    def errors(self) -> dict[str, int]:
        return dict(self._errors or {})

    def count_send_error(self, error: OSError) -> None:
        self.send_errors += 1
        self._count(error)

    def _count(self, error: OSError) -> None:
        if self._errors is None:
            self._errors = {}
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        self._errors[name] = self._errors.get(name, 0) + 1


@attrs.define(eq=False)
class SocketCounts(Sender):
    """Running counts of the datagrams that one socket has sent, and of its errors in both directions."""

    receive_errors: int = attrs.field(default=0, init=False)

    def count_receive_error(self, error: OSError) -> None:
        self.receive_errors += 1
        self._count(error)
