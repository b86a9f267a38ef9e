"""Benjamini and Hochberg's steps, written out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeroute.serving.experiments.statistics.multiple import adjusted


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_each_is_the_least_level_at_which_it_is_found(p_values: list[float]) -> None:
    ordered = sorted(p_values)
    want = {
        p: min(1.0, *(ordered[k] * len(ordered) / (k + 1) for k in range(i, len(ordered))))
        for i, p in reversed(list(enumerate(ordered)))
    }
    found = adjusted(dict(enumerate(p_values)))
    for key, p in enumerate(p_values):
        assert found[key] == pytest.approx(want[p])


def test_what_is_not_known_counts_for_nothing() -> None:
    assert adjusted({"a": 0.01, "b": None, "c": 0.04}) == {"a": 0.02, "b": None, "c": 0.04}
    assert adjusted({"a": None}) == {"a": None}
    assert adjusted({}) == {}
