"""Whether a variant has made a metric worse than is allowed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .comparison import compare
from .sequential import (
    MINIMUM_UNITS,
    TUNED_FOR,
    is_ready,
    mixture_weight,
    one_sided_critical,
    one_sided_log_ratio,
)
from .tails import as_normal, as_student
from .units import Direction, Kind, Sums


@dataclass(frozen=True)
class Guardrail:
    """worsening: how much worse the variant is, at_least: the one-sided always-valid bound of it,
    both in the metric's units. None: not enough units yet."""

    breached: bool
    worsening: float | None
    at_least: float | None
    p_value: float | None


def guardrail(
    control: Sums,
    variant: Sums,
    *,
    kind: Kind,
    direction: Direction = "down",
    max_increase: float = 0.0,
    alpha: float = 0.05,
    minimum_units: int = MINIMUM_UNITS,
) -> Guardrail:
    """Test that the metric got worse by more than `max_increase`, at any look.

    direction: where the metric should go; worse is the other way. max_increase: absolute, 0 or
    more. A variant that is within it is ever called breached with a chance of alpha at most.

    Raises:
        ValueError: max_increase is negative or not finite.
    """
    if not 0 <= max_increase < math.inf:
        raise ValueError(f"max_increase is {max_increase}: it must be 0 or more")
    comparison = compare(control, variant, kind=kind)
    if comparison is None:
        return Guardrail(False, None, None, None)
    worsening = comparison.difference * (1 if direction == "down" else -1)
    if not is_ready(comparison, minimum_units):
        return Guardrail(False, worsening, None, None)
    error, degrees = comparison.standard_error, comparison.degrees_of_freedom
    mixture = mixture_weight(comparison.information, alpha=alpha, tuned_for=TUNED_FOR)
    at_least = worsening - error * as_student(one_sided_critical(mixture, alpha), degrees)
    ratio = one_sided_log_ratio(as_normal((worsening - max_increase) / error, degrees), mixture)
    return Guardrail(at_least > max_increase, worsening, at_least, math.exp(min(0.0, -ratio)))
