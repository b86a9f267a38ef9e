"""Which experts are merged with each other, against slow references and known answers."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeroute.adapters.smoe.grouping import (
    adaptive_counts,
    dominants,
    fixed_counts,
    group_by_logits,
    group_by_outputs,
    random_groups,
)
from mergeroute.adapters.smoe.usage import LayerUsage


def make_usage(
    counts: list[int], *, logits: Tensor | None = None, outputs: Tensor | None = None
) -> LayerUsage:
    logits = torch.eye(len(counts)) if logits is None else logits
    return LayerUsage(
        tokens=max(1, sum(counts)),
        counts=torch.tensor(counts),
        logit_gram=logits.T @ logits,
        saliency=torch.zeros(len(counts)),
        hidden=torch.zeros(0, 8),
        mean_outputs=outputs,
    )


layers_of_counts = st.lists(
    st.lists(st.integers(0, 50), min_size=4, max_size=4), min_size=1, max_size=5
)


@given(layers_of_counts, st.integers(1, 4), st.sets(st.integers(0, 4)))
def test_adaptive_counts_spend_the_budget_and_leave_one_in_each_layer(
    counts: list[list[int]], keep: int, skipped: set[int]
) -> None:
    usage = [make_usage(own) for own in counts]
    found = adaptive_counts(usage, keep=keep, skipped=sorted(skipped))
    merged = [layer for layer in range(len(counts)) if layer not in skipped]
    assert sum(found[layer] for layer in merged) == keep * len(merged)
    assert all(1 <= count <= 4 for count in found)
    assert all(found[layer] == 4 for layer in range(len(counts)) if layer in skipped)


def test_a_layer_that_uses_its_experts_evenly_keeps_more_of_them() -> None:
    usage = [make_usage([25, 25, 25, 25]), make_usage([97, 1, 1, 1])]
    assert adaptive_counts(usage, keep=2) == [3, 1]
    assert fixed_counts(4, 3, keep=2, skipped=[1]) == [2, 4, 2]


def test_experts_join_the_dominant_one_with_the_most_alike_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 4, generator=generator)
    logits[:, 3] = 2 * logits[:, 0] + 0.1 * logits[:, 3]
    logits[:, 2] = logits[:, 1] + 0.1 * logits[:, 2]
    groups = group_by_logits(make_usage([5, 9, 1, 2], logits=logits), 2)
    assert groups.tolist() == [1, 0, 0, 1]  # group 0 is around expert 1, the most used
    cosines = make_usage([1, 1, 1, 1], logits=logits).logit_cosines
    columns = torch.nn.functional.cosine_similarity(logits.T[:, None], logits.T[None], dim=-1)
    assert torch.allclose(cosines, columns, atol=1e-5)


def test_equal_router_rows_leave_no_group_empty() -> None:
    groups = group_by_logits(make_usage([3, 2, 1, 0], logits=torch.ones(5, 4)), 3)
    assert sorted(set(groups.tolist())) == [0, 1, 2]


def test_outputs_that_are_close_make_a_cluster() -> None:
    outputs = torch.tensor([[0.0, 0], [5, 5], [0.1, 0], [5, 5.1], [9, 0]])
    groups = group_by_outputs(make_usage([1] * 5, outputs=outputs), 3)
    assert groups[0] == groups[2]
    assert groups[1] == groups[3]
    assert len(set(groups.tolist())) == 3
    assert group_by_outputs(make_usage([1] * 5, outputs=outputs), 5).tolist() == [0, 1, 2, 3, 4]


def test_equal_outputs_still_make_as_many_clusters_as_asked_for() -> None:
    groups = group_by_outputs(make_usage([1] * 4, outputs=torch.ones(4, 3)), 3)
    assert sorted(set(groups.tolist())) == [0, 1, 2]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_random_groups_are_of_like_size(experts: int, count: int, seed: int) -> None:
    count = min(count, experts)
    groups = random_groups(experts, count, seed=seed)
    sizes = torch.bincount(groups, minlength=count)
    assert int(sizes.min()) >= experts // count
    assert int(sizes.max()) <= -(-experts // count)
    assert torch.equal(groups, random_groups(experts, count, seed=seed))


def test_the_most_used_expert_of_a_group_dominates_it() -> None:
    found = dominants(torch.tensor([0, 1, 0, 1, 2]), torch.tensor([1, 5, 3, 4, 0]))
    assert found.tolist() == [2, 1, 2, 1, 4]
