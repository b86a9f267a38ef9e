"""What a variant changes, by its units."""

from __future__ import annotations

from dataclasses import dataclass

from .comparison import (
    Comparison,
    Interval,
    compare,
    difference_interval,
    lift,
    lift_interval,
)
from .cuped import compare_adjusted
from .sequential import MINIMUM_UNITS, TUNED_FOR, AlwaysValid, always_valid
from .tails import student_critical, student_tail
from .units import Kind, Sums


@dataclass(frozen=True)
class Effect:
    """Variant less control. None: it cannot be known (too few units, nothing varies, no base).

    interval, lift_interval, p_value: for one look, fixed beforehand. always_valid: for any look.
    lift: the difference as a share of the control's mean. variance_kept: after CUPED; 1 without.
    """

    control_mean: float | None
    variant_mean: float | None
    difference: float | None
    standard_error: float | None
    interval: Interval | None
    p_value: float | None
    lift: float | None
    lift_interval: Interval | None
    always_valid: AlwaysValid | None
    adjusted: bool
    variance_kept: float


def effect(
    control: Sums,
    variant: Sums,
    *,
    kind: Kind,
    alpha: float = 0.05,
    tuned_for: float = TUNED_FOR,
    minimum_units: int = MINIMUM_UNITS,
) -> Effect:
    """The effect on the mean per observation, by Welch's test on units (delta method).

    The lift's interval is Fieller's. Adjusted by the covariate where it varies (CUPED).
    alpha: 1 - the confidence of every interval, in (0, 1).
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}: it must lie between 0 and 1, 0.05 is usual")
    adjusted = compare_adjusted(control, variant, kind=kind)
    comparison = adjusted or compare(control, variant, kind=kind)
    if comparison is None:
        return _unknown(control, variant)
    critical = student_critical(alpha / 2, comparison.degrees_of_freedom)
    return Effect(
        control_mean=comparison.control.value,
        variant_mean=comparison.variant.value,
        difference=comparison.difference,
        standard_error=comparison.standard_error,
        interval=difference_interval(comparison, critical),
        p_value=p_value(comparison),
        lift=lift(comparison),
        lift_interval=lift_interval(comparison, critical),
        always_valid=always_valid(
            comparison, alpha=alpha, tuned_for=tuned_for, minimum_units=minimum_units
        ),
        adjusted=adjusted is not None,
        variance_kept=comparison.variance_kept,
    )


def p_value(comparison: Comparison) -> float | None:
    """Two-sided, of Welch's test; None where nothing varies."""
    error = comparison.standard_error
    if error == 0:
        return None
    size = abs(comparison.difference) / error
    return min(1.0, 2 * student_tail(size, comparison.degrees_of_freedom))


def _unknown(control: Sums, variant: Sums) -> Effect:
    first, second = control.mean, variant.mean
    difference = None if first is None or second is None else second - first
    return Effect(first, second, difference, None, None, None, None, None, None, False, 1.0)
