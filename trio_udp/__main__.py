"""``python -m trio_udp``: the command line, see trio_udp/operate/_command_line.py."""

import sys

from .operate._command_line import main

if __name__ == "__main__":
    sys.exit(main())
