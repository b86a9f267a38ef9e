"""Ensemble scorer: what is certain first, then what was learned."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..adapters.errors import RouterError
from .base import Card, Query, Scorer, Scores, Signal


@dataclass(frozen=True)
class Ensemble:
    """The first member with an opinion decides.

    members: in order; usually rules, then a learned scorer.

    Raises:
        RouterError: there are no members.
    """

    members: tuple[Scorer, ...]
    name: str = "ensemble"

    def __post_init__(self) -> None:
        if not self.members:
            raise RouterError("the ensemble has no members: give at least one scorer")

    @property
    def modules(self) -> tuple[str, ...]:
        """All that a member may name, in the members' order."""
        return tuple(dict.fromkeys(name for member in self.members for name in member.modules))

    @property
    def signals(self) -> tuple[Signal, ...]:
        """All members', each object once."""
        return tuple({id(s): s for member in self.members for s in member.signals}.values())

    def score(self, query: Query) -> Scores | None:
        """The first opinion; its reason says whose, unless the member gives one itself."""
        for member in self.members:
            scores = member.score(query)
            if scores is not None and (scores.logits or scores.is_certain):
                return replace(scores, reason=scores.reason or f"{member.name} decides")
        return None

    def with_module(self, card: Card) -> Ensemble:
        """Every member learns of it, as far as it can."""
        return replace(self, members=tuple(member.with_module(card) for member in self.members))

    def without_module(self, name: str) -> Ensemble:
        """No member names it any more."""
        return replace(self, members=tuple(member.without_module(name) for member in self.members))
