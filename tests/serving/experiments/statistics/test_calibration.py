"""Looking early at experiments without a difference: a few of the benchmark's simulations."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from benchmarks.experiment_statistics import (
    guardrails,
    judged_at,
    looked_at,
    sample_ratios,
    verdicts,
)
from benchmarks.experiment_worlds import BINARY, SCORE, World, arrivals, returning
from mergeroute.serving.experiments.statistics.units import Sums

Looks = Callable[[World, int, np.random.Generator], Iterator[tuple[Sums, Sums]]]


@pytest.mark.parametrize(("simulate", "users"), [(arrivals, 4_000), (returning, 400)])
@pytest.mark.parametrize("world", [BINARY, SCORE], ids=lambda world: world.name)
def test_fifty_looks_find_nothing_that_is_not_there(
    world: World, simulate: Looks, users: int
) -> None:
    random = np.random.default_rng(6)
    found = np.mean([looked_at(world, simulate(world, users, random)) for _ in range(100)], axis=0)
    always, lift, fixed, requests, _ = found
    assert max(always, lift) <= 0.05
    assert fixed > 0.1 < requests  # what looking early costs otherwise


def test_three_variants_by_three_metrics_have_no_winner_where_all_are_alike() -> None:
    [found] = verdicts(10)
    assert (found.variants, found.metrics, found.looks) == (3, 3, 50)
    assert (found.winner, found.adjusted) == (0, 0)
    better = arrivals(SCORE, 2_000, np.random.default_rng(8), change=0.5)
    looks = ({SCORE.name: {"a": control, "b": variant}} for control, variant in better)
    assert judged_at(looks).tolist() == [1, 1]


def test_guardrails_pause_what_is_worse_and_nothing_else() -> None:
    paused = {row.worsening: row.paused for row in guardrails(30)}
    assert paused[0.0] == 0
    assert paused[0.01] <= 10
    assert paused[0.05] == 100


def test_one_point_of_all_units_in_the_wrong_variant_is_seen() -> None:
    sound, leaking, *_ = sample_ratios(200)
    assert (sound.units, leaking.units) == (100_000, 100_000)
    assert sound.alarms <= 1
    assert leaking.alarms >= 99
