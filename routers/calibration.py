"""Confidence that means what it says: temperature, and how far off confidences are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..adapters.errors import RouterError
from .base import Scores

_LARGEST_TEMPERATURE = 1e4
_BINS = 15


@dataclass(frozen=True)
class Calibration:
    """What a scorer's logits and distances mean, from prompts that it was not fitted on.

    temperature: by which logits are divided so that a softmax tells how often the best is right.
    distances: of the modules' prompts, ascending.
    """

    temperature: float = 1.0
    distances: tuple[float, ...] = ()

    def scores(
        self,
        modules: Sequence[str],
        logits: Tensor,
        distance: Tensor,
        basis: Mapping[str, str] = {},
    ) -> Scores:
        """Logits of the modules, and of none where there is one more, [m] or [m + 1], and the
        distance, [], of one prompt."""
        *own, none = [*(logits / self.temperature).tolist(), None][: len(modules) + 1]
        return Scores(
            logits=dict(zip(modules, own, strict=True)),
            distance=float(distance),
            calibration=self.distances,
            none=none,
            basis=basis,
        )

    def state(self) -> dict[str, Tensor]:
        """Tensors to save."""
        values = {"calibration": self.distances, "temperature": (self.temperature,)}
        return {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Calibration:
        """Undo `state`.

        Raises:
            RouterError: a tensor is missing, or holds what cannot be.
        """
        try:
            distances, temperature = state["calibration"].double(), state["temperature"].double()
        except KeyError as error:
            raise RouterError(f"the router lacks tensor {error}: fit it again") from error
        is_finite = bool(distances.isfinite().all() and temperature.isfinite().all())
        if not (is_finite and temperature.numel() == 1 and float(temperature) > 0):
            raise RouterError("the router's calibration is damaged: fit it again")
        return cls(float(temperature), tuple(distances.flatten().sort().values.tolist()))


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
