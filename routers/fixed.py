"""Fixed scorer: the same blend for every prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..adapters.blend import Blend
from .base import Card, Query, Scores, Signal


@dataclass(frozen=True)
class Fixed:
    """Scores that are the blend's weights, whatever is asked.

    unserved: modules that have gone since; what they had goes to the backbone.
    """

    blend: Blend
    name: str = "fixed"
    unserved: frozenset[str] = frozenset()

    @property
    def modules(self) -> tuple[str, ...]:
        """Those of the blend that are served."""
        return tuple(name for name in self.blend if name not in self.unserved)

    @property
    def signals(self) -> tuple[Signal, ...]:
        """Nothing is read."""
        return ()

    def score(self, query: Query) -> Scores:
        """The weights; they are certain."""
        del query
        weights = {name: self.blend[name] for name in self.modules}
        return Scores(weights, is_certain=True, reason="every prompt gets this blend")

    def with_module(self, card: Card) -> Fixed:
        """The module has the weight that the blend gives it, if any."""
        return replace(self, unserved=self.unserved - {card.name})

    def without_module(self, name: str) -> Fixed:
        """The blend without it."""
        return replace(self, unserved=self.unserved | {name})
