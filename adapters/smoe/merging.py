"""Merging: the experts of a group averaged into one, their centre."""

from __future__ import annotations

from torch import Tensor

from .layout import ExpertWeights
from .usage import LayerUsage


def usage_shares(usage: LayerUsage, *, floor: float) -> Tensor:
    """What each expert weighs by how often it was selected, [E].

    floor: what an expert weighs at least, as a share of the layer's selections: without it one that
    no calibration token was sent to would vanish, and a group of such experts would have no mean.

    Departs from the reference code, which divides by the sum plus a small number: a group that was
    never selected comes out as zeros there, and as its plain mean here.

    Source: Li et al. 2024, Merge, Then Compress, arXiv:2310.01334, equation 1.
    """
    return usage.frequencies.clamp(min=floor)


def merged(weights: ExpertWeights, groups: Tensor, shares: Tensor) -> ExpertWeights:
    """The weighted mean of the experts of each group, [G] of them.

    groups: [E], 0 to G - 1, none empty. shares: [E], above 0; they need not sum to 1.
    """
    count = int(groups.max()) + 1
    totals = shares.new_zeros(count).index_add_(0, groups, shares)
    factors = (shares / totals[groups]).tolist()
    centres = ExpertWeights(*(x.new_zeros(count, *x.shape[1:]) for x in weights.matrices))
    for expert, (group, factor) in enumerate(zip(groups.tolist(), factors, strict=True)):
        for centre, own in zip(centres.matrices, weights.matrices, strict=True):
            centre[group].add_(own[expert], alpha=factor)
    return centres
