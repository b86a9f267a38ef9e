"""LoRA-LEGO: the rank-one units of several LoRAs of one matrix, clustered into a rank budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .delta import LowRank, concat

MAX_RATIO = 4.0
"""Parameter reweighting enlarges a centroid at most so much: the mean of units that cancel is
noise."""

RESTARTS = 10
_STEPS = 100
_SAME = 1e-10
"""Squared distances up to this share of the mean squared length are rounding."""

Gauge = Literal["balanced", "raw"]
Reweight = Literal["both", "parameter", "output", "none"]


def lego(
    deltas: Sequence[LowRank],
    *,
    rank: int,
    gauge: Gauge = "balanced",
    reweight: Reweight = "both",
    seed: int = 0,
) -> LowRank:
    """One delta of a given rank from many: clusters of their minimal semantic units.

    A unit is one component: a column b of the left factor with a row a of the right one. Units of
    all deltas are clustered, every cluster gives one component of the result.

    deltas: each [o, i], of any ranks; those that change nothing do not count. rank: clusters, at
    least 1; the result has fewer components if there are fewer distinct units.
    gauge: `balanced` takes the units from the singular value decomposition, clusters them by the
    Frobenius distance between the matrices b aᵀ and represents a cluster by the best rank-one
    approximation of its mean, so that the result depends on the deltas alone. `raw` is the paper's
    form: it clusters the vectors [a; b] as stored and takes their mean, which changes with the
    factors (B G⁻¹, G A) that an adapter happens to be stored in.
    reweight: `parameter` gives every centroid the mean norm of its units (enlarged at most 4
    times), against the norm lost by averaging; `output` multiplies the result by sqrt(mean rank /
    components), against the variance gained by adding; `both` is the paper's.
    seed: of the initial centres.

    The scale is that of one adapter, not of the sum: with `output`, copies of one adapter collapse
    into the adapter, and as many clusters as units give the sum over sqrt(number of deltas).

    Raises:
        ValueError: no deltas, their shapes differ, or rank is below 1.

    Source: Zhao et al. 2025, Merging LoRAs like Playing LEGO, arXiv:2409.16167; gauge `balanced` is
    our own.
    """
    if rank < 1:
        raise ValueError(f"rank {rank} is out of range: at least 1")
    dtype = concat(deltas).left.dtype  # refuses none, and different shapes
    present = [_units(delta, gauge) for delta in deltas if delta.norm() > 0]
    if not present:
        return LowRank(
            torch.zeros_like(deltas[0].left[:, :1]), torch.zeros_like(deltas[0].right[:1])
        )
    units = concat(present)
    gram = _gram(units, gauge)
    labels = cluster_units(gram, clusters=rank, seed=seed)
    centroid = _rank_one if gauge == "balanced" else _mean_unit
    merged = concat(
        [
            centroid(_select(units, labels == label), reweight in ("both", "parameter"))
            for label in range(int(labels.max()) + 1)
        ]
    )
    if reweight in ("both", "output"):
        merged = merged.scaled((units.rank / len(present) / merged.rank) ** 0.5)
    return LowRank(merged.left.to(dtype), merged.right.to(dtype))


def cluster_units(
    gram: Tensor, *, clusters: int, seed: int = 0, restarts: int = RESTARTS
) -> Tensor:
    """Labels [M] of k-means in the space where `gram` [M, M] holds the inner products.

    Labels count from 0 without gaps and number at most `clusters`: units that are equal share one,
    unless there are as many clusters as units. The best of `restarts` runs from k-means++ centres
    drawn with `seed`. Units are put into an order of their own first, so that the result does not
    depend on the order they come in, except among units of equal length.

    gram: symmetric, positive semidefinite. clusters, restarts: at least 1.

    Source: Arthur and Vassilvitskii 2007, k-means++: The Advantages of Careful Seeding.
    """
    if clusters >= len(gram):
        return torch.arange(len(gram), device=gram.device)
    order = _canonical_order(gram)
    points = _embedded(gram[order][:, order].double())
    generator = torch.Generator().manual_seed(seed)
    runs = [_lloyd(points, _careful_centres(points, clusters, generator)) for _ in range(restarts)]
    best, _ = min(runs, key=lambda run: run[1])
    labels = torch.empty_like(best)
    labels[order] = best
    compact: Tensor = torch.unique(labels, return_inverse=True)[1]
    return compact


def _units(delta: LowRank, gauge: Gauge) -> LowRank:
    if gauge == "raw":
        return LowRank(delta.left.double(), delta.right.double())
    return LowRank.from_svd(*delta.svd(rtol=1e-6))


def _gram(units: LowRank, gauge: Gauge) -> Tensor:
    """Inner products [M, M]: of the matrices b aᵀ, or of the vectors [a; b]."""
    lefts, rights = units.left.T @ units.left, units.right @ units.right.T
    return lefts * rights if gauge == "balanced" else lefts + rights


def _select(units: LowRank, members: Tensor) -> LowRank:
    return LowRank(units.left[:, members], units.right[members])


def _rank_one(units: LowRank, reweight: bool) -> LowRank:
    """The best rank-one approximation of the mean of the matrices b aᵀ."""
    u, singular, vt = units.scaled(1 / units.rank).svd()
    if not singular.numel():
        return LowRank(units.left[:, :1] * 0, units.right[:1])
    size = singular[:1]
    if reweight:
        mean = (units.left.norm(dim=0) * units.right.norm(dim=1)).mean()
        size = torch.minimum(MAX_RATIO * size, mean)
    return LowRank.from_svd(u[:, :1], size, vt[:1])


def _mean_unit(units: LowRank, reweight: bool) -> LowRank:
    """The mean of the vectors [a; b]."""
    b, a = units.left.mean(1, keepdim=True), units.right.mean(0, keepdim=True)
    if not reweight:
        return LowRank(b, a)
    mean = (units.left.square().sum(0) + units.right.square().sum(1)).sqrt().mean()
    ratio = mean / (b.square().sum() + a.square().sum()).sqrt()
    ratio = ratio.nan_to_num(1.0).clamp(max=MAX_RATIO)
    return LowRank(b * ratio, a * ratio)


def _canonical_order(gram: Tensor) -> Tensor:
    """Longest first; among equals, the one that is more alike the others."""
    likeness = gram.square().sum(1)
    order = likeness.argsort(descending=True, stable=True)
    lengths = (gram.diagonal() / gram.diagonal().max() * 1e6).round()
    return order[lengths[order].argsort(descending=True, stable=True)]


def _embedded(gram: Tensor) -> Tensor:
    """Points [M, M], on the CPU, whose inner products are `gram`."""
    values, vectors = torch.linalg.eigh(gram.cpu())
    points: Tensor = vectors * values.clamp(min=0).sqrt()
    return points


def _careful_centres(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Up to `clusters` distinct points, each drawn by its squared distance to those before."""
    same = _SAME * points.square().sum(1).mean()
    chances = torch.ones(len(points), dtype=points.dtype)
    nearest = torch.full_like(chances, torch.inf)
    centres: list[Tensor] = []
    while len(centres) < clusters and bool((chances > 0).any()):
        centres.append(points[torch.multinomial(chances, 1, generator=generator)])
        nearest = torch.minimum(nearest, (points - centres[-1]).square().sum(1))
        chances = nearest.where(nearest > same, 0.0)
    return torch.cat(centres)


def _lloyd(points: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    """Labels [M] and the sum of squared distances, where k-means stops moving."""
    labels = torch.full((len(points),), -1)
    for _ in range(_STEPS):
        distances = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.argmin(1)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        counts = torch.bincount(labels, minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return labels, float(distances.min(1).values.square().sum())
