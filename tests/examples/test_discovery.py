"""examples/discovery.py: servers that a client finds through a group, on loopback and on a network of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("needs Linux", allow_module_level=True)

from ..conftest import free_port
from ..namespaces import Machine, inside, machines, needs_namespaces

EXAMPLE = Path(__file__).parents[2] / "examples" / "discovery.py"
TIMEOUT = 20


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def port() -> int:
    return free_port()


def serve(closing: ExitStack, name: str, *options: object, machine: Machine | None = None) -> subprocess.Popen[str]:
    """Start a server, which must end with status 0 and without an error message."""
    command = [sys.executable, "-u", "-W", "error", str(EXAMPLE), "serve", name, *map(str, options)]
    with inside(machine.name) if machine else nullcontext():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    closing.callback(stop, process)
    return process


def wait_until_listening(*servers: subprocess.Popen[str]) -> None:
    for process in servers:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("listening on ")


def stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(SIGTERM)
    try:
        assert (*process.communicate(timeout=TIMEOUT), process.returncode) == ("", "", 0)
    finally:
        process.kill()


def ask(*options: object, machine: Machine | None = None) -> Any:
    command = [sys.executable, "-W", "error", str(EXAMPLE), "ask", *map(str, options)]
    with inside(machine.name) if machine else nullcontext():
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)


def test_several_servers_on_one_machine(closing: ExitStack, port: int) -> None:
    """Every server on the machine answers the question of a client over loopback."""
    wait_until_listening(*(serve(closing, name, "--interface", "lo", "--port", port) for name in ("kitchen", "cellar")))
    found = ask("--interface", "lo", "--port", port, "--seconds", 0.5)
    assert (sorted(found.stdout.splitlines()), found.stderr) == (["cellar 127.0.0.1", "kitchen 127.0.0.1"], "")
    assert found.returncode == 0


def test_no_answer(port: int) -> None:
    """Without a server, the client prints that there was no answer, and ends with status 1."""
    found = ask("--interface", "lo", "--port", port, "--seconds", 0.1)
    assert (found.stdout, found.stderr, found.returncode) == ("", "no answer\n", 1)


def test_an_unknown_interface(port: int) -> None:
    """A server without any interface to listen on prints the reason, and ends with status 1."""
    command = [sys.executable, "-W", "error", str(EXAMPLE), "serve", "x", "--interface", "nosuch", "--port", str(port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.stderr.splitlines() == [
        "[Errno 19] No such device: no interface 'nosuch'",
        "no interface to listen on",
    ]
    assert done.returncode == 1


@needs_namespaces
@pytest.mark.parametrize("version", [4, 6])
def test_two_interfaces(closing: ExitStack, version: int) -> None:
    """A server with two interfaces answers on each, from its address there; a client finds all machines."""
    asking, one, two = closing.enter_context(machines("asking", "one", "two"))
    for number, (machine, wire) in enumerate(((one, "wire1"), (two, "wire2"), (two, "wire3")), 1):
        asking.wire_to(machine, wire)
        for end, host in ((asking, 1), (machine, 2)):
            end.set(f"ipv6/conf/{wire}/accept_dad", 0)
            end.ip(f"link set {wire} addrgenmode none")
            end.ip(f"address add 192.0.{number}.{host}/24 dev {wire}")
            end.ip(f"link set {wire} up")
            end.ip(f"address add fe80::{number}:{host}/64 nodad dev {wire}")
    asking.wait_until_up("wire1", "wire2", "wire3")
    options = ["--version", version, "--interface"]
    wait_until_listening(
        serve(closing, "kitchen", *options, "wire1", machine=one),
        serve(closing, "cellar", *options, "wire2", "--interface", "wire3", machine=two),
    )
    found = ask(*options, "wire1", "--interface", "wire2", "--interface", "wire3", "--seconds", 0.5, machine=asking)
    hosts = ["192.0.{}.2", "fe80::{}:2"][version == 6]
    expected = [f"{name} {hosts.format(number)}" for name, number in (("cellar", 2), ("cellar", 3), ("kitchen", 1))]
    assert (sorted(found.stdout.splitlines()), found.stderr) == (expected, "")
