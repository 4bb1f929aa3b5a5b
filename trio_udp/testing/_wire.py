"""Datagrams in transit: when each arrives, and at which sockets.

    SimulatedEngine.send() -> Wire.send() -> [random draw] -> in transit -> arrive -> SimulatedSocket.put()

All packets in transit are in one heap. They arrive when Trio's clock reaches their time; of two that are due at the
same time, the one sent first arrives first. ``catch_up`` delivers the packets that are due. Every call that reads the
state of the network begins with it, and a task that runs only while packets are in transit calls it at the time of the
next arrival.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import os
from collections.abc import Iterator

import attrs
import trio

from .._endpoints import Address
from .._endpoints._address import is_multicast
from .._trio import is_in_trio
from ._addresses import interface_of, is_beyond, reaches_many
from ._conditions import Conditions
from ._packets import Packet, SimulatedRoute
from ._sockets import SimulatedSocket, SocketTable
from ._timeline import DatagramEvent


@attrs.define(eq=False)
class Wire:
    """Carries datagrams between the sockets of a table, under conditions that may change at any time."""

    conditions: Conditions
    _sockets: SocketTable
    events: list[DatagramEvent] = attrs.field(factory=list, init=False)
    _partitions: list[Partition] = attrs.field(factory=list, init=False)
    _numbers: Iterator[int] = attrs.field(factory=lambda: itertools.count(1), init=False)

    # A heap of (arrival time, number to break ties, packet). And for each path, the arrival of its last packet in
    # order.
    _in_transit: list[tuple[float, int, Packet]] = attrs.field(factory=list, init=False)
    _order: Iterator[int] = attrs.field(factory=itertools.count, init=False)
    _last_arrival: dict[tuple[Address, Address], float] = attrs.field(factory=dict, init=False)

    _clock: trio.abc.Clock | None = attrs.field(default=None, init=False)  # all times here are of this clock
    _alarm: trio.CancelScope | None = attrs.field(default=None, init=False)  # its deadline is the next arrival

    # Sending.

    def check_path(self, source: Address, destination: Address) -> None:
        """Raise the error that a kernel gives if it has no route from source to destination."""
        if is_beyond(destination):
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
        for partition in self._partitions:
            if partition.error is not None and partition.separates(source, destination):
                raise OSError(partition.error, os.strerror(partition.error))

    def send(
        self,
        payload: bytes,
        source: Address,
        destination: Address,
        now: float,
        departure: float,
        sender: SimulatedSocket | None = None,
    ) -> None:
        """Carry a datagram that leaves its sender at ``departure``; without a sender it is an injected one."""
        number = next(self._numbers)
        if not reaches_many(destination):
            self._leave(Packet(number, payload, source, destination, destination), now, departure)
        else:
            # Each machine gets its own copy; sockets on one machine share it.
            receivers = self._sockets.many(destination, source)
            if sender is not None and is_multicast(destination):
                receivers = [socket for socket in receivers if _reaches(sender, socket)]
            machines = dict.fromkeys(socket.own_addresses[0] for socket in receivers)
            for receiver in machines:
                self._leave(Packet(number, payload, source, destination, receiver), now, departure)
            if not machines:
                self._record(now, Packet(number, payload, source, destination, destination), "no receiver")
        self.catch_up()
        self._set_alarm()

    def _leave(self, packet: Packet, now: float, departure: float) -> None:
        journeys = self.conditions.journeys(packet)
        if self._is_cut(packet):
            self._record(now, packet, "cut off")
            return
        if not journeys:
            self._record(now, packet, "lost")
        for copy, (latency, held_back) in enumerate(journeys):
            arrival = max(departure + latency, self._last_arrival.get(packet.path, 0.0))
            fate = "duplicated" if copy else "sent"
            if held_back is None:
                self._last_arrival[packet.path] = arrival
            else:
                arrival += held_back
                fate = "held back"
            self._record(now, packet, fate)
            heapq.heappush(self._in_transit, (arrival, next(self._order), packet))

    # Arriving.

    def catch_up(self) -> float:
        """Deliver the packets that are due; return the time."""
        now = trio.current_time()
        clock = trio.lowlevel.current_clock()
        if clock is not self._clock:
            # Another run of Trio has its own time: packets in transit from the previous run arrive now.
            self._clock = clock
            self._in_transit = [(now, order, packet) for _, order, packet in sorted(self._in_transit)]
            self._last_arrival.clear()
            for socket in self._sockets:
                socket.forget_times()
        while self._in_transit and self._in_transit[0][0] <= now:
            when, _, packet = heapq.heappop(self._in_transit)
            self._arrive(when, packet)
        return now

    def catch_up_if_any(self) -> None:
        """Deliver the packets that are due, before the network changes. Outside of Trio, do nothing."""
        if self._in_transit and is_in_trio():
            self.catch_up()

    def _arrive(self, now: float, packet: Packet) -> None:
        if self._last_arrival.get(packet.path) == now:
            del self._last_arrival[packet.path]
        if self._is_cut(packet):
            self._record(now, packet, "cut off")
        elif packet.is_refusal:
            sender = self._sockets.connected(packet.destination, packet.source)
            self._record(now, packet, "arrived" if sender else "port closed")
            if sender:
                sender.refuse()
        elif packet.is_copy:
            self._arrive_at_machine(now, packet)
        elif (socket := self._sockets.unicast(packet.destination, packet.source)) is not None:
            self._put(now, packet, socket, packet.destination)
        else:
            self._record(now, packet, "port closed")
            # Only a connected sender receives a refusal.
            if self._sockets.connected(packet.source, packet.destination):
                self._leave(packet.refusal(), now, now)

    def _arrive_at_machine(self, now: float, packet: Packet) -> None:
        found = self._sockets.many(packet.destination, packet.source)
        sockets = [socket for socket in found if socket.own_addresses[0] == packet.receiver]
        for socket in sockets:
            self._put(now, packet, socket, socket.source_for(packet.source))
        if not sockets:  # they have left the group, or were closed, in the meantime
            self._record(now, packet, "no receiver")

    def _put(self, now: float, packet: Packet, socket: SimulatedSocket, local: Address) -> None:
        route = SimulatedRoute(packet.source, local, packet.destination, interface_of(packet.destination))
        self._record(now, packet, "arrived" if socket.put(packet.payload, route) else "buffer full")

    def _record(self, now: float, packet: Packet, fate: str) -> None:
        if packet.is_refusal:
            fate = f"refusal {fate}"
        receiver = packet.receiver if packet.is_copy else None
        self.events.append(
            DatagramEvent(now, packet.number, fate, packet.source, packet.destination, packet.payload, receiver)
        )

    # The alarm.

    def _set_alarm(self) -> None:
        """Make sure that ``catch_up`` is called when the next packet is due."""
        if not self._in_transit:
            return
        if self._alarm is None:
            # A system task, because it must outlive the sender, and every clean-up that still waits for an answer.
            trio.lowlevel.spawn_system_task(self._catch_up_while_in_transit)
            self._alarm = trio.CancelScope()  # until the task begins
        elif self._in_transit[0][0] < self._alarm.deadline:
            self._alarm.deadline = self._in_transit[0][0]

    async def _catch_up_while_in_transit(self) -> None:
        try:
            while self._in_transit:
                with trio.CancelScope(deadline=self._in_transit[0][0]) as self._alarm:
                    await trio.sleep_forever()
                self.catch_up()
        finally:
            self._alarm = None

    # Partitions.

    def cut(self, some: frozenset[Address], others: frozenset[Address] | None, error: int | None) -> Partition:
        """Begin a partition; see :meth:`SimulatedNetwork.partition`."""
        self.catch_up_if_any()
        partition = Partition(self, some, others, error)
        self._partitions.append(partition)
        return partition

    def heal(self, partition: Partition) -> None:
        if partition in self._partitions:
            self.catch_up_if_any()
            self._partitions.remove(partition)

    def _is_cut(self, packet: Packet) -> bool:
        return any(partition.separates(*packet.path) for partition in self._partitions)


def _reaches(sender: SimulatedSocket, receiver: SimulatedSocket) -> bool:
    """Whether a datagram to a group reaches a member. No routers count hops here, but 0 stays on the machine."""
    return sender.loop if receiver.is_on_machine_of(sender) else sender.hops > 0


@attrs.frozen(eq=False)
class Partition:
    """A cut through the network, made by :meth:`SimulatedNetwork.partition`; a context manager that heals it."""

    _wire: Wire = attrs.field(repr=False)
    _some: frozenset[Address]
    _others: frozenset[Address] | None  # None: all others
    error: int | None

    def heal(self) -> None:
        """Let datagrams pass again. Idempotent."""
        self._wire.heal(self)

    def __enter__(self) -> Partition:
        return self

    def __exit__(self, *_: object) -> None:
        self.heal()

    def separates(self, one: Address, other: Address) -> bool:
        """Whether two addresses are on different sides."""
        return self._lies_between(one, other) or self._lies_between(other, one)

    def _lies_between(self, one: Address, other: Address) -> bool:
        beyond = other not in self._some if self._others is None else other in self._others
        return one in self._some and beyond
