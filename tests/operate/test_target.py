"""From "module:handler" to a handler, and messages about mistakes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from trio_udp.operate._target import TargetError, check_accept, check_target, entered, load_target, split_target

from . import apps
from .conftest import APPS, ROOT


def load(target: str, app_dir: Path | str = ROOT) -> object:
    return check_target(load_target(target, str(app_dir)), target)


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo a test's imports and changes of the path."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))


@pytest.mark.parametrize("name", ["tell_pid", "tell_pid_of_datagram", "instance.handler"])
def test_a_module(name: str) -> None:
    """A target names an async function, a datagram_handler or a method in a module."""
    expected: object = apps
    for part in name.split("."):
        expected = getattr(expected, part)
    assert load(f"{APPS}:{name}") == expected


def test_a_file(tmp_path: Path) -> None:
    """A file is imported as if it were run as a script: it finds modules beside it, and has its own name."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "beside.py").write_text("VALUE = 5\n")
    (tmp_path / "folder" / "app.py").write_text("import beside\nasync def handler(client): return beside.VALUE\n")
    handler = load("folder/app.py:handler", tmp_path)
    assert (handler.__module__, handler.__name__) == ("app", "handler")  # type: ignore[attr-defined]


def test_a_file_with_the_name_of_a_module_in_use(tmp_path: Path) -> None:
    """A file may be called queue.py; the module queue stays."""
    import queue

    (tmp_path / "queue.py").write_text("async def handler(client): pass\n")
    load("queue.py:handler", tmp_path)
    assert sys.modules["queue"] is queue


@pytest.mark.parametrize("target", ["app", "app:", ":handler", ""])
def test_no_target(target: str) -> None:
    """A target has a module, a colon and a name."""
    with pytest.raises(TargetError, match="is not a target: write module:handler"):
        split_target(target)


LOOKS_LIKE = "a handler is an async function with one argument: async def handler(client)"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:handler", f"no module named 'no_such_module': is --app-dir right? It is {ROOT}"),
        ("tests.no_such_module:handler", f"no module named 'tests.no_such_module': is --app-dir right? It is {ROOT}"),
        ("two words:handler", "'two words' is not a module name: write module:handler or path/file.py:handler"),
        ("no/such/file.py:handler", f"no such file: {ROOT}/no/such/file.py"),
        (f"{APPS}:nothing", f"'{APPS}' has no 'nothing': name a handler that is defined there"),
        (f"{APPS}:instance.nothing", f"'{APPS}' has no 'instance.nothing': name a handler that is defined there"),
        (f"{APPS}:number", f"'{APPS}:number' is not a function but int 5: {LOOKS_LIKE}"),
        (f"{APPS}:Class", f"'{APPS}:Class' is not a function but the class Class: {LOOKS_LIKE}"),
        (f"{APPS}:generator", f"'{APPS}:generator' is an async generator: {LOOKS_LIKE}, without yield"),
        (f"{APPS}:no_argument", f"'{APPS}:no_argument' cannot be called with one argument, a client: {LOOKS_LIKE}"),
        (f"{APPS}:two_arguments", f"'{APPS}:two_arguments' cannot be called with one argument, a client: {LOOKS_LIKE}"),
        (
            f"{APPS}:plain",
            f"'{APPS}:plain' is not async: {LOOKS_LIKE}; or use @datagram_handler, or --factory for a function that "
            "returns a context manager",
        ),
    ],
)
def test_mistakes(target: str, message: str) -> None:
    """A mistake in a target raises an error that says in one line what to do."""
    with pytest.raises(TargetError) as raised:
        load(target)
    assert str(raised.value) == message


def test_an_error_inside_the_module_is_not_ours(tmp_path: Path) -> None:
    """An exception in the user's module passes unchanged, also one about a missing module."""
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_module'"):
        load("broken:handler", tmp_path)


def test_two_targets_in_one_file(tmp_path: Path) -> None:
    """A file is imported once, so that its handler and its accept have the same variables."""
    (tmp_path / "app.py").write_text("async def handler(client): pass\ndef accept(datagram): return True\n")
    handler, accept = (load_target(f"app.py:{name}", str(tmp_path)) for name in ("handler", "accept"))
    assert handler.__globals__ is accept.__globals__


ACCEPT = "--accept needs a plain function with one argument: def accept(datagram) -> bool | bytes"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", f"'app:number' is not a function but int 5: {ACCEPT}"),
        ("tell_pid", f"'app:tell_pid' is async: {ACCEPT}"),
        ("gives_nothing", f"'app:gives_nothing' cannot be called with one argument, a datagram: {ACCEPT}"),
    ],
)
def test_mistakes_with_accept(name: str, message: str) -> None:
    """A wrong accept raises an error of one line."""
    with pytest.raises(TargetError) as raised:
        check_accept(getattr(apps, name), f"app:{name}", apps.tell_pid)
    assert str(raised.value) == message
    with pytest.raises(TargetError, match="--accept cannot be used with a datagram_handler"):
        check_accept(apps.accept_greetings, "app:accept", apps.tell_pid_of_datagram)


async def test_a_factory() -> None:
    """A factory's context manager yields the handler, which may be a plain function that returns an awaitable."""
    async with entered(lambda: Manager(lambda client: None), "app:factory", factory=True) as handler:
        assert callable(handler)


class Manager:
    """An async context manager without contextlib."""

    def __init__(self, given: object) -> None:
        self.given = given

    async def __aenter__(self) -> object:
        return self.given

    async def __aexit__(self, *_: object) -> None:
        pass


async def returns_nothing() -> None:
    pass


WANTED = "--factory needs a function without arguments that returns an async context manager"


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (5, f"'app:factory' is not a function but int 5: {WANTED}"),
        (apps.tell_pid, f"'app:factory' cannot be called without arguments: {WANTED}"),
        (int, f"'app:factory' returned int 0: {WANTED} (see contextlib.asynccontextmanager)"),
        (returns_nothing, f"'app:factory' returned coroutine .*: {WANTED} .*"),
        (lambda: Manager(5), "'the handler of app:factory' is not a function but int 5: .*"),
    ],
)
async def test_mistakes_with_factories(factory: object, message: str) -> None:
    """A wrong factory, or one without a valid handler, raises an error of one line."""
    pattern = message if ".*" in message else f"^{re.escape(message)}$"
    with pytest.raises(TargetError, match=pattern):
        async with entered(factory, "app:factory", factory=True):
            raise AssertionError
