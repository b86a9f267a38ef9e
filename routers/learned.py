"""Learned scorer: a signal, and a head that was fitted on its features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, Self

from torch import Tensor

from .base import Card, Query, Scorer, Scores, Signal


class Fitted(Scorer, Protocol):
    """A scorer that was fitted, and can be saved."""

    def state(self) -> Mapping[str, Tensor]:
        """Tensors to save."""


class Head(Protocol):
    """Features to scores. Immutable: what grows or shrinks is a new one."""

    @property
    def name(self) -> str:
        """What responses and metrics call the router."""

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that it may name."""

    def score(self, features: Tensor) -> Scores:
        """Features [d] to a score per module."""

    def with_module(self, name: str, features: Tensor) -> Self:
        """This head and one module more, or with the module replaced. features: of its samples,
        [n, d], n at least 1. The other modules' logits stay."""

    def without_module(self, name: str) -> Self:
        """This head without a module."""

    def state(self) -> Mapping[str, Tensor]:
        """Tensors to save."""


@dataclass(frozen=True)
class Learned:
    """A head on a signal."""

    signal: Signal
    head: Head

    @property
    def name(self) -> str:
        """The head's."""
        return self.head.name

    @property
    def modules(self) -> tuple[str, ...]:
        """The head's."""
        return self.head.modules

    @property
    def signals(self) -> tuple[Signal, ...]:
        """The one."""
        return (self.signal,)

    def state(self) -> Mapping[str, Tensor]:
        """The head's tensors."""
        return self.head.state()

    def score(self, query: Query) -> Scores:
        """The head's scores."""
        return self.head.score(self.signal.read([query])[0])

    def with_module(self, card: Card) -> Learned:
        """Known by its samples; a card without any changes nothing."""
        if not card.samples:
            return self
        return replace(self, head=self.head.with_module(card.name, self.signal.read(card.samples)))

    def without_module(self, name: str) -> Learned:
        """The head without it."""
        return replace(self, head=self.head.without_module(name))
