"""The benchmark's servers and techniques: each still works."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

if sys.platform != "linux":
    pytest.skip("the benchmark needs Linux", allow_module_level=True)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SERVERS_PY = BENCHMARKS / "servers.py"
needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")
PEERS = {"uvloop": "uvloop", "easynetwork": "easynetwork", "anyio": "anyio"}
ECHOES_NEVER = {"trio_udp accept": "once", "trio_udp send_to_all": "fan"}  # and their replacement
FANS = ["trio_udp", "trio_udp send_to_all", "uvloop", "asyncio", "trio", "blocking"]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_servers", SERVERS_PY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SERVERS = _load()


def _exchange(arguments: list[str], questions: list[bytes]) -> list[bytes]:
    """Start a server, send it one datagram after another from one socket, and return the replies."""
    if (peer := PEERS.get(arguments[1])) and importlib.util.find_spec(peer) is None:
        pytest.skip(f"{peer} is not installed")
    command = [sys.executable, str(SERVERS_PY), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            started = select.select([process.stdout], [], [], 30)[0]
            port = process.stdout.readline() if started else ""
            if not port:
                process.kill()
                pytest.fail(process.stderr.read())
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.settimeout(10)
                client.connect(("127.0.0.1", int(port)))
                answers = []
                for question in questions:
                    client.send(question)
                    answers.append(client.recv(65_536))
                return answers
        finally:
            process.kill()


@pytest.mark.parametrize("server", SERVERS.SERVERS)
def test_each_server_of_the_benchmark_echoes(server: str) -> None:
    """A server of the benchmark answers each datagram with the same payload."""
    what = ECHOES_NEVER.get(server, "echo")
    payload = SERVERS.JOIN + b"oin"
    assert _exchange([what, server], [payload]) == [payload]


@pytest.mark.parametrize("server", FANS)
def test_each_server_of_the_fan_out_sends_to_members(server: str) -> None:
    """A client that has joined receives each later datagram once."""
    assert _exchange(["fan", server], [SERVERS.JOIN, b"one", b"two"]) == [SERVERS.JOIN, b"one", b"two"]


@pytest.mark.parametrize("technique", SERVERS.TECHNIQUES)
def test_the_server_works_without_each_technique(technique: str) -> None:
    """Each technique can still be switched off, and the server serves without it."""
    assert _exchange(["echo", "trio_udp", technique], [b"one", b"two"]) == [b"one", b"two"]


@needs_compiler
def test_fan_out_is_measured(tmp_path: Path) -> None:
    """``run.py`` measures the fan-out, where each question reaches 50 clients, and loses nothing."""
    program = [sys.executable, str(BENCHMARKS / "run.py"), "--quick", "--output", str(tmp_path)]
    servers = ["C", "trio_udp", "trio_udp send_to_all"]
    subprocess.run([*program, "--only", "fan-out", "--servers", *servers], check=True, timeout=60, capture_output=True)
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [(server, 0, 0) for server in servers] == [(it["server"], it["lost"], it["out_of_order"]) for it in runs]


@needs_compiler
def test_crowds_are_measured() -> None:
    """``crowds.py`` prints a table, in which every new client was answered."""
    program = [sys.executable, str(BENCHMARKS / "crowds.py"), "--clients", "300", "--runs", "1"]
    done = subprocess.run(program, check=True, timeout=60, capture_output=True, text=True)
    (unanswered,) = [line.split(":")[1].split() for line in done.stdout.splitlines() if "unanswered" in line]
    assert ["unanswered", "0", "0"] == unanswered
