"""Fixed scorer: the same blend for every prompt."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..adapters.blend import Blend
from .base import Scores


@dataclass(frozen=True)
class Fixed:
    """Scores that are the blend's weights; its policy is `quantise`."""

    blend: Blend
    name: str = "fixed"

    def score(self, features: Tensor) -> Scores:
        """The weights, whatever the features."""
        return Scores(logits=dict(self.blend))
