"""The soak of soak.py, for a few seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="needs all of 127.0.0.0/8 to send from")
@pytest.mark.parametrize("engine", ["linux", "portable"])
def test_soak(engine: str) -> None:
    """Under loss, floods and restarts a server keeps order, counts everything, and leaves nothing behind."""
    program = Path(__file__).with_name("soak.py")
    options = ["--seconds", "1", "--forged", "20000", "--engine", engine]  # test_flood.py has 100,000 forged addresses
    command = [sys.executable, "-W", "error", str(program), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout + result.stderr
