"""The public names of the package, at run time and for a type checker."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
import subprocess
import sys
import textwrap
import typing
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import pytest

import trio_udp

# Names for annotations. They are not objects of their own at run time.
ALIASES = {"Accept", "Address", "Handler", "OnError", "Payload"}
# Imported only when they are used, or by name.
OPTIONAL = {"dtls", "metrics", "operate", "testing"}
CLASSES_AND_FUNCTIONS = sorted(set(trio_udp.__all__) - ALIASES)


def test_all_lists_every_public_name() -> None:
    """__all__ lists every public name, and nothing else is public."""
    # pytest adds names with an "@" to packages with a plugin; these five are modules, once they have been imported.
    names = {name for name in dir(trio_udp) if not name.startswith(("_", "@"))}
    assert sorted(names - {"dtls", "layers", "metrics", "operate", "testing"}) == trio_udp.__all__


def test_a_type_checker_sees_the_same_names() -> None:
    """Every public name is re-exported in the form that type checkers treat as public."""
    source = Path(trio_udp.__file__).read_text()
    assert sorted(set(re.findall(r"(\w+) as \1\b", source)) - {"dtls"}) == trio_udp.__all__
    assert (Path(trio_udp.__file__).parent / "py.typed").exists()


def test_names_live_in_the_package() -> None:
    """Every public object has the public module as its ``__module__``, for tracebacks, documentation and pickles."""
    assert {getattr(trio_udp, name).__module__ for name in CLASSES_AND_FUNCTIONS} == {"trio_udp"}
    limits = trio_udp.Limits(max_clients=5)
    assert pickle.loads(pickle.dumps(limits)) == limits


def test_what_a_plain_server_does_not_need_is_imported_when_it_is_used() -> None:
    """``import trio_udp`` imports no workers, DTLS, metrics or simulated network; each is there once it is used."""
    source = """
        import sys, trio
        trios = set(sys.modules)
        import trio_udp
        added = set(sys.modules) - trios
        print(*sorted({name.partition(".")[2].partition(".")[0] for name in added if "trio_udp." in name} & {OPTIONAL}))
        print(*sorted(added & {"OpenSSL", "argparse", "json", "multiprocessing", "prometheus_client", "rich"}))
        print("trio_udp.layers.dtls" in added)
        from trio_udp import Supervisor
        print(Supervisor is trio_udp.Supervisor is trio_udp.operate.Supervisor)
    """.replace("OPTIONAL", repr(sorted(OPTIONAL))[1:-1])
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["", "", "False", "True"]


def test_a_name_that_is_not_there() -> None:
    """A misspelt name raises AttributeError as in any module."""
    with pytest.raises(AttributeError, match=r"module 'trio_udp' has no attribute 'server'"):
        trio_udp.server  # type: ignore[attr-defined]  # noqa: B018


def test_everything_public_is_documented() -> None:
    """Every public function, class, method and property has a docstring."""
    for name in CLASSES_AND_FUNCTIONS:
        thing = getattr(trio_udp, name)
        assert inspect.getdoc(thing), name
        if inspect.isclass(thing):
            for attribute, member in vars(thing).items():
                if not attribute.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                    assert inspect.getdoc(member), f"{name}.{attribute}"


def test_every_alias_is_documented() -> None:
    """A public type alias is followed by a docstring, as documentation tools expect."""
    documented = set()
    for path in Path(trio_udp.__file__).parent.rglob("*.py"):
        for block in ast.walk(ast.parse(path.read_text())):
            body = getattr(block, "body", None)
            statements = [*body, *getattr(block, "orelse", [])] if isinstance(body, list) else []
            for statement, following in pairwise(statements):
                if (
                    isinstance(statement, ast.AnnAssign)
                    and isinstance(statement.target, ast.Name)
                    and isinstance(following, ast.Expr)
                    and isinstance(following.value, ast.Constant)
                    and isinstance(following.value.value, str)
                ):
                    documented.add(statement.target.id)
    assert ALIASES <= documented


def test_statistics_are_values() -> None:
    """Snapshots of statistics can be compared and hashed."""
    numbers = {"received": 1, "bytes_received": 1, "truncated": 0, "sent": 0, "bytes_sent": 0}
    errors = {"receive_errors": 0, "send_errors": 1, "errors": {"EPERM": 1}}
    kernel = {"kernel_dropped": 0, "kernel_queued": 0, "receive_buffer": 0, "receive_buffer_requested": 0}
    one, other = (trio_udp.EndpointStatistics(**numbers, **errors, **kernel) for _ in range(2))  # type: ignore[arg-type]
    assert one == other
    assert len({one, other}) == 1


def test_statistics_of_servers_can_be_added() -> None:
    """The sum of two servers' statistics has the sums of all counters, errors by name included; sum() works too."""
    names = [field.name for field in attrs.fields(trio_udp.ServerStatistics) if field.name != "errors"]
    numbers: Any = dict(zip(names, range(1, 100), strict=False))
    one = trio_udp.ServerStatistics(errors={"EPERM": 1}, **numbers)
    other = attrs.evolve(one, received=50, errors={"EPERM": 2, "EINVAL": 1})
    both = one + other
    assert both == sum([one, other])
    assert {name: getattr(both, name) for name in names} == {
        name: getattr(one, name) + getattr(other, name) for name in names
    }
    assert both.errors == {"EPERM": 3, "EINVAL": 1}
    assert both.accounted_for == one.accounted_for + other.accounted_for
    with pytest.raises(TypeError):
        one + 1


def test_values_can_be_introspected() -> None:
    """Libraries that build values from data can find the types of their fields."""
    for value in (trio_udp.Limits, trio_udp.ServerStatistics, trio_udp.ClientStatistics):
        hints = typing.get_type_hints(value)
        assert {field.name for field in attrs.fields(value)} <= set(hints)
