"""From scores to weights: small steps that are composed with `|`.

`softmax(0.5) | top_k(1) | abstain(0.005) | quantise` reads: turn scores into shares at temperature
0.5, keep the best module, give up when the prompt is farther away than all but 0.5 % of the
modules' own prompts, snap to 1/64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..adapters.blend import MAX_WEIGHT, Blend
from ..adapters.errors import RouterError
from .base import Scores

_STEP = re.compile(r"\s*(?P<name>[a-z_]+)\s*(?:\(\s*(?P<argument>[^()]*?)\s*\))?\s*")


@dataclass(frozen=True)
class Weighing:
    """What a policy has made of scores so far.

    weights: by module. confidences: the shares the softmax gave, before anything was cut.
    threshold: of the distance, once a step set one. reason: in words.
    """

    weights: Mapping[str, float]
    scores: Scores
    confidences: Mapping[str, float] = field(default_factory=dict)
    threshold: float | None = None
    reason: str = ""


class Step(Protocol):
    """One step of a policy."""

    def apply(self, weighing: Weighing) -> Weighing:
        """The weighing after this step."""


@dataclass(frozen=True)
class Softmax:
    """Scores to shares that sum to 1. temperature: above 0; below 1 sharpens."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        _require(self.temperature > 0, f"softmax({self.temperature:g})", "a temperature above 0")

    def apply(self, weighing: Weighing) -> Weighing:
        """The weighing after this step."""
        best = max(weighing.weights.values())
        powers = {
            name: math.exp((score - best) / self.temperature)
            for name, score in weighing.weights.items()
        }
        total = sum(powers.values())
        shares = {name: power / total for name, power in powers.items()}
        winner = max(shares, key=lambda name: shares[name])
        reason = f"{winner} scores best ({shares[winner]:.3f})"
        return replace(weighing, weights=shares, confidences=shares, reason=reason)


@dataclass(frozen=True)
class TopK:
    """Keep the k largest weights and share the rest's among them. k: at least 1."""

    k: int = 1

    def __post_init__(self) -> None:
        _require(
            self.k >= 1 and float(self.k).is_integer(), f"top_k({self.k:g})", "a whole number >= 1"
        )

    def apply(self, weighing: Weighing) -> Weighing:
        """The weighing after this step."""
        ranked = sorted(weighing.weights.items(), key=lambda pair: -pair[1])
        kept = dict(ranked[: int(self.k)])
        total, kept_total = sum(weighing.weights.values()), sum(kept.values())
        factor = total / kept_total if kept_total else 0.0
        return replace(weighing, weights={name: w * factor for name, w in kept.items()})


@dataclass(frozen=True)
class Abstain:
    """Leave the prompt to the backbone when it is farther away than the modules' own prompts are.

    rate: share of the modules' own prompts that is given up at most, in (0, 1).
    """

    rate: float = 0.005

    def __post_init__(self) -> None:
        _require(0 < self.rate < 1, f"abstain({self.rate:g})", "a rate between 0 and 1")

    def apply(self, weighing: Weighing) -> Weighing:
        """The weighing after this step."""
        scores = weighing.scores
        if scores.distance is None or not scores.calibration:
            raise RouterError(
                "abstain() needs a scorer that measures distances and was calibrated: "
                "fit a prototype router, or leave abstain out of the policy"
            )
        kept = math.ceil(len(scores.calibration) * (1 - self.rate))
        threshold = scores.calibration[min(kept, len(scores.calibration)) - 1]
        if scores.distance <= threshold:
            return replace(weighing, threshold=threshold)
        reason = (
            f"abstained: distance {scores.distance:.4g} is above {threshold:.4g}, "
            "it is unlike any module's prompts"
        )
        return replace(weighing, weights={}, threshold=threshold, reason=reason)


@dataclass(frozen=True)
class Quantise:
    """Snap weights to 1/64, as every blend does; small ones vanish."""

    def apply(self, weighing: Weighing) -> Weighing:
        """The weighing after this step."""
        clipped = {n: max(-MAX_WEIGHT, min(MAX_WEIGHT, w)) for n, w in weighing.weights.items()}
        return replace(weighing, weights=dict(Blend(clipped)))


@dataclass(frozen=True)
class Policy:
    """Steps in order."""

    steps: tuple[Step, ...]

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Read `softmax(0.5) | abstain(0.005) | quantise`.

        Raises:
            RouterError: a step is unknown, its argument is out of range, or top_k or abstain come
                without one softmax before them.
        """
        steps = tuple(_parse_step(part) for part in text.split("|"))
        kinds = [type(step) for step in steps]
        needs_softmax = TopK in kinds or Abstain in kinds
        if kinds.count(Softmax) > 1 or (needs_softmax and kinds[0] is not Softmax):
            raise RouterError(f"policy {text!r} needs one softmax, and as its first step")
        return cls(steps)

    def __or__(self, other: Policy) -> Policy:
        return Policy(self.steps + other.steps)

    def apply(self, weighing: Weighing) -> Weighing:
        """The weighing after all steps."""
        for step in self.steps:
            weighing = step.apply(weighing)
        return weighing


STEPS = {"softmax": Softmax, "top_k": TopK, "abstain": Abstain, "quantise": Quantise}


def _parse_step(text: str) -> Step:
    match = _STEP.fullmatch(text)
    if match is None or match["name"] not in STEPS:
        raise RouterError(
            f"policy step {text.strip()!r} is unknown: {', '.join(STEPS)} are allowed"
        )
    kind, argument = STEPS[match["name"]], match["argument"]
    try:
        step: Step = kind(float(argument)) if argument else kind()
    except (ValueError, TypeError) as error:
        raise RouterError(f"policy step {text.strip()!r} takes no such argument") from error
    return step


def _require(holds: bool, step: str, rule: str) -> None:
    if not holds:
        raise RouterError(f"policy step {step} is out of range: {rule} is allowed")
