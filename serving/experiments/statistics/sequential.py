"""Intervals and p-values that hold however often one looks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.optimize import brentq
from scipy.special import log_ndtr

from .comparison import Comparison, Interval, difference_interval, lift_interval
from .tails import as_normal, as_student

MINIMUM_UNITS = 100  # effective ones in each variant: before, a normal approximation is not trusted
TUNED_FOR = 500.0  # in Comparison.information: 2,000 observations in two equal variants


@dataclass(frozen=True)
class AlwaysValid:
    """Valid at any look and any moment of stopping. p_value: 1 / the mixture's likelihood ratio;
    the smallest of all looks so far is valid, too."""

    interval: Interval | None
    lift_interval: Interval | None
    p_value: float


def always_valid(
    comparison: Comparison | None,
    *,
    alpha: float = 0.05,
    tuned_for: float = TUNED_FOR,
    minimum_units: int = MINIMUM_UNITS,
) -> AlwaysValid | None:
    """The mixture sequential test of no difference, and the confidence sequence it inverts.

    tuned_for: the information at which the interval is narrowest; fixed before the experiment.
    None before both variants have `minimum_units` effective units, and where nothing varies.

    The t of few units is read as the z that is as surprising.

    Source: Robbins 1970, Ann. Math. Stat. 41(5) (normal mixture); Johari, Pekelis and Walsh 2015,
    Always Valid Inference, arXiv:1512.04922 (mixture SPRT, always-valid p-value); Waudby-Smith et
    al. 2021, arXiv:2103.06476 (why an estimated variance and any distribution will do: asymptotic
    confidence sequences; tuning).
    """
    if not is_ready(comparison, minimum_units):
        return None
    assert comparison is not None
    mixture = mixture_weight(comparison.information, alpha=alpha, tuned_for=tuned_for)
    degrees = comparison.degrees_of_freedom
    z = as_normal(comparison.difference / comparison.standard_error, degrees)
    critical = as_student(two_sided_critical(mixture, alpha), degrees)
    return AlwaysValid(
        difference_interval(comparison, critical),
        lift_interval(comparison, critical),
        math.exp(min(0.0, -log_likelihood_ratio(z, mixture))),
    )


def is_ready(comparison: Comparison | None, minimum_units: int) -> bool:
    """Whether there are units enough, and any spread."""
    if comparison is None or comparison.variance == 0:
        return False
    fewest = min(comparison.control.effective_units, comparison.variant.effective_units)
    return fewest >= minimum_units


def mixture_weight(information: float, *, alpha: float, tuned_for: float = TUNED_FOR) -> float:
    """The variance of the effects mixed over, in units of the squared standard error.

    Information counts observations, not units, because it must grow at least as fast as the
    precision does: units that come back add observations but no units.
    """
    level = -2 * math.log(alpha)
    return (level + math.log(level + 1)) * information / tuned_for


def log_likelihood_ratio(z: float, mixture: float) -> float:
    """Of a normal mixture of effects against none."""
    return z * z / 2 * mixture / (1 + mixture) - math.log1p(mixture) / 2


def two_sided_critical(mixture: float, alpha: float) -> float:
    """The z at which the likelihood ratio is 1 / alpha."""
    level = math.log1p(mixture) - 2 * math.log(alpha)
    return math.sqrt((1 + mixture) / mixture * level)


def one_sided_log_ratio(z: float, mixture: float) -> float:
    """Of a mixture over positive effects alone: valid against any effect of 0 or less.

    Source: Howard et al. 2021, Ann. Stat. 49(2), arXiv:1810.08240 (one-sided normal
    mixture).
    """
    shift = z * math.sqrt(mixture / (1 + mixture))
    return log_likelihood_ratio(z, mixture) + math.log(2) + float(log_ndtr(shift))


def one_sided_critical(mixture: float, alpha: float) -> float:
    """The z at which the one-sided ratio is 1 / alpha; never above the two-sided one."""
    most = two_sided_critical(mixture, alpha)
    return float(brentq(lambda z: one_sided_log_ratio(z, mixture) + math.log(alpha), 0.0, most))
