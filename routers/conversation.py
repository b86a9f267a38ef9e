"""Conversations keep their blend, so that what is cached of their earlier turns stays valid."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from ..adapters.errors import RouterError
from .base import Decision, Query
from .router import Router

MODES = ("sticky", "each-turn")
MOST_TURNS = 32
"""Turns of a conversation that are looked at, at most. In a longer one the first of them moves on
by half of that at a time: were it another one with every turn, so might be the blend."""


@dataclass(frozen=True)
class Stickiness:
    """When a conversation gives up its blend.

    mode: `sticky`: when another module is clearly better; `each-turn`: the last turn alone decides.
    margin: the share by which the other module must exceed the current one, in [0, 1]; 1: never.

    Raises:
        RouterError: another mode, or a margin out of range.
    """

    mode: str = "sticky"
    margin: float = 0.5

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise RouterError(f"conversation mode {self.mode!r} is unknown: {', '.join(MODES)}")
        if not 0 <= self.margin <= 1:
            raise RouterError(
                f"conversation margin {self.margin:g} is out of range: 0 to 1 is allowed"
            )


def route_conversation(
    router: Router, query: Query, stickiness: Stickiness, *, before: Decision | None = None
) -> Decision:
    """Decide the blend of the last turn, given the turns before it.

    A function of the conversation alone: every turn is routed and compared with the blend so far,
    so that replicas and restarts agree, and each turn is decided as it was when it was the last.

    before: the decision of the request before, from clients that send new turns only; then the
        last turn alone is routed, and compared with it.

    Raises:
        RouterError: as `Router.route`.
    """
    started = time.perf_counter()
    if stickiness.mode == "each-turn":
        return router.route(query)
    count = len(query.turns)
    decision = before
    for turn in range(_first_turn(count) if before is None else count, count + 1):
        decision = _next(decision, router.route(query.up_to(turn)), router, stickiness.margin)
    assert decision is not None  # a query has at least one turn
    return replace(decision, milliseconds=(time.perf_counter() - started) * 1000)


def _first_turn(count: int) -> int:
    """Where to begin, counted from 1: at the first turn, or at one of the last MOST_TURNS."""
    stride = MOST_TURNS // 2
    return max(0, -(-(count - MOST_TURNS) // stride)) * stride + 1


def _next(current: Decision | None, new: Decision, router: Router, margin: float) -> Decision:
    """The decision after one turn more."""
    if current is None or not _may_stay(current, new, router) or current.blend == new.blend:
        return new
    lead = _lead(current, new)
    if lead > margin:
        moved = f"the conversation leaves {_named(current)}: {new.best} leads by {lead:.3f}"
        return replace(new, reason=f"{new.reason}; {moved}")
    return replace(new, blend=current.blend, reason=_kept_reason(current, new, margin))


def _may_stay(current: Decision, new: Decision, router: Router) -> bool:
    """What is certain or chosen token by token goes first, and a module may be gone."""
    if new.is_certain or new.token_routing or current.token_routing:
        return False
    return set(current.blend) <= set(router.modules)


def _lead(current: Decision, new: Decision) -> float:
    """By how much the new best module's share exceeds that of the current one; 0 for the same."""
    if new.best is None:
        return 0.0
    return new.scores.get(new.best, 0.0) - new.scores.get(current.best or "", 0.0)


def _kept_reason(current: Decision, new: Decision, margin: float) -> str:
    if new.best is None:
        why = f"this turn names no module ({new.reason})"
    elif new.best == current.best:
        why = f"{new.best} is still best"
    else:
        why = f"{new.best} leads by {_lead(current, new):.3f} only"
    rule = f"another module must lead by more than {margin:g} to move it"
    return f"the conversation keeps {_named(current)}: {why}; {rule}"


def _named(decision: Decision) -> str:
    return decision.blend.weights_text if decision.blend else "the backbone"
