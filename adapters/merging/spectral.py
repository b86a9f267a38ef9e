"""Spectral merges of the deltas of one matrix: singular vectors and row spaces, in factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..delta import LowRank, concat

RANK_TOLERANCE = 1e-6
"""Singular values up to this share of the largest are rounding of float32, no direction of their
own; what they would point at changes with the factors that the delta happens to be stored in."""

PINV_TOLERANCE = 1e-4
"""Eigenvalues that a pseudo-inverse without a ridge drops, as a share of the largest."""

Rank = Annotated[int, Field(ge=1)]
Ridge = Annotated[float, Field(ge=0)]


def tsv(
    deltas: Sequence[LowRank],
    *,
    weights: Sequence[float],
    rank: Rank | None = None,
    scale: float = 1.0,
) -> LowRank:
    """TSV-M: the leading singular vectors of all experts, made orthogonal to each other.

    deltas: each [o, i]. weights: one per delta, a factor on it. rank: singular triplets kept of
    each expert; default min(o, i) over the number of experts that change this matrix, rounded down.
    scale: a factor on the result, which has at most rank x experts components.

    Departure: directions in which an expert changes nothing are never kept, and what two experts
    share completely is not filled up with arbitrary directions (the polar factor is a partial
    isometry). With both, the result depends on the deltas and not on how they are factored.

    Raises:
        ValueError: no deltas, shapes or the number of weights differ, or rank is below 1.

    Source: Gargiulo et al. 2025, Task Singular Vectors, arXiv:2412.00081.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank {rank} is out of range: at least 1")
    present = weighted(deltas, weights)
    kept = rank or max(1, min(deltas[0].shape) // max(1, len(present)))
    parts = [delta.svd(rtol=RANK_TOLERANCE) for delta in present]
    if not parts:
        return zero_like(deltas[0])
    u = _polar(torch.cat([u[:, :kept] for u, _, _ in parts], 1))
    v = _polar(torch.cat([vt[:kept].T for _, _, vt in parts], 1))
    singular = torch.cat([s[:kept] for _, s, _ in parts])
    return cast_like(LowRank.from_svd(u, singular, v.T).scaled(scale), deltas[0])


def iso_c(deltas: Sequence[LowRank], *, weights: Sequence[float], scale: float = 1.0) -> LowRank:
    """ISO-C: the weighted sum with every singular value replaced by their mean.

    deltas: each [o, i]. weights: one per delta, a factor on it. scale: a factor on the result.

    Departure: the mean is over the numerical rank of the sum, and only its own directions are
    raised. Over all min(o, i) values, as in the reference, a sum of low rank would be given
    arbitrary directions. Both agree for a sum of full rank.

    Raises:
        ValueError: no deltas, or shapes or the number of weights differ.

    Source: Marczak et al. 2025, No Task Left Behind, arXiv:2502.04959.
    """
    present = weighted(deltas, weights)
    if not present:
        return zero_like(deltas[0])
    u, singular, vt = summed(present).svd(rtol=RANK_TOLERANCE)
    if not singular.numel():
        return zero_like(deltas[0])
    flat = singular.mean().expand_as(singular)
    return cast_like(LowRank.from_svd(u, flat, vt).scaled(scale), deltas[0])


def wudi(
    deltas: Sequence[LowRank],
    *,
    weights: Sequence[float],
    ridge: Ridge = 1.0,
    scale: float = 1.0,
) -> LowRank:
    """WUDI in closed form: on the inputs that an expert reacts to, the merge answers as it does.

    The minimum of sum_t |(D - D_t) D_tᵀ|² / |D_t|² + ridge (T / i) |D|², which is
    D = (sum_t D_t C_t) (sum_t C_t + ridge (T / i) I)⁻¹ with C_t = D_tᵀ D_t / |D_t|². Its norm is
    capped at that of the weighted sum.

    deltas: each [o, i]. weights: one per delta, a factor on it. ridge: relative to the mean of the
    diagonal of sum_t C_t, at least 0; 0 takes the pseudo-inverse. scale: a factor on the result.

    Departure: closed form and ridge instead of 300 steps of Adam from the sum. Without a ridge the
    result grows to several times the sum when experts share their row space in part, as LoRAs from
    one initialisation do. With inputs outside the experts' row spaces a plain average is closer to
    each expert than this.

    Raises:
        ValueError: no deltas, shapes or the number of weights differ, or ridge is negative.

    Source: Cheng et al. 2025, Whoever Started the Interference Should End It, arXiv:2503.08099.
    """
    if ridge < 0:
        raise ValueError(f"ridge {ridge} is out of range: at least 0")
    present = weighted(deltas, weights)
    parts = [delta.svd(rtol=RANK_TOLERANCE) for delta in present]
    if not parts:
        return zero_like(deltas[0])
    w = torch.cat([vt.T * (s / s.norm()) for _, s, vt in parts], 1)  # [i, R], w wᵀ = sum_t C_t
    n = torch.cat([u * (s.square() / s.norm()) for u, s, _ in parts], 1)  # n wᵀ = sum_t D_t C_t
    merged = _least_squares(n, w, ridge * len(parts) / w.shape[0])
    bound, norm = summed(present).norm(), merged.norm()
    capped = merged.scaled(min(1.0, bound / norm)) if norm > 0 else merged
    return cast_like(balanced(capped).scaled(scale), deltas[0])


def weighted(deltas: Sequence[LowRank], weights: Sequence[float]) -> list[LowRank]:
    """The deltas times their weights, in float64, without those that change nothing.

    Raises:
        ValueError: no deltas, or shapes or the number of weights differ.
    """
    if len(weights) != len(deltas):
        raise ValueError(f"{len(weights)} weights for {len(deltas)} deltas: give one per delta")
    concat(deltas)  # refuses none, and different shapes
    wide = [LowRank(d.left.double(), d.right.double()) for d in deltas]
    scaled = [delta.scaled(weight) for delta, weight in zip(wide, weights, strict=True)]
    return [delta for delta in scaled if delta.norm() > 0]


def summed(deltas: Sequence[LowRank]) -> LowRank:
    """The exact sum in at most min(o, i) components; the matrix is formed only if ranks exceed
    that."""
    o, i = deltas[0].shape
    if sum(delta.rank for delta in deltas) <= min(o, i):
        return concat(deltas)
    dense = torch.stack([delta.dense() for delta in deltas]).sum(0)
    identity = torch.eye(min(o, i), dtype=dense.dtype, device=dense.device)
    return LowRank(dense, identity) if i <= o else LowRank(identity, dense)


def balanced(delta: LowRank) -> LowRank:
    """The same change in balanced factors, which lose nothing but the last digit in float32, where
    factors that cancel each other would lose all."""
    u, singular, vt = delta.svd(rtol=1e-9)
    return LowRank.from_svd(u, singular, vt) if singular.numel() else zero_like(delta)


def zero_like(delta: LowRank) -> LowRank:
    """No change, in one component."""
    return LowRank(torch.zeros_like(delta.left[:, :1]), torch.zeros_like(delta.right[:1]))


def cast_like(merged: LowRank, delta: LowRank) -> LowRank:
    """`merged` in the dtype of `delta`."""
    return LowRank(merged.left.to(delta.left.dtype), merged.right.to(delta.right.dtype))


def _polar(x: Tensor) -> Tensor:
    """The partial isometry nearest to x [n, k]; orthonormal columns where x has full rank."""
    u, singular, vt = torch.linalg.svd(x, full_matrices=False)
    kept = singular > RANK_TOLERANCE * singular[:1]
    polar: Tensor = u[:, kept] @ vt[kept]
    return polar


def _least_squares(n: Tensor, w: Tensor, ridge: float) -> LowRank:
    """n wᵀ (w wᵀ + ridge I)⁻¹ through the smaller of wᵀ w [R, R] and w wᵀ [i, i]."""
    if w.shape[1] <= w.shape[0]:
        return LowRank(n @ _inverse(w.T @ w, ridge), w.T)
    return LowRank(n @ w.T, _inverse(w @ w.T, ridge))


def _inverse(gram: Tensor, ridge: float) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    floor = values[-1] * (PINV_TOLERANCE if ridge == 0 else 1e-14)
    shrunk = torch.where(values > floor, 1 / (values + ridge), 0.0)
    inverse: Tensor = (vectors * shrunk) @ vectors.T
    return inverse
