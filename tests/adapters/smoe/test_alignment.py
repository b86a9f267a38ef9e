"""Neurons in another order: found again, and no output changes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from mergeroute.adapters.smoe.alignment import aligned, permutation
from mergeroute.adapters.smoe.layout import ExpertWeights

from ...moe import run_expert_slowly


def make_experts(
    parts: int, *, experts: int = 4, width: int = 24, hidden: int = 32
) -> ExpertWeights:
    generator = torch.Generator().manual_seed(parts)
    return ExpertWeights(
        torch.randn(experts, parts * width, hidden, generator=generator),
        torch.randn(experts, hidden, width, generator=generator),
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_alignment_changes_no_output(parts: int) -> None:
    weights = make_experts(parts)
    found = aligned(weights, torch.tensor([0, 0, 2, 2]))
    x = torch.randn(50, 32)
    for expert in range(4):
        before, after = (run_expert_slowly(w, expert, x, silu) for w in (weights, found))
        assert torch.allclose(before, after, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    assert torch.equal(found.gate_up[0], weights.gate_up[0])
    assert not torch.equal(found.gate_up[1], weights.gate_up[1])


@pytest.mark.parametrize("parts", [1, 2])
def test_shuffled_neurons_are_recovered_exactly(parts: int) -> None:
    weights = make_experts(parts)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(5))
    gate_up, down = weights.gate_up.clone(), weights.down.clone()
    gate_up[1] = torch.cat([part[order] for part in weights.gate_up[0].chunk(parts)])
    down[1] = weights.down[0][:, order]
    shuffled = ExpertWeights(gate_up, down)
    assert torch.equal(order[permutation(shuffled, 1, 0)], torch.arange(24))
    found = aligned(shuffled, torch.tensor([0, 0, 2, 3]))
    assert torch.equal(found.gate_up[1], weights.gate_up[0])
    assert torch.equal(found.down[1], weights.down[0])
