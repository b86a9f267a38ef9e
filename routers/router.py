"""Router: signal, scorer and policy in a row."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..adapters.blend import Blend
from ..adapters.errors import RouterError
from .base import Decision, Query, Scorer, Signal
from .policies import Policy, Weighing


@dataclass(frozen=True)
class Router:
    """A prompt in, a decision out.

    digest: of the router's files. renamed: where modules that the scorer knows have gone since, by
    their old names; the decision speaks of the new ones, and weights that meet there add up.
    """

    signal: Signal
    scorer: Scorer
    policy: Policy
    digest: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)

    def route(self, query: Query) -> Decision:
        """Decide the blend for one prompt; the same prompt gets the same decision."""
        started = time.perf_counter()
        scores = self.scorer.score(self.signal.read(query))
        if not all(math.isfinite(score) for score in scores.logits.values()):
            raise RouterError("the scores are not finite: the prompt or the router is damaged")
        start = Weighing(weights=dict(scores.logits), scores=scores)
        weighing = self.policy.apply(start)
        confidences = self._renamed(weighing.confidences)
        ranked = sorted(confidences.items(), key=lambda pair: -pair[1])
        return Decision(
            blend=self._blend(weighing.weights),
            scores=confidences or self._renamed(scores.logits),
            confidence=ranked[0][1] if ranked else 1.0,
            distance=scores.distance,
            threshold=weighing.threshold,
            runner_up=ranked[1][0] if len(ranked) > 1 else None,
            router=self.scorer.name,
            reason=self._reason(weighing),
            milliseconds=(time.perf_counter() - started) * 1000,
        )

    def _blend(self, weights: Mapping[str, float]) -> Blend:
        return Blend(weights).renamed({name: self.renamed.get(name, name) for name in weights})

    def _renamed(self, shares: Mapping[str, float]) -> dict[str, float]:
        """Shares by new name; the order is that of the first old one."""
        sums: dict[str, float] = {}
        for name, share in shares.items():
            new = self.renamed.get(name, name)
            sums[new] = sums.get(new, 0.0) + share
        return sums

    def _reason(self, weighing: Weighing) -> str:
        """The policy's reason, which has the scorer's names, and where these modules have gone."""
        reason = weighing.reason or "every prompt gets this blend"
        moved = [name for name in Blend(weighing.weights) if name in self.renamed]
        return "; ".join(
            [reason, *(f"{name} is folded into {self.renamed[name]}" for name in moved)]
        )
