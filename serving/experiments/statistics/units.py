"""Sums over units of assignment: all that the statistics read of a metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Kind = Literal["binary", "continuous", "count"]
Direction = Literal["up", "down"]

LARGEST = 1e60  # a total of one unit
MOST = 1e70  # their sum: its fourth power must be a float


@dataclass(frozen=True)
class Sums:
    """Sums of one metric in one variant, over the units that have an observation of it.

    A unit (a user, a session) has totals of its own: y, the sum of its values; x, how many values;
    z, one number known before it was assigned. n counts units; yy, xx, zz are sums of squares and
    xy, yz, xz of products of these totals, so a database can compute all of it. Sums of disjoint
    units add up.

    Raises:
        ValueError: a sum is no finite number, or there are more units than observations.
    """

    n: int = 0
    y: float = 0.0
    x: float = 0.0
    yy: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    z: float = 0.0
    zz: float = 0.0
    yz: float = 0.0
    xz: float = 0.0

    def __post_init__(self) -> None:
        for name, value in zip(self.__dataclass_fields__, astuple(self), strict=True):
            most = MOST if len(name) == 1 else MOST**2
            if not math.isfinite(value) or abs(value) > most:
                raise ValueError(f"the sum {name} is {value}: it must be finite, {most:g} at most")
        if not 0 <= self.n <= self.x:
            rule = "units without an observation must be left out"
            raise ValueError(f"{self.n} units have {self.x:g} observations: {rule}")

    def __add__(self, other: Sums) -> Sums:
        if not isinstance(other, Sums):
            return NotImplemented
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Sums(*(mine + theirs for mine, theirs in pairs))

    @property
    def mean(self) -> float | None:
        """The mean of all observations; None without any."""
        return self.y / self.x if self.x > 0 else None

    @classmethod
    def of(cls, y: ArrayLike, x: ArrayLike | None = None, z: ArrayLike | None = None) -> Sums:
        """Sums of units given one by one; those without an observation are left out.

        y, x, z: [units], totals of each unit. x: 1 where not given. z: 0 where not given.
        """
        ys = np.asarray(y, dtype=np.float64)
        xs = np.ones_like(ys) if x is None else np.asarray(x, dtype=np.float64)
        zs = np.zeros_like(ys) if z is None else np.asarray(z, dtype=np.float64)
        _check((ys, xs, zs))
        kept = xs > 0
        ys, xs, zs = ys[kept], xs[kept], zs[kept]
        products = (ys @ ys, xs @ xs, xs @ ys, zs.sum(), zs @ zs, ys @ zs, xs @ zs)
        return cls(len(ys), float(ys.sum()), float(xs.sum()), *map(float, products))


def _check(arrays: Sequence[NDArray[np.float64]]) -> None:
    for name, array in zip("yxz", arrays, strict=True):
        if array.shape != arrays[0].shape or array.ndim != 1:
            raise ValueError(f"{name} has shape {array.shape}: give one number for every unit")
        if not (np.isfinite(array).all() and (np.abs(array) <= LARGEST).all()):
            raise ValueError(f"{name} holds a number that is not finite or above {LARGEST:g}")
    if ((arrays[1] < 1) & (arrays[1] != 0)).any():
        raise ValueError(
            "x holds a number that is neither 0 nor 1 and more: it counts observations"
        )
