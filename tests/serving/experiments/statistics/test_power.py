"""The calculator against the non-central t."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mergeroute.serving.experiments.statistics.power import (
    Design,
    days_to_reach,
    deviation_of,
    minimum_detectable_effect,
    power_at,
    units_needed,
)
from mergeroute.serving.experiments.statistics.units import Sums

from .samples import sums, users

ONE_LOOK = Design(deviation=2.0, always_valid=False)


@pytest.mark.parametrize("units", [40, 200, 5_000])
def test_one_look_is_the_power_of_the_t_test(units: int) -> None:
    degrees, critical = units - 2, stats.t.isf(0.025, units - 2)
    shift = 2.8
    want = stats.nct.sf(critical, degrees, shift) + stats.nct.cdf(-critical, degrees, shift)
    assert power_at(ONE_LOOK, units, shift * 2.0 * math.sqrt(4 / units)) == pytest.approx(
        want, abs=0.015
    )


def test_the_textbooks_sixteen() -> None:
    """Two groups of 15.7 (deviation / effect)^2 units for a power of 80 % at 5 %."""
    assert units_needed(ONE_LOOK, 0.1) == pytest.approx(2 * 15.698 * 400, rel=0.001)


@settings(max_examples=50)
@given(
    st.floats(0.01, 10),
    st.floats(0.05, 0.95),
    st.floats(1, 50),
    st.booleans(),
    st.floats(0.5, 0.99),
)
def test_units_and_effect_are_each_others_answer(
    deviation: float, share: float, observations: float, always: bool, power: float
) -> None:
    design = Design(deviation, observations, share=share, power=power, always_valid=always)
    units = units_needed(design, deviation / 20)
    assert units is not None
    assert (
        power_at(design, units, deviation / 20)
        >= power
        > power_at(design, units - 1, deviation / 20)
    )
    found = minimum_detectable_effect(design, units)
    assert found is not None
    assert found == pytest.approx(deviation / 20, rel=0.01)
    assert power_at(design, units, found) == pytest.approx(power, abs=1e-6)


def test_looking_all_the_time_costs_units() -> None:
    one = units_needed(ONE_LOOK, 0.1)
    always = units_needed(replace(ONE_LOOK, always_valid=True), 0.1)
    assert one is not None
    assert always is not None
    assert 2 * one < always < 3.5 * one
    many = units_needed(replace(ONE_LOOK, always_valid=True, observations_per_unit=20), 0.1)
    assert many is not None
    assert many > always  # the same spread of units, looked at over more values
    assert power_at(ONE_LOOK, 100_000, 0.0) == pytest.approx(ONE_LOOK.alpha, rel=1e-3)


def test_clustering_is_in_the_deviation() -> None:
    y, x, _ = users(20_000, seed=1, mean=0.3, binary=True)
    found = deviation_of(Sums.of(y, x), "binary")
    assert found is not None
    assert found > 1.2 * math.sqrt(0.3 * 0.7 / float(x.mean()))  # if values were independent
    even = Sums.of(sums(1).y + y * 0, x * 0 + 4)
    assert deviation_of(even, "continuous") == 0
    assert deviation_of(Sums(), "binary") is None


def test_what_takes_for_ever_or_no_time() -> None:
    assert units_needed(ONE_LOOK, 0.0) is None
    assert units_needed(ONE_LOOK, 1e-9) is None
    assert units_needed(Design(0.0), 1.0) == 4
    assert minimum_detectable_effect(Design(0.0), 100) == 0
    assert minimum_detectable_effect(ONE_LOOK, 3) is None
    assert days_to_reach(1_000, units_so_far=400, units_per_day=100) == 6
    assert days_to_reach(1_000, units_so_far=1_400, units_per_day=0) == 0
    assert days_to_reach(1_000, units_so_far=400, units_per_day=0) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("share", 0.0), ("alpha", 1.0), ("power", 1.5), ("deviation", -1.0)],
)
def test_a_design_that_cannot_be_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}: it must"):
        Design(**{"deviation": 2.0, field: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"observations_per_unit is 0\.5: it must be 1 or more"):
        Design(1.0, 0.5)
