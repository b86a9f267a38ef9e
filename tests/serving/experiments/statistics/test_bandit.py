"""Weights that follow the evidence."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeroute.serving.experiments.statistics.bandit import _shared_out, thompson_weights
from mergeroute.serving.experiments.statistics.units import Sums

from .samples import sums


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.5, 1.5), min_size=1, max_size=6), st.floats(0, 0.16))
def test_weights_are_whole_buckets_with_a_floor(means: list[float], floor: float) -> None:
    sides = {f"v{i}": sums(200, seed=i, mean=mean) for i, mean in enumerate(means)}
    found = thompson_weights(sides, kind="continuous", direction="up", floor=floor)
    assert found is not None
    buckets = [round(weight * 10_000) for weight in found.values()]
    assert sum(buckets) == 10_000
    assert [many / 10_000 for many in buckets] == list(found.values())
    assert min(found.values()) >= floor - 1e-12
    assert list(found) == list(sides)


def test_the_better_gets_more_in_the_direction_asked_for() -> None:
    sides = {"a": sums(seed=1), "b": sums(seed=2, mean=2)}
    up = thompson_weights(sides, kind="continuous", direction="up", floor=0.1)
    assert up == {"a": 0.1, "b": 0.9}
    down = thompson_weights(sides, kind="continuous", direction="down", floor=0.1)
    assert down == {"a": 0.9, "b": 0.1}


def test_too_few_units_move_no_weight() -> None:
    sides = {"a": sums(seed=1), "b": sums(20, seed=2, mean=9), "c": Sums()}
    assert thompson_weights(sides, kind="continuous", direction="up") is None
    assert thompson_weights({"a": sums()}, kind="continuous", direction="up") == {"a": 1}


def test_a_busy_unit_takes_back_what_was_known() -> None:
    known = {"a": sums(seed=1), "b": sums(seed=2, mean=2)}
    assert thompson_weights(known, kind="continuous", direction="up") is not None
    busy = known["a"] + Sums.of([4_000.0], [4_000.0])
    assert thompson_weights({**known, "a": busy}, kind="continuous", direction="up") is None


def test_what_is_left_over_goes_to_the_largest_remainders() -> None:
    assert _shared_out(10, {"a": 0.21, "b": 0.29, "c": 0.5}) == {"a": 2, "b": 3, "c": 5}
    assert _shared_out(2, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}) == {"a": 1, "b": 1, "c": 0}


def test_floors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 variants cannot each have 0\.6: lower the floor"):
        thompson_weights({"a": Sums(), "b": Sums()}, kind="binary", direction="up", floor=0.6)
    with pytest.raises(ValueError, match="0 variants"):
        thompson_weights({}, kind="binary", direction="up")
