"""Confidence that means what it says: temperature, and how far off confidences are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import cross_entropy

_LARGEST_TEMPERATURE = 1e4
_BINS = 15


@dataclass(frozen=True)
class ReliabilityBin:
    """Prompts whose confidence lies in one range. confidence, accuracy: their means."""

    count: int
    confidence: float
    accuracy: float


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature, at least 1, at which a softmax over held-out logits fits the targets best.

    logits: [n, m]. targets: [n]. It never sharpens: when every prompt is right, no data says how
    sure to be.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv:1706.04599, section 4.2
    """

    def loss(log_temperature: float) -> float:
        return float(cross_entropy(logits / math.exp(log_temperature), targets))

    highest = math.log(_LARGEST_TEMPERATURE)
    found = minimize_scalar(loss, bounds=(0.0, highest), method="bounded")
    return math.exp(found.x) if found.fun < loss(0.0) else 1.0


def reliability(confidences: Sequence[float], is_right: Sequence[bool]) -> list[ReliabilityBin]:
    """Confidences in [0, 1] in equally wide bins; empty bins are left out."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for confidence, right in zip(confidences, is_right, strict=True):
        index = min(int(confidence * _BINS), _BINS - 1)
        bins.setdefault(index, []).append((confidence, right))
    return [
        ReliabilityBin(
            count=len(members),
            confidence=sum(confidence for confidence, _ in members) / len(members),
            accuracy=sum(right for _, right in members) / len(members),
        )
        for _, members in sorted(bins.items())
    ]


def calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Expected calibration error: mean gap between confidence and accuracy, by number of prompts.

    Source: Guo et al. 2017, arXiv:1706.04599, section 2.
    """
    total = sum(each.count for each in bins)
    gaps = sum(each.count * abs(each.confidence - each.accuracy) for each in bins)
    return gaps / total if total else math.nan
