"""Fixed scorer: the same blend for every prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..adapters.blend import Blend
from .base import Card, Query, Scores, Signal


@dataclass(frozen=True)
class Fixed:
    """Scores that are the blend's weights, whatever is asked."""

    blend: Blend
    name: str = "fixed"

    @property
    def modules(self) -> tuple[str, ...]:
        """The blend's."""
        return tuple(self.blend)

    @property
    def signals(self) -> tuple[Signal, ...]:
        """Nothing is read."""
        return ()

    def score(self, query: Query) -> Scores:
        """The weights; they are certain."""
        del query
        return Scores(dict(self.blend), is_certain=True, reason="every prompt gets this blend")

    def with_module(self, card: Card) -> Fixed:
        """The same blend: nobody gave the module a weight."""
        del card
        return self

    def without_module(self, name: str) -> Fixed:
        """The blend without it; what it had goes to the backbone."""
        return replace(self, blend=Blend({n: w for n, w in self.blend.items() if n != name}))
