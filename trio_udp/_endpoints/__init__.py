"""Where datagrams come from and go to: the only part of the package that knows sockets.

_open.py        from a host and a port to endpoints
_endpoint.py    a bound socket: waiting, batches, counters
_engine.py      what an endpoint asks of the code that makes the system calls
_faults.py      what each error of a socket means
_choice.py      which such code there is for a socket
_socket.py      what is the same in all of it
_portable.py    for every platform, a system call for each datagram
_linux.py       for Linux, one for up to 64
_address.py     addresses: what they look like, which of them can be sent to, and how much
_pktinfo.py     the control messages that tell, and set, our own address
"""

from ._address import (
    MAX_PAYLOAD_IPV4 as MAX_PAYLOAD_IPV4,
    Address as Address,
    numeric_address as numeric_address,
    source_prefix as source_prefix,
)
from ._endpoint import Endpoint as Endpoint
from ._engine import BATCH as BATCH, Datagram as Datagram, Route as Route
from ._open import open_connected_endpoint as open_connected_endpoint, open_endpoints as open_endpoints
