"""Pruning: the experts that matter least left out, which merges are compared with."""

from __future__ import annotations

from torch import Tensor

from .usage import LayerUsage


def kept_experts(usage: LayerUsage, count: int) -> Tensor:
    """The experts whose router-weighted outputs are largest, [count], in their order.

    One that no calibration token was sent to goes first; of equal ones the later.

    Source: Lasby et al. 2025, REAP the Experts, arXiv:2510.13999: the mean over an expert's own
    tokens of its gate times the norm of its output.
    """
    return usage.saliency.argsort(descending=True, stable=True)[:count].sort().values
