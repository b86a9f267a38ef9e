"""Who owns which bucket, and what a ramp moves."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.assignment import moved
from mergeroute.serving.errors import ApiError
from mergeroute.serving.experiments.allocation import (
    Allocation,
    allocate,
    ramped,
    shares,
    whole_buckets,
)
from mergeroute.serving.experiments.hashing import BUCKETS

from .shapes import property_of, weights

PATHS = st.lists(weights(), min_size=1, max_size=4)
PAIRS = st.lists(weights(("a", "b")), min_size=1, max_size=6)


def after(path: Sequence[dict[str, float]]) -> Allocation:
    """Weights one after another."""
    allocation = allocate(path[0])
    for step in path[1:]:
        allocation = ramped(allocation, step)
    return allocation


def change(before: Allocation, wanted: dict[str, float]) -> dict[str, int]:
    """In buckets, by variant."""
    had, will = before.counts(), shares(wanted)
    return {name: will.get(name, 0) - had.get(name, 0) for name in {*had, *will}}


@property_of
@given(path=PATHS)
def test_every_bucket_is_owned_and_shares_are_exact(path: list[dict[str, float]]) -> None:
    allocation = after(path)
    owners = allocation.owners()
    assert len(owners) == BUCKETS
    assert allocation.counts() == {name: n for name, n in shares(path[-1]).items() if n}
    probes = {0, BUCKETS - 1, *(start for _, start, _ in allocation.runs)}
    assert all(allocation.variant_of(probe) == owners[probe] for probe in probes)


@property_of
@given(path=PATHS, wanted=weights())
def test_a_ramp_moves_half_the_sum_of_all_changes_and_reshuffles_nobody(
    path: list[dict[str, float]], wanted: dict[str, float]
) -> None:
    before = after(path)
    result = ramped(before, wanted)
    changes = change(before, wanted)
    assert moved(before, result) == sum(map(abs, changes.values())) // 2
    for old, new in zip(before.owners(), result.owners(), strict=True):
        assert old == new or (changes[old] < 0 < changes[new])


@property_of
@given(before=weights(), wanted=weights())
def test_there_and_back(before: dict[str, float], wanted: dict[str, float]) -> None:
    start = allocate(before)
    assert ramped(ramped(start, wanted), before) == start


@property_of
@given(path=PAIRS)
def test_two_variants_always_stand_where_their_weights_put_them(
    path: list[dict[str, float]],
) -> None:
    assert after(path) == allocate(path[-1])


@property_of
@given(path=PATHS, wanted=weights(("a", "b", "c", "d", "new")))
def test_a_new_variant_takes_from_those_who_lose(
    path: list[dict[str, float]], wanted: dict[str, float]
) -> None:
    before = after(path)
    result = ramped(before, wanted)
    assert moved(before, result) == sum(map(abs, change(before, wanted).values())) // 2
    assert result.counts() == {name: n for name, n in shares(wanted).items() if n}


@property_of
@given(path=PATHS, wanted=weights(("a", "c")))
def test_a_variant_that_is_not_named_gives_up_all(
    path: list[dict[str, float]], wanted: dict[str, float]
) -> None:
    before = after(path)
    result = ramped(before, wanted)
    assert set(result.counts()) <= {"a", "c"}
    assert moved(before, result) == sum(map(abs, change(before, wanted).values())) // 2


@property_of
@given(path=PATHS)
def test_the_same_weights_again_move_nobody(path: list[dict[str, float]]) -> None:
    allocation = after(path)
    assert ramped(allocation, path[-1]) == allocation


def test_from_one_percent_to_fifty() -> None:
    before = allocate({"control": 0.99, "routed": 0.01})
    result = ramped(before, {"control": 0.5, "routed": 0.5})
    assert moved(before, result) == 4_900
    assert all(result.variant_of(n) == "routed" for n in range(9_900, BUCKETS))


@property_of
@given(path=PATHS)
def test_it_is_stored_as_json(path: list[dict[str, float]]) -> None:
    allocation = after(path)
    assert Allocation.parse(json.loads(json.dumps(allocation.as_lists()))) == allocation


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [["a", 0, 9_999]],
        [["a", 1, BUCKETS]],
        [["a", 0, 10], ["b", 11, BUCKETS]],
        [["a", 0, 10], ["b", 9, BUCKETS]],
        [["a", 0, BUCKETS + 1]],
        [["a", 0, 5], ["b", 5, 5], ["a", 5, BUCKETS]],
    ],
)
def test_a_damaged_one_is_refused(runs: list[list[Any]]) -> None:
    with pytest.raises(ApiError, match="damaged, restore the database") as caught:
        Allocation.parse(runs)
    assert caught.value.status == 500


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": 0.5, "b": 0.4}, "sum to 0.9, they must sum to 1"),
        ({"a": 1 / 3, "b": 2 / 3}, "must be a multiple of 1/10000: write 0.3333"),
        ({"a": 1.5, "b": -0.5}, "'a' is 1.5, it must be from 0 to 1"),
        ({"a": float("nan"), "b": 0.5}, "is nan, it must be from 0 to 1"),
        ({"a": float("inf")}, "is inf, it must be from 0 to 1"),
        ({}, "sum to 0, they must"),
    ],
)
def test_weights_that_are_no_shares(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        allocate(given)


def test_every_share_that_can_be_written_with_four_digits_is_taken() -> None:
    for count in range(BUCKETS + 1):
        assert whole_buckets("it", float(f"{count / BUCKETS:.4f}")) == count
