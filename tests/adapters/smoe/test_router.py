"""The router of merged experts: exact, and fitted into a plain checkpoint."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeroute.adapters.smoe.router import fitted_rows, group_gates, group_logits, mean_rows

GROUPS = torch.tensor([0, 1, 0, 2, 1, 0])


@given(st.integers(0, 1000), st.floats(0.1, 60))
def test_group_log_sum_exp_sums_the_probabilities(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(9, 6, generator=generator)
    summed = torch.zeros(9, 3).index_add_(1, GROUPS, logits.softmax(1))
    assert torch.allclose(group_logits(logits, GROUPS).softmax(1), summed, atol=1e-6)


@given(st.integers(0, 1000), st.integers(1, 6))
def test_duplicates_among_the_chosen_are_one_with_their_gates_added(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gates, choice = torch.randn(11, 6, generator=generator).softmax(1).topk(k)
    chosen, summed = group_gates(choice, gates, GROUPS)
    expected = torch.zeros(11, 3).scatter_add_(1, GROUPS[choice], gates)
    assert torch.allclose(torch.zeros(11, 3).scatter_add_(1, chosen, summed), expected, atol=1e-6)
    for row, own in zip(chosen.tolist(), summed.tolist(), strict=True):
        active = [group for group, gate in zip(row, own, strict=True) if gate > 0]
        assert len(active) == len(set(row)) == len(set(active))


def divergence(logits: Tensor, wanted: Tensor) -> float:
    given_, target = logits.log_softmax(1), wanted.log_softmax(1)
    return float((target.exp() * (target - given_)).sum(1).mean())


def test_fitted_rows_are_closer_than_the_members_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    router, hidden = (
        torch.randn(6, 16, generator=generator),
        torch.randn(800, 16, generator=generator),
    )
    rows, gap = fitted_rows(router, GROUPS, hidden, top_k=2)
    fresh = torch.randn(500, 16, generator=generator)
    wanted = group_logits(fresh @ router.T, GROUPS)
    assert divergence(fresh @ rows.T, wanted) < 0.7 * divergence(
        fresh @ mean_rows(router, GROUPS).T, wanted
    )
    assert 0.5 < gap.agreement <= 1
    assert abs(gap.kl - divergence(fresh @ rows.T, wanted)) < 0.3 * gap.kl


def test_groups_of_one_keep_their_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    router, hidden = (
        torch.randn(4, 8, generator=generator),
        torch.randn(100, 8, generator=generator),
    )
    _, gap = fitted_rows(router, torch.arange(4), hidden, top_k=2)
    assert gap.kl < 1e-6
    assert gap.agreement == 1


def test_one_group_is_always_chosen_and_few_tokens_are_enough() -> None:
    router = torch.randn(4, 8)
    _, gap = fitted_rows(router, torch.zeros(4, dtype=torch.long), torch.randn(1, 8), top_k=1)
    assert (gap.kl, gap.agreement) == (0, 1)
