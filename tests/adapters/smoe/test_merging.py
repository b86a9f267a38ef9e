"""Means of experts, and experts left out."""

from __future__ import annotations

import torch

from mergeroute.adapters.smoe.layout import ExpertWeights
from mergeroute.adapters.smoe.merging import merged, usage_shares
from mergeroute.adapters.smoe.pruning import kept_experts
from mergeroute.adapters.smoe.usage import LayerUsage


def make_usage(counts: list[int], saliency: list[float]) -> LayerUsage:
    experts = len(counts)
    return LayerUsage(
        tokens=10,
        counts=torch.tensor(counts),
        logit_gram=torch.eye(experts),
        saliency=torch.tensor(saliency),
        hidden=torch.zeros(0, 8),
    )


def test_a_centre_is_the_weighted_mean_of_its_group() -> None:
    weights = ExpertWeights(torch.randn(4, 6, 5), torch.randn(4, 5, 3))
    shares = torch.tensor([0.5, 0.1, 0.3, 0.1])
    centres = merged(weights, torch.tensor([0, 1, 0, 1]), shares)
    expected = (0.5 * weights.gate_up[0] + 0.3 * weights.gate_up[2]) / 0.8
    assert torch.allclose(centres.gate_up[0], expected)
    assert torch.allclose(centres.down[1], (weights.down[1] + weights.down[3]) / 2)


def test_one_group_of_each_expert_changes_nothing() -> None:
    weights = ExpertWeights(torch.randn(4, 6, 5), torch.randn(4, 5, 3))
    centres = merged(weights, torch.arange(4), torch.rand(4) + 0.1)
    assert torch.equal(centres.gate_up, weights.gate_up)
    assert torch.equal(centres.down, weights.down)


def test_experts_that_were_never_used_have_their_plain_mean() -> None:
    usage = make_usage([0, 0, 8, 2], [0.0] * 4)
    shares = usage_shares(usage, floor=0.01)
    assert torch.allclose(shares, torch.tensor([0.01, 0.01, 0.8, 0.2]))
    weights = ExpertWeights(torch.randn(4, 6, 5), torch.randn(4, 5, 3))
    centres = merged(weights, torch.tensor([0, 0, 1, 1]), shares)
    assert torch.allclose(centres.gate_up[0], weights.gate_up[:2].mean(0))


def test_the_most_salient_experts_are_kept_in_their_order() -> None:
    usage = make_usage([0, 4, 4, 2], [0.0, 0.2, 0.9, 0.5])
    assert kept_experts(usage, 3).tolist() == [1, 2, 3]
    assert kept_experts(usage, 1).tolist() == [2]
    even = make_usage([1, 1, 1], [0.5, 0.5, 0.5])
    assert kept_experts(even, 2).tolist() == [0, 1]
