"""Merges that are linear in the deltas, in factors: exact, at the sum of the ranks; and LEGO."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..delta import LowRank, concat
from ..lego import lego
from .calibrated import fisher
from .stack import Block, Merged, Stack, as_rows


def keep_base(stack: Stack) -> Merged:
    """No change at all: the backbone is the base."""
    return stack.merge(lambda block: block.base * 0)


def linear_factors(
    deltas: Sequence[LowRank], *, weights: Sequence[float], normalize: bool = True
) -> LowRank:
    """The weighted mean of the deltas, or their weighted sum; see `elementwise.linear`."""
    total = (sum(weights) or 1.0) if normalize else 1.0
    return _weighted(deltas, [weight / total for weight in weights])


def task_arithmetic_factors(
    deltas: Sequence[LowRank], *, weights: Sequence[float], scale: float = 1.0
) -> LowRank:
    """The scaled sum of the deltas; see `elementwise.task_arithmetic`."""
    return _weighted(deltas, [scale * weight for weight in weights])


def lego_merge(
    deltas: Sequence[LowRank],
    *,
    weights: Sequence[float],
    rank: Annotated[int, Field(ge=1)],
    gauge: Literal["balanced", "raw"] = "balanced",
    scale: float = 1.0,
    seed: int = 0,
) -> LowRank:
    """Cluster the experts' rank-one units into `rank` of them; see `mergeroute.adapters.lego`.

    Source: Zhao et al. 2024, Merging LoRAs like Playing LEGO, arXiv:2409.16167, section 4.
    """
    weighted = [delta.scaled(weight) for delta, weight in zip(deltas, weights, strict=True)]
    return lego(weighted, rank=rank, gauge=gauge, seed=seed).scaled(scale)


def fisher_merge(
    stack: Stack, *, diagonals: Sequence[Tensor], floor: Annotated[float, Field(gt=0)] = 1e-6
) -> Merged:
    """Average the deltas entry by entry, each weighed by its expert's Fisher information.

    diagonals: of each expert, in the parameter's shape. floor: added to every diagonal.

    Source: Matena and Raffel 2022, arXiv:2111.09832, section 3; see `calibrated.fisher`.
    """
    whole = [as_rows(diagonal) for diagonal in diagonals]

    def merge(blocks: Iterator[Block]) -> Merged:
        start = 0
        for block in blocks:
            stop = start + block.x.shape[1]
            rows = torch.stack([diagonal[start:stop].to(block.x) for diagonal in whole])
            yield fisher(block.x, rows, weights=block.w, floor=floor)
            start = stop

    return merge(stack.read())


def _weighted(deltas: Sequence[LowRank], factors: Sequence[float]) -> LowRank:
    return concat([delta.scaled(factor) for delta, factor in zip(deltas, factors, strict=True)])
