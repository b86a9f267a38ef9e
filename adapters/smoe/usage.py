"""Usage: how a sparse mixture of experts routes calibration prompts, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class LayerUsage:
    """What one layer did with the tokens of calibration prompts, padding left out.

    tokens: how many there were. counts: [E], of those that each expert was selected for.
    logit_gram: [E, E], sum over tokens of z zᵀ, z the router's logits.
    saliency: [E], mean over an expert's own tokens of its gate times the norm of its output; 0 for
        an expert that had none.
    hidden: [n, D], what some of the tokens brought into the layer, drawn evenly.
    mean_outputs: [E, D], each expert's mean output over *all* tokens, where it was asked for.
    moment: [D, D], mean of x xᵀ over what goes into the experts, each token weighing by its squared
        gate once for each of its experts, where it was asked for.
    """

    tokens: int
    counts: Tensor
    logit_gram: Tensor
    saliency: Tensor
    hidden: Tensor
    mean_outputs: Tensor | None = None
    moment: Tensor | None = None

    @property
    def frequencies(self) -> Tensor:
        """Each expert's share of all selections, [E], float32, which sum to 1."""
        return self.counts.float() / self.counts.sum().clamp(min=1)

    @property
    def logit_cosines(self) -> Tensor:
        """Cosine between the experts' columns of router logits, [E, E]."""
        norms = self.logit_gram.diagonal().clamp(min=0).sqrt()
        return self.logit_gram / (norms[:, None] * norms).clamp(min=1e-30)


Usage = Mapping[str, LayerUsage]
"""By the name of the sparse layer."""
