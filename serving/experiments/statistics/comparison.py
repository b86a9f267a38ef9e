"""Two variants side by side: their means and how these vary together."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .means import Mean, mean_of
from .units import Kind, Sums


@dataclass(frozen=True)
class Interval:
    """From low to high."""

    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A control and a variant, before any verdict. covariance: of the two means, 0 unless both
    were adjusted by a covariate.

    information: c v / (c + v) for c and v observations; it grows as evidence comes in.
    variance_kept: the share of the difference's variance that an adjustment has left.
    """

    control: Mean
    variant: Mean
    covariance: float = 0.0
    variance_kept: float = 1.0

    @property
    def difference(self) -> float:
        """Variant less control."""
        return self.variant.value - self.control.value

    @property
    def variance(self) -> float:
        """Of the difference."""
        return max(self.control.variance + self.variant.variance - 2 * self.covariance, 0.0)

    @property
    def standard_error(self) -> float:
        """Of the difference."""
        return math.sqrt(self.variance)

    @property
    def degrees_of_freedom(self) -> float:
        """Welch's and Satterthwaite's, of effective units."""
        total = self.control.variance + self.variant.variance
        share = self.control.variance / total if total > 0 else 0.5
        control, variant = self.control.effective_units - 1, self.variant.effective_units - 1
        return 1 / (share * share / control + (1 - share) * (1 - share) / variant)

    @property
    def information(self) -> float:
        """In observations: a quarter of all of them where the split is even."""
        return self.control.observations / (
            1 + self.control.observations / self.variant.observations
        )


def compare(control: Sums, variant: Sums, *, kind: Kind) -> Comparison | None:
    """The two as they are; None where a variant has fewer than two effective units."""
    first, second = mean_of(control, kind), mean_of(variant, kind)
    return Comparison(first, second) if first and second else None


def difference_interval(comparison: Comparison, critical: float) -> Interval | None:
    """The difference, give or take `critical` standard errors; None where nothing varies."""
    reach = critical * comparison.standard_error
    if not 0 < reach < math.inf:
        return None
    return Interval(comparison.difference - reach, comparison.difference + reach)


def lift(comparison: Comparison) -> float | None:
    """The difference as a share of the control's mean (of its size, where that is negative)."""
    size = abs(comparison.control.value)
    found = comparison.difference / size if size > 0 else math.inf
    return found if math.isfinite(found) else None


def lift_interval(comparison: Comparison, critical: float) -> Interval | None:
    """All lifts r at which variant - (1 + r) control lies within `critical` standard errors of 0.

    None where nothing varies, or the control's mean cannot be told from 0: then every lift is
    possible.

    Source: Fieller 1954, Some Problems in Interval Estimation, JRSS B 16(2).
    """
    base = comparison.control.value
    if base == 0 or comparison.variance == 0:
        return None
    square = critical * critical
    control = square * (comparison.control.variance / base / base)
    variant = square * (comparison.variant.variance / base / base)
    both = square * (comparison.covariance / base / base)
    ratio = comparison.variant.value / base
    # theta^2 (1 - control) - 2 theta (ratio - both) + ratio^2 - variant <= 0
    if not control < 1:
        return None
    middle = ratio - both
    root = math.sqrt(max(middle * middle - (1 - control) * (ratio * ratio - variant), 0.0))
    ends = ((middle - root) / (1 - control) - 1, (middle + root) / (1 - control) - 1)
    if not all(map(math.isfinite, ends)):
        return None
    return Interval(*ends) if base > 0 else Interval(-ends[1], -ends[0])
