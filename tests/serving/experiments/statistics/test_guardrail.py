"""Guardrails."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeroute.serving.experiments.statistics.guardrail import guardrail
from mergeroute.serving.experiments.statistics.units import Sums

from .samples import any_sums, sums


def errors(count: int, of: int) -> Sums:
    """One request a unit."""
    return Sums.of(np.r_[np.ones(count), np.zeros(of - count)])


def test_a_rate_far_beyond_is_breached_and_one_within_is_not() -> None:
    worse = guardrail(errors(10, 1000), errors(80, 1000), kind="binary", max_increase=0.01)
    assert worse.breached
    assert worse.worsening == pytest.approx(0.07)
    assert worse.at_least is not None
    assert 0.01 < worse.at_least < 0.07
    assert worse.p_value is not None
    assert worse.p_value < 0.05
    within = guardrail(errors(10, 1000), errors(15, 1000), kind="binary", max_increase=0.01)
    assert not within.breached


@given(st.integers(0, 300), st.floats(0, 0.2))
def test_breached_is_where_the_p_value_says_so(seed: int, allowed: float) -> None:
    found = guardrail(
        sums(seed=seed), sums(seed=seed + 999, mean=1.3), kind="continuous", max_increase=allowed
    )
    assert found.p_value is not None
    assert found.breached == (found.p_value < 0.05)


def test_worse_is_less_where_more_is_better() -> None:
    good, bad = sums(seed=1, mean=2), sums(seed=2, mean=1)
    assert guardrail(good, bad, kind="continuous", direction="up", max_increase=0.1).breached
    assert not guardrail(bad, good, kind="continuous", direction="up").breached
    assert guardrail(bad, good, kind="continuous", direction="down").breached


def test_the_first_requests_pause_nothing() -> None:
    found = guardrail(errors(0, 50), errors(50, 50), kind="binary")
    assert (found.breached, found.worsening, found.at_least) == (False, 1.0, None)
    assert guardrail(Sums(), Sums(), kind="binary").worsening is None


@given(any_sums(), any_sums())
def test_whatever_is_recorded_makes_numbers_or_none(control: Sums, variant: Sums) -> None:
    found = guardrail(control, variant, kind="continuous", minimum_units=2)
    json.dumps(asdict(found), allow_nan=False)


def test_an_allowance_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="max_increase is -1: it must be 0 or more"):
        guardrail(Sums(), Sums(), kind="binary", max_increase=-1)
