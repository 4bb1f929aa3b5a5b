"""The package shows what it says it shows, at run time and to a type checker."""

from __future__ import annotations

import inspect
import pickle
import re
import typing
from pathlib import Path

import attrs

import trio_udp


def test_all_is_what_there_is() -> None:
    """__all__ lists every public name, and nothing else is public."""
    # pytest adds names with an "@" to packages with a plugin; testing is a module, once somebody has imported it.
    names = {name for name in vars(trio_udp) if not name.startswith(("_", "@"))}
    assert sorted(names - {"testing"}) == trio_udp.__all__


def test_a_type_checker_sees_the_same_names() -> None:
    """Every public name is re-exported in the form that type checkers take as public."""
    source = Path(trio_udp.__file__).read_text()
    assert sorted(set(re.findall(r"(\w+) as \1\b", source))) == trio_udp.__all__
    assert (Path(trio_udp.__file__).parent / "py.typed").exists()


def test_names_live_in_the_package() -> None:
    """Tracebacks, documentation and pickles name the public place, not the module inside."""
    assert {getattr(trio_udp, name).__module__ for name in trio_udp.__all__} == {"trio_udp"}
    limits = trio_udp.Limits(max_clients=5)
    assert pickle.loads(pickle.dumps(limits)) == limits


def test_everything_public_is_documented() -> None:
    """Every public function, class, method and property has a docstring."""
    for name in trio_udp.__all__:
        thing = getattr(trio_udp, name)
        assert inspect.getdoc(thing), name
        if inspect.isclass(thing):
            for attribute, member in vars(thing).items():
                if not attribute.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                    assert inspect.getdoc(member), f"{name}.{attribute}"


def test_statistics_are_values() -> None:
    """Two snapshots can be compared, and be members of a set."""
    numbers = {"received": 1, "bytes_received": 1, "truncated": 0, "sent": 0, "bytes_sent": 0}
    errors = {"receive_errors": 0, "send_errors": 1, "errors": {"EPERM": 1}}
    kernel = {"kernel_dropped": 0, "kernel_queued": 0, "receive_buffer": 0, "receive_buffer_requested": 0}
    one, other = (trio_udp.EndpointStatistics(**numbers, **errors, **kernel) for _ in range(2))  # type: ignore[arg-type]
    assert one == other
    assert len({one, other}) == 1


def test_values_can_be_introspected() -> None:
    """Libraries that build values from data find the types of their fields."""
    for value in (trio_udp.Limits, trio_udp.ServerStatistics, trio_udp.ClientStatistics):
        hints = typing.get_type_hints(value)
        assert {field.name for field in attrs.fields(value)} <= set(hints)
