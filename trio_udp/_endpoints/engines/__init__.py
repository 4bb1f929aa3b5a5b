"""The code that makes the system calls: one engine for every platform, and a faster one for Linux.

_engine.py            what an endpoint asks of an engine
_choice.py            which engine there is for a socket
_socket.py            what both have in common
portable.py           for every platform, a system call for each datagram
linux.py              for Linux, one for up to 64
linux_routes.py       its routes: raw addresses
linux_structures.py   the C structures of its calls
pktinfo.py            the control messages that tell, and set, our own address
probes.py             questions to the kernel about addresses
coalescing.py         UDP_GRO, switched on and off for all engines of a socket
"""

from ._choice import engine_for as engine_for
from ._engine import (
    BATCH as BATCH,
    Ancillary as Ancillary,
    Engine as Engine,
    Outgoing as Outgoing,
    Received as Received,
    Route as Route,
)
from ._socket import is_connected as is_connected
