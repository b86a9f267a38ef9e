"""Merges that weigh by what a model saw on calibration prompts: Fisher, RegMean.

All are written on deltas. The base cancels: the base plus what comes out here is exactly what whole
weights would have given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..delta import LowRank, concat
from ..errors import RecipeError

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


def fisher(
    x: Tensor,
    diagonals: Tensor,
    *,
    weights: Tensor,
    floor: Positive = 1e-6,
    norms: Tensor | None = None,
) -> Tensor:
    """Average deltas entry by entry, each weighed by its expert's Fisher information.

    x: deltas, [T, b, i], any block of rows. diagonals: the same rows of the Fisher diagonals.
    weights: one per expert, [T], or what broadcasts over x; not negative, not all zero.
    norms: `fisher_norm` of each expert's whole model, [T]: diagonals are divided by them. Without,
    an expert that is sure of its answers hardly counts.
    floor: added to every diagonal then; far above them, the plain average comes out.

    Returns [b, i]: sum of w (F + floor) x over sum of w (F + floor), F divided by its norm.

    Raises:
        ValueError: shapes differ, or the weights are negative or all zero.

    Source: Matena and Raffel 2022, Merging Models with Fisher-Weighted Averaging,
    arXiv:2111.09832, section 2. The floor is that of MergeLM's code, where it is divided by the
    norm too: there it outweighs the information of an expert whose norm is small.
    """
    if x.shape != diagonals.shape:
        raise ValueError(f"deltas {tuple(x.shape)} and diagonals {tuple(diagonals.shape)} differ")
    per_expert = (-1, *[1] * (x.ndim - 1))
    if weights.ndim == 1:
        weights = weights.view(per_expert)
    _check_weights(weights)
    if norms is not None:
        diagonals = diagonals / norms.view(per_expert).clamp_min(torch.finfo(norms.dtype).tiny)
    shares = weights * (diagonals + floor)  # [T, b, i]
    return (shares * x).sum(0) / shares.sum(0)


def fisher_norm(diagonals: Iterable[Tensor]) -> float:
    """The L2 norm of one expert's Fisher diagonal over all its parameters."""
    return math.sqrt(sum(float(diagonal.double().square().sum()) for diagonal in diagonals))


def regmean(
    deltas: Sequence[LowRank],
    grams: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    reduction: Share = 0.9,
    ridge: Positive = 1e-4,
) -> LowRank:
    """Merge deltas of one linear layer so that its outputs stay close to each expert's.

    Minimises sum of w |X (Δ - Δt)ᵀ|² over the inputs X of every expert: (Σ w Δt Gt) (Σ w Gt)⁻¹.

    deltas: [o, i] each, one per expert. The dense matrix is never formed: the ranks add up.
    grams: second moments of the experts' inputs, [i, i] each. Give means over tokens, else the
    expert with more tokens weighs more.
    weights: one per expert, not negative; default 1 each.
    reduction: what off-diagonal moments are multiplied by, in [0, 1]; 1 is the exact regression.
    ridge: added to every diagonal, in units of the mean diagonal. Directions that no input
    took get the weighted average of the deltas, and a single expert comes back as it is.

    Raises:
        ValueError: counts or shapes differ, or the weights are negative or all zero.
        RecipeError: the moments are not finite, or not positive definite at this ridge.

    Source: Jin et al. 2023, Dataless Knowledge Fusion by Merging Weights of Language Models,
    arXiv:2212.09849, section 3. reduction 0.9 is usual for encoders; MergeBench runs Llama with
    0.5, FusionBench GPT-2 with 0.6. The ridge is ours.
    """
    moments, total = _moments([delta.shape for delta in deltas], grams, weights, reduction, ridge)
    factors = []
    for delta, moment in zip(deltas, moments, strict=True):
        right = _solved(total, moment @ delta.right.double().T).T  # [r, i]
        factors.append(LowRank(delta.left, right.to(delta.right.dtype)))
    return concat(factors)


def regmean_dense(
    deltas: Sequence[Tensor],
    grams: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    reduction: Share = 0.9,
    ridge: Positive = 1e-4,
) -> Tensor:
    """`regmean` for deltas that are dense matrices, [o, i] each: one solve, and a dense result.

    Raises:
        ValueError, RecipeError: as `regmean`.
    """
    shapes = [(delta.shape[0], delta.shape[1]) for delta in deltas]
    moments, total = _moments(shapes, grams, weights, reduction, ridge)
    outputs = torch.zeros(shapes[0], dtype=torch.float64, device=total.device)
    for delta, moment in zip(deltas, moments, strict=True):
        outputs += delta.double() @ moment
    return _solved(total, outputs.T).T.to(deltas[0].dtype)


def _moments(
    shapes: Sequence[tuple[int, int]],
    grams: Sequence[Tensor],
    weights: Sequence[float] | None,
    reduction: float,
    ridge: float,
) -> tuple[list[Tensor], Tensor]:
    """Weighed, reduced and ridged moments in float64, [i, i] each, and the factor of their sum."""
    scales = torch.tensor(weights if weights is not None else [1.0] * len(grams))
    _check_shapes(shapes, grams, scales)
    _check_weights(scales)
    mean = sum(float(gram.diagonal().double().mean()) for gram in grams) / len(grams)
    if not math.isfinite(mean):
        raise RecipeError("input moments hold NaN or inf: run the calibration in float32")
    moments = [
        scale * _ridged(gram.double(), reduction, ridge=ridge * mean or 1.0)
        for gram, scale in zip(grams, scales.tolist(), strict=True)
    ]
    factor, failed = torch.linalg.cholesky_ex(torch.stack(moments).sum(0))
    if failed or not factor.isfinite().all():
        raise RecipeError(
            f"input moments are not positive definite at ridge {ridge:g}: raise it, lower "
            f"reduction ({reduction:g}) or give more calibration prompts"
        )
    return moments, factor


def _ridged(gram: Tensor, reduction: float, *, ridge: float) -> Tensor:
    """Off-diagonal entries times `reduction`, and `ridge` on the diagonal, [i, i]."""
    return reduction * gram + torch.diag((1 - reduction) * gram.diagonal() + ridge)


def _solved(factor: Tensor, right: Tensor) -> Tensor:
    """M⁻¹ right from the Cholesky factor of M, [i, n]."""
    return torch.cholesky_solve(right, factor)


def _check_weights(weights: Tensor) -> None:
    if not (weights >= 0).all() or not weights.sum() > 0:
        raise ValueError(f"weights {weights.flatten().tolist()[:8]} are negative or all zero")


def _check_shapes(
    shapes: Sequence[tuple[int, int]], grams: Sequence[Tensor], weights: Tensor
) -> None:
    if not len(shapes) == len(grams) == len(weights) or not shapes:
        raise ValueError(f"{len(shapes)} deltas, {len(grams)} moments, {len(weights)} weights")
    inputs = shapes[0][1]
    if set(shapes) != {shapes[0]} or {tuple(g.shape) for g in grams} != {(inputs, inputs)}:
        raise ValueError(
            f"deltas of shape {shapes} and moments of shape {[tuple(g.shape) for g in grams]} "
            "do not belong together: [o, i] and [i, i]"
        )
