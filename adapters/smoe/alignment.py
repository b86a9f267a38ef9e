"""Alignment: experts' neurons put into one order, so that their weights can be averaged."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .layout import ExpertWeights


def aligned(weights: ExpertWeights, references: Tensor) -> ExpertWeights:
    """The same experts with their neurons in the order of the experts they are merged with.

    No expert's output changes. references: [E], to which expert each is aligned; one that is its
    own reference stays as it is.

    Departs from the reference code, which aligns every expert of a layer to its first one: here
    each is aligned to the one whose group it joins.

    Source: Li et al. 2024, Merge, Then Compress, arXiv:2310.01334, section 3.2; Ainsworth et al.
    2023, Git Re-Basin, arXiv:2209.04836.
    """
    gate_up, down = weights.gate_up.clone(), weights.down.clone()
    for expert, reference in enumerate(references.tolist()):
        if expert == reference:
            continue
        order = permutation(weights, expert, reference)
        gate_up[expert] = _neurons(weights, expert)[:, order].flatten(0, 1)
        down[expert] = weights.down[expert][:, order]
    return ExpertWeights(gate_up, down)


def permutation(weights: ExpertWeights, expert: int, reference: int) -> Tensor:
    """Which neuron of an expert comes to each place, [F], so that it is closest to a reference.

    Gate, up and down matrices count together: a neuron is one row of each of the first two and one
    column of the last. Time: F³; an F of 14,336 takes minutes.
    """
    ours, theirs = _neurons(weights, reference), _neurons(weights, expert)
    likeness = torch.einsum("pfd,pgd->fg", ours, theirs)
    likeness += weights.down[reference].T @ weights.down[expert]
    _, order = linear_sum_assignment(likeness.cpu().numpy(), maximize=True)
    return torch.from_numpy(order).to(weights.down.device)


def _neurons(weights: ExpertWeights, expert: int) -> Tensor:
    """An expert's gate and up matrices, [p, F, D]."""
    return torch.stack(weights.gate_up[expert].chunk(weights.parts))
