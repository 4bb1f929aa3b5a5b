"""Where datagrams come from and go to: the only part of the package that knows sockets.

_open.py        from a host and a port to endpoints
_endpoint.py    a bound socket: waiting, batches, counters
_engine.py      what an endpoint asks of the code that makes the system calls
_portable.py    that code for every platform
_pktinfo.py     the control messages that tell, and set, our own address
"""

from ._endpoint import Endpoint as Endpoint
from ._engine import BATCH as BATCH, Address as Address, Datagram as Datagram, Route as Route
from ._open import open_endpoints as open_endpoints
