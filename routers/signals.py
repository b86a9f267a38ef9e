"""What of a prompt a scorer looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.errors import RouterError
from .base import Encode, Query

POOLINGS = ("mean", "last")


@dataclass(frozen=True)
class HiddenState:
    """The backbone's hidden state after its first layers, pooled over the prompt's tokens.

    encode: runs the layers, with the engine's own weights. layer: how many layers, at least 1.
    pooling: `mean` over all tokens, or the `last` token.

    Raises:
        RouterError: another pooling, or a layer below 1.
    """

    encode: Encode
    layer: int
    pooling: str = "mean"

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise RouterError(f"pooling {self.pooling!r} is unknown: {', '.join(POOLINGS)}")
        if self.layer < 1:
            raise RouterError(f"layer {self.layer} is out of range: at least 1")

    def read(self, query: Query) -> Tensor:
        """The pooled hidden state, [hidden], float32."""
        states = self.encode(query.token_ids, self.layer)
        return (states.mean(0) if self.pooling == "mean" else states[-1]).float()


@dataclass(frozen=True)
class NoSignal:
    """Nothing: for scorers that do not look at the prompt."""

    def read(self, query: Query) -> Tensor:
        """An empty tensor."""
        return torch.empty(0)
