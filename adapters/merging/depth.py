"""What depends on how deep in the model a parameter lies: LiNeS and layer swapping."""

from __future__ import annotations

from .stack import Stack


def lines_factor(depth: float | None, *, alpha: float, beta: float) -> float:
    """What LiNeS multiplies the merged delta of a parameter with: alpha + beta * depth.

    depth: the index of the parameter's block over the last index, in [0, 1]; outside the blocks
    (None) the factor is alpha. For a single expert the paper sets beta = 1 - alpha.

    Source: Wang et al. 2024, LiNeS, arXiv:2410.17146 (layer-increasing scaling).
    """
    return alpha if depth is None else alpha + beta * depth


def lines_alpha(sum_l1: float, merged_l1: float, experts: int) -> float:
    """The alpha of LiNeS for a merge: |sum of the deltas|₁ / |merged delta|₁ / experts.

    sum_l1: of the unweighted sum, over all parameters of the model (see `l1_of_sum`).
    merged_l1: of the merged delta before LiNeS, over the same parameters; if it is zero,
    so that nothing depends on alpha, the answer is 1 / experts.

    Source: Wang et al. 2024, LiNeS, arXiv:2410.17146 (multi-task merging).
    """
    return (sum_l1 / merged_l1 if merged_l1 else 1.0) / experts


def l1_of_sum(stack: Stack) -> float:
    """The L1 norm of the unweighted sum of the deltas of one parameter."""
    return sum(float(block.x.sum(0).abs().sum()) for block in stack.read())


def middle_share(depth: float | None, *, bottom: float, top: float, transition: float) -> float:
    """How much of a block comes from the expert of the middle: 0, 1, or 1/2 in a transition.

    depth: in [0, 1]; None, outside the blocks, belongs to the ends. bottom, top: the depths that
    the ends take. transition: the depth beside each of them that is averaged.

    Source: Bandarkar et al. 2024, Layer Swapping, arXiv:2410.01335.
    """
    if depth is None:
        return 0.0
    inside = min(depth - bottom, 1 - top - depth)
    if inside < 0:
        return 0.0
    return 0.5 if inside < transition else 1.0
