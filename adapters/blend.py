"""Blend: weights over modules for one request."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .errors import BlendError

UNITS = 64
"""A weight is a whole number of 1/UNITS."""

MAX_WEIGHT = 8.0
_NAME = re.compile(r"[^\s=,]+")
_PREFIX = "blend:"
_PLAIN = re.compile(r"[-+.0-9a-zA-Z]+")


@dataclass(frozen=True, init=False)
class Blend(Mapping[str, float]):
    """Immutable weights over modules, in canonical form: sorted by name, in 1/64, without zeros.

    Equal blends are equal, hash alike and print alike, so that a blend can key a cache. Weights may
    be negative and may sum to any value; what is missing to 1 stays on the backbone (abstains).

    Raises:
        BlendError: a weight is not finite or beyond 8 in size, or a name is empty or holds
            white space, `=` or `,`.
    """

    units: tuple[tuple[str, int], ...]
    """(name, weight in 1/64), sorted by name, no zeros."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        snapped = {name: _snap(name, weight) for name, weight in (weights or {}).items()}
        object.__setattr__(self, "units", tuple(sorted((n, u) for n, u in snapped.items() if u)))

    @classmethod
    def parse(cls, text: str) -> Blend:
        """Read `blend:code=0.75,math=0.25`; the prefix may be left out, `none` is the empty blend.

        Raises:
            BlendError: the text has another form, names a module twice or holds a bad weight.
        """
        body = text.removeprefix(_PREFIX).strip(" ")
        if body in ("", "none"):
            return cls()
        weights: dict[str, float] = {}
        for part in body.split(","):
            name, equals, number = part.strip(" ").rpartition("=")
            if not equals:
                raise BlendError(f"{part!r} in blend {text!r} has no weight: write name=weight")
            if name in weights:
                raise BlendError(f"blend {text!r} names {name!r} twice: give one weight per module")
            weights[name] = _number(name, number)
        return cls(weights)

    def __getitem__(self, name: str) -> float:
        for known, units in self.units:
            if known == name:
                return units / UNITS
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.units)

    def __len__(self) -> int:
        return len(self.units)

    def __eq__(self, other: object) -> bool:
        return self.units == other.units if isinstance(other, Blend) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.units)

    @property
    def weights_text(self) -> str:
        """`code=0.75,math=0.25`, or `none`: what response headers show."""
        return ",".join(f"{name}={weight:.7g}" for name, weight in self.items()) or "none"

    @property
    def abstained(self) -> float:
        """The share in [0, 1] that stays on the backbone: 1 minus the sum of the weights."""
        return min(1.0, max(0.0, 1.0 - sum(self.values())))

    def renamed(self, names: Mapping[str, str]) -> Blend:
        """The same weights under other names; weights that meet under one name are added up."""
        weights: dict[str, float] = {}
        for name, weight in self.items():
            weights[names[name]] = weights.get(names[name], 0.0) + weight
        return Blend(weights)

    def __str__(self) -> str:
        return _PREFIX + self.weights_text


def _snap(name: str, weight: float) -> int:
    if not _NAME.fullmatch(name):
        raise BlendError(
            f"{name!r} is no module name: it is empty or holds white space, '=' or ','"
        )
    if not abs(weight) <= MAX_WEIGHT:  # NaN compares false
        raise BlendError(
            f"weight {weight!r} of {name!r} is out of range: finite, between -8 and 8 is allowed"
        )
    return round(weight * UNITS)


def _number(name: str, text: str) -> float:
    try:
        if not _PLAIN.fullmatch(text):  # float() also takes other scripts' digits, '_' and newlines
            raise ValueError(text)
        return float(text)
    except ValueError as error:
        raise BlendError(f"weight {text!r} of {name!r} is not a number") from error
