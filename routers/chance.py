"""Chance scorer: a control that every router must beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from .base import Card, Query, Scores, Signal


@dataclass(frozen=True)
class Chance:
    """A module drawn evenly, the same one for the same last turn.

    Every module draws a number from the prompt's digest, and the largest wins: where a module comes
    or goes, only the prompts that it takes or had change hands. seed: another one draws anew.

    Source: Thaler and Ravishankar 1998, Using name-based mappings to increase hit rates, IEEE/ACM
    Transactions on Networking 6 (rendezvous hashing).
    """

    modules: tuple[str, ...]
    seed: int = 0
    name: str = "chance"

    @property
    def signals(self) -> tuple[Signal, ...]:
        """Nothing is read that needs computing."""
        return ()

    def score(self, query: Query) -> Scores:
        """The module drawn, for certain; nothing without modules."""
        if not self.modules:
            return Scores({}, is_certain=True, reason="there is no module to draw")
        winner = max(self.modules, key=lambda module: self._draw(module, query))
        return Scores({winner: 1.0}, is_certain=True, reason=f"{winner} was drawn at random")

    def with_module(self, card: Card) -> Chance:
        """Draws among one more."""
        return replace(self, modules=tuple(dict.fromkeys((*self.modules, card.name))))

    def without_module(self, name: str) -> Chance:
        """Draws among the others."""
        return replace(self, modules=tuple(known for known in self.modules if known != name))

    def _draw(self, module: str, query: Query) -> bytes:
        turn = query.turns[-1]
        drawn_from = repr((self.seed, module, turn.token_ids, turn.text))
        return hashlib.blake2b(drawn_from.encode("ascii", "backslashreplace")).digest()
