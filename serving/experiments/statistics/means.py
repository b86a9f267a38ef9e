"""The mean of one variant and how far it may be off, with units as what varies."""

from __future__ import annotations

from dataclasses import dataclass

from .units import Kind, Sums

ROUNDING = 1e-12  # of sums of squares: a spread below a millionth of the values is none
FEWEST = 2 - 1e-9  # effective units


@dataclass(frozen=True)
class Mean:
    """A mean over observations. variance: of the mean, not of the observations.

    effective_units: how many units of equal weight would say as much; fewer than there are where
    a few units make most of the observations.
    """

    value: float
    variance: float
    effective_units: float
    observations: float


def mean_of(sums: Sums, kind: Kind) -> Mean | None:
    """The mean per observation and its variance by the delta method, clustered by unit.

    A mean of values is a ratio of two sums over units, y / x. Its variance is that of the mean of
    the units' linearised values (y_i - R x_i) / mean(x), whatever the correlation within a unit.
    binary: at least what independent observations would give at a rate moved towards one half by
    a success and a failure, so that a variant without a single error is not held for certain.

    Bessel's correction and the degrees of freedom count effective units, x^2 / sum of squared x,
    because a heavy user's residual is small by being most of the mean itself.

    None with fewer than two effective units.

    Source: Deng, Knoblich and Lu 2018, Applying the Delta Method in Metric Analytics,
    arXiv:1803.06336; Agresti and Caffo 2000, The American Statistician 54(4); effective
    units: Kish 1965, Survey Sampling.
    """
    effective = sums.x * sums.x / sums.xx if sums.xx > 0 else 0.0
    if sums.n < 2 or effective < FEWEST:
        return None
    ratio = sums.y / sums.x
    squares = residual_squares(sums, ratio)
    variance = squares * effective / (effective - 1) / sums.x / sums.x
    if kind == "binary":
        variance = max(variance, independent_variance(sums))
    return Mean(ratio, variance, effective, sums.x)


def residual_squares(sums: Sums, ratio: float) -> float:
    """The sum over units of (y - ratio x) squared; 0 where only rounding is left of it."""
    largest = sums.yy + ratio * ratio * sums.xx
    squares = largest - 2 * ratio * sums.xy
    return squares if squares > ROUNDING * largest else 0.0


def independent_variance(sums: Sums) -> float:
    """The variance of a rate of independent observations, never 0."""
    rate = min(max((sums.y + 1) / (sums.x + 2), 0.0), 1.0)
    return rate * (1 - rate) / (sums.x + 2)
