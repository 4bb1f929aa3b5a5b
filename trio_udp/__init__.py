"""UDP servers with structured concurrency: one task and one bounded, ordered inbox for each client.

    trio.run(trio_udp.serve, handler, 9999)  # runs async def handler(client) once for each address that writes

serve(handler, port)                 run a server
serve_endpoints(handler, endpoints)  run a server on sockets that are open already
serve_workers("module:name", port)   run a server in several processes, for several CPUs
connect(host, port)                  open the other end of a conversation
open_endpoints(port)                 open sockets without a server
request(channel, payload, ...)       ask until there is an answer
@request_handler                     make a handler from an async function that answers one datagram
@datagram_handler                    make a handler from a plain function that sees every datagram, without clients
typed(handler, ...)                  give a handler objects instead of bytes
Limits(...), RateLimit(...)          bound the memory and the traffic that strangers can use
testing                              a network in memory, for tests

help(trio_udp.serve) explains every argument.
"""

from types import FunctionType
from typing import TYPE_CHECKING

from ._client import Client as Client
from ._connection import Connection as Connection, connect as connect, connect_unix as connect_unix
from ._endpoints import (
    Address as Address,
    Credentials as Credentials,
    Datagram as Datagram,
    Endpoint as Endpoint,
    Payload as Payload,
    open_endpoints as open_endpoints,
    open_unix_endpoint as open_unix_endpoint,
)
from ._handlers import (
    Accept as Accept,
    Handler as Handler,
    OnError as OnError,
    datagram_handler as datagram_handler,
)
from ._limits import Limits as Limits, RateLimit as RateLimit
from ._requests import request_handler as request_handler
from ._serve import serve as serve, serve_endpoints as serve_endpoints
from ._server import Server as Server, log_error as log_error, raise_error as raise_error
from ._statistics import (
    ClientStatistics as ClientStatistics,
    ConnectionStatistics as ConnectionStatistics,
    EndpointStatistics as EndpointStatistics,
    ServerStatistics as ServerStatistics,
)
from .layers.request import NoAnswerError as NoAnswerError, backoff as backoff, request as request
from .layers.typed import TypedChannel as TypedChannel, typed as typed

if TYPE_CHECKING:
    from . import dtls as dtls
    from .operate import (
        Supervisor as Supervisor,
        WorkerError as WorkerError,
        WorkerStatus as WorkerStatus,
        endpoints_from_systemd as endpoints_from_systemd,
        serve_workers as serve_workers,
    )

__all__ = [
    "Accept",
    "Address",
    "Client",
    "ClientStatistics",
    "Connection",
    "ConnectionStatistics",
    "Credentials",
    "Datagram",
    "Endpoint",
    "EndpointStatistics",
    "Handler",
    "Limits",
    "NoAnswerError",
    "OnError",
    "Payload",
    "RateLimit",
    "Server",
    "ServerStatistics",
    "Supervisor",
    "TypedChannel",
    "WorkerError",
    "WorkerStatus",
    "backoff",
    "connect",
    "connect_unix",
    "datagram_handler",
    "endpoints_from_systemd",
    "log_error",
    "open_endpoints",
    "open_unix_endpoint",
    "raise_error",
    "request",
    "request_handler",
    "serve",
    "serve_endpoints",
    "serve_workers",
    "typed",
]
__version__ = "0.1.0"

# Tracebacks, documentation and pickles then name the public module. Type aliases have no ``__module__`` to set.
for _value in [globals().get(name) for name in __all__]:
    if issubclass(type(_value), (type, FunctionType)):  # on 3.10 isinstance() takes an alias for a class
        _value.__module__ = __name__
del _value, FunctionType

if not TYPE_CHECKING:

    def __getattr__(name):
        """Import at the first use what a plain server does not need: ``dtls``, and the names of ``operate``."""
        from importlib import import_module

        if name == "dtls":
            return import_module(".dtls", __name__)
        if name in __all__:
            return getattr(import_module(".operate", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__, "dtls"})


del TYPE_CHECKING
