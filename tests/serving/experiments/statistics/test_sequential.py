"""The mixture test against its integral, and against paths that are looked at all the time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from mergeroute.serving.experiments.statistics.comparison import compare
from mergeroute.serving.experiments.statistics.sequential import (
    AlwaysValid,
    always_valid,
    log_likelihood_ratio,
    mixture_weight,
    one_sided_critical,
    one_sided_log_ratio,
    two_sided_critical,
)
from mergeroute.serving.experiments.statistics.tails import as_normal, as_student
from mergeroute.serving.experiments.statistics.units import Sums

from .samples import sums


@pytest.mark.parametrize("z", [-2.0, 0.0, 1.0, 4.0])
@pytest.mark.parametrize("mixture", [0.1, 3.0, 200.0])
def test_the_ratio_is_the_mixtures_integral(z: float, mixture: float) -> None:
    def ratio(effect: float) -> float:
        return float(math.exp(effect * z - effect**2 / 2) * stats.norm.pdf(effect, 0, mixture**0.5))

    far = 12 * mixture**0.5
    points = [z * mixture / (1 + mixture)]
    both = integrate.quad(ratio, -far, far, points=points, limit=200)[0]
    above = integrate.quad(ratio, 0, far, points=[max(points[0], 0.01)], limit=200)[0]
    assert log_likelihood_ratio(z, mixture) == pytest.approx(math.log(both), abs=1e-6)
    assert one_sided_log_ratio(z, mixture) == pytest.approx(math.log(2 * above), abs=1e-6)


@given(st.floats(1e-3, 1e6), st.floats(1e-4, 0.3))
def test_the_critical_values_are_where_the_ratio_is_one_in_alpha(
    mixture: float, alpha: float
) -> None:
    two, one = two_sided_critical(mixture, alpha), one_sided_critical(mixture, alpha)
    assert log_likelihood_ratio(two, mixture) == pytest.approx(-math.log(alpha))
    assert one_sided_log_ratio(one, mixture) == pytest.approx(-math.log(alpha))
    assert one < two


def test_the_interval_is_narrowest_where_it_is_tuned_for() -> None:
    """In comparison with the square root of time, by the law that the paper tunes by."""
    at = {w: two_sided_critical(mixture_weight(w, alpha=0.05), 0.05) for w in (50, 500, 5000)}
    assert at[500] == min(at.values())
    assert at[500] == pytest.approx(3.03, abs=0.01)


@pytest.mark.parametrize(
    ("critical", "sign"), [(two_sided_critical, np.abs), (one_sided_critical, np.asarray)]
)
def test_paths_looked_at_all_the_time_cross_in_alpha_at_most(
    critical: Callable[[float, float], float], sign: Callable[[np.ndarray], np.ndarray]
) -> None:
    steps = np.unique(np.geomspace(10, 100_000, 400).astype(int))
    gaps = np.sqrt(np.diff(steps, prepend=0))
    paths = (np.random.default_rng(1).normal(size=(8_000, len(steps))) * gaps).cumsum(axis=1)
    z = sign(paths / np.sqrt(steps))
    lines = [critical(mixture_weight(float(s), alpha=0.05), 0.05) for s in steps]
    crossed = (z > lines).any(axis=1).mean()
    assert 0.02 < crossed <= 0.05
    assert (z > (1.96 if sign is np.abs else 1.645)).any(axis=1).mean() > 0.2  # as fixed ones would


@given(st.integers(0, 500), st.floats(0.8, 1.3))
def test_p_value_and_interval_agree(seed: int, mean: float) -> None:
    found = found_of(sums(seed=seed), sums(seed=seed + 1000, mean=mean))
    assert found is not None
    assert found.interval is not None
    excluded = not found.interval.low <= 0 <= found.interval.high
    assert excluded == (found.p_value < 0.05)
    if found.lift_interval:
        assert excluded == (not found.lift_interval.low <= 0 <= found.lift_interval.high)


def found_of(control: Sums, variant: Sums) -> AlwaysValid | None:
    """The always-valid view of a continuous metric."""
    return always_valid(compare(control, variant, kind="continuous"))


def test_few_units_get_no_verdict() -> None:
    assert found_of(sums(90), sums(5_000, seed=1)) is None
    assert found_of(sums(5_000), sums(5_000, seed=1)) is not None
    heavy = Sums.of(np.arange(5_000.0) * 100, np.r_[1e6, np.ones(4_999)])
    assert found_of(heavy, sums(5_000)) is None
    assert always_valid(None) is None


def test_a_clear_difference_has_a_small_p_value_not_zero() -> None:
    found = found_of(sums(5_000), sums(5_000, seed=1, mean=50))
    assert found is not None
    assert 0 < found.p_value < 1e-90


@given(st.floats(0, 30), st.floats(1, 1e9))
def test_students_t_is_read_as_a_normal_and_back(z: float, degrees: float) -> None:
    assert as_normal(z, degrees) <= z * (1 + 1e-9) + 1e-9
    assert as_normal(-z, degrees) == -as_normal(z, degrees)
    if z < 8:
        assert as_normal(as_student(z, degrees), degrees) == pytest.approx(z, abs=1e-6)
