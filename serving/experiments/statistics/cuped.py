"""Less noise by what was known of a unit before it was assigned (CUPED)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .comparison import Comparison, compare
from .means import ROUNDING
from .units import Kind, Sums


@dataclass(frozen=True)
class Covariate:
    """The covariate of one variant. variance, covariance (with the metric's linearised values):
    of means over units."""

    mean: float
    variance: float
    covariance: float


def compare_adjusted(control: Sums, variant: Sums, *, kind: Kind) -> Comparison | None:
    """The two with what the covariate explains taken out; None where it explains nothing.

    Each mean is moved by -theta (its covariate's mean - that of both), theta being the covariance
    of metric and covariate over the covariate's variance, of both variants together. The
    difference then has the variance of u - theta z, u being linearised values (see means.py).
    None: too few units, or a covariate that is absent, equal for all or unrelated.

    Source: Deng, Xu, Kohavi and Walker 2013, Improving the Sensitivity of Online Controlled
    Experiments by Utilizing Pre-Experiment Data (CUPED), WSDM.
    """
    plain = compare(control, variant, kind=kind)
    if plain is None or plain.variance == 0:
        return None
    first, second = covariate_of(control), covariate_of(variant)
    spread = first.variance + second.variance
    theta = (first.covariance + second.covariance) / spread if spread > 0 else 0.0
    share = variant.n / (control.n + variant.n)
    return _adjust(plain, (first, second), theta=theta, share=share) if theta else None


def covariate_of(sums: Sums) -> Covariate:
    """Its mean, and how it varies with the metric. sums: of two units at least."""
    mean = sums.z / sums.n
    squares = sums.zz - sums.n * mean * mean
    if squares <= ROUNDING * sums.zz:
        return Covariate(mean, 0.0, 0.0)
    ratio = sums.y / sums.x
    unit = sums.n / (sums.n - 1)
    products = sums.yz - ratio * sums.xz
    return Covariate(mean, squares / (sums.n - 1) / sums.n, products * unit / sums.x / sums.n)


def _adjust(
    plain: Comparison, covariates: tuple[Covariate, Covariate], *, theta: float, share: float
) -> Comparison | None:
    first, second = covariates
    moved = theta * (second.mean - first.mean)
    spread = theta * theta * (first.variance + second.variance)
    along, across = theta * first.covariance, theta * second.covariance
    control = plain.control.variance - 2 * share * along + share * share * spread
    variant = plain.variant.variance - 2 * (1 - share) * across + (1 - share) ** 2 * spread
    both = (1 - share) * along + share * across - share * (1 - share) * spread
    left = control + variant - 2 * both
    if left <= ROUNDING * plain.variance:  # the covariate is the metric itself
        return None
    return Comparison(
        replace(plain.control, value=plain.control.value + share * moved, variance=control),
        replace(plain.variant, value=plain.variant.value - (1 - share) * moved, variance=variant),
        covariance=both,
        variance_kept=left / plain.variance,
    )
