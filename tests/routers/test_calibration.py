"""Temperature and calibration error against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeroute.routers.calibration import calibration_error, fit_temperature, reliability

predictions = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60)


@given(found=predictions)
def test_bins_hold_every_prompt_and_their_means(found: list[tuple[float, bool]]) -> None:
    bins = reliability([c for c, _ in found], [right for _, right in found])
    assert sum(each.count for each in bins) == len(found)
    right = sum(each.count * each.accuracy for each in bins)
    assert right == pytest.approx(sum(right for _, right in found))
    assert all(0 <= each.accuracy <= 1 and 0 <= each.confidence <= 1 for each in bins)
    assert [each.confidence for each in bins] == sorted(each.confidence for each in bins)


@given(found=predictions)
def test_the_error_is_the_mean_gap_over_bins(found: list[tuple[float, bool]]) -> None:
    expected = 0.0
    for k in range(15):
        members = [(c, r) for c, r in found if min(int(c * 15), 14) == k]
        if members:
            gap = sum(c for c, _ in members) - sum(r for _, r in members)
            expected += abs(gap) / len(found)
    error = calibration_error(reliability([c for c, _ in found], [r for _, r in found]))
    assert error == pytest.approx(expected, abs=1e-9)
    assert error <= 1


def test_nothing_has_no_error() -> None:
    assert reliability([], []) == []
    assert math.isnan(calibration_error([]))


@pytest.mark.parametrize("truth", [1.0, 3.0, 8.0])
def test_the_temperature_that_labels_were_drawn_at_is_found(truth: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 5, generator=generator, dtype=torch.float64) * 6
    shares = (logits / truth).softmax(1)
    targets = torch.multinomial(shares, 1, generator=generator)[:, 0]
    assert fit_temperature(logits, targets) == pytest.approx(truth, rel=0.05)


def test_it_never_sharpens_and_stays_finite() -> None:
    logits = torch.eye(3, dtype=torch.float64).repeat(10, 1)
    targets = torch.arange(3).repeat(10)
    assert fit_temperature(logits, targets) == 1.0
    contradictory = torch.zeros(30, dtype=torch.long)
    assert 1 < fit_temperature(logits * 100, contradictory) < 1e4 + 1
