"""Constructors: none for classes whose instances users only receive, and a fast one for records made often."""

from __future__ import annotations

import math
from abc import ABCMeta
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import attrs

T = TypeVar("T")


class NoPublicConstructor(ABCMeta):
    """A metaclass for classes that users do not call: a call raises ``TypeError``. Use :func:`create`."""

    def __call__(cls, *_: object, **__: object) -> NoReturn:
        raise TypeError(f"{cls.__module__}.{cls.__qualname__} has no public constructor")


def create(cls: Callable[..., T], *args: Any) -> T:
    """Make an instance of a class without a public constructor."""
    instance: T = type.__call__(cls, *args)  # type: ignore[arg-type]
    return instance


def constant_defaults(cls: type[T]) -> type[T]:
    """Give an attrs class an ``__init__`` that is three times as fast.

    The ``__init__`` of attrs looks up the default of every field that is not an argument, at each call. Here defaults
    are constants, and numbers and None are literals: making a record of 33 fields takes 0.5 µs instead of 2.0.
    """
    arguments, constants, lines = ["self"], {}, []
    for field in attrs.fields(cls):  # type: ignore[arg-type]  # cls is an attrs class
        name, default = field.name, field.default
        assert not isinstance(default, attrs.Factory), name  # type: ignore[arg-type]  # Factory is a class
        if default is None or (type(default) in (bool, int, float) and math.isfinite(default)):
            value = repr(default)
        else:
            value = name
            constants[name] = default
        if field.init:
            arguments.append(field.alias if default is attrs.NOTHING else f"{field.alias}={value}")
            value = field.alias
        lines.append(f"self.{name} = {value}")
    exec(f"def __init__({', '.join(arguments)}):\n " + "\n ".join(lines), constants)
    cls.__init__ = constants["__init__"]  # type: ignore[method-assign]
    return cls
