"""Weights that follow the evidence (Thompson sampling)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..allocation import least_buckets
from ..hashing import BUCKETS
from .bayes import beliefs
from .means import mean_of
from .sequential import MINIMUM_UNITS
from .units import Direction, Kind, Sums


def thompson_weights(
    sums: Mapping[str, Sums],
    *,
    kind: Kind,
    direction: Direction,
    floor: float = 0.05,
    seed: int = 0,
) -> dict[str, float] | None:
    """Every variant's weight: the floor, and its chance to be the best of what is left.

    Weights are multiples of 1/10,000, sum to 1 and are never below `floor`. None while a variant
    has fewer than 100 effective units, and again where one busy unit has made them so few: what is
    not known moves no weight.

    Raises:
        ValueError: no variants, or floors that do not fit into 1.

    Source: Scott 2010, A Modern Bayesian Look at the Multi-armed Bandit (probability matching).
    """
    least = least_buckets(floor)
    if not sums or not 0 <= least * len(sums) <= BUCKETS:
        raise ValueError(f"{len(sums)} variants cannot each have {floor}: lower the floor")
    means = [mean_of(each, kind) for each in sums.values()]
    if any(mean is None or mean.effective_units < MINIMUM_UNITS for mean in means):
        return None
    found = beliefs(sums, kind=kind, direction=direction, seed=seed)
    chances = {name: belief.probability_best or 0.0 for name, belief in found.items()}
    free = BUCKETS - least * len(sums)
    return {name: (least + more) / BUCKETS for name, more in _shared_out(free, chances).items()}


def _shared_out(buckets: int, chances: Mapping[str, float]) -> dict[str, int]:
    """Whole buckets by chance; the largest remainders, then the first names, get what is left."""
    exact = {name: buckets * chance for name, chance in chances.items()}
    whole = {name: math.floor(many) for name, many in exact.items()}
    order = sorted(exact, key=lambda name: whole[name] - exact[name])
    for name in order[: buckets - sum(whole.values())]:
        whole[name] += 1
    return whole
