"""UDP servers with structured concurrency: one task and one bounded, ordered inbox for each client."""

from ._client import Client as Client
from ._connect import Connection as Connection, connect as connect
from ._endpoints import Endpoint as Endpoint, open_endpoints as open_endpoints
from ._limits import Limits as Limits, RateLimit as RateLimit
from ._requests import request_handler as request_handler
from ._serve import (
    Server as Server,
    log_error as log_error,
    serve as serve,
    serve_endpoints as serve_endpoints,
)
from ._statistics import (
    ClientStatistics as ClientStatistics,
    ConnectionStatistics as ConnectionStatistics,
    EndpointStatistics as EndpointStatistics,
    ServerStatistics as ServerStatistics,
)

__all__ = [
    "Client",
    "ClientStatistics",
    "Connection",
    "ConnectionStatistics",
    "Endpoint",
    "EndpointStatistics",
    "Limits",
    "RateLimit",
    "Server",
    "ServerStatistics",
    "connect",
    "log_error",
    "open_endpoints",
    "request_handler",
    "serve",
    "serve_endpoints",
]
__version__ = "0.1.0"

# Tracebacks, documentation and pickles name the public place.
for _name in __all__:
    globals()[_name].__module__ = __name__
del _name
