"""Steps in which the experts decide entry by entry whose change counts."""

from __future__ import annotations

from torch import Tensor

from .combine import elected_sign
from .stack import Block, Stack


def majority_sign(stack: Stack) -> Stack:
    """Set to zero every entry that, weighted, has not the sign of the sum over the experts.

    A sum of zero counts as positive. A weight below zero turns an expert's signs round, one of zero
    leaves it nothing.

    Source: Yadav et al. 2023, TIES-Merging, arXiv:2306.01708, section 3 (elect); weighted as in
    mergekit, which for equal weights is the paper's rule.
    """
    return stack.map(lambda block: block.with_x(_aligned(block)))


def agree(stack: Stack, tall_threshold: float, agreement: int) -> Stack:
    """Set to zero, for all experts, the positions that too few of them use.

    tall_threshold: see `tall_mask`; the merged delta is the plain sum, so that the masks do not
    depend on the weights. agreement: how many experts must use a position; more than there are asks
    for all.

    Source: Wang et al. 2024, Localizing Task Information, arXiv:2405.07813 (consensus).
    """
    needed = min(agreement, stack.experts)

    def change(block: Block) -> Block:
        users = tall_mask(block.x, block.x.sum(0), tall_threshold).sum(0)
        return block.with_x(block.x * (users >= needed))

    return stack.map(change)


def tall_mask(delta: Tensor, merged: Tensor, threshold: float) -> Tensor:
    """The entries of the merged delta that serve an expert, bool of the shape of its delta.

    They are those where |delta| > threshold * |merged - delta|. A higher threshold keeps fewer.
    delta: [..., o, i]. merged: [o, i].

    Source: Wang et al. 2024, Localizing Task Information, arXiv:2405.07813 (TALL-masks).
    """
    return delta.abs() > (merged - delta).abs_().mul_(threshold)


def _aligned(block: Block) -> Tensor:
    """x where the sign of w * x is the elected one, else zero."""
    sign = block.w.sign() * elected_sign(block)
    return (block.x * sign).clamp_min_(0).mul_(sign)
