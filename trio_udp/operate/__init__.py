"""Running a server as a service: on several CPUs, restarted without loss, from the command line or by systemd.

    command line -> serve_workers() -> Supervisor -> Slot -> WorkerProcess   (the supervisor's process)
                                                                 | JSON lines
                                                              _worker.py     (one process for each worker)

    systemd.py      sockets that systemd passes, and notices to systemd
    _watching.py    views of a supervisor: the live view (_live.py, _view.py), metrics and health by HTTP (_health.py)

The rest of trio_udp does not use this package, and imports it only when one of the names below is first asked for. Read
_supervisor.py first.
"""

from ._process import WorkerError as WorkerError
from ._supervisor import Supervisor as Supervisor, WorkerStatus as WorkerStatus, serve_workers as serve_workers
from .systemd import endpoints_from_systemd as endpoints_from_systemd

for _public in (Supervisor, WorkerError, WorkerStatus, endpoints_from_systemd, serve_workers):
    _public.__module__ = "trio_udp"
del _public
