"""The program that runs one of the servers in Python.

    python servers.py WHAT SERVER [TECHNIQUE]    prints its port, then serves on it until it is killed

traffic.py describes WHAT a server does. ours.py has the servers of trio_udp, and peers.py those of other libraries.
techniques.py can switch off one of our techniques. server.c, server.rs, server.go and server.js are servers in other
languages.
"""

from __future__ import annotations

import signal
import sys

from traffic import LONGEST_LIFE


def main() -> None:
    signal.alarm(LONGEST_LIFE)
    what, server, *without = sys.argv[1:]
    if server.startswith("trio_udp"):
        # Import here, so that our imports add nothing to the memory and start of other servers.
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
