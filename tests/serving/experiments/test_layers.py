"""Experiments of one layer share no unit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2_contingency

from mergeroute.serving.errors import ApiError
from mergeroute.serving.experiments.hashing import BUCKETS, bucket
from mergeroute.serving.experiments.layers import (
    Ranges,
    check_together,
    claim,
    holds,
    layer_bucket,
)

from .shapes import experiment, property_of

STEPS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5_000)), max_size=12)


def members(ranges: Ranges) -> set[int]:
    """All buckets."""
    return {n for start, end in ranges for n in range(start, end)}


@property_of
@given(steps=STEPS)
def test_claims_are_exact_and_disjoint_and_keep_whom_they_can(
    steps: list[tuple[str, int]],
) -> None:
    held: dict[str, Ranges] = {}
    for name, count in steps:
        others = [ranges for other, ranges in held.items() if other != name]
        before = members(held.get(name, ()))
        if count + sum(len(members(other)) for other in others) > BUCKETS:
            with pytest.raises(ApiError, match="of the layer is free") as caught:
                claim(others, count / BUCKETS, held=held.get(name, ()))
            assert caught.value.status == 409
            continue
        held[name] = claim(others, count / BUCKETS, held=held.get(name, ()))
        after = members(held[name])
        assert len(after) == count
        assert after.isdisjoint(set().union(*map(members, others)))
        assert before <= after if count >= len(before) else after <= before
        assert all(a < b for a, b in held[name])
        assert all(holds(held[name], n) == (n in after) for n in (0, *list(after)[:3], 9_999))


def test_an_experiment_that_finds_no_room_says_how_much_there_is() -> None:
    with pytest.raises(ApiError, match=r"traffic 0\.5 is asked for, 0\.3 of the layer is free"):
        claim([((0, 3_000),), ((5_000, 9_000),)], 0.5)


@pytest.mark.parametrize(
    ("mine", "other", "message"),
    [
        ({}, {}, None),
        ({"attach_to": "auto"}, {"attach_to": "auto"}, None),
        ({"layer": "x"}, {"unit": ["user"]}, None),
        ({"layer": "x", "attach_to": "auto"}, {}, None),
        ({}, {"unit": ["user"]}, "state the same unit, or choose another layer"),
        ({"layer": "x", "attach_to": "auto"}, {"attach_to": "auto"}, "put them into one layer"),
    ],
)
def test_what_can_run_at_once(
    mine: dict[str, Any], other: dict[str, Any], message: str | None
) -> None:
    runs = experiment(name="other", **other)
    if message is None:
        check_together(experiment(**mine), [runs])
        return
    with pytest.raises(ApiError, match=message) as caught:
        check_together(experiment(**mine), [runs])
    assert (caught.value.status, caught.value.code) == (409, "experiment_conflict")


def test_layers_and_variants_are_independent() -> None:
    keys = [f"user-{n}" for n in range(40_000)]
    one, two, drawn = (
        [layer_bucket("one", key) // 2_500 for key in keys],
        [layer_bucket("two", key) // 2_500 for key in keys],
        [bucket("salt", key) // 2_500 for key in keys],
    )
    for left, right in ((one, two), (one, drawn), (two, drawn)):
        table = [[0] * 4 for _ in range(4)]
        for row, column in zip(left, right, strict=True):
            table[row][column] += 1
        assert chi2_contingency(table).pvalue > 0.001


def test_a_layer_is_not_hashed_like_an_experiment_of_its_name() -> None:
    assert layer_bucket("checkout", "1") != bucket("checkout", "1")
