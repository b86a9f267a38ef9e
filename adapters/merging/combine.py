"""The last steps: from a stack to the stream of the merged delta."""

from __future__ import annotations

import torch
from torch import Tensor

from .stack import Block, Merged, Stack


def total(stack: Stack) -> Merged:
    """The weighted sum of the deltas."""
    return stack.merge(weighted_sum)


def mean(stack: Stack) -> Merged:
    """The weighted sum of the deltas over the sum of the weights; over 1 where that is zero."""
    return stack.merge(lambda block: _over(weighted_sum(block), block.w.sum(0)))


def disjoint_mean(stack: Stack) -> Merged:
    """The weighted mean over the experts whose entry is not zero; zero where there is none.

    Source: Yadav et al. 2023, TIES-Merging, arXiv:2306.01708, section 3 (disjoint merge); the
    divisor is the sum of the weights, which for equal weights is the paper's count.
    """
    return stack.merge(lambda block: _over(weighted_sum(block), surviving_weight(block)))


def max_aligned(stack: Stack) -> Merged:
    """The elected sign times the largest weighted magnitude among the experts that have it.

    Source: Huang et al. 2024, EMR-Merging, arXiv:2405.17461 (elect).
    """

    def combine(block: Block) -> Tensor:
        sign = elected_sign(block)
        return block.wx.mul_(sign).amax(0).clamp_min_(0).mul_(sign)

    return stack.merge(combine)


def scaled(merged: Merged, scale: float) -> Merged:
    """The merged delta times `scale`."""
    return merged if scale == 1 else (block * scale for block in merged)


def elected_sign(block: Block) -> Tensor:
    """The sign of the weighted sum over the experts, 1 or -1, [b, i]; 1 for zero."""
    return torch.where(weighted_sum(block) >= 0, 1.0, -1.0)


def weighted_sum(block: Block) -> Tensor:
    """The sum of w * x over the experts, [b, i], added in their order."""
    if block.w.numel() != len(block.x):
        return block.wx.sum(0)
    weights: list[float] = block.w.flatten().tolist()
    out: Tensor = block.x[0] * weights[0]
    for x, weight in zip(block.x[1:], weights[1:], strict=True):
        out.add_(x, alpha=weight)
    return out


def surviving_weight(block: Block) -> Tensor:
    """The sum of the weights of the experts whose entry is not zero, [b, i]."""
    return block.x.sign().abs_().mul_(block.w).sum(0)


def _over(numerator: Tensor, divisor: Tensor) -> Tensor:
    return numerator.div_(torch.where(divisor == 0, 1.0, divisor))
