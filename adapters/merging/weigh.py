"""Steps that set how much each expert counts: per parameter, per column or per entry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .quantile import kth_largest, kth_largest_magnitudes
from .stack import Block, Stack

OUTLIERS = 1e-4
"""The share of entries at either end of the magnitudes that PCB clamps."""


def weighted(stack: Stack, factors: Tensor) -> Stack:
    """Weights times `factors`, which broadcast over [T, b, i]."""
    return stack.map(lambda block: replace(block, w=block.w * factors.to(block.w.device)))


def reweighted(stack: Stack, weights: Sequence[float]) -> Stack:
    """Other weights in place of the recipe's, one per expert."""
    w = torch.tensor(weights, dtype=torch.float32).view(-1, 1, 1)
    return stack.map(lambda block: replace(block, w=w.to(block.w.device)))


def energies(stack: Stack) -> Tensor:
    """Each expert's share of the sum of squares, [T, 1, 1]; equal shares if all are zero.

    Source: Wan et al. 2024, FuseChat, arXiv:2408.07990 (SCE: calculate).
    """
    squares = _sums_of_squares(stack)
    if not squares.any():
        squares = torch.ones_like(squares)
    return (squares / squares.sum()).float().view(-1, 1, 1)


def inverse_losses(losses: Sequence[float], power: float) -> list[float]:
    """Weights in proportion to (1 / loss)^power, with a sum of 1.

    Source: Yu and Choi 2025, Metrics-Weighted Averaging, arXiv:2504.18580.
    """
    smallest = min(losses)
    shares = [(smallest / loss) ** power for loss in losses]
    return [share / sum(shares) for share in shares]


def compete(stack: Stack, ratio: float, unit_rms: bool) -> Stack:
    """Weigh every entry by how much it matters in its expert and how far the experts back it.

    The score of an entry is exp(T m²) tanh(x * sum of x over the experts), m its clamped magnitude
    scaled to [0, 1] within its expert. The best share `ratio` of an expert's scores, scaled to
    [0, 1], multiply its weight; all others are zero. Magnitudes end up clamped.

    ratio: in (0, 1]. unit_rms: divide x by the root mean square of all deltas within tanh.

    Source: Du et al. 2024, PCB-Merging, arXiv:2410.02396 (intra- and inter-balancing).
    """
    high, low = kth_largest_magnitudes(stack, _clamp_ranks).T[:, :, None, None]
    unit = _mean_square(stack) if unit_rms else 1.0

    def score(block: Block) -> Tensor:
        magnitude = block.x.abs().clamp_(low, high).sub_(low).div_(_nonzero(high - low))
        backing = (block.x * block.x.sum(0)).div_(unit).tanh_()
        return magnitude.square_().sub_(1).mul_(stack.experts).exp_().mul_(backing)

    def read() -> Iterator[Tensor]:
        return map(score, stack.read())

    best, cut = kth_largest(read, lambda n: [1, n - int(n * (1 - ratio))]).T[:, :, None, None]

    def change(block: Block) -> Block:
        x = block.x.sign() * block.x.abs().clamp_(low, high)
        scores = score(block)
        spread = (scores - cut).clamp_min_(0).div_(_nonzero(best - cut))
        c = torch.where(best > cut, spread, (scores >= cut).float())
        return replace(block, x=x, w=block.w * c)

    return stack.map(change)


def disentangle(stack: Stack, above_average_value_ratio: float, calibration: float) -> Stack:
    """Weigh every column by how far each expert changed its magnitude and its direction.

    Columns of [out, in]; where the parameter is stored transposed, its rows take their place.
    Columns are ranked within each expert, by the change of their norm and by one minus the cosine
    with the base's column; the softmax of the ranks over the experts is the score, and that of an
    expert's columns above its average is `calibration`. The weight is the mean of both scores.
    Entries of a vector are ranked by their change alone.

    Source: Yu et al. 2024, Extend Model Merging from Fine-Tuned to Pre-Trained LLMs (WIDEN),
    arXiv:2408.03092.
    """
    changes = _column_changes(stack)
    scores = [_scores(change, above_average_value_ratio, calibration) for change in changes]
    factors = torch.stack(scores).mean(0).float()
    if stack.context.is_transposed:
        return _rows_weighted(stack, factors)
    return weighted(stack, factors[:, None])


def _sums_of_squares(stack: Stack) -> Tensor:
    """Of every expert, [T], float64."""
    blocks = [block.x.flatten(1).norm(dim=1).double().square().cpu() for block in stack.read()]
    return torch.stack(blocks).sum(0)


def _mean_square(stack: Stack) -> float:
    """Over the entries of all experts that are not zero; 1 if there is none."""
    entries = sum(int(block.x.count_nonzero()) for block in stack.read())
    return float(_sums_of_squares(stack).sum()) / entries if entries else 1.0


def _clamp_ranks(n: int) -> list[int]:
    """The ranks of the largest and the smallest magnitude that stay."""
    return [n - max(0, int(n * (1 - OUTLIERS) - 1)), n - int(n * OUTLIERS)]


def _nonzero(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, 1.0, divisor)


def _rows_weighted(stack: Stack, factors: Tensor) -> Stack:
    """Weights times a factor for every expert's stored row; factors: [T, rows]."""

    def read() -> Iterator[Block]:
        start = 0
        for block in stack.read():
            stop = start + block.x.shape[1]
            own = factors[:, start:stop, None].to(block.w.device)
            yield replace(block, w=block.w * own)
            start = stop

    return replace(stack, read=read)


def _column_changes(stack: Stack) -> list[Tensor]:
    """Of each column the change of its magnitude and of its direction, [T, i] each.

    One minus a cosine is taken from norms alone, (|x|² - (change of norm)²) / (2 * norms): the
    difference itself is lost in rounding when deltas are small. A vector has one kind of change.
    """
    is_transposed = stack.context.is_transposed
    rows, sums = 0, list[Tensor]()
    for block in stack.read():
        rows += block.x.shape[1]
        sums.append(_sums(block, 2 if is_transposed else 1))
        if not is_transposed:
            sums = [torch.stack(sums).sum(0)]
    whole, experts = torch.cat(sums, 1), stack.experts
    change, inner, base = whole[:experts], whole[experts:-1], whole[-1]
    if rows == 1 and not is_transposed:
        return [change.sqrt()]
    norm = base.sqrt()
    grown = (base + 2 * inner + change).clamp_min(0).sqrt()
    magnitude = (2 * inner + change) / _nonzero(grown + norm)
    direction = (change - magnitude.square()).clamp_min(0) / _nonzero(2 * norm * grown)
    return [magnitude.abs(), direction]


def _sums(block: Block, axis: int) -> Tensor:
    """Sums over an axis of [T, b, i]: T of x², T of x * base, one of base²; [2 T + 1, ...]."""
    base = block.base.double()[None]
    squares, inner = block.x.double().square(), (block.x * block.base).double()
    return torch.cat([part.sum(axis) for part in (squares, inner, base.square())])


def _scores(change: Tensor, above_average_value_ratio: float, calibration: float) -> Tensor:
    """The score of every column of every expert, [T, i]."""
    columns = change.shape[1]
    steps = torch.arange(columns, dtype=change.dtype, device=change.device) / columns
    order = change.argsort(dim=1, stable=True)
    ranks = torch.empty_like(change).scatter_(1, order, steps.expand_as(change))
    above = ranks > above_average_value_ratio * ranks.mean(1, keepdim=True)
    return torch.where(above, calibration, ranks.softmax(0))
