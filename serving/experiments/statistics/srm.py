"""Whether the units were split as the weights say (sample ratio mismatch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

from scipy.special import chdtrc

ALARM = 0.001
FEWEST_EXPECTED = 5.0  # units in every cell: the chi-square approximation needs them


@dataclass(frozen=True)
class SampleRatio:
    """p_value, statistic: None with too few units to tell. statistic is also None, and p_value 0,
    where units are in a variant of weight 0."""

    p_value: float | None
    statistic: float | None
    is_mismatch: bool


def sample_ratio(counts: Mapping[str, int], weights: Mapping[str, float]) -> SampleRatio:
    """Pearson's chi-square test of the units (never requests) against the weights.

    weights: any scale. A variant without units may be missing in `counts`. Variants of which fewer
    than 5 units are expected are one cell with the next smallest, so that they hide no other's.

    Raises:
        ValueError: a count or weight is negative, or a count's variant has no weight.

    Source: Fabijan et al. 2019, Diagnosing Sample Ratio Mismatch in Online Controlled
    Experiments, KDD.
    """
    _check(counts, weights)
    if any(counts.get(name, 0) for name, weight in weights.items() if weight == 0):
        return SampleRatio(0.0, None, is_mismatch=True)
    units, total = sum(counts.values()), sum(weights.values())
    cells = _pooled([(units * (w / total), counts.get(n, 0)) for n, w in weights.items() if w > 0])
    if len(cells) < 2:
        return SampleRatio(None, None, is_mismatch=False)
    statistic = sum((count - expected) ** 2 / expected for expected, count in cells)
    p_value = float(chdtrc(len(cells) - 1, statistic))
    return SampleRatio(p_value, statistic, is_mismatch=p_value < ALARM)


def _pooled(cells: Sequence[tuple[float, int]]) -> Sequence[tuple[float, int]]:
    """Expected and counted units, the two smallest cells together until enough are expected in
    each. By what is expected alone: counts that chose would raise alarms.
    """
    cells = sorted(cells, key=itemgetter(0))
    while len(cells) > 1 and cells[0][0] < FEWEST_EXPECTED:
        (one, count), (other, others), *rest = cells
        cells = sorted([(one + other, count + others), *rest], key=itemgetter(0))
    return cells


def _check(counts: Mapping[str, int], weights: Mapping[str, float]) -> None:
    for name, value in (*counts.items(), *weights.items()):
        if not 0 <= value < float("inf"):
            raise ValueError(
                f"{name} has {value}: counts and weights are finite and never negative"
            )
    unknown = sorted(set(counts) - set(weights))
    if unknown:
        raise ValueError(f"{', '.join(unknown)} has units and no weight: give every variant's")
