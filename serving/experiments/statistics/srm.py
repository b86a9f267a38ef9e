"""Whether the units were split as the weights say (sample ratio mismatch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scipy.special import chdtrc

ALARM = 0.001
FEWEST_EXPECTED = 5.0  # units in every variant: the chi-square approximation needs them


@dataclass(frozen=True)
class SampleRatio:
    """p_value, statistic: None with too few units to tell. statistic is also None, and p_value 0,
    where units are in a variant of weight 0."""

    p_value: float | None
    statistic: float | None
    is_mismatch: bool


def sample_ratio(counts: Mapping[str, int], weights: Mapping[str, float]) -> SampleRatio:
    """Pearson's chi-square test of the units (never requests) against the weights.

    weights: any scale. A variant without units may be missing in `counts`.

    Raises:
        ValueError: a count or weight is negative, or a count's variant has no weight.

    Source: Fabijan et al. 2019, Diagnosing Sample Ratio Mismatch in Online Controlled
    Experiments, KDD.
    """
    _check(counts, weights)
    if any(counts.get(name, 0) for name, weight in weights.items() if weight == 0):
        return SampleRatio(0.0, None, is_mismatch=True)
    units, total = sum(counts.values()), sum(weights.values())
    expected = {name: units * (w / total) for name, w in weights.items() if w > 0}
    if len(expected) < 2 or min(expected.values()) < FEWEST_EXPECTED:
        return SampleRatio(None, None, is_mismatch=False)
    statistic = sum((counts.get(name, 0) - many) ** 2 / many for name, many in expected.items())
    p_value = float(chdtrc(len(expected) - 1, statistic))
    return SampleRatio(p_value, statistic, is_mismatch=p_value < ALARM)


def _check(counts: Mapping[str, int], weights: Mapping[str, float]) -> None:
    for name, value in (*counts.items(), *weights.items()):
        if not 0 <= value < float("inf"):
            raise ValueError(
                f"{name} has {value}: counts and weights are finite and never negative"
            )
    unknown = sorted(set(counts) - set(weights))
    if unknown:
        raise ValueError(f"{', '.join(unknown)} has units and no weight: give every variant's")
