"""What a router takes and gives, and the protocols of its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..adapters.blend import Blend

Encode = Callable[[tuple[int, ...], int], Tensor]
"""Token ids and a number of layers, at least 1, to the hidden states [t, hidden] after them."""


@dataclass(frozen=True)
class Query:
    """What is routed: a prompt as the backbone will see it.

    token_ids: the rendered prompt. text: the user's words alone, for signals that read text.
    """

    token_ids: tuple[int, ...]
    text: str = ""


@dataclass(frozen=True)
class Scores:
    """A scorer's opinion.

    logits: per module, in the bank's order; any scale that a softmax understands.
    distance: how far the prompt is from what the scorer was fitted on; None: it cannot tell.
    calibration: the same distance for held-out prompts of the modules, ascending.
    """

    logits: Mapping[str, float]
    distance: float | None = None
    calibration: Sequence[float] = ()


class Signal(Protocol):
    """What of a query a scorer looks at."""

    def read(self, query: Query) -> Tensor:
        """The query's features, [d], float32."""


class Scorer(Protocol):
    """Features to scores."""

    @property
    def name(self) -> str:
        """What responses and metrics call the router."""

    def score(self, features: Tensor) -> Scores:
        """Features [d] to a score per module."""


@dataclass(frozen=True)
class Decision:
    """What a router decided, and why.

    scores: weight of each module before it was cut and snapped. confidence: of the best one.
    distance: of the prompt from what the router was fitted on, when the scorer can tell.
    threshold: the distance above which the router abstains, when its policy has one.
    milliseconds: time the decision took.
    """

    blend: Blend
    scores: Mapping[str, float] = field(default_factory=dict)
    confidence: float = 1.0
    distance: float | None = None
    threshold: float | None = None
    runner_up: str | None = None
    router: str = "none"
    reason: str = ""
    milliseconds: float = 0.0

    @property
    def abstained(self) -> float:
        """The share that stays on the backbone."""
        return self.blend.abstained
