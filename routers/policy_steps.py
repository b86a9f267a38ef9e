"""The steps that policies are made of: each turns weights into weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from fractions import Fraction
from typing import Protocol

from ..adapters.blend import MAX_WEIGHT, UNITS, Blend
from ..adapters.errors import RouterError
from .base import Scores

_LARGEST_EXPONENT = 700.0
"""The exponential of more overflows."""


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


def ranked(weights: Mapping[str, float]) -> list[tuple[str, float]]:
    """Modules and weights, the largest first; of equal ones, the first by name."""
    return sorted(weights.items(), key=lambda pair: (-pair[1], pair[0]))


@dataclass(frozen=True)
class Softmax:
    """Scores to shares that sum to 1. temperature: above 0; below 1 sharpens.

    Where the scorer knows prompts that no module serves, confidences leave a share to these; the
    weights do not: whether to abstain is for another step to say.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        _require(
            0 < self.temperature < math.inf,
            f"softmax({self.temperature:g})",
            "a finite temperature above 0",
        )

    def apply(self, weighing: Weighing) -> Weighing:
        """The weighing after this step."""
        best = max(weighing.weights.values())
        powers = {
            name: math.exp((score - best) / self.temperature)
            for name, score in weighing.weights.items()
        }
        total = math.fsum(powers.values())  # the modules' order must not show in any digit
        shares = {name: power / total for name, power in powers.items()}
        left = 1 / (1 + self._none(weighing.scores, best) / total)
        confidences = {name: share * left for name, share in shares.items()}
        winner, share = ranked(confidences)[0]
        reason = f"{winner} scores best ({share:.3f})"
        return replace(weighing, weights=shares, confidences=confidences, reason=reason)

    def _none(self, scores: Scores, best: float) -> float:
        """The power of no module, beside that of the best one, which is 1."""
        if scores.none is None:
            return 0.0
        return math.exp(min((scores.none - best) / self.temperature, _LARGEST_EXPONENT))


@dataclass(frozen=True)
class Sharpen:
    """Raise weights to a power and scale them back to the sum they had: the confidence stays that
    of the softmax. power: above 0; above 1 favours the best module, below 1 evens out.
    """

    power: float

    def __post_init__(self) -> None:
        _require(0 < self.power < math.inf, f"sharpen({self.power:g})", "a finite power above 0")

    def apply(self, weighing: Weighing) -> Weighing:
        """The weighing after this step."""
        best = max(weighing.weights.values(), default=0.0)
        if best <= 0:
            return weighing
        # relative to the best one, the sum of powers is at least 1: it cannot vanish
        powers = {name: (weight / best) ** self.power for name, weight in weighing.weights.items()}
        factor = math.fsum(weighing.weights.values()) / math.fsum(powers.values())
        return replace(weighing, weights={name: p * factor for name, p in powers.items()})


@dataclass(frozen=True)
class TopK:
    """Keep the k largest weights and share the rest's among them. k: at least 1."""

    k: int = 1

    def __post_init__(self) -> None:
        _require(_is_count(self.k), f"top_k({self.k})", "a whole number >= 1")

    def apply(self, weighing: Weighing) -> Weighing:
        """The weighing after this step."""
        return _keep(weighing, dict(ranked(weighing.weights)[: self.k]), renormalise=True)


