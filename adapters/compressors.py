"""Compressors of one delta: what each keeps of it, and the bytes it would take to store that.

What they keep has full rank, so none is served as it is: a build converts it to low rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .merging.elect import tall_mask
from .merging.masks import emr_mask_and_rescale


@dataclass(frozen=True)
class Compressed:
    """What is kept of a delta. dense: [o, i], float32. nbytes: in its own packed form."""

    dense: Tensor
    nbytes: int


def magnitude(delta: Tensor, *, density: float) -> Compressed:
    """Keep the largest entries. Stored as bfloat16 values and a bit mask.

    delta: [o, i]. density: share kept, in (0, 1]; ties at the threshold are kept.

    Source: Han et al. 2015, Learning both Weights and Connections, arXiv:1506.02626.
    """
    kept = delta.abs() >= _threshold(delta, density)
    return Compressed(delta * kept, 2 * int(kept.sum()) + _bits(delta))


def compeft(delta: Tensor, *, density: float, alpha: float = 1.0) -> Compressed:
    """Keep the signs of the largest entries, times one scale. Stored as two bit masks.

    alpha: times the standard deviation of the whole delta, as the paper has it.

    Source: Yadav et al. 2023, ComPEFT, arXiv:2311.13171, section 2.
    """
    kept = delta.abs() >= _threshold(delta, density)
    scale = alpha * delta.std(correction=0)
    return Compressed(delta.sign() * kept * scale, 2 * _bits(delta) + 4)


def bitdelta(delta: Tensor) -> Compressed:
    """Keep the sign of every entry, times the mean magnitude; zero counts as plus.

    Source: Liu et al. 2024, BitDelta, arXiv:2402.10193, section 3.1, without the distillation.
    """
    sign = torch.where(delta < 0, -1.0, 1.0)
    return Compressed(sign * delta.abs().mean(), _bits(delta) + 4)


def tall(delta: Tensor, merged: Tensor, *, threshold: float = 0.4) -> Compressed:
    """Keep the merged change where it mostly stems from this expert. Stored as a bit mask.

    delta: the expert's change of the base. merged: the sum of all experts' changes.

    Source: Wang et al. 2024, Localizing Task Information, arXiv:2405.07813, equation 4.
    """
    return Compressed(merged * tall_mask(delta, merged, threshold), _bits(delta))


def emr(delta: Tensor, unified: Tensor) -> Compressed:
    """Keep the unified change where it has the expert's sign, rescaled to the expert's size.

    unified: the elected change of all experts. Stored as a bit mask and a scale.

    Source: Huang et al. 2024, EMR-Merging, arXiv:2405.17461, section 3.2.
    """
    mask, scale = emr_mask_and_rescale(delta, unified)
    return Compressed(unified * mask * scale, _bits(delta) + 4)


def quantised(weight: Tensor, *, bits: int) -> Compressed:
    """Round every row to integers of `bits` bits with one scale a row, to nearest.

    weight: [o, i]; an expert's own weight rather than its delta, for comparison.
    """
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / top
    dense = (weight / scale).round().clamp(-top, top) * scale
    return Compressed(dense, weight.numel() * bits // 8 + 4 * scale.numel())


OWN_DELTA: dict[str, Callable[..., Compressed]] = {
    "magnitude": magnitude,
    "compeft": compeft,
    "bitdelta": bitdelta,
}
"""Compressors of an expert's exclusive part."""

MASKS: dict[str, Callable[[Tensor, Tensor], Compressed]] = {"tall": tall, "emr": emr}
"""Compressors of an expert's change of the base, given the merged change."""


def _threshold(delta: Tensor, density: float) -> Tensor:
    kept = max(1, round(density * delta.numel()))
    return delta.abs().flatten().kthvalue(delta.numel() - kept + 1).values


def _bits(delta: Tensor) -> int:
    return (delta.numel() + 7) // 8
