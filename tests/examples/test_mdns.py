"""examples/mdns.py: Avahi and python-zeroconf find it over IPv4 and IPv6, on each of two interfaces."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from signal import SIGTERM

import attrs
import pytest

if sys.platform != "linux":
    pytest.skip("needs Linux", allow_module_level=True)

from ..namespaces import Machine, inside, machines, needs_namespaces

zeroconf = pytest.importorskip("zeroconf")

EXAMPLE = Path(__file__).parents[2] / "examples" / "mdns.py"
TIMEOUT = 20
AVAHI = ["avahi-daemon", "avahi-resolve", "avahi-browse", "dbus-daemon"]

pytestmark = [
    needs_namespaces,
    pytest.mark.skipif(not all(map(shutil.which, AVAHI)), reason=f"needs {', '.join(AVAHI)}"),
]

BUS = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><listen>unix:path={}</listen><auth>EXTERNAL</auth>
<policy context="default">
<allow user="*"/><allow own="*"/><allow send_type="method_call"/><allow send_type="signal"/>
<allow send_requested_reply="true" send_type="method_return"/><allow send_requested_reply="true" send_type="error"/>
<allow receive_type="method_call"/><allow receive_type="method_return"/>
<allow receive_type="error"/><allow receive_type="signal"/>
</policy></busconfig>
"""
DAEMON = """[server]
use-ipv4=yes
use-ipv6=yes
[publish]
disable-publishing=yes
"""


@attrs.frozen
class Avahi:
    """A machine with Avahi, and our machine with the example, with two wires between them."""

    ours: Machine
    theirs: Machine
    bus: str

    def run(self, *command: str, machine: Machine | None = None) -> list[str]:
        """Run a client of Avahi; return its lines."""
        with inside((machine or self.theirs).name):
            done = subprocess.run(
                command,
                env={**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": self.bus},
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
        assert (done.stderr, done.returncode) == ("", 0)
        return done.stdout.splitlines()


@pytest.fixture(scope="module")
def avahi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Avahi]:
    folder = tmp_path_factory.mktemp("avahi")
    with ExitStack() as closing:
        ours, theirs = closing.enter_context(machines("mdns-ours", "mdns-theirs"))
        for number, wire in enumerate(("one", "two"), 1):
            ours.wire_to(theirs, wire)
            for machine, host in ((ours, 1), (theirs, 2)):
                machine.set(f"ipv6/conf/{wire}/accept_dad", 0)
                machine.ip(f"link set {wire} addrgenmode none")
                machine.ip(f"address add 192.0.{number}.{host}/24 dev {wire}")
                machine.ip(f"link set {wire} up")
                machine.ip(f"address add fe80::{number}:{host}/64 nodad dev {wire}")
        ours.wait_until_up("one", "two")

        start(
            closing, ours, [sys.executable, "-u", str(EXAMPLE), "demo", "_http._tcp", "8080"], until=["listening"] * 2
        )
        bus = f"unix:path={folder / 'bus'}"
        (folder / "bus.conf").write_text(BUS.format(folder / "bus"))
        (folder / "avahi.conf").write_text(DAEMON)
        command = ["dbus-daemon", f"--config-file={folder / 'bus.conf'}", "--nofork", "--print-address"]
        start(closing, theirs, command, until=["unix:"])
        # Avahi writes its process ID to a fixed file: give it a folder of its own.
        script = (
            "mount -t tmpfs none /run/avahi-daemon && exec avahi-daemon --no-drop-root --no-chroot --no-rlimits -f $0"
        )
        os.makedirs("/run/avahi-daemon", exist_ok=True)
        command = ["unshare", "--mount", "sh", "-c", script, str(folder / "avahi.conf")]
        start(closing, theirs, command, until=["Server startup complete"], environment={"DBUS_SYSTEM_BUS_ADDRESS": bus})
        yield Avahi(ours, theirs, bus)


def start(
    closing: ExitStack,
    machine: Machine,
    command: list[str],
    *,
    until: list[str],
    environment: dict[str, str] | None = None,
) -> None:
    """Start a program on a machine, and wait until it has printed lines with these words, in this order."""
    with inside(machine.name):
        process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    closing.callback(stop, process)
    assert process.stdout is not None
    lines: list[str] = []
    for words in until:
        for line in process.stdout:
            lines.append(line)
            if words in line:
                break
        else:
            pytest.fail(f"{command[0]} ended: {''.join(lines)}")


def stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(SIGTERM)
    try:
        process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()


def test_avahi_resolves_the_name(avahi: Avahi) -> None:
    """avahi-resolve finds the address of the name, over IPv4 and over IPv6."""
    name, address = avahi.run("avahi-resolve", "-4", "-n", "demo.local")[0].split("\t")
    assert (name, address) in [("demo.local", f"192.0.{number}.1") for number in (1, 2)]
    name, address = avahi.run("avahi-resolve", "-6", "-n", "demo.local")[0].split("\t")
    assert (name, address) in [("demo.local", f"fe80::{number}:1") for number in (1, 2)]


def test_avahi_browses_the_service(avahi: Avahi) -> None:
    """avahi-browse finds the service on both interfaces and in both families, with our address on each."""
    lines = avahi.run("avahi-browse", "--resolve", "--terminate", "--parsable", "_http._tcp")
    found = sorted(line.split(";")[1:9] for line in lines if line.startswith("="))
    assert found == [
        [wire, protocol, "demo", "Web Site", "local", "demo.local", host.format(number), "8080"]
        for wire, number in (("one", 1), ("two", 2))
        for protocol, host in (("IPv4", "192.0.{}.1"), ("IPv6", "fe80::{}:1"))
    ]


def test_zeroconf_finds_the_service(avahi: Avahi) -> None:
    """python-zeroconf finds the service, also from a program with the same port on the responder's machine."""
    program = """if 1:
        import sys, zeroconf
        with zeroconf.Zeroconf(interfaces=[sys.argv[1]]) as client:
            info = client.get_service_info("_http._tcp.local.", "demo._http._tcp.local.", 5000)
            print(info.server, info.port, *info.parsed_addresses())
    """
    for machine, own in ((avahi.theirs, "192.0.2.2"), (avahi.ours, "192.0.2.1")):
        lines = avahi.run(sys.executable, "-c", program, own, machine=machine)
        assert lines == ["demo.local. 8080 192.0.2.1"]


def test_a_resolver_without_multicast(avahi: Avahi) -> None:
    """dig, which asks the group from a port of its own, gets a unicast answer with its question."""
    if shutil.which("dig") is None:
        pytest.skip("needs dig")
    command = ["dig", "-p", "5353", "-b", "192.0.2.2", "@192.0.2.1", "demo.local", "A", "+tries=1", "+time=5"]
    lines = avahi.run(*command, "+noall", "+answer", "+question")
    assert [line.split() for line in lines] == [
        [";demo.local.", "IN", "A"],
        ["demo.local.", lines[1].split()[1], "IN", "A", "192.0.2.1"],
    ]
