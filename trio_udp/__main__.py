"""The command line: the script ``trio-udp``, or ``python -m trio_udp``. See trio_udp/operate/_command_line.py."""

import sys


def main() -> int:
    """Run the command line; return the exit status. Ctrl-C before there is anything to stop ends it without a word."""
    try:
        from .operate._command_line import main as run  # long enough to be interrupted

        return run()
    except KeyboardInterrupt:
        return 130  # as shells do for SIGINT


if __name__ == "__main__":
    sys.exit(main())
