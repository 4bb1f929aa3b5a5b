"""Running a server as a service: on all cores, restarted without loss, from the command line or by systemd.

    command line -> serve_workers() -> Supervisor -> Slot -> WorkerProcess   (the supervisor's process)
                                                                 | JSON lines
                                                              _worker.py     (one process for each worker)

    systemd.py      sockets that systemd passes, and notices to it
    _watching.py    what shows a supervisor: the live view (_live.py, _view.py), metrics and health by HTTP (_health.py)

Uses only public names of the rest of the package, and is not used by it. Read _supervisor.py first.
"""

from ._process import WorkerError as WorkerError
from ._supervisor import Supervisor as Supervisor, WorkerStatus as WorkerStatus, serve_workers as serve_workers
from .systemd import endpoints_from_systemd as endpoints_from_systemd
