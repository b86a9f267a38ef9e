"""What experiments make of a request, before its target is resolved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...routers.base import Decision
    from .enrolment import Enrolment


@dataclass(frozen=True)
class Plan:
    """target: what answers in place of what the model names; None: that does. enrolment: None where
    the request takes part in no experiment. promoted_by: the experiment that made the target the
    default of `auto`; without the target, the server's own default answers. seed: what is drawn
    with where the body states none, so that it can be done again; None: whatever the engine draws.
    decisions: one per prompt, made before; none: they are to be made.
    """

    target: str | None = None
    enrolment: Enrolment | None = None
    promoted_by: str | None = None
    seed: int | None = None
    decisions: tuple[Decision, ...] = ()


NO_PLAN = Plan()
