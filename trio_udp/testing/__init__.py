"""A network in memory for testing programs that speak UDP: no sockets, virtual time, random network conditions.

_network.py      SimulatedNetwork: open endpoints, connect, inject datagrams, partition. Read this first
_engine.py       an endpoint's engine over a simulated socket
_wire.py         datagrams in transit: arrival times, receiving sockets, partitions
_sockets.py      the kernel's part: buffers, and the table of addresses and groups
_conditions.py   loss, latency and so on: the random draw for each packet
_packets.py      a datagram in transit, and its fragments
_addresses.py    addresses in their normal form, so that they can be compared
_timeline.py     recorded events, as values and as readable lines
_scheduling.py   other randomness: Trio's task order, jitter

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
