"""EMR for compressors: an expert as a mask and one number beside the unified delta."""

from __future__ import annotations

from torch import Tensor


def emr_mask_and_rescale(delta: Tensor, unified: Tensor) -> tuple[Tensor, float]:
    """What of the unified delta is an expert's: its delta is about rescale * mask * unified.

    delta, unified: same shape; one parameter, where the paper takes one number for the whole
    model. The mask holds where the signs agree; the number makes the L1 norms equal, and is 0 for
    an empty mask.

    Source: Huang et al. 2024, EMR-Merging, arXiv:2405.17461 (mask, rescale).
    """
    mask = delta * unified > 0
    kept = float((unified * mask).abs().sum())
    return mask, float(delta.abs().sum()) / kept if kept else 0.0
