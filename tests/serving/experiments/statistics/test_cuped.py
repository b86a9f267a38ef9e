"""CUPED against the same written out unit by unit, and against resampled users."""

from __future__ import annotations

import numpy as np
import pytest

from mergeroute.serving.experiments.statistics.cuped import compare_adjusted
from mergeroute.serving.experiments.statistics.effect import effect
from mergeroute.serving.experiments.statistics.units import Sums

from .samples import Array, users


def test_one_observation_a_unit_is_the_paper() -> None:
    random = np.random.default_rng(1)
    z = [random.normal(3, 1, count) for count in (120, 80)]
    y = [
        each + random.normal(shift, 0.5, len(each)) for each, shift in zip(z, (0, 0.2), strict=True)
    ]
    parts = [np.cov(a, b) / len(a) for a, b in zip(y, z, strict=True)]
    theta = sum(p[0, 1] for p in parts) / sum(p[1, 1] for p in parts)
    centre = np.concatenate(z).mean()
    adjusted = [a - theta * (b - centre) for a, b in zip(y, z, strict=True)]
    found = compare_adjusted(Sums.of(y[0], z=z[0]), Sums.of(y[1], z=z[1]), kind="continuous")
    assert found is not None
    assert found.control.value == pytest.approx(adjusted[0].mean())
    assert found.variant.value == pytest.approx(adjusted[1].mean())
    want = sum(each.var(ddof=1) / len(each) for each in adjusted)
    assert found.variance == pytest.approx(want)
    assert found.variance_kept == pytest.approx(
        want / sum(each.var(ddof=1) / len(each) for each in y)
    )
    assert found.variance_kept < 0.3


def resampled(units: tuple[Array, Array, Array], random: np.random.Generator) -> Sums:
    """Sums of as many users, drawn with replacement."""
    chosen = random.integers(0, len(units[0]), len(units[0]))
    y, x, z = (each[chosen] for each in units)
    return Sums.of(y, x, z)


def test_clustered_means_vary_as_resampled_ones_do() -> None:
    sides = users(400, seed=1), users(300, seed=2)
    random = np.random.default_rng(3)
    rows = []
    for _ in range(1_500):
        each = compare_adjusted(*(resampled(side, random) for side in sides), kind="continuous")
        assert each is not None
        rows.append((each.control.value, each.variant.value))
    want = np.cov(np.array(rows).T)
    found = compare_adjusted(*(Sums.of(*side) for side in sides), kind="continuous")
    assert found is not None
    assert found.variance == pytest.approx(want[0, 0] + want[1, 1] - 2 * want[0, 1], rel=0.12)
    assert found.control.variance == pytest.approx(want[0, 0], rel=0.12)
    assert found.variant.variance == pytest.approx(want[1, 1], rel=0.12)
    assert found.covariance == pytest.approx(want[0, 1], abs=0.1 * want[0, 0])


def test_without_a_covariate_nothing_is_adjusted() -> None:
    (y, x, z), (w, v, _) = users(200, seed=1), users(200, seed=2)
    assert compare_adjusted(Sums.of(y, x), Sums.of(w, v), kind="continuous") is None
    constant = [Sums.of(a, b, np.full(200, 0.1)) for a, b in ((y, x), (w, v))]
    assert compare_adjusted(*constant, kind="continuous") is None
    plain = effect(Sums.of(y, x), Sums.of(w, v), kind="continuous")
    assert (plain.adjusted, plain.variance_kept) == (False, 1.0)
    assert effect(*constant, kind="continuous") == plain
    one_sided = compare_adjusted(Sums.of(y, x, z), Sums.of(w, v), kind="continuous")
    assert one_sided is not None


def test_a_covariate_that_is_the_metric_is_not_believed() -> None:
    values = np.random.default_rng(1).normal(size=(2, 300))
    both = [Sums.of(each, z=each) for each in values]
    assert compare_adjusted(*both, kind="continuous") is None


def test_an_adjusted_effect_says_so_and_is_narrower() -> None:
    (y, x, z), (w, v, u) = users(500, seed=5), users(500, seed=6, mean=1.2)
    plain = effect(Sums.of(y, x), Sums.of(w, v), kind="continuous")
    found = effect(Sums.of(y, x, z), Sums.of(w, v, u), kind="continuous")
    assert found.adjusted
    assert found.standard_error is not None
    assert plain.standard_error is not None
    assert found.standard_error == pytest.approx(plain.standard_error * found.variance_kept**0.5)
    assert found.variance_kept < 0.9
