"""Steps that set entries of the deltas to zero."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from ..errors import RecipeError
from .quantile import kth_largest, kth_largest_magnitudes, share
from .stack import Block, Context, Stack


def top(stack: Stack, density: float) -> Stack:
    """Keep the share `density` of every delta that is largest in magnitude.

    At least one entry is kept; entries equal to the smallest kept magnitude are all kept.
    density: in (0, 1].

    Source: Yadav et al. 2023, TIES-Merging, arXiv:2306.01708, section 3 (trim), per parameter.
    """
    if density >= 1:
        return stack
    smallest = kth_largest_magnitudes(stack, lambda n: [share(density, n)])[:, 0].tolist()
    bounds = [_just_below(magnitude) for magnitude in smallest]
    return stack.map(lambda block: block.with_x(_above(block.x, bounds)))


def band(stack: Stack, density: float, gamma: float) -> Stack:
    """Drop the share `gamma` of largest entries of every delta, keep the share `density` after it.

    Where both do not fit, fewer of the largest are dropped. Entries equal to a bound are kept.
    density: in (0, 1]. gamma: in [0, 1).

    Source: Davari and Belilovsky 2023, Model Breadcrumbs, arXiv:2312.06795 (breadcrumbs mask).
    """
    if density >= 1:
        return stack

    def ranks(n: int) -> list[int]:
        kept = share(density, n)
        dropped = min(int(gamma * n), n - kept)
        return [dropped + 1, dropped + kept]

    largest, smallest = kth_largest_magnitudes(stack, ranks).T.tolist()
    below = [_just_below(magnitude) for magnitude in smallest]
    return stack.map(
        lambda block: block.with_x(_above(block.x, below).sub_(_above(block.x, largest)))
    )


def variance(stack: Stack, select_topk: float) -> Stack:
    """Keep the positions where the experts differ most: a share of those where they differ at all.

    At least one position is kept, positions equal to the smallest kept variance all are; where no
    two experts differ, everything is kept.
    select_topk: in (0, 1].

    Source: Wan et al. 2024, FuseChat, arXiv:2408.07990 (SCE: select).
    """
    if select_topk >= 1:
        return stack

    def read() -> Iterator[Tensor]:
        return (_spread(block)[None] for block in stack.read())

    differing = sum(int(spread.count_nonzero()) for spread in read())
    smallest = float(kth_largest(read, lambda _: [share(select_topk, differing)]))
    return stack.map(lambda block: block.with_x(block.x * (_spread(block) >= smallest)))


def drop(stack: Stack, density: float) -> Stack:
    """Keep every entry with probability `density`, times 1 / density: the mean stays.

    density: in (0, 1].

    Source: Yu et al. 2023, Language Models are Super Mario, arXiv:2311.03099 (DARE).
    """
    if density >= 1:
        return stack

    def change(block: Block) -> Block:
        kept = _uniform(stack.context, block) < density
        return block.with_x((block.x * kept).div_(density))

    return stack.map(change)


def rank_drop(stack: Stack, density: float, epsilon: float) -> Stack:
    """Keep entries with a probability that grows with their rank in the row, times its inverse.

    The probability ramps from density - epsilon for the smallest magnitude of a row to density +
    epsilon for the largest; a row of one entry has `density`.

    Departure: a row is one of the parameter as it is stored, as in mergekit. In GPT-2's Conv1D
    weights it holds what goes out of one input unit, in others what comes into one output unit.

    Raises:
        RecipeError: the ramp leaves (0, 1].

    Source: Deep et al. 2024, DELLA-Merging, arXiv:2406.11617 (MagPrune).
    """
    if density >= 1:
        return stack
    if density - epsilon <= 0 or density + epsilon > 1:
        raise RecipeError(
            f"density {density} with epsilon {epsilon} keeps entries with probabilities from "
            f"{density - epsilon:g} to {density + epsilon:g}, they must lie in (0, 1]: "
            "choose a smaller epsilon"
        )

    def change(block: Block) -> Block:
        probability = _ramp(block.x, density, epsilon)
        kept = _uniform(stack.context, block) < probability
        return block.with_x((block.x * kept).div_(probability))

    return stack.map(change)


def _above(x: Tensor, bounds: list[float]) -> Tensor:
    """x where its magnitude is above the bound of its expert, else zero; [T, b, i]."""
    return torch.stack([hardshrink(row, bound) for row, bound in zip(x, bounds, strict=True)])


def _just_below(magnitude: float) -> float:
    """The float32 before a magnitude."""
    return float(torch.tensor(magnitude).nextafter(torch.tensor(-math.inf)))


def _spread(block: Block) -> Tensor:
    """The variance across the experts, [b, i]."""
    return (block.x - block.x.mean(0)).square_().mean(0)


def _uniform(context: Context, block: Block) -> Tensor:
    """Numbers in [0, 1) like x, each expert's from its own generator."""
    names = context.experts or tuple(str(k) for k in range(len(block.x)))
    shape = block.x.shape[1:]
    drawn = [torch.rand(shape, generator=context.generator(name, block.index)) for name in names]
    return torch.stack(drawn).to(block.x.device)


def _ramp(x: Tensor, density: float, epsilon: float) -> Tensor:
    """The probability that an entry is kept, by the rank of its magnitude in its row."""
    columns = x.shape[-1]
    if columns == 1:
        return torch.full_like(x, density)
    steps = torch.linspace(density - epsilon, density + epsilon, columns, device=x.device)
    order = x.abs().argsort(dim=-1, stable=True)
    return torch.empty_like(x).scatter_(-1, order, steps.expand_as(x))
