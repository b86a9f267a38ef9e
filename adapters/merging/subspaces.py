"""Merges in the frame of singular vectors: sign election in a shared basis, continual arrival."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..delta import LowRank
from .spectral import RANK_TOLERANCE, balanced, cast_like, summed, weighted, zero_like

Share = Annotated[float, Field(gt=0, le=1)]
Threshold = Annotated[float, Field(ge=0, le=1)]


def knots(
    deltas: Sequence[LowRank],
    *,
    weights: Sequence[float],
    density: Share = 0.2,
    scale: float = 1.0,
) -> LowRank:
    """KnOTS-TIES: TIES in the basis that the experts share, so that low rank stays low.

    [D_1 ... D_T] = U S [V_1 ... V_T]; trim, elect and average the parts S V_t, then U times the
    result, which has at most as many components as all deltas together.

    deltas: each [o, i]. weights: one per delta; a delta counts times its weight when signs are
    elected, and the mean of those that agree is a weighted mean, so that a common factor on all
    weights changes nothing. density: share of entries kept per delta, in (0, 1]. scale: a factor
    on the result.

    The reference tunes both parameters: density 0.2 with scale 0.6 for vision, density 1 with
    scale 0.5 for Llama-3-8B. Departures: entries are trimmed within this matrix, not over the whole
    model; an exact tie between signs elects neither.

    Raises:
        ValueError: no deltas, shapes or the number of weights differ, or density is out of range.

    Source: Stoica et al. 2025, Model merging with SVD to tie the KnOTS, arXiv:2410.19735; Yadav et
    al. 2023, TIES-Merging, arXiv:2306.01708, section 3.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density {density} is out of range: in (0, 1]")
    present = weighted(deltas, weights)
    if not present:
        return zero_like(deltas[0])
    basis = _shared_basis(present)  # [o, k]
    parts = torch.stack([(basis.T @ delta.left) @ delta.right for delta in present])  # [T, k, i]
    sizes = [abs(w) for d, w in zip(deltas, weights, strict=True) if weighted([d], [w])]
    merged = _disjoint_mean(_trimmed(parts, density), torch.tensor(sizes).to(parts))
    return cast_like(LowRank(basis, merged).scaled(scale), deltas[0])


def opcm(
    deltas: Sequence[LowRank],
    *,
    weights: Sequence[float],
    alpha: Threshold = 0.5,
    scale: float = 1.0,
) -> LowRank:
    """OPCM: experts that arrive one after another, each cleaned of what is merged already.

    deltas: each [o, i], in the order of their arrival, which matters. weights: one per delta, a
    factor on it. alpha: see `opcm_step`. scale: a factor on the result, whose norm is the mean of
    the norms of the weighted deltas before that.

    Departure: the reference sets that norm for the whole model, by one factor per arrival. All
    those factors but the last cancel, so its result is `opcm_step` folded over the experts and one
    factor for all matrices at the end; here every matrix has its own. Experts that leave the matrix
    as it is do not count.

    Raises:
        ValueError: no deltas, or shapes or the number of weights differ.

    Source: Tang et al. 2025, Merging Models on the Fly Without Retraining, arXiv:2501.09522.
    """
    present = weighted(deltas, weights)
    if not present:
        return zero_like(deltas[0])
    total = present[0]
    for delta in present[1:]:
        total = opcm_step(total, delta, alpha=alpha)
    mean = sum(delta.norm() for delta in present) / len(present)
    return cast_like(balanced(total).scaled(scale * mean / total.norm()), deltas[0])


def opcm_step(total: LowRank, delta: LowRank, *, alpha: Threshold = 0.5) -> LowRank:
    """`total` plus what is new in `delta`: one arrival. All that has to be kept is the total.

    In the frame of the singular vectors of `total`, the diagonal of `delta` and its block between
    the leading vectors are left out.

    total, delta: [o, i], float64 or float32; the result is float64, in at most min(o, i) or the
    sum of both ranks components. alpha: leading are the vectors up to this share of the sum of the
    singular values, in [0, 1].

    Departure: only the diagonal within the rank of `total` is left out. The reference goes on along
    vectors that `total` does not determine. At alpha 1 the whole block goes; the reference's search
    for an excess finds none there and leaves only the diagonal out.

    Raises:
        ValueError: the shapes differ, or alpha is out of range.

    Source: as `opcm`.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha} is out of range: in [0, 1]")
    if total.shape != delta.shape:
        raise ValueError(f"a delta of shape {delta.shape} cannot join one of {total.shape}")
    u, singular, vt = total.svd(rtol=RANK_TOLERANCE)
    left, right = delta.left.double(), delta.right.double()
    inner = (u.T @ left) @ (right @ vt.T)  # [k, k]
    leading = int((singular.cumsum(0) <= alpha * singular.sum() * (1 + 1e-12)).sum())
    known = torch.diag(inner.diagonal())
    known[:leading, :leading] = inner[:leading, :leading]
    return summed([LowRank(u @ (torch.diag(singular) - known), vt), LowRank(left, right)])


def _shared_basis(deltas: Sequence[LowRank]) -> Tensor:
    """The left singular vectors [o, k] of [D_1 ... D_T]: of [B_t R_tᵀ] with A_tᵀ = Q_t R_t."""
    cores = [delta.left @ torch.linalg.qr(delta.right.T, mode="r").R.T for delta in deltas]
    u, singular, _ = torch.linalg.svd(torch.cat(cores, 1), full_matrices=False)
    basis: Tensor = u[:, singular > RANK_TOLERANCE * singular[0]]
    return basis


def _trimmed(parts: Tensor, density: float) -> Tensor:
    """Every expert's largest entries, the rest zero; parts: [T, k, i]."""
    sizes = parts.abs().flatten(1)
    kept = max(1, int(density * sizes.shape[1]))
    least = sizes.kthvalue(sizes.shape[1] - kept + 1, dim=1).values
    return torch.where(parts.abs() >= least[:, None, None], parts, 0.0)


def _disjoint_mean(parts: Tensor, sizes: Tensor) -> Tensor:
    """Mean of the weighted entries [T, k, i] whose sign is that of their sum; sizes: [T]."""
    agree = parts.sign() == parts.sum(0).sign()
    divisor = (agree * sizes[:, None, None]).sum(0)
    return torch.where(agree, parts, 0.0).sum(0) / divisor.where(divisor > 0, 1.0)
