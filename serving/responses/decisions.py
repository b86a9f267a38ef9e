"""How decisions are told: in the headers of answers, and by the preview."""

from __future__ import annotations

from typing import Any

from ...routers.base import Decision
from ..assigning import Assignment


def blend_text(decision: Decision) -> str:
    """The blend as response headers show it."""
    return "per-token" if decision.token_routing else decision.blend.weights_text


def route_object(assignment: Assignment) -> dict[str, Any]:
    """The response of /v1/route."""
    decision, bank = assignment.decision, assignment.hosted.bank
    enrolment = assignment.enrolment
    return {
        "object": "route",
        "target": assignment.target.name,
        "bank": bank.name,
        "bank_digest": bank.digest,
        "blend": dict(decision.blend),
        "abstained": decision.abstained,
        "confidence": decision.confidence,
        "scores": dict(decision.scores),
        "distance": decision.distance,
        "typicality": decision.typicality,
        "threshold": decision.threshold,
        "runner_up": decision.runner_up,
        "router": decision.router,
        "reason": decision.reason,
        "basis": dict(decision.basis),
        "routing": decision.token_routing.settings if decision.token_routing else None,
        "milliseconds": round(decision.milliseconds, 3),
        "experiment": enrolment.experiment if enrolment else None,
        "variant": enrolment.variant if enrolment else None,
    }
