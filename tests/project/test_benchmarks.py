"""The benchmark: each of its servers, loads and techniques still works, and its pages say what was measured."""

from __future__ import annotations

import importlib
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

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")
PEERS = {"uvloop": "uvloop", "easynetwork": "easynetwork", "anyio": "anyio"}
# Servers that do not echo, and what they do instead.
ECHOES_NEVER = {
    "trio_udp accept": "once",
    "trio_udp send_to_all": "fan",
    "trio_udp Endpoint": "flight",
    "trio_udp with credentials": "unix",
}
FANS = ["trio_udp", "trio_udp send_to_all", "uvloop", "asyncio", "trio", "blocking"]
FLIGHTS = ["trio_udp", "trio_udp datagram_handler", "trio_udp Endpoint", "uvloop", "asyncio", "trio", "blocking"]
UNIX = ["trio_udp", "trio_udp datagram_handler", "trio_udp with credentials", "uvloop", "asyncio"]
COMPILED = ["C", "C with GSO", "Rust", "Go", "Node"]


def _modules(*names: str) -> list[ModuleType]:
    """Modules of the benchmark, which is not a package: they are found only while they are imported."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHMARKS:
                del sys.modules[name]


traffic, native, ours, peers, techniques, figures, report, claims = _modules(
    "traffic", "native", "ours", "peers", "techniques", "figures", "report", "claims"
)
JOIN: bytes = traffic.JOIN
FLIGHT = [bytes([number]) for number in range(traffic.FLIGHT)]


def _exchange(
    command: list[str], questions: list[bytes], environment: dict[str, str] | None = None, answers: int | None = None
) -> list[bytes]:
    """Start a server, send it one datagram after another from one socket, and return the replies."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            started = select.select([process.stdout], [], [], 30)[0]
            address = process.stdout.readline().strip() if started else ""
            if not address:
                process.kill()
                pytest.fail(process.stderr.read())
            is_unix = address.startswith("@")
            with socket.socket(socket.AF_UNIX if is_unix else socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.settimeout(10)
                if is_unix:
                    client.bind(f"/tmp/trio-udp-test-{process.pid}")
                    target: str | tuple[str, int] = address.replace("@", "\0", 1)
                else:
                    target = ("127.0.0.1", int(address))
                received = []
                for question in questions:
                    client.sendto(question, target)
                    received += [client.recv(65_536) for _ in range(answers or 1)]
                return received
        finally:
            process.kill()
            Path(f"/tmp/trio-udp-test-{process.pid}").unlink(missing_ok=True)


def _in_python(what: str, server: str, *technique: str) -> list[str]:
    if (peer := PEERS.get(server)) and importlib.util.find_spec(peer) is None:
        pytest.skip(f"{peer} is not installed")
    return [sys.executable, str(BENCHMARKS / "servers.py"), what, server, *technique]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> object:
    return native.build(tmp_path_factory.mktemp("programs"))


def _run(program: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """Run a program of the benchmark, and return what it says on both outputs."""
    command = [sys.executable, str(BENCHMARKS / program), *arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100, env=environment
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


# ---- servers ----


@pytest.mark.parametrize("server", [*ours.SERVERS, *peers.SERVERS])
def test_each_server_of_the_benchmark_answers(server: str) -> None:
    """A server answers a datagram with itself, or with what it is measured in."""
    what = ECHOES_NEVER.get(server, "echo")
    payload = JOIN + b"oin"
    (answer,) = _exchange(_in_python(what, server), [payload])
    assert answer == (bytes(traffic.STREAM_SIZE) if what == "flight" else payload)


@pytest.mark.parametrize("server", FANS)
def test_each_server_of_the_fan_out_sends_to_members(server: str) -> None:
    """A client that has joined receives each later datagram once."""
    assert _exchange(_in_python("fan", server), [JOIN, b"one", b"two"]) == [JOIN, b"one", b"two"]


@pytest.mark.parametrize("server", FLIGHTS)
def test_each_server_of_the_flights_sends_seventeen(server: str) -> None:
    """Every request is answered with 17 datagrams of 1,200 bytes, in order."""
    answers = _exchange(_in_python("flight", server), [b"one", b"two"], answers=traffic.FLIGHT)
    assert [answer[:1] for answer in answers] == FLIGHT + FLIGHT
    assert {len(answer) for answer in answers} == {traffic.STREAM_SIZE}


@pytest.mark.parametrize("server", UNIX)
def test_each_server_on_a_unix_socket_echoes(server: str) -> None:
    """A client with a file for its name is answered."""
    assert _exchange(_in_python("unix", server), [b"one", b"two"]) == [b"one", b"two"]


@pytest.mark.parametrize("technique", techniques.TECHNIQUES)
def test_the_server_works_without_each_technique(technique: str) -> None:
    """Each technique can still be switched off, and the server serves without it."""
    assert _exchange(_in_python("echo", "trio_udp", technique), [b"one", b"two"]) == [b"one", b"two"]


@needs_compiler
@pytest.mark.parametrize("server", COMPILED)
def test_each_server_in_another_language_does_everything(server: str, programs: ModuleType) -> None:
    """Echoes, members, acknowledgements and flights: what the servers in Python do."""
    if server in programs.left_out:
        pytest.skip(f"{server}: {programs.left_out[server]}")
    command, options = programs.servers[server], ["gso"] if server == "C with GSO" else []

    def exchange(what: str, questions: list[bytes], answers: int = 1) -> list[bytes]:
        return _exchange([*command, what, *options], questions, native.ENVIRONMENT, answers)

    assert exchange("echo", [b"one", b""]) == [b"one", b""]
    assert exchange("fan", [JOIN, b"one", b"two"]) == [JOIN, b"one", b"two"]
    flights = exchange("flight", [b"one", b"two"], traffic.FLIGHT)
    assert [(answer[:1], len(answer)) for answer in flights] == [(it, traffic.STREAM_SIZE) for it in FLIGHT + FLIGHT]


# ---- loads and results ----


@needs_compiler
def test_every_kind_of_load_is_measured(tmp_path: Path) -> None:
    """``run.py`` measures each shape, loses nothing, and writes tables and the figures they are from."""
    shapes = ["1x64", "flight", "stream-in", "fan-out", "proxied", "unix", "arrival", "memory", "crowd"]
    servers = ["trio_udp", "trio_udp send_to_all"]
    _run("run.py", "--quick", "--output", str(tmp_path), "--only", *shapes, "--servers", *servers)
    (file,) = tmp_path.glob("python-*.json")
    runs = json.loads(file.read_text())["runs"]
    assert {(run["shape"], run["server"]) for run in runs} == {
        *((shape, "trio_udp") for shape in shapes),
        ("fan-out", "trio_udp send_to_all"),
    }
    with_loss = [it for it in runs if it["figures"].get("lost", 0) or it["figures"].get("out_of_order", 0)]
    assert with_loss == []
    assert f"[{file.stem}]({file.stem}.md)" in (tmp_path / "results.md").read_text()
    assert "## 17 datagrams of 1,200 bytes" in file.with_suffix(".md").read_text()


@needs_compiler
def test_workers_are_measured(tmp_path: Path) -> None:
    """One worker, two and four are started by the command line, loaded, and stopped."""
    _run("run.py", "--quick", "--output", str(tmp_path), "--only", "workers-work", "workers-idle")
    results = _kept(tmp_path)
    assert results.servers("workers-work") == ["1 worker", "2 workers"]
    assert results.servers("workers-idle") == ["4 workers"]


@needs_compiler
def test_what_is_missing_is_left_out_and_said_to_be(tmp_path: Path) -> None:
    """Without Rust, Go and Node the rest is measured, and the results name them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in (os.environ.get("CC", "cc"), "as", "ld"):
        found = shutil.which(program)
        assert found
        (folder / Path(program).name).symlink_to(found)
    arguments = ["--quick", "--output", str(tmp_path), "--only", "1x64", "--servers", "C", "Rust", "Go", "Node"]
    said = _run("run.py", *arguments, environment={**os.environ, "PATH": str(folder)})
    results = _kept(tmp_path)
    assert results.servers("1x64") == ["C"]
    for language, program in {"Rust": "rustc", "Go": "go", "Node": "node"}.items():
        assert f"left out: {language}, no `{program}` here\n" in said
        assert f"{language}, no `{program}` here" in (tmp_path / f"{results.name}.md").read_text()


@needs_compiler
def test_crowds_are_measured() -> None:
    """``crowds.py`` prints a table, in which every new client was answered."""
    said = _run("crowds.py", "--clients", "300", "--runs", "1")
    (unanswered,) = [line.split(":")[1].split() for line in said.splitlines() if "unanswered" in line]
    assert ["unanswered", "0", "0"] == unanswered


@pytest.mark.skipif(shutil.which("gtlsclient") is None, reason="needs Debian's package ngtcp2-client")
def test_http3_is_measured() -> None:
    """``http3.py`` prints the rates of both servers, down and up."""
    pytest.importorskip("aioquic", minversion="1.7")
    program = [sys.executable, str(BENCHMARKS / "http3.py"), "--megabytes", "1", "--clients", "1", "--rounds", "1"]
    done = subprocess.run(program, check=True, timeout=60, capture_output=True, text=True)
    assert [line.split()[0] for line in done.stdout.splitlines() if "ratio" in line] == ["down", "up"]


# ---- pages ----


def _kept(folder: Path) -> figures.Results:  # type: ignore[name-defined]
    (results,) = figures.kept_in(folder)
    return results


def _made_up(python: str, micros: dict[str, list[float]]) -> dict[str, object]:
    """Results of a run in which one shape was measured, by server and turn."""
    return {
        "python": python,
        "date": "2026-01-01",
        "minutes": 1,
        "machine": "a machine",
        "versions": {"trio": "0.35.0", "uvloop": "0.23.0"},
        "left_out": {},
        "failures": [],
        "quick": False,
        "rounds": 3,
        "seconds": 1,
        "turns": 1,
        "titles": {"64x4": "64 clients"},
        "runs": [
            {
                "shape": "64x4",
                "server": server,
                "without": None,
                "turn": number,
                "figures": {"micros": micros, "rate": 1.0, "lost": 0, "out_of_order": 0},
            }
            for server, turns in micros.items()
            for number, micros in enumerate(turns)
        ],
    }


def test_results_are_kept_for_each_python(tmp_path: Path) -> None:
    """A run with one Python replaces its own results only; the first page shows the ratios of all, newest first."""
    report.write(_made_up("CPython 3.9.1", {"trio_udp": [9, 9, 9], "uvloop": [1, 1, 1]}), tmp_path)
    report.write(_made_up("CPython 3.14.0", {"trio_udp": [2, 3, 6], "uvloop": [4, 3, 5]}), tmp_path)
    page = report.write(_made_up("CPython 3.9.2", {"trio_udp": [1, 2, 3], "uvloop": [2, 2, 2]}), tmp_path)
    assert {file.name for file in tmp_path.glob("*.json")} == {"python-3.9.json", "python-3.14.json"}
    assert "| uvloop = 1 | task per client, 3.14 | task per client, 3.9 |" in page
    assert "| 64 clients, four datagrams in flight each | 1.00 (0.50 - 1.20) | 1.00 (0.50 - 1.50) |" in page


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: f"{claim.document}:{claim.row}")
def test_every_claim_is_in_its_document_and_has_its_row(claim: claims.Claim) -> None:  # type: ignore[name-defined]
    """What a document says about speed is from a figure of the results that are kept with it."""
    assert claim.words in " ".join((ROOT / claim.document).read_text().split())  # lines may be broken anywhere
    newest = figures.kept_in(BENCHMARKS / "results")[0]
    assert claim.measured(newest) is not None
