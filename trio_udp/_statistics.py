"""Counters: the snapshots that users read, and the mutable tallies that the package writes."""

import errno
from collections.abc import Mapping

import attrs


@attrs.frozen(kw_only=True)
class EndpointStatistics:
    """What has passed through one socket since it was opened.

    Attributes:
      received: Datagrams read from the kernel, truncated ones included.
      bytes_received: Their payload bytes, as far as they were read.
      truncated: Datagrams longer than ``max_datagram_size``: never delivered, not even in part.
      sent: Datagrams that the kernel has taken.
      bytes_sent: Their payload bytes.
      receive_errors: Errors that reading gave.
      send_errors: Datagrams that the kernel or the network refused to send.
      errors: Both kinds of error by name: ``{"EHOSTUNREACH": 2}``.
      kernel_dropped: Datagrams that never came here: the kernel has dropped them, nearly always because the receive
        buffer was full. They are in no other count; some that travelled as one (GSO, GRO) count as one. Told by Linux
        (``SO_MEMINFO``), like the next; 0 elsewhere.
      kernel_queued: Bytes of kernel memory that hold datagrams not yet read.
      receive_buffer: Bytes granted for them, in the measure of ``SO_RCVBUF``: Linux lets them fill twice as much, to
        have room for its own structures.
      receive_buffer_requested: What was asked for; 0 where nothing was.
    """

    received: int
    bytes_received: int
    truncated: int
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
    """What has passed through one :class:`Connection`.

    ``received == delivered + waiting + dropped_at_end + truncated``, always.

    Attributes:
      delivered: Datagrams returned by ``receive``.
      waiting: Datagrams read ahead that nobody has asked for yet; at most one batch of 64.
      dropped_at_end: Datagrams read ahead when the connection was closed.
    """

    delivered: int
    waiting: int
    dropped_at_end: int


@attrs.frozen(kw_only=True)
class ClientStatistics:
    """What has passed between a server and one client.

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
      requests_timed_out: Requests that :func:`request_handler` gave up on.
      sends_withheld: Datagrams not sent, for the sake of ``Limits.amplification``.
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
    """What has happened to every datagram that a server read, and to its clients.

    Nothing disappears: ``received == delivered + waiting + dropped_inbox_full + dropped_at_end + truncated
    + refused_by_rate + refused_by_accept + refused_full + refused_stopping``, always. ``kernel_dropped`` is not part of
    it.

    Attributes:
      received, bytes_received, sent, bytes_sent, truncated, receive_errors, send_errors, errors: As in
        :class:`EndpointStatistics`, over all endpoints of the server.
      delivered: Datagrams taken by handlers.
      waiting: Datagrams in inboxes now.
      dropped_inbox_full: Datagrams dropped because an inbox, or all inboxes together, were full; also strangers'
        datagrams for which there would have been no room.
      dropped_at_end: Datagrams still in an inbox when its client was closed or cancelled, or when its handler
        ended without having taken any.
      refused_by_rate: Datagrams turned away by ``Limits.rate_limit``, those of clients included.
      refused_by_accept: Strangers' datagrams that ``accept`` turned away.
      refused_full: Strangers' datagrams turned away at ``max_clients``.
      refused_stopping: Datagrams that came too late: the server was draining.
      clients: Handlers alive now.
      clients_started: Handler calls so far.
      clients_expired: Clients ended by their idle timeout.
      clients_evicted: Clients ended to make room for a stranger.
      handler_errors: Handlers that raised.
      requests_timed_out: Requests that :func:`request_handler` gave up on.
      sends_withheld: Datagrams not sent, for the sake of ``Limits.amplification``.
      kernel_dropped: Datagrams that never came to the server: the kernel's receive buffers were full; see
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
    refused_by_accept: int
    refused_full: int
    refused_stopping: int
    clients: int
    clients_started: int
    clients_expired: int
    clients_evicted: int
    handler_errors: int
    requests_timed_out: int
    receive_errors: int
    send_errors: int
    errors: Mapping[str, int] = attrs.field(hash=False)
    kernel_dropped: int = 0
    refused_by_rate: int = 0
    sends_withheld: int = 0


@attrs.frozen(kw_only=True)
class KernelFigures:
    """What the kernel says about a socket; zeros where it does not."""

    dropped: int = 0  # datagrams
    queued: int = 0  # bytes
    receive_buffer: int = 0  # bytes


@attrs.define(eq=False)
class SendTally:
    """Running counts of what one conversation has sent."""

    sent: int = 0
    bytes_sent: int = 0
    send_errors: int = 0
    # Built at the first error: most clients never see one, and there may be 100,000 of them.
    _errors: dict[str, int] | None = None

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
class EndpointTally(SendTally):
    """Running counts of what has passed through one socket; its engine writes them."""

    received: int = 0
    bytes_received: int = 0
    truncated: int = 0
    receive_errors: int = 0

    def count_receive_error(self, error: OSError) -> None:
        self.receive_errors += 1
        self._count(error)
