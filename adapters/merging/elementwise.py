"""The elementwise methods by name, each a short chain of steps over a stack.

`density` and the other parameters are named as in mergekit; `scale` is its `lambda`. A method that
elects signs divides by the weights that survive unless `normalize` is false; for mergekit the
default is false in dare_ties and breadcrumbs_ties.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..errors import RecipeError
from .combine import disjoint_mean, max_aligned, mean, scaled, total
from .depth import middle_share
from .elect import agree, majority_sign
from .sparsify import band, drop, rank_drop, top, variance
from .stack import Merged, Stack
from .weigh import compete, disentangle, energies, inverse_losses, reweighted, weighted

Share = Annotated[float, Field(gt=0, le=1)]
"""A share, in (0, 1]."""
Part = Annotated[float, Field(ge=0, lt=1)]
"""A share that may be nothing, in [0, 1)."""
Depth = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


def linear(stack: Stack, *, normalize: bool = True) -> Merged:
    """The weighted mean of the deltas; the base plus it is the weighted mean of the experts.

    normalize: divide by the sum of the weights; without, the result is the weighted sum.

    Source: Wortsman et al. 2022, Model soups, arXiv:2203.05482; mergekit `linear`.
    """
    return mean(stack) if normalize else total(stack)


def task_arithmetic(stack: Stack, *, scale: float = 1.0) -> Merged:
    """The weighted sum of the deltas.

    scale: of the result; 1 as in mergekit. For sums of many experts with weights of 1 the paper
    finds 0.3 to 0.4 best.

    Source: Ilharco et al. 2023, Editing Models with Task Arithmetic, arXiv:2212.04089.
    """
    return scaled(total(stack), scale)


def ties(
    stack: Stack, *, density: Share = 0.2, normalize: bool = True, scale: float = 1.0
) -> Merged:
    """Trim each delta to its largest entries, elect signs, average what agrees.

    density: share of entries kept per delta and parameter; 0.2 as in the paper, which trims the
    whole model at once. normalize: divide by the weights that survive. scale: of the result.

    Source: Yadav et al. 2023, TIES-Merging, arXiv:2306.01708, section 3.
    """
    return _elected(top(stack, density), normalize, scale)


def dare_linear(
    stack: Stack, *, density: Share = 0.5, normalize: bool = False, scale: float = 1.0
) -> Merged:
    """Drop entries at random, rescale the others, add up.

    density: the probability that an entry stays; the paper uses 0.1 to 0.5, least where deltas are
    small. normalize: divide by the sum of the weights.

    Source: Yu et al. 2023, Language Models are Super Mario, arXiv:2311.03099 (DARE).
    """
    return _summed(drop(stack, density), normalize, scale)


def dare_ties(
    stack: Stack, *, density: Share = 0.5, normalize: bool = True, scale: float = 1.0
) -> Merged:
    """Drop entries at random, rescale the others, elect signs, average what agrees.

    Parameters as in `dare_linear`; normalize: divide by the weights that survive.

    Source: Yu et al. 2023, Language Models are Super Mario, arXiv:2311.03099 (DARE with
    TIES).
    """
    return _elected(drop(stack, density), normalize, scale)


def della(
    stack: Stack,
    *,
    density: Share = 0.7,
    epsilon: Part = 0.15,
    normalize: bool = True,
    scale: float = 1.0,
) -> Merged:
    """Drop entries at random, the small ones of a row sooner; rescale, elect signs, average.

    density: the mean probability that an entry stays. epsilon: half the width of the ramp around
    it, as in mergekit; the paper's epsilon is the whole width. normalize: divide by the weights
    that survive. Rows are those of the parameter as it is stored, also of GPT-2's Conv1D weights.

    Raises:
        RecipeError: density -/+ epsilon leaves (0, 1].

    Source: Deep et al. 2024, DELLA-Merging, arXiv:2406.11617.
    """
    return _elected(rank_drop(stack, density, epsilon), normalize, scale)


def della_linear(
    stack: Stack,
    *,
    density: Share = 0.7,
    epsilon: Part = 0.15,
    normalize: bool = False,
    scale: float = 1.0,
) -> Merged:
    """Drop entries at random, the small ones of a row sooner; rescale, add up.

    Parameters and errors as in `della`; normalize: divide by the sum of the weights.

    Source: Deep et al. 2024, DELLA-Merging, arXiv:2406.11617.
    """
    return _summed(rank_drop(stack, density, epsilon), normalize, scale)


def breadcrumbs(
    stack: Stack,
    *,
    density: Share = 0.9,
    gamma: Part = 0.01,
    normalize: bool = False,
    scale: float = 1.0,
) -> Merged:
    """Drop the largest and the smallest entries of each delta, add up.

    density: share of entries kept. gamma: share of the largest dropped; both as in mergekit.
    normalize: divide by the sum of the weights.

    Source: Davari and Belilovsky 2023, Model Breadcrumbs, arXiv:2312.06795.
    """
    return _summed(band(stack, density, gamma), normalize, scale)


def breadcrumbs_ties(
    stack: Stack,
    *,
    density: Share = 0.9,
    gamma: Part = 0.01,
    normalize: bool = True,
    scale: float = 1.0,
) -> Merged:
    """Drop the largest and the smallest entries of each delta, elect signs, average what agrees.

    Parameters as in `breadcrumbs`; normalize: divide by the weights that survive.

    Source: Davari and Belilovsky 2023, arXiv:2312.06795; mergekit `breadcrumbs_ties`.
    """
    return _elected(band(stack, density, gamma), normalize, scale)


def sce(stack: Stack, *, select_topk: Share = 1.0, scale: float = 1.0) -> Merged:
    """Select where experts differ, weigh them by their energy there, erase minority signs, average.

    select_topk: share of the positions where they differ that is kept; 1 as in mergekit.
    The recipe's weights multiply the energies.

    Source: Wan et al. 2024, FuseChat, arXiv:2408.07990 (SCE).
    """
    selected = variance(stack, select_topk)
    elected = majority_sign(selected)
    return scaled(disjoint_mean(weighted(elected, energies(selected))), scale)


def pcb(stack: Stack, *, ratio: Share = 0.1, unit_rms: bool = True, scale: float = 1.0) -> Merged:
    """Weigh every entry by its rank in a competition within and between experts, average.

    ratio: share of the entries of an expert that count. unit_rms: measure deltas in units of their
    root mean square, so that the result does not depend on their scale; false is the paper's rule.
    Quantiles are those of one parameter, the paper's of the whole model. The recipe's weights count
    in the average alone, not in the competition.

    Source: Du et al. 2024, PCB-Merging, arXiv:2410.02396.
    """
    return scaled(mean(compete(stack, ratio, unit_rms)), scale)


def consensus(
    stack: Stack,
    *,
    tall_threshold: Positive = 0.4,
    agreement: Annotated[int, Field(ge=1)] = 2,
    scale: float = 1.0,
) -> Merged:
    """The sum of the deltas where enough experts use it.

    tall_threshold: how much of the merged delta must serve an expert; the paper tries 0.2 to 0.6.
    agreement: how many experts must use an entry; 2 removes what serves none or one. The recipe's
    weights count in the sum alone: what serves whom is asked of the plain sum.

    Source: Wang et al. 2024, Localizing Task Information, arXiv:2405.07813 (consensus).
    """
    return scaled(total(agree(stack, tall_threshold, agreement)), scale)


def emr(stack: Stack, *, scale: float = 1.0) -> Merged:
    """The unified delta of EMR: elected signs, each with the largest magnitude that has it.

    See `masks` for what gives every expert its part of it back.

    Source: Huang et al. 2024, EMR-Merging, arXiv:2405.17461.
    """
    return scaled(max_aligned(stack), scale)


def widen(
    stack: Stack,
    *,
    above_average_value_ratio: Positive = 1.0,
    score_calibration_value: Positive = 1.0,
    scale: float = 1.0,
) -> Merged:
    """Weigh columns by the change of their magnitude and of their direction, add up.

    A column is what one input unit, or one token of an embedding, gives out; GPT-2's Conv1D weights
    and embeddings store it as a row.

    above_average_value_ratio: columns ranked above this times an expert's average get the score
    score_calibration_value. Weights need not sum to 1. Made for merges of fine-tuned with further
    pre-trained models.

    Source: Yu et al. 2024, WIDEN, arXiv:2408.03092.
    """
    weighed = disentangle(stack, above_average_value_ratio, score_calibration_value)
    return scaled(total(weighed), scale)


def mwa(
    stack: Stack, *, losses: tuple[Positive, ...], power: float = 1.0, scale: float = 1.0
) -> Merged:
    """The mean weighted by (1 / loss)^power; the recipe's weights are not used.

    losses: one per expert, in their order. power: 0 is the plain mean.

    Raises:
        RecipeError: not as many losses as experts.

    Source: Yu and Choi 2025, Metrics-Weighted Averaging, arXiv:2504.18580.
    """
    if len(losses) != stack.experts:
        raise RecipeError(f"{len(losses)} losses for {stack.experts} experts: give one for each")
    return scaled(total(reweighted(stack, inverse_losses(losses, power))), scale)


def layer_swap(
    stack: Stack,
    *,
    outer: str,
    inner: str,
    bottom: Depth = 0.15,
    top: Depth = 0.15,
    transition: Depth = 0.05,
) -> Merged:
    """The first and the last blocks from one expert, those between from another.

    outer, inner: names of experts; parameters outside the blocks come from outer. bottom, top: the
    shares of the depth that outer takes. transition: the share beside each that is averaged.

    Raises:
        RecipeError: no expert has that name.

    Source: Bandarkar et al. 2024, Layer Swapping, arXiv:2410.01335.
    """
    names = stack.context.experts
    for name in (outer, inner):
        if name not in names:
            raise RecipeError(f"layer_swap: {name!r} is no expert; there are {', '.join(names)}")
    middle = middle_share(stack.context.depth, bottom=bottom, top=top, transition=transition)
    weights = [(name == outer) * (1 - middle) + (name == inner) * middle for name in names]
    return total(reweighted(stack, weights))


def _summed(stack: Stack, normalize: bool, scale: float) -> Merged:
    """The weighted mean or the weighted sum."""
    return scaled(mean(stack) if normalize else total(stack), scale)


def _elected(stack: Stack, normalize: bool, scale: float) -> Merged:
    """Sign election, then the disjoint mean or the sum of what agrees."""
    elected = majority_sign(stack)
    return scaled(disjoint_mean(elected) if normalize else total(elected), scale)
