"""Effects against scipy's tests and inverted by brute force."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mergeroute.serving.experiments.statistics.comparison import (
    compare,
    difference_interval,
    lift_interval,
)
from mergeroute.serving.experiments.statistics.effect import effect
from mergeroute.serving.experiments.statistics.units import Kind, Sums

from .samples import any_sums, sums, users


def test_one_observation_a_unit_is_welchs_test() -> None:
    random = np.random.default_rng(2)
    control, variant = random.normal(1, 1, 40), random.normal(1.4, 2, 90)
    want = stats.ttest_ind(variant, control, equal_var=False)
    found = effect(Sums.of(control), Sums.of(variant), kind="continuous", alpha=0.1)
    assert found.p_value == pytest.approx(want.pvalue)
    assert found.difference == pytest.approx(variant.mean() - control.mean())
    interval = want.confidence_interval(0.9)
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((interval.low, interval.high))


def test_the_lifts_interval_is_every_lift_that_is_not_refuted() -> None:
    comparison = compare(sums(300, seed=1), sums(250, seed=2, mean=1.2), kind="continuous")
    assert comparison is not None
    correlated = replace(comparison, covariance=0.3 * comparison.control.variance)
    for each in (comparison, correlated):
        found = lift_interval(each, 2.5)
        grid = np.linspace(-0.5, 1.5, 200_001)
        gap = each.variant.value - (1 + grid) * each.control.value
        variance = each.variant.variance + (1 + grid) ** 2 * each.control.variance
        variance -= 2 * (1 + grid) * each.covariance
        kept = grid[np.abs(gap) <= 2.5 * np.sqrt(variance)]
        assert found is not None
        assert (found.low, found.high) == pytest.approx((kept.min(), kept.max()), abs=2e-5)


def test_a_lift_needs_a_control_that_is_not_zero() -> None:
    random = np.random.default_rng(3)
    around_zero, above = Sums.of(random.normal(0, 1, 200)), Sums.of(random.normal(3, 1, 200))
    assert effect(around_zero, above, kind="continuous").lift_interval is None
    zero = effect(Sums.of([-1.0, 1.0, 0.0]), above, kind="continuous")
    assert (zero.lift, zero.lift_interval) == (None, None)
    assert zero.interval is not None


def test_negative_means_rise_when_they_get_less_negative() -> None:
    found = effect(sums(400, seed=1, mean=-2), sums(400, seed=2, mean=-1), kind="continuous")
    assert found.lift is not None
    assert found.lift_interval is not None
    assert found.lift == pytest.approx(0.5, abs=0.1)
    assert found.lift_interval.low < found.lift < found.lift_interval.high


@given(st.integers(0, 1000), st.sampled_from(["binary", "continuous", "count"]))
def test_swapping_the_two_turns_the_sign(seed: int, kind: Kind) -> None:
    first, second = (sums(150, seed=seed + i, mean=0.4, binary=kind == "binary") for i in (0, 1))
    there, back = effect(first, second, kind=kind), effect(second, first, kind=kind)
    assert (there.difference or 0) == pytest.approx(-(back.difference or 0))
    assert there.p_value == pytest.approx(back.p_value)
    assert there.interval is not None
    assert back.interval is not None
    assert there.interval.low == pytest.approx(-back.interval.high)
    assert there.standard_error == pytest.approx(back.standard_error)


@given(st.floats(1e-6, 1e6), st.sampled_from([-1, 1]))
def test_another_unit_of_measure_changes_nothing_but_it(size: float, sign: int) -> None:
    (y, x, _), (w, v, _) = users(200, seed=1), users(200, seed=2, mean=1.3)
    plain = effect(Sums.of(y, x), Sums.of(w, v), kind="continuous")
    factor = size * sign
    scaled = effect(Sums.of(y * factor, x), Sums.of(w * factor, v), kind="continuous")
    assert scaled.difference == pytest.approx(factor * (plain.difference or 0))
    assert scaled.standard_error == pytest.approx(size * (plain.standard_error or 0))
    assert scaled.p_value == pytest.approx(plain.p_value)
    assert scaled.lift == pytest.approx(sign * (plain.lift or 0))
    assert scaled.always_valid is not None
    assert plain.always_valid is not None
    assert scaled.always_valid.p_value == pytest.approx(plain.always_valid.p_value)


@given(any_sums(), any_sums(), st.sampled_from(["binary", "continuous", "count"]))
def test_whatever_is_recorded_makes_numbers_or_none(
    control: Sums, variant: Sums, kind: Kind
) -> None:
    found = effect(control, variant, kind=kind, minimum_units=2)
    json.dumps(asdict(found), allow_nan=False)
    if found.interval is not None:
        assert found.p_value is not None
        assert 0 <= found.p_value <= 1
        assert found.interval.low <= (found.difference or 0) <= found.interval.high


def test_nothing_varies_nothing_is_said() -> None:
    found = effect(Sums.of(np.full(500, 7.0)), Sums.of(np.full(500, 8.0)), kind="count")
    assert (found.difference, found.standard_error) == (1.0, 0.0)
    assert (found.p_value, found.interval, found.always_valid) == (None, None, None)


def test_the_interval_has_its_level() -> None:
    comparison = compare(sums(seed=1), sums(seed=2), kind="continuous")
    assert comparison is not None
    assert difference_interval(comparison, 0.0) is None
    with pytest.raises(
        ValueError, match=r"alpha is 5: it must lie between 0 and 1, 0\.05 is usual"
    ):
        effect(sums(), sums(), kind="continuous", alpha=5)
