"""A network in memory for testing programs that speak UDP: no sockets, virtual time, random network conditions.

_network.py      SimulatedNetwork: open endpoints on it, connect, inject, cut it in two. Read this first
_engine.py       an endpoint's engine over a simulated socket
_wire.py         datagrams under way: when they arrive and at which sockets, and partitions
_sockets.py      what the kernel keeps: buffers, and which socket has which address and which groups
_conditions.py   loss, latency and so on: draw what happens to a datagram
_packets.py      a datagram under way, and its fragments
_addresses.py    the form in which the network compares addresses
_timeline.py     recorded events, as values and as readable lines
_scheduling.py   Trio's random task order

Each file imports only from files below it. See docs/testing.md. ``import trio_udp`` does not import this package.
"""

from ._network import SimulatedNetwork as SimulatedNetwork
from ._scheduling import deterministic_scheduling as deterministic_scheduling
from ._timeline import DatagramEvent as DatagramEvent
from ._wire import Partition as Partition

__all__ = ["DatagramEvent", "Partition", "SimulatedNetwork", "deterministic_scheduling"]

for _name in __all__:
    globals()[_name].__module__ = __name__
del _name
