"""A network in memory, to test what speaks UDP: no sockets, no ports, no waiting, and weather that a seed decides.

_network.py      the network: who is where, what becomes of a datagram, and when it arrives. Read this first
_engine.py       what a socket would be: buffers and errors, seen by an ``Endpoint``
_timeline.py     what has happened, as values and as readable lines
_scheduling.py   Trio's own dice

See docs/testing.md. ``import trio_udp`` does not import this.
"""

from ._network import Partition as Partition, SimulatedNetwork as SimulatedNetwork
from ._scheduling import deterministic_scheduling as deterministic_scheduling
from ._timeline import DatagramEvent as DatagramEvent

__all__ = ["DatagramEvent", "Partition", "SimulatedNetwork", "deterministic_scheduling"]

for _name in __all__:
    globals()[_name].__module__ = __name__
del _name
