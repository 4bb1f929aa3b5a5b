"""Every server of the benchmark that is written in Python, as a program: what runs in a process alone.

    python servers.py WHAT SERVER [TECHNIQUE]    prints its port, then serves on it until it is killed

WHAT it does is in traffic.py, trio_udp's own servers are in ours.py, those of others in peers.py, and techniques.py
switches one of our techniques off. server.c, server.rs, server.go and server.js do the same in other languages.
"""

from __future__ import annotations

import signal
import sys

from traffic import LONGEST_LIFE


def main() -> None:
    signal.alarm(LONGEST_LIFE)
    what, server, *without = sys.argv[1:]
    if server.startswith("trio_udp"):
        # Imported here: a peer's memory and start must not depend on what we import.
        import ours
        from techniques import TECHNIQUES

        for technique in without:
            TECHNIQUES[technique]()
        ours.SERVERS[server](what)
    else:
        import peers

        peers.SERVERS[server](what)


if __name__ == "__main__":
    main()
