"""How small an effect an experiment can find, and how long that takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.optimize import brentq

from .means import mean_of
from .sequential import TUNED_FOR, mixture_weight, two_sided_critical
from .tails import as_student, normal_tail, student_critical
from .units import Kind, Sums

MOST_UNITS = 10**12


@dataclass(frozen=True)
class Design:
    """A control and one variant of it, both varying as the control does.

    deviation: the standard deviation of units' linearised values (see deviation_of); it holds the
    clustering. share: the variant's, of the units of the two. always_valid: whether it is looked at
    all the time. Then the power is that of the last look alone; earlier looks only add to it.

    Raises:
        ValueError: a number out of range.
    """

    deviation: float
    observations_per_unit: float = 1.0
    share: float = 0.5
    alpha: float = 0.05
    power: float = 0.8
    always_valid: bool = True

    def __post_init__(self) -> None:
        for name in ("share", "alpha", "power"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must lie between 0 and 1")
        for name, least in (("deviation", 0), ("observations_per_unit", 1)):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be {least} or more")


def deviation_of(sums: Sums, kind: Kind) -> float | None:
    """The standard deviation of units' linearised values (y - R x) / mean(x), from data so far.

    None with fewer than two units.
    """
    mean = mean_of(sums, kind)
    return math.sqrt(mean.variance * sums.n) if mean else None


def power_at(design: Design, units: float, effect: float) -> float:
    """The chance to find `effect` (absolute, either sign) with `units` units in both variants."""
    if design.deviation == 0:
        return 1.0 if effect else design.alpha
    shift = abs(effect) / _standard_error(design, units)
    critical = _critical(design, units)
    return normal_tail(critical - shift) + normal_tail(critical + shift)


def units_needed(design: Design, effect: float) -> int | None:
    """Units in the two variants together until `effect` is found with the design's power.

    None: no effect, or more than 10^12 units.
    """
    low, high = 1, 4
    while power_at(design, high, effect) < design.power:
        low, high = high, 2 * high
        if high > MOST_UNITS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        found = middle >= 4 and power_at(design, middle, effect) >= design.power
        low, high = (low, middle) if found else (middle, high)
    return high


def minimum_detectable_effect(design: Design, units: float) -> float | None:
    """The smallest absolute effect found with the design's power; None below four units."""
    if units < 4:
        return None
    if design.deviation == 0:
        return 0.0
    error = _standard_error(design, units)
    most = _critical(design, units) + 40
    wanted = brentq(lambda shift: power_at(design, units, shift * error) - design.power, 0.0, most)
    return float(wanted) * error


def days_to_reach(units: int, *, units_so_far: int, units_per_day: float) -> float | None:
    """Days until there are `units` units, at the present pace of new ones; None at no pace."""
    missing = max(units - units_so_far, 0)
    if not missing:
        return 0.0
    return missing / units_per_day if units_per_day > 0 else None


def _standard_error(design: Design, units: float) -> float:
    return design.deviation / math.sqrt(units * design.share * (1 - design.share))


def _critical(design: Design, units: float) -> float:
    degrees = max(units - 2, 1.0)
    if not design.always_valid:
        return student_critical(design.alpha / 2, degrees)
    observations = units * design.observations_per_unit * design.share * (1 - design.share)
    mixture = mixture_weight(observations, alpha=design.alpha, tuned_for=TUNED_FOR)
    return as_student(two_sided_critical(mixture, design.alpha), degrees)