@dataclass(frozen=True)
class TopP:
    """Keep the fewest of the largest weights that make up the share p of all: the surer the router,
    the fewer modules.

    p: in (0, 1]; the module that crosses p is kept, and 1 keeps all. k_min, k_max: bounds of the
    number kept; k_max None: no bound. renormalise: the weights that were cut are shared among those
    kept, as after `top_k`; false: they are left to the backbone, as in the paper.

    Source: Huang et al. 2024, Harder Tasks Need More Experts, arXiv:2403.07652, section 3.2.
    """

    p: float
    k_min: int = 1
    k_max: int | None = None
    _: KW_ONLY
    renormalise: bool = True

    def __post_init__(self) -> None:
        _require(0 < self.p <= 1, f"top_p({self.p:g})", "a share above 0 and up to 1")
        _require(_is_count(self.k_min), f"top_p(k_min={self.k_min})", "a whole number >= 1")
        _require(
            self.k_max is None or (_is_count(self.k_max) and self.k_max >= self.k_min),
            f"top_p(k_max={self.k_max})",
            f"a whole number >= k_min ({self.k_min})",
        )

    def apply(self, weighing: Weighing) -> Weighing:
        """The weighing after this step."""
        pairs = ranked(weighing.weights)
        count = max(self.k_min, self._crossing([weight for _, weight in pairs]))
        if self.k_max is not None:
            count = min(self.k_max, count)
        return _keep(weighing, dict(pairs[:count]), renormalise=self.renormalise)

    def _crossing(self, weights: list[float]) -> int:
        """How many of the weights, descending, it takes to make up p."""
        if self.p == 1:
            return len(weights)  # a rounded sum may reach 1 before the last of them
        goal = self.p * math.fsum(weights)
        before = itertools.accumulate(weights[:-1], initial=0.0)
        return sum(sum_before < goal for sum_before in before)


@dataclass(frozen=True)
class Threshold:
    """Drop modules whose weight is below a bound; without any left, the backbone answers.

    weight: in (0, 1]. renormalise: as for `top_p`.
    """

    weight: float
    _: KW_ONLY
    renormalise: bool = True

    def __post_init__(self) -> None:
        _require(
            0 < self.weight <= 1, f"threshold({self.weight:g})", "a weight above 0 and up to 1"
        )

    def apply(self, weighing: Weighing) -> Weighing:
        """The weighing after this step."""
        kept = {name: w for name, w in weighing.weights.items() if w >= self.weight}
        if weighing.weights and not kept:
            nearest, weight = ranked(weighing.weights)[0]
            reason = f"no module reaches {self.weight:g}, {nearest} comes nearest ({weight:.3f})"
            weighing = replace(weighing, reason=f"abstained: {reason}")
        return _keep(weighing, kept, renormalise=self.renormalise)


@dataclass(frozen=True)
class Abstain:
    """Leave the prompt to the backbone when it is farther away than the modules' own prompts are.

    rate: share of the modules' own prompts that is given up at most, in expectation, in (0, 1). The
    threshold is the conformal quantile: the ceil((n + 1) * (1 - rate))-th smallest of the scorer's
    n held-out distances. Where n + 1 is below 1 / rate, it is the largest: never infinite, so that
    what is far away abstains always; up to 1 / (n + 1) may be given up then.

    Source: Vovk, Gammerman and Shafer 2005, Algorithmic Learning in a Random World, section 2.2.
    """

    rate: float = 0.005

    def __post_init__(self) -> None:
        _require(0 < self.rate < 1, f"abstain({self.rate:g})", "a rate between 0 and 1")

    def apply(self, weighing: Weighing) -> Weighing:
        """The weighing after this step.

        Raises:
            RouterError: the scorer measures no distance, or was not calibrated.
        """
        scores = weighing.scores
        if scores.distance is None or not scores.calibration:
            raise RouterError(
                f"abstain({self.rate:g}) needs a scorer that measures distances and was "
                "calibrated: fit a prototype router, or leave abstain out of the policy"
            )
        count = len(scores.calibration)
        kept = math.ceil((count + 1) * (1 - Fraction(str(self.rate))))  # the rate as it is written
        threshold = scores.calibration[min(count, kept) - 1]
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
        snapped = dict(Blend(clipped))
        if any(clipped.values()) and not snapped:
            reason = f"abstained: every weight is below 1/{2 * UNITS} and vanishes"
            weighing = replace(weighing, reason=reason)
        return replace(weighing, weights=snapped)


def _keep(weighing: Weighing, kept: Mapping[str, float], *, renormalise: bool) -> Weighing:
    """Only these weights. renormalise: scaled to the sum that all had."""
    kept_total = math.fsum(kept.values())
    if renormalise and kept_total:
        factor = math.fsum(weighing.weights.values()) / kept_total
        kept = {name: weight * factor for name, weight in kept.items()}
    return replace(weighing, weights=kept)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 1


def _require(holds: bool, step: str, rule: str) -> None:
    if not holds:
        raise RouterError(f"policy step {step} is out of range: {rule} is allowed")
