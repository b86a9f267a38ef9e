"""Folds, and what cross-validation makes of held-out distances."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeroute.adapters.errors import RouterError
from mergeroute.routers.folds import calibrate, stratified_folds, targets_of


@given(st.lists(st.integers(5, 70), min_size=1, max_size=4))
def test_every_fold_has_its_share_of_every_class(counts: list[int]) -> None:
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    folds = stratified_folds(targets)
    number = int(folds.max()) + 1
    assert number == (5 if min(counts) >= 50 else min(10, *counts))
    for k, count in enumerate(counts):
        sizes = folds[targets == k].bincount(minlength=number)
        assert count // number <= int(sizes.min()) <= int(sizes.max()) <= -(-count // number)
    assert torch.equal(folds, stratified_folds(targets))


def test_every_prompt_is_scored_once_by_what_it_was_not_fitted_on() -> None:
    targets = targets_of(["a"] * 6 + ["b"] * 7, ["a", "b"])
    scored = torch.zeros(13, dtype=torch.long)

    def score(kept: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        assert torch.equal(kept, ~left)
        scored[left] += 1
        rows = left.nonzero()[:, 0]
        return torch.zeros(len(rows), 2, dtype=torch.float64), rows.double()

    calibration = calibrate(score, targets, modules=2)
    assert scored.tolist() == [1] * 13
    assert calibration.distances == tuple(map(float, range(13)))


@pytest.mark.parametrize(
    ("own", "none", "expected"),
    [
        ([-5.0, -1.0, 2.0, 9.0, 0.0], [10.0, 20.0], [0.0, 0.0, 0.0, 2.0, 9.0]),  # raised to 0
        ([-5.0, -1.0, 2.0, 9.0, 0.0], [3.0, 3.0], [0.0, 0.0, 0.0, 2.0, 3.0]),  # lowered to none's
        ([-5.0, -1.0, 2.0, 9.0, 0.0], [-3.0, -3.0], [0.0] * 5),  # never below 0
    ],
)
def test_log_odds_are_clamped(own: list[float], none: list[float], expected: list[float]) -> None:
    found = torch.tensor(own + none * 5, dtype=torch.float64)
    targets = targets_of(["a"] * 5, ["a"], none=10)

    def score(kept: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        del kept
        return torch.zeros(int(left.sum()), 2, dtype=torch.float64), found[left]

    assert calibrate(score, targets, modules=1).distances == tuple(expected)


@pytest.mark.parametrize(
    ("labels", "none", "message"),
    [
        (["a"] * 5 + ["c"], 0, "prompts name 'c', no module: a, b"),
        (["a"] * 5 + ["b"] * 4, 0, "module 'b' has 4 prompts, at least 5"),
        (["a"] * 5 + ["b"] * 5, 9, "9 prompts that no module serves"),
    ],
)
def test_too_few_prompts_are_refused(labels: list[str], none: int, message: str) -> None:
    with pytest.raises(RouterError, match=message):
        targets_of(labels, ["a", "b"], none=none)
