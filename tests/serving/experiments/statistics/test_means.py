"""Means against textbook formulas, and against resampled users."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mergeroute.serving.experiments.statistics.means import mean_of
from mergeroute.serving.experiments.statistics.units import Kind, Sums

from .samples import users


def test_one_observation_a_unit_is_the_ordinary_standard_error() -> None:
    values = np.random.default_rng(0).normal(5, 2, 70)
    mean = mean_of(Sums.of(values), "continuous")
    assert mean is not None
    assert mean.value == pytest.approx(values.mean())
    assert mean.variance**0.5 == pytest.approx(stats.sem(values))
    assert mean.effective_units == pytest.approx(70)
    assert mean.observations == 70


@pytest.mark.parametrize("binary", [False, True])
def test_the_variance_is_that_of_resampled_users(binary: bool) -> None:
    kind: Kind = "binary" if binary else "continuous"
    y, x, _ = users(500, seed=4, mean=0.3, binary=binary)
    chosen = np.random.default_rng(1).integers(0, 500, (4_000, 500))
    resampled = y[chosen].sum(axis=1) / x[chosen].sum(axis=1)
    mean = mean_of(Sums.of(y, x), kind)
    assert mean is not None
    assert mean.variance**0.5 == pytest.approx(resampled.std(), rel=0.05)
    # what taking requests for independent would say is far too little
    assert mean.variance > 1.3 * (0.3 * 0.7 if binary else 1.25) / x.sum()


def test_repeating_every_request_adds_no_certainty() -> None:
    y, x, _ = users(200, seed=5)
    once, twice = mean_of(Sums.of(y, x), "continuous"), mean_of(Sums.of(2 * y, 2 * x), "continuous")
    assert once is not None
    assert twice is not None
    assert twice.variance == pytest.approx(once.variance)


def test_a_rate_without_a_success_is_not_certain() -> None:
    found = mean_of(Sums.of(np.zeros(100)), "binary")
    assert found is not None
    assert found.variance**0.5 == pytest.approx((1 / 102 * 101 / 102 / 102) ** 0.5)
    assert found.value == 0


def test_equal_values_have_no_spread_but_for_rounding() -> None:
    for value in (0.1, 1e9 + 0.3, -7.7):
        found = mean_of(Sums.of([value * k for k in (1, 3, 7)], [1, 3, 7]), "continuous")
        assert found is not None
        assert found.variance == 0


def test_few_units_or_one_that_outweighs_all_tell_nothing() -> None:
    assert mean_of(Sums(), "binary") is None
    assert mean_of(Sums.of([3.0]), "continuous") is None
    assert mean_of(Sums.of([5e5, 1.0, 2.0], [1e6, 1.0, 1.0]), "continuous") is None
