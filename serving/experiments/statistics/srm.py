"""Whether the units were split as the weights say (sample ratio mismatch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class Split:
    """How many units each variant got, and the weights it got them by."""

    counts: Mapping[str, int]
    weights: Mapping[str, float]


def sample_ratio(counts: Mapping[str, int], weights: Mapping[str, float]) -> SampleRatio:
    """Pearson's chi-square test of the units (never requests) against the weights.

    weights: any scale. A variant without units may be missing in `counts`.

    Raises:
        ValueError: a count or weight is negative, or a count's variant has no weight.

    Source: Fabijan et al. 2019, Diagnosing Sample Ratio Mismatch in Online Controlled
    Experiments, KDD.
    """
    return sample_ratio_of([Split(counts, weights)])


def sample_ratio_of(splits: Sequence[Split]) -> SampleRatio:
    """The same for weights that changed: units are counted under the weights they were assigned by.

    The chi-squares of all splits are added up, and their degrees of freedom. A split with fewer
    than 5 units expected in a variant is left out.
    """
    statistic, degrees = 0.0, 0
    for split in splits:
        _check(split)
        if any(split.counts.get(name, 0) for name, weight in split.weights.items() if weight == 0):
            return SampleRatio(0.0, None, is_mismatch=True)
        found = _chi_square(split)
        if found is not None:
            statistic += found
            degrees += sum(weight > 0 for weight in split.weights.values()) - 1
    if degrees == 0:
        return SampleRatio(None, None, is_mismatch=False)
    p_value = float(chdtrc(degrees, statistic))
    return SampleRatio(p_value, statistic, is_mismatch=p_value < ALARM)


def _chi_square(split: Split) -> float | None:
    units, total = sum(split.counts.values()), sum(split.weights.values())
    expected = {name: units * (w / total) for name, w in split.weights.items() if w > 0}
    if min(expected.values(), default=0) < FEWEST_EXPECTED:
        return None
    return sum((split.counts.get(name, 0) - many) ** 2 / many for name, many in expected.items())


def _check(split: Split) -> None:
    for name, value in (*split.counts.items(), *split.weights.items()):
        if not 0 <= value < float("inf"):
            raise ValueError(
                f"{name} has {value}: counts and weights are finite and never negative"
            )
    unknown = sorted(set(split.counts) - set(split.weights))
    if unknown:
        raise ValueError(f"{', '.join(unknown)} has units and no weight: give every variant's")
