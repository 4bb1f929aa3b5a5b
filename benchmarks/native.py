"""Compiles the programs of the benchmark that are not in Python, and reports those that cannot be compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import traffic

HERE = Path(__file__).parent

SIZES = {
    name: str(getattr(traffic, name))
    for name in ("STREAM_SIZE", "OUT_BURST", "FLIGHT", "IN_BURST", "ACKNOWLEDGEMENT", "RECEIVE_BUFFER", "LONGEST_LIFE")
}
ENVIRONMENT = {**SIZES, "JOIN": traffic.JOIN.decode()}  # of servers in Rust, Go and JavaScript

NATIVE = ["C", "C with GSO", "Rust", "Go", "Node"]


class Programs(NamedTuple):
    load: str
    servers: dict[str, list[str]]  # by name: the command that takes what to do as its next argument
    versions: dict[str, str]  # of compilers and interpreters
    left_out: dict[str, str]  # by name: what is missing


def build(folder: Path) -> Programs:
    """Compile the load and the servers into a folder. In Python, the load would be slower than the servers."""
    compiler = os.environ.get("CC", "cc")
    programs = Programs(str(folder / "load"), {}, {}, {})
    c_version = _version([compiler, "--version"])
    if c_version is None:
        sys.exit(f"The load is written in C, and there is no compiler {compiler!r}. Install one, or set CC.")
    programs.versions["C compiler"] = c_version
    definitions = [*(f"-D{name}={value}" for name, value in SIZES.items()), f'-DJOIN="{traffic.JOIN.decode()}"']
    for name in ("load", "server"):
        _run([compiler, "-O2", "-Wall", *definitions, "-o", str(folder / name), str(HERE / f"{name}.c")])
    programs.servers["C"] = programs.servers["C with GSO"] = [str(folder / "server")]

    rust, go = str(folder / "server-rust"), str(folder / "server-go")
    for name, version_command, build_command, command in (
        ("Rust", ["rustc", "--version"], ["rustc", "-O", "-o", rust, str(HERE / "server.rs")], [rust]),
        ("Go", ["go", "version"], ["go", "build", "-o", go, str(HERE / "server.go")], [go]),
        ("Node", ["node", "--version"], None, ["node", str(HERE / "server.js")]),
    ):
        version = _version(version_command)
        if version is None:
            programs.left_out[name] = f"no `{version_command[0]}` here"
            continue
        if build_command:
            _run(build_command)
        programs.versions[name] = version
        programs.servers[name] = command
    return programs


def _version(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return None
    return None if done.returncode else done.stdout.partition("\n")[0].strip()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
