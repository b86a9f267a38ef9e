"""Grouping: which experts of a layer are merged with each other.

A grouping is a tensor [E] that holds each expert's group, 0 to G - 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from torch import Tensor

from .usage import LayerUsage


def fixed_counts(experts: int, layers: int, *, keep: int, skipped: Sequence[int] = ()) -> list[int]:
    """As many groups in every layer; layers that are skipped keep all experts."""
    return [experts if layer in skipped else keep for layer in range(layers)]


def adaptive_counts(
    usage: Sequence[LayerUsage], *, keep: int, skipped: Sequence[int] = ()
) -> list[int]:
    """How many groups each layer gets under a global budget: its dominant experts, those whose
    frequencies are the highest over all layers.

    keep: groups of a layer, on average over those that are not skipped. A layer's most used expert
    is always dominant, so that each has one at least.

    Departs from the reference code, which keeps what lies above a threshold and fails where many
    experts tie at it: the budget is spent exactly, ties go to the earlier layer and expert.

    Source: Li et al. 2024, Merge, Then Compress, arXiv:2310.01334, section 3.1.
    """
    frequencies = torch.stack([layer.frequencies for layer in usage])  # [L, E]
    frequencies.scatter_(1, frequencies.argmax(1, keepdim=True), 2.0)  # each layer's first is safe
    merged = [layer for layer in range(len(usage)) if layer not in skipped]
    ranked = frequencies[merged].flatten().argsort(descending=True, stable=True)
    owners = ranked[: keep * len(merged)] // frequencies.shape[1]
    found = torch.bincount(owners, minlength=len(merged)).tolist()
    counts = dict(zip(merged, found, strict=True))
    return [counts.get(layer, frequencies.shape[1]) for layer in range(len(usage))]


def group_by_logits(usage: LayerUsage, count: int) -> Tensor:
    """Groups around the `count` most used experts: every other one joins that whose router logits
    are most like its own over all calibration tokens, by cosine.

    Departs from the reference code, where the count of a group's members is never raised and the
    capacity of groups looks up the wrong row: groups have no capacity here.

    Source: Li et al. 2024, Merge, Then Compress, arXiv:2310.01334, section 3.1.
    """
    dominant = usage.counts.argsort(descending=True, stable=True)[:count]
    groups = usage.logit_cosines[:, dominant].argmax(1)
    groups[dominant] = torch.arange(len(dominant))  # whatever rounding says of equal rows
    return groups


def group_by_outputs(usage: LayerUsage, count: int) -> Tensor:
    """Clusters of experts whose mean outputs over all calibration tokens are close: agglomerative,
    Euclidean, average linkage.

    Departs from the reference code, whose run script misspells the method and so runs k-means, and
    whose complete linkage merges the pair that is farthest apart.

    Source: Chen et al. 2025, HC-SMoE, arXiv:2410.08589, section 3.
    """
    assert usage.mean_outputs is not None
    if count == len(usage.mean_outputs):
        return torch.arange(count)
    tree = linkage(usage.mean_outputs.double().numpy(), method="average")
    return torch.from_numpy(cut_tree(tree, n_clusters=count)[:, 0]).long()


def random_groups(experts: int, count: int, *, seed: int) -> Tensor:
    """Groups by lot, as large as each other but for one: what every other grouping must beat."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(experts, generator=generator) % count


def dominants(groups: Tensor, counts: Tensor) -> Tensor:
    """The most used expert of each expert's group, [E]. counts: [E], tokens of each expert."""
    found = torch.empty_like(groups)
    for group in set(groups.tolist()):
        members = torch.nonzero(groups == group).flatten()
        found[members] = members[counts[members].argmax()]
    return found
