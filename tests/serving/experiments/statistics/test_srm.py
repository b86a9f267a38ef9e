"""Sample ratios against scipy's chi-square."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mergeroute.serving.experiments.statistics.srm import sample_ratio

EVEN = {"a": 0.5, "b": 0.5}


@given(st.lists(st.tuples(st.integers(50, 10**6), st.floats(0.2, 1)), min_size=2, max_size=5))
def test_it_is_pearsons_test(rows: list[tuple[int, float]]) -> None:
    counts = {str(i): count for i, (count, _) in enumerate(rows)}
    weights = {str(i): weight for i, (_, weight) in enumerate(rows)}
    share = sum(counts.values()) / sum(weights.values())
    want = stats.chisquare(list(counts.values()), [w * share for w in weights.values()])
    found = sample_ratio(counts, weights)
    assert found.statistic == pytest.approx(want.statistic)
    assert found.p_value == pytest.approx(want.pvalue, abs=1e-12)
    assert found.is_mismatch == (want.pvalue < 0.001)


def test_a_leak_is_seen_and_chance_is_not() -> None:
    assert sample_ratio({"a": 51_000, "b": 49_000}, EVEN).is_mismatch
    assert not sample_ratio({"a": 50_500, "b": 49_500}, EVEN).is_mismatch  # p = 0.0016
    assert sample_ratio({"a": 10_000}, EVEN).is_mismatch
    assert not sample_ratio({"a": 10**12, "b": 10**12 + 10**6}, EVEN).is_mismatch


def test_too_few_units_cannot_tell() -> None:
    for counts in ({}, {"a": 0, "b": 0}, {"a": 9}, {"a": 4, "b": 5}):
        found = sample_ratio(counts, EVEN)
        assert (found.p_value, found.statistic, found.is_mismatch) == (None, None, False)
    assert sample_ratio({"a": 10}, {"a": 1.0}).p_value is None
    assert sample_ratio({"a": 0}, {"a": 0.0}).p_value is None


def test_a_tiny_variant_hides_no_other() -> None:
    """999 units: 499, 499 and 1 are expected, the last with the first of the others."""
    weights = {"a": 0.4995, "b": 0.4995, "tiny": 0.001}
    found = sample_ratio({"a": 600, "b": 398, "tiny": 1}, weights)
    want = stats.chisquare([601, 398], [999 * 0.5005, 999 * 0.4995])
    assert (found.p_value, found.statistic) == pytest.approx((want.pvalue, want.statistic))
    assert found.is_mismatch
    assert not sample_ratio({"a": 500, "b": 498, "tiny": 1}, weights).is_mismatch


def test_twenty_small_variants_are_ten() -> None:
    weights = {str(n): 0.05 for n in range(20)}
    counts = {str(n): 4 + (-1) ** (n // 2) for n in range(20)}  # 80 units, 4 expected of each
    found = sample_ratio(counts, weights)
    pairs = [counts[str(n)] + counts[str(n + 1)] for n in range(0, 20, 2)]
    assert found.p_value == pytest.approx(stats.chisquare(pairs).pvalue)


def test_a_unit_where_none_belongs_is_a_mismatch() -> None:
    found = sample_ratio({"a": 100, "b": 100, "c": 1}, {**EVEN, "c": 0})
    assert (found.p_value, found.is_mismatch) == (0.0, True)
    unused = sample_ratio({"a": 100, "b": 130, "c": 0}, {**EVEN, "c": 0})
    assert unused == sample_ratio({"a": 100, "b": 130}, EVEN)


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="c has units and no weight: give every variant's"):
        sample_ratio({"c": 1}, EVEN)
    with pytest.raises(ValueError, match="a has -1: counts and weights are finite"):
        sample_ratio({"a": -1}, EVEN)
    with pytest.raises(ValueError, match="b has nan"):
        sample_ratio({"a": 1}, {"a": 1, "b": float("nan")})
