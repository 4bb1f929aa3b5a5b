"""Setting up a process once at its start: logging and the garbage collector, of the supervisor and its workers."""

from __future__ import annotations

import gc
import json
import logging
import sys
import time


class JSONFormatter(logging.Formatter):
    """Formats each record as one JSON object on one line."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def prepare_process(level: int, style: str, *, is_worker: bool) -> None:
    """Set up the log and the garbage collector of a process that serves.

    Args:
      level: Level of the root logger.
      style: ``"text"``, ``"json"``, or ``"none"`` to leave logging as it is.
      is_worker: Do not log when serving starts and stops, because the supervisor does.
    """
    # A full collection visits all clients: 0.4 s for 100,000 of them. With the default threshold of 10, a flood of new
    # clients causes nine of them.
    gc.set_threshold(700, 10, 1000)
    if style != "none":
        handler = logging.StreamHandler(sys.stderr)
        text = logging.Formatter("%(asctime)s %(levelname)-7s [%(process)d] %(message)s", "%H:%M:%S")
        handler.setFormatter(JSONFormatter() if style == "json" else text)
        logging.basicConfig(level=level, handlers=[handler], force=True)
    if is_worker and level > logging.DEBUG:
        logging.getLogger("trio_udp").setLevel(max(level, logging.WARNING))
