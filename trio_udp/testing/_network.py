"""The network: who is where, what becomes of a datagram, and when it arrives.

    SimulatedEngine.send() -> _send() -> [the dice] -> _under_way -> _arrive() -> SimulatedEngine.put()

Everything under way is in one heap, and arrives when Trio's clock says so; of two that are due at the same moment, the
first to be sent. Whoever looks (``_catch_up``) lets arrive what is due; a task that lives only while something is under
way sees to it that somebody looks in time.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import os
import random
from collections.abc import Iterable, Iterator
from typing import Any, cast

import attrs
import trio

from .._connect import Connection
from .._conversation import Payload
from .._endpoints import Address, Endpoint, numeric_address
from .._endpoints._address import is_ipv6, max_payload
from .._endpoints._endpoint import check_max_datagram_size
from ._engine import SimulatedEngine, on_this_machine
from ._scheduling import check_seed
from ._timeline import DatagramEvent

# A datagram that is to be overtaken is held back for up to so many seconds.
HELD_BACK = 0.1

# RFC 791: the least that every link can carry.
LEAST_MTU = 68

# Where a connection is bound that does not say where: an address for documentation, and the ports that RFC 6335 has for
# whoever asks for none.
SOMEWHERE, SOMEWHERE_IPV6 = "198.51.100.1", "2001:db8::1"
FREE_PORTS = range(49_152, 65_536)


def _check_number(value: object, name: str, least: float, most: float, *, kind: Any = (int, float)) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} must be {'an int' if kind is int else 'a number'}, not {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be from {least} to {most}, not {value!r}")


def _probability(_: object, attribute: attrs.Attribute[float], value: float) -> None:
    _check_number(value, attribute.name, 0, 1)


def _latency(_: object, attribute: attrs.Attribute[tuple[float, float]], value: tuple[float, float]) -> None:
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"latency must be two numbers of seconds (low, high), not {value!r}")
    low, high = value
    _check_number(low, "latency", 0, 1e9)
    _check_number(high, "latency", low, 1e9)


def _mtu(_: object, attribute: attrs.Attribute[int], value: int) -> None:
    _check_number(value, "mtu", LEAST_MTU, 65_535, kind=int)


def _bandwidth(_: object, attribute: attrs.Attribute[float | None], value: float | None) -> None:
    if value is not None:
        _check_number(value, "bandwidth", 1e-9, 1e18)


def _seed(_: object, attribute: attrs.Attribute[int], value: int) -> None:
    check_seed(value)


@attrs.define(eq=False, kw_only=True)
class SimulatedNetwork:
    """A network in memory, on Trio's clock, with weather that a seed decides.

    Endpoints and connections on it are the same types as on a real one. By default nothing is lost and everything
    arrives at once. The weather may change at any time, by assignment, for what is sent from then on. Use it inside
    Trio, best with ``trio.testing.MockClock(autojump_threshold=0)`` (for pytest: ``autojump_clock``); nothing needs to
    be closed. The same seed gives the same run, byte for byte, under :func:`deterministic_scheduling`.

    Attributes:
      seed: Of the dice.
      loss: Probability that a packet is lost.
      duplicate: Probability that a datagram arrives twice.
      reorder: Probability that a datagram is held back, for up to a tenth of a second, so that those sent after it
        overtake it. Otherwise those between the same two addresses arrive in the order in which they were sent.
      latency: Seconds on the way, from the least to the most. Since datagrams between two addresses do not overtake one
        another, dense traffic is held up by its slowest, and nearer to the most.
      mtu: Bytes in one packet, IP header included. A longer datagram is sent in fragments, as a kernel does by default,
        and lost if one of them is.
      bandwidth: Payload bytes per second that leave each sending address. What waits to leave is in the address's send
        buffer; when that is full, ``send_nowait`` raises ``trio.WouldBlock`` and ``send`` waits. ``None`` for no limit.
      events: What has happened so far, a list of :class:`DatagramEvent`. It grows until you ``clear()`` it.
    """

    seed: int = attrs.field(default=0, validator=_seed, on_setattr=attrs.setters.frozen)
    loss: float = attrs.field(default=0.0, validator=_probability)
    duplicate: float = attrs.field(default=0.0, validator=_probability)
    reorder: float = attrs.field(default=0.0, validator=_probability)
    latency: tuple[float, float] = attrs.field(default=(0.0, 0.0), validator=_latency)
    mtu: int = attrs.field(default=1_500, validator=_mtu)
    bandwidth: float | None = attrs.field(default=None, validator=_bandwidth)
    events: list[DatagramEvent] = attrs.field(factory=list, init=False, repr=False)

    _dice: random.Random = attrs.field(init=False, repr=False)
    _engines: dict[Address, SimulatedEngine] = attrs.field(factory=dict, init=False, repr=False)
    _partitions: list[Partition] = attrs.field(factory=list, init=False, repr=False)
    _free_ports: Iterator[int] = attrs.field(factory=lambda: itertools.cycle(FREE_PORTS), init=False, repr=False)
    _numbers: Iterator[int] = attrs.field(factory=lambda: itertools.count(1), init=False, repr=False)

    # A heap of (when it arrives, number to tell ties, packet); and for each pair of addresses when the last one arrives
    # that is in order.
    _under_way: list[tuple[float, int, _Packet]] = attrs.field(factory=list, init=False, repr=False)
    _order: Iterator[int] = attrs.field(factory=itertools.count, init=False, repr=False)
    _last_arrival: dict[tuple[Address, Address], float] = attrs.field(factory=dict, init=False, repr=False)
    _clock: trio.abc.Clock | None = attrs.field(default=None, init=False, repr=False)  # of the run that times are of
    _alarm: trio.CancelScope | None = attrs.field(default=None, init=False, repr=False)  # of the task that looks

    @_dice.default
    def _(self) -> random.Random:
        return random.Random(self.seed)

    def endpoint(
        self,
        host: str,
        port: int,
        *,
        max_datagram_size: int = 65_535,
        receive_buffer: int | None = None,
        send_buffer: int | None = None,
    ) -> Endpoint:
        """Open an endpoint at any address, for :func:`serve_endpoints`.

        It has no ``socket``: to ask for it raises ``io.UnsupportedOperation``, an ``OSError``.

        Args:
          host: Numeric. ``"0.0.0.0"`` or ``"::"`` stands for all addresses of its family that have no endpoint of their
            own.
          port: UDP port; 0 lets the network choose.
          max_datagram_size: Longest payload to accept, in bytes; longer datagrams are counted as truncated.
          receive_buffer: Bytes of memory for datagrams not yet read, each of which takes 768 besides its payload. What
            arrives when it is full is dropped, and counted as ``kernel_dropped``. 212,992 by default, as on Linux.
          send_buffer: The same for datagrams that have not yet left; see ``bandwidth``.

        Raises:
          OSError: ``EADDRINUSE``: the address is taken.
          TypeError, ValueError: An argument makes no sense.
        """
        check_max_datagram_size(max_datagram_size)
        for name, size in (("receive_buffer", receive_buffer), ("send_buffer", send_buffer)):
            if size is not None:
                _check_number(size, name, 1, 2**63, kind=int)
        return self._open(
            numeric_address((host, port)),
            max_datagram_size=max_datagram_size,
            receive_buffer=receive_buffer,
            send_buffer=send_buffer,
        )

    async def connect(self, host: str, port: int, *, local_address: Address | None = None) -> Connection:
        """Open a connection to an address; stands in for :func:`trio_udp.connect`.

        Args:
          host: Numeric.
          port: UDP port.
          local_address: Any numeric host and port to send from; port 0 lets the network choose, which by default
            chooses the host too.

        Raises:
          OSError: ``EADDRINUSE``: ``local_address`` is taken.
          TypeError, ValueError: Not addresses that can be written to, or of two families.
        """
        peer = _destination((host, port))
        local = on_this_machine(numeric_address(local_address or (SOMEWHERE_IPV6 if is_ipv6(peer) else SOMEWHERE, 0)))
        _check_families(local, peer)
        await trio.lowlevel.checkpoint()
        endpoint = self._open(local, peer=peer)
        endpoint.tells_refusals = True
        return Connection(endpoint, endpoint.route(peer))

    def inject(self, payload: Payload, source: Address, destination: Address) -> None:
        """Send a datagram from any address, also a forged one, and through the same weather as all others.

        Raises:
          OSError: ``EMSGSIZE``: longer than a UDP datagram can be.
          TypeError, ValueError: Not bytes-like, not addresses, or of two families.
        """
        source, destination = _one_address(source), _destination(destination)
        _check_families(source, destination)
        copy = bytes(memoryview(payload))
        if len(copy) > max_payload(destination):
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        now = self._catch_up()
        self._send(copy, source, destination, now, now)

    def partition(
        self, some: Iterable[Address], others: Iterable[Address] | None = None, *, error: int | None = None
    ) -> Partition:
        """Cut some addresses off from others: nothing is sent or arrives, in neither direction.

        It is there at once, until :meth:`Partition.heal`; or for the time of a ``with``::

            with network.partition([connection.local_address]):
                await trio.sleep(120)

        Args:
          some: Addresses, with their ports.
          others: Addresses to cut them off from; by default all others.
          error: An errno (such as ``errno.EHOSTUNREACH`` or ``errno.EPERM``) that sending across fails with, as where
            the sender's own router or firewall is the cause. By default the sender is not told.
        """
        if error is not None:
            _check_number(error, "error", 1, 2**31, kind=int)
        side = frozenset(map(_one_address, some))
        other_side = None if others is None else frozenset(map(_one_address, others))
        self._catch_up_if_any()
        partition = Partition(self, side, other_side, error)
        self._partitions.append(partition)
        return partition

    def fail_next_receive(self, address: Address, error: int) -> None:
        """Let reading fail once, with an errno, at the endpoint or connection at an address.

        What has arrived before is read before. ``errno.EAGAIN`` stands for a datagram that was announced and then is
        not there, as after a wrong checksum.

        Raises:
          ValueError: Nobody is there.
        """
        _check_number(error, "error", 1, 2**31, kind=int)
        engine = self._engines.get(numeric_address(address))
        if engine is None:
            raise ValueError(f"nobody is at {address!r}")
        engine.put_error(OSError(error, os.strerror(error)))

    def timeline(self) -> str:
        """What has happened so far, one line for each of ``events``."""
        return "\n".join(map(str, self.events))

    # What follows is for the engines.

    def _catch_up(self) -> float:
        """Let everything arrive that is due; return the time."""
        now = trio.current_time()
        clock = trio.lowlevel.current_clock()
        if clock is not self._clock:
            # Another run of Trio's, with a time of its own: what was under way in the one before arrives now.
            self._clock = clock
            self._under_way = [(now, order, packet) for _, order, packet in sorted(self._under_way)]
            self._last_arrival.clear()
            for engine in self._engines.values():
                engine.forget_time()
        while self._under_way and self._under_way[0][0] <= now:
            when, _, packet = heapq.heappop(self._under_way)
            self._arrive(when, packet)
        return now

    def _catch_up_if_any(self) -> None:
        """What is due arrives before the network changes. (Outside of Trio nothing can be.)"""
        if self._under_way and trio.lowlevel.in_trio_run():
            self._catch_up()

    def _send(self, payload: bytes, source: Address, destination: Address, now: float, departure: float) -> None:
        """Take over a datagram that will have left its sender at ``departure``."""
        self._leave(_Packet(next(self._numbers), payload, source, destination), now, departure)
        self._catch_up()
        self._look_in_time()

    def _check_route(self, source: Address, destination: Address) -> None:
        """Raise what a kernel would that cannot send from here to there."""
        if not destination[1]:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        for partition in self._partitions:
            if partition._error is not None and partition._separates(source, destination):
                raise OSError(partition._error, os.strerror(partition._error))

    def _remove(self, engine: SimulatedEngine) -> None:
        self._catch_up_if_any()
        del self._engines[engine.bound_address]

    def _open(self, address: Address, **options: Any) -> Endpoint:
        self._catch_up_if_any()
        host, port, *rest = address
        for candidate in [port] if port else itertools.islice(self._free_ports, len(FREE_PORTS)):
            address = cast("Address", (host, candidate, *rest))
            if address not in self._engines:
                engine = self._engines[address] = SimulatedEngine(self, address, **options)
                endpoint = Endpoint(engine)
                endpoint.receive_buffer_requested = options.get("receive_buffer") or 0
                return endpoint
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    def _leave(self, packet: _Packet, now: float, departure: float) -> None:
        """Throw the dice for a packet: the same number of them each time, whatever they say."""
        dice = self._dice
        lost, doubled = dice.random(), dice.random()
        travels = [(dice.uniform(*self.latency), dice.random(), dice.uniform(0, HELD_BACK)) for _ in range(2)]
        if self._is_cut(packet):
            self._record(now, packet, "cut off")
        elif lost < 1 - (1 - self.loss) ** packet.fragments(self.mtu):
            self._record(now, packet, "lost")
        else:
            for copy, (latency, reordered, held_back) in enumerate(travels[: 2 if doubled < self.duplicate else 1]):
                path = packet.source, packet.destination
                arrival = max(departure + latency, self._last_arrival.get(path, 0.0))
                fate = "duplicated" if copy else "sent"
                if reordered < self.reorder:
                    arrival += held_back
                    fate = "held back"
                else:
                    self._last_arrival[path] = arrival
                self._record(now, packet, fate)
                heapq.heappush(self._under_way, (arrival, next(self._order), packet))

    def _arrive(self, now: float, packet: _Packet) -> None:
        path = packet.source, packet.destination
        if self._last_arrival.get(path) == now:
            del self._last_arrival[path]
        if self._is_cut(packet):
            self._record(now, packet, "cut off")
            return
        engine = self._listener(packet)
        if engine is None:
            self._record(now, packet, "port closed")
            # Who is not connected would not be told anyway.
            if not packet.is_refusal and self._connected(packet.source, packet.destination):
                self._leave(packet.refusal(), now, now)
        elif packet.is_refusal:
            self._record(now, packet, "arrived")
            engine.refuse()
        elif engine.put(packet.payload, (packet.source, packet.destination)):
            self._record(now, packet, "arrived")
        else:
            self._record(now, packet, "buffer full")

    def _listener(self, packet: _Packet) -> SimulatedEngine | None:
        """Who takes a packet at its destination. A connected one takes it from its peer only."""
        if packet.is_refusal:
            return self._connected(packet.destination, packet.source)
        port = packet.destination[1]
        everywhere: Address = ("::", port, 0, 0) if is_ipv6(packet.destination) else ("0.0.0.0", port)
        for address in (packet.destination, everywhere):
            engine = self._engines.get(address)
            if engine is not None and engine.peer in (None, packet.source):
                return engine
        return None

    def _connected(self, address: Address, peer: Address) -> SimulatedEngine | None:
        engine = self._engines.get(address)
        return engine if engine is not None and engine.peer == peer else None

    def _is_cut(self, packet: _Packet) -> bool:
        return any(partition._separates(packet.source, packet.destination) for partition in self._partitions)

    def _record(self, now: float, packet: _Packet, fate: str) -> None:
        if packet.is_refusal:
            fate = f"refusal {fate}"
        self.events.append(DatagramEvent(now, packet.number, fate, packet.source, packet.destination, packet.payload))

    def _look_in_time(self) -> None:
        """See to it that somebody looks when the next packet is due."""
        if not self._under_way:
            return
        if self._alarm is None:
            # Of the system's, because it must outlive whoever sends, and every clean-up that still awaits an answer.
            trio.lowlevel.spawn_system_task(self._look_while_under_way)
            self._alarm = trio.CancelScope()  # until it begins
        elif self._under_way[0][0] < self._alarm.deadline:
            self._alarm.deadline = self._under_way[0][0]

    async def _look_while_under_way(self) -> None:
        try:
            while self._under_way:
                with trio.CancelScope(deadline=self._under_way[0][0]) as self._alarm:
                    await trio.sleep_forever()
                self._catch_up()
        finally:
            self._alarm = None


def _check_families(source: Address, destination: Address) -> None:
    if is_ipv6(source) != is_ipv6(destination):
        raise ValueError(f"{source!r} and {destination!r} are of two families")


def _one_address(address: Address) -> Address:
    """Check an address that datagrams can come from or go to."""
    address = numeric_address(address)
    if on_this_machine(address) != address:
        raise ValueError(f"{address!r} stands for many addresses: name those that are meant")
    return address


def _destination(address: Address) -> Address:
    """Check an address that is to be written to."""
    address = on_this_machine(numeric_address(address))
    if not address[1]:
        raise ValueError(f"nobody can write to port 0: {address!r}")
    return address


@attrs.frozen(eq=False)
class Partition:
    """A cut through the network, as :meth:`SimulatedNetwork.partition` makes it; a context manager that heals it."""

    _network: SimulatedNetwork = attrs.field(repr=False)
    _some: frozenset[Address]
    _others: frozenset[Address] | None  # None: all others
    _error: int | None

    def heal(self) -> None:
        """Let datagrams pass again. Idempotent."""
        if self in self._network._partitions:
            self._network._catch_up_if_any()
            self._network._partitions.remove(self)

    def __enter__(self) -> Partition:
        return self

    def __exit__(self, *_: object) -> None:
        self.heal()

    def _separates(self, one: Address, other: Address) -> bool:
        """Whether two addresses are on different sides."""
        return self._lies_between(one, other) or self._lies_between(other, one)

    def _lies_between(self, one: Address, other: Address) -> bool:
        beyond = other not in self._some if self._others is None else other in self._others
        return one in self._some and beyond


@attrs.frozen(eq=False)
class _Packet:
    """A datagram on its way, or what tells its sender that nobody listens there (ICMP, "port unreachable")."""

    number: int
    payload: bytes
    source: Address
    destination: Address
    is_refusal: bool = False

    def refusal(self) -> _Packet:
        return _Packet(self.number, self.payload, self.destination, self.source, is_refusal=True)

    def fragments(self, mtu: int) -> int:
        """How many packets of IP it takes. All but the last of them carry a multiple of 8 bytes: RFC 791, RFC 8200."""
        header, of_fragment = (40, 48) if is_ipv6(self.source) else (20, 20)
        length = 8 + (0 if self.is_refusal else len(self.payload))
        if header + length <= mtu:
            return 1
        return -(-length // ((mtu - of_fragment) // 8 * 8))
