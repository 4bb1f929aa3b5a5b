"""Classes that users receive and never make themselves."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


class NoPublicConstructor(ABCMeta):
    """A metaclass for such classes: calling the class raises ``TypeError``, and :func:`create` makes an instance."""

    def __call__(cls, *_: object, **__: object) -> NoReturn:
        raise TypeError(f"{cls.__module__}.{cls.__qualname__} has no public constructor")


def create(cls: Callable[..., T], *args: Any) -> T:
    """Make an instance of a class without a public constructor."""
    instance: T = type.__call__(cls, *args)  # type: ignore[arg-type]
    return instance
