"""The benchmark of DTLS still runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "dtls.py"


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark needs Linux")
@pytest.mark.parametrize("server", ["trio_udp", "trio"])
def test_the_benchmark_prints_its_figures(server: str) -> None:
    """The benchmark prints four figures, of any size."""
    warnings = ["-W", "error"] if server == "trio_udp" else []  # trio leaves clients behind
    command = [sys.executable, *warnings, str(BENCHMARK), "--scale", "0.02", "--server", server]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.stderr == ""
    lines = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    assert [what for _, what in lines] == [
        "KB for each idle client",
        "µs for each handshake",
        "µs for each echo",
        "µs for each forged ClientHello",
    ]
    assert all(float(figure.replace(",", "")) > 0 for figure, _ in lines)
