"""Network conditions: their values, checked on assignment, and the random draw of the fate of one packet."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import attrs

from ._packets import Packet
from ._scheduling import check_seed

# The most seconds that a reordered datagram is held back.
HELD_BACK = 0.1

# RFC 791: every link carries packets of at least this length.
LEAST_MTU = 68


def check_number(value: object, name: str, least: float, most: float, *, kind: Any = (int, float)) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} must be {'an int' if kind is int else 'a number'}, not {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be from {least} to {most}, not {value!r}")


def _seed(_: object, attribute: attrs.Attribute[int], value: int) -> None:
    check_seed(value)


def _probability(_: object, attribute: attrs.Attribute[float], value: float) -> None:
    check_number(value, attribute.name, 0, 1)


def _latency(_: object, attribute: attrs.Attribute[tuple[float, float]], value: tuple[float, float]) -> None:
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"latency must be two numbers of seconds (low, high), not {value!r}")
    low, high = value
    check_number(low, "latency", 0, 1e9)
    check_number(high, "latency", low, 1e9)


def _mtu(_: object, attribute: attrs.Attribute[int], value: int) -> None:
    check_number(value, "mtu", LEAST_MTU, 65_535, kind=int)


def _bandwidth(_: object, attribute: attrs.Attribute[float | None], value: float | None) -> None:
    if value is not None:
        check_number(value, "bandwidth", 1e-9, 1e18)


class Journey(NamedTuple):
    """How one copy of a packet travels."""

    latency: float  # seconds
    held_back: float | None  # more seconds, so that later datagrams overtake it; None: it keeps its place in the order


@attrs.define(eq=False, kw_only=True)
class Conditions:
    """The conditions of a network. :class:`SimulatedNetwork` inherits these attributes and documents them."""

    seed: int = attrs.field(default=0, validator=_seed, on_setattr=attrs.setters.frozen)
    loss: float = attrs.field(default=0.0, validator=_probability)
    duplicate: float = attrs.field(default=0.0, validator=_probability)
    reorder: float = attrs.field(default=0.0, validator=_probability)
    latency: tuple[float, float] = attrs.field(default=(0.0, 0.0), validator=_latency)
    mtu: int = attrs.field(default=1_500, validator=_mtu)
    bandwidth: float | None = attrs.field(default=None, validator=_bandwidth)

    _random: random.Random = attrs.field(init=False, repr=False)

    @_random.default
    def _(self) -> random.Random:
        return random.Random(self.seed)

    def journeys(self, packet: Packet) -> list[Journey]:
        """Draw the fate of a packet: no journey if it is lost, two if it is duplicated.

        This always draws the same number of random numbers, so that changing one condition leaves the other draws as
        they are.
        """
        draw = self._random
        lost, doubled = draw.random(), draw.random()
        copies = [(draw.uniform(*self.latency), draw.random(), draw.uniform(0, HELD_BACK)) for _ in range(2)]
        if lost < 1 - (1 - self.loss) ** packet.fragments(self.mtu):
            return []
        return [
            Journey(latency, held_back if reordered < self.reorder else None)
            for latency, reordered, held_back in copies[: 2 if doubled < self.duplicate else 1]
        ]
