"""The code that makes the system calls: one engine for every platform, and a faster one for Linux.

_engine.py            Engine: the interface between an endpoint and an engine
_choice.py            the choice of an engine for a socket
_socket.py            the common part of both engines
proxy.py              a wrapper around another engine that takes off the headers of proxies
proxy_header.py       the header of the PROXY protocol
portable.py           for every platform: one system call for each datagram
unix.py               for Unix-domain sockets: names, credentials, the file of a socket
linux.py              for Linux: one system call for up to 64 messages
linux_routes.py       the routes of the Linux engine: raw addresses
linux_structures.py   the C structures of its system calls
segmentation.py       which datagrams leave as one message (GSO)
pktinfo.py            the control messages that tell and set our own address
ancillary.py          options that bring other ancillary data, and passed files
probes.py             questions to the kernel about addresses
multicast.py          groups and multicast options
coalescing.py         UDP_GRO (GRO), turned on and off for all engines of a socket
"""

from ._choice import engine_for as engine_for
from ._engine import (
    BATCH as BATCH,
    Ancillary as Ancillary,
    Engine as Engine,
    Multicast as Multicast,
    Outgoing as Outgoing,
    Received as Received,
    Route as Route,
)
from ._socket import is_connected as is_connected
from .linux_routes import network_getter as network_getter
from .proxy import INNER_SIZE as INNER_SIZE, ProxyEngine as ProxyEngine
from .segmentation import by_peer as by_peer
from .unix import (
    AF_UNIX as AF_UNIX,
    Credentials as Credentials,
    Name as Name,
    bound_file as bound_file,
    credentials_of as credentials_of,
    is_by_name as is_by_name,
    route_to_name as route_to_name,
    switch_on_credentials as switch_on_credentials,
    unix_engine as unix_engine,
    watch_names as watch_names,
)
