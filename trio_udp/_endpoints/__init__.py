"""Endpoints: the only part of the package that knows sockets.

_endpoint.py    Endpoint, the public face of a bound socket
_reader.py      receiving for a server: waiting, batches, the hook in Trio's scheduler
_back_off.py    telling persistent faults of reading from passing ones
_one_by_one.py  receiving without a server: one datagram at a time
_outbox.py      sending: order, waiting for room, the turns of tasks
_unix_outbox.py sending on a Unix-domain socket: one line of tasks for each peer
_unread.py      how much of a Unix-domain socket's send buffer its peers hold
_datagram.py    Datagram, the public view of one datagram
_addressed.py   send_to: datagrams that the program itself addresses
_multicast.py   joining groups, and the options for sending to them
_open.py        from a host and a port to endpoints
_echoes.py      datagrams that a server sends to a group and receives back
_unix.py        from a path to an endpoint: stale files, permissions
_sources.py     source addresses that are refused or never answered
_buffers.py     buffer sizes: requests, and the warning about a small one
_faults.py      the meaning of each socket error
_address.py     addresses: their forms and kinds
_networks.py    networks as users write them
engines/        the code that makes the system calls
"""

from ._address import (
    MAX_PAYLOAD_IPV4 as MAX_PAYLOAD_IPV4,
    Address as Address,
    host_bytes as host_bytes,
    host_key as host_key,
    is_answerable as is_answerable,
    is_limited_broadcast as is_limited_broadcast,
    is_multicast as is_multicast,
    is_unspecified as is_unspecified,
    network_of as network_of,
    numeric_address as numeric_address,
)
from ._addressed import find_way as find_way, send_on as send_on, send_on_nowait as send_on_nowait
from ._buffers import check_max_datagram_size as check_max_datagram_size, grant_receive_buffer as grant_receive_buffer
from ._datagram import (
    Datagram as Datagram,
    Origin as Origin,
    make_datagram as make_datagram,
    route_of as route_of,
)
from ._echoes import Echoes as Echoes
from ._endpoint import Endpoint as Endpoint, make_endpoint as make_endpoint, reader_of as reader_of
from ._networks import Network as Network, Networks as Networks
from ._one_by_one import OneByOne as OneByOne
from ._open import open_connected_endpoint as open_connected_endpoint, open_endpoints as open_endpoints
from ._outbox import (
    LONG_ROW as LONG_ROW,
    MOST_HELD as MOST_HELD,
    YIELD_EVERY as YIELD_EVERY,
    Outbox as Outbox,
    Payload as Payload,
    ServerTurn as ServerTurn,
)
from ._reader import EachPass as EachPass, Reader as Reader
from ._sources import Source as Source, Sources as Sources
from ._unix import (
    open_connected_unix_endpoint as open_connected_unix_endpoint,
    open_unix_endpoint as open_unix_endpoint,
)
from .engines import (
    BATCH as BATCH,
    Ancillary as Ancillary,
    Credentials as Credentials,
    Engine as Engine,
    Outgoing as Outgoing,
    Received as Received,
    Route as Route,
    credentials_of as credentials_of,
    is_by_name as is_by_name,
    network_getter as network_getter,
    route_to_name as route_to_name,
)
