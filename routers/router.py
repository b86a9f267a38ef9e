"""Router: signal, scorer and policy in a row."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from ..adapters.blend import Blend
from ..adapters.errors import RouterError
from .base import Decision, Query, Scorer, Signal
from .policies import Policy, Weighing


@dataclass(frozen=True)
class Router:
    """A prompt in, a decision out. digest: of the router's files."""

    signal: Signal
    scorer: Scorer
    policy: Policy
    digest: str = ""

    def route(self, query: Query) -> Decision:
        """Decide the blend for one prompt; the same prompt gets the same decision."""
        started = time.perf_counter()
        scores = self.scorer.score(self.signal.read(query))
        if not all(math.isfinite(score) for score in scores.logits.values()):
            raise RouterError("the scores are not finite: the prompt or the router is damaged")
        start = Weighing(weights=dict(scores.logits), scores=scores)
        weighing = self.policy.apply(start)
        ranked = sorted(weighing.confidences.items(), key=lambda pair: -pair[1])
        return Decision(
            blend=Blend(weighing.weights),
            scores=weighing.confidences or scores.logits,
            confidence=ranked[0][1] if ranked else 1.0,
            distance=scores.distance,
            threshold=weighing.threshold,
            runner_up=ranked[1][0] if len(ranked) > 1 else None,
            router=self.scorer.name,
            reason=weighing.reason or "every prompt gets this blend",
            milliseconds=(time.perf_counter() - started) * 1000,
        )
