"""Conversations keep their blend, so that what is cached of their earlier turns stays valid."""

from __future__ import annotations

import math
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

    mode: `sticky`: when another module, or the backbone, is clearly better; `each-turn`: the last
    turn alone decides. margin: the share by which it must exceed the current one, in [0, 1]; 1:
    never. patience: on how many turns in a row the backbone must be better, at least 1: a turn that
    leans on the one before it ("and 15?", "thanks") looks like no module's.

    Raises:
        RouterError: another mode, or a margin or a patience out of range.
    """

    mode: str = "sticky"
    margin: float = 0.5
    patience: int = 2

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise RouterError(f"conversation mode {self.mode!r} is unknown: {', '.join(MODES)}")
        if not 0 <= self.margin <= 1:
            raise RouterError(
                f"conversation margin {self.margin:g} is out of range: 0 to 1 is allowed"
            )
        if self.patience < 1:
            raise RouterError(f"conversation patience {self.patience} is too small: 1 turn or more")


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
        decision = _next(decision, router.route(query.up_to(turn)), router, stickiness)
    assert decision is not None  # a query has at least one turn
    return replace(decision, milliseconds=(time.perf_counter() - started) * 1000)


def _first_turn(count: int) -> int:
    """Where to begin, counted from 1: at the first turn, or at one of the last MOST_TURNS."""
    stride = MOST_TURNS // 2
    return max(0, -(-(count - MOST_TURNS) // stride)) * stride + 1


def _next(
    current: Decision | None, new: Decision, router: Router, stickiness: Stickiness
) -> Decision:
    """The decision after one turn more."""
    if current is None or not _may_stay(current, new, router) or current.blend == new.blend:
        return new
    own = _share(current.best, new)
    lead = _share(new.best, new) - own
    strays = current.strays + 1 if new.best is None else 0
    if lead > stickiness.margin and (new.best is not None or strays >= stickiness.patience):
        leads = f"{new.best or 'the backbone'} leads by {lead:.3f}"
        moved = f"the conversation leaves {_named(current)}: {leads}"
        return replace(new, reason=f"{new.reason}; {moved}")
    reason = _kept_reason(current, new, lead, stickiness)
    return replace(new, blend=current.blend, confidence=own, strays=strays, reason=reason)


def _may_stay(current: Decision, new: Decision, router: Router) -> bool:
    """What is certain or chosen token by token goes first, and a module may be gone."""
    if new.is_certain or new.token_routing or current.token_routing:
        return False
    return set(current.blend) <= set(router.modules)


def _share(module: str | None, turn: Decision) -> float:
    """Of a module on a turn; None: of the backbone, what the modules' shares leave. They leave
    nothing where the scorer knows no prompts that no module serves, or has no opinion."""
    if module is not None:
        return turn.scores.get(module, 0.0)
    return max(0.0, 1 - math.fsum(turn.scores.values())) if turn.scores else 0.0


def _kept_reason(current: Decision, new: Decision, lead: float, stickiness: Stickiness) -> str:
    leads = f"leads by {lead:.3f}" if lead > 0 else "does not lead"
    leads += " only" * (0 < lead <= stickiness.margin)
    if new.best is None:
        why = f"this turn names no module ({new.reason}), and the backbone {leads}"
    elif new.best == current.best:
        why = f"{new.best} is still best"
    else:
        why = f"{new.best} {leads}"
    rule = f"another must lead by more than {stickiness.margin:g} to move it"
    if new.best is None:
        rule += f", the backbone on {stickiness.patience} turns in a row"
    return f"the conversation keeps {_named(current)}: {why}; {rule}"


def _named(decision: Decision) -> str:
    return decision.blend.weights_text if decision.blend else "the backbone"
