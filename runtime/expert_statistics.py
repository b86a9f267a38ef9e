"""What experts do on calibration prompts, measured one expert at a time for a build."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..adapters.blend import Blend
from ..adapters.experts import Base, Expert, LoraExpert
from ..adapters.merging.calibrated import fisher_norm
from .calibration import fisher_diagonals, input_moments
from .loading import load_model
from .merging import merge_into
from .rendering import Rendered
from .sequential import SequentialMoments

Prompts = Mapping[str, Sequence[Rendered]]
"""Calibration prompts by the expert's name."""


def expert_model(expert: Expert, base: Base, device: torch.device) -> Any:  # noqa: ANN401
    """The expert as a plain model in float32."""
    if not isinstance(expert, LoraExpert):
        return load_model(expert.path, device=device, dtype=torch.float32)
    model = load_model(base.path, device=device, dtype=torch.float32)
    merge_into(model, {expert.name: expert.module}, Blend({expert.name: 1.0}))
    return model


class ExpertStatistics:
    """Statistics of experts on their own prompts, each found when it is first asked for.

    prompts: of every expert. on_prompt: called once per prompt and run.
    Memory: i² numbers for each linear layer and expert, or as many as the model for each expert's
    Fisher diagonal.
    """

    def __init__(
        self,
        base: Base,
        experts: Sequence[Expert],
        prompts: Prompts,
        *,
        device: torch.device,
        on_prompt: Callable[[], None] = lambda: None,
    ) -> None:
        self._base = base
        self._experts = experts
        self._prompts = prompts
        self._device = device
        self._on_prompt = on_prompt

    def moments(self, layer: str) -> Sequence[Tensor]:
        """Mean of x xᵀ over each expert's inputs of a linear layer, [i, i] each."""
        return [moments[layer] for moments in self._moments]

    def fishers(self, parameter: str) -> Sequence[Tensor]:
        """Each expert's Fisher diagonal of a parameter, in its shape; of norm 1 over the model, or
        the expert that is least sure of its answers would decide alone.
        """
        return [fishers[parameter] for fishers in self._fishers]

    def merged(self, parameter: str, weight: Tensor) -> None:
        """Nothing: what the experts do does not depend on the merge."""

    def moments_of(self, expert: Expert) -> dict[str, Tensor]:
        """Mean of x xᵀ over one expert's inputs of every linear layer."""
        model = expert_model(expert, self._base, self._device)
        prompts = self._prompts[expert.name]
        found = input_moments(model, prompts, on_prompt=self._on_prompt)
        return {layer: moment.mean for layer, moment in found.items()}

    @cached_property
    def _moments(self) -> list[dict[str, Tensor]]:
        return [self.moments_of(expert) for expert in self._experts]

    @cached_property
    def _fishers(self) -> list[dict[str, Tensor]]:
        return [self._fisher(expert) for expert in self._experts]

    def _fisher(self, expert: Expert) -> dict[str, Tensor]:
        model = expert_model(expert, self._base, self._device)
        prompts = self._prompts[expert.name]
        found = fisher_diagonals(model, prompts, labels="sampled", on_prompt=self._on_prompt)
        norm = fisher_norm(found.values())
        return {name: diagonal / (norm or 1.0) for name, diagonal in found.items()}


class SequentialStatistics(ExpertStatistics):
    """Moments for RegMean++: the inputs of a block come from the merged blocks before it."""

    def moments(self, layer: str) -> Sequence[Tensor]:
        """Mean of x xᵀ over each expert's inputs, behind what is merged already."""
        while layer not in self._found:
            self._advance()
        return [moment.mean for moment in self._found[layer]]

    def merged(self, parameter: str, weight: Tensor) -> None:
        """Keep the merged parameter until its block is whole."""
        self._weights[parameter] = weight

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        return {}

    @cached_property
    def _found(self) -> dict[str, Any]:
        return {}

    @cached_property
    def _sequential(self) -> SequentialMoments:
        """The merged model so far: begun once everything outside the blocks is merged."""
        model = load_model(self._base.path, device=self._device, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self._weights:
                    parameter.copy_(self._weights[name])
        prompts = [self._prompts[expert.name] for expert in self._experts]
        self._index = 0
        return SequentialMoments(model, prompts, on_prompt=self._on_prompt)

    def _advance(self) -> None:
        """Hand over the block that was merged last, and look at the next one."""
        sequential = self._sequential
        if self._index:
            names = sequential.parameters(self._index - 1)
            known = {n: self._weights.pop(n) for n in names if n in self._weights}
            sequential.merged(self._index - 1, known)
        names = sequential.parameters(self._index)
        experts = (self._own(expert, names) for expert in self._experts)
        self._found.clear()
        self._found.update(sequential.block(self._index, experts))
        self._index += 1

    def _own(self, expert: Expert, names: Sequence[str]) -> dict[str, Tensor]:
        """An expert's weights of a block."""
        weights = {}
        for name in names:
            info = self._base.checkpoint.tensors[name]
            base = self._base.checkpoint.read_rows(name, 0, info.rows).float()
            weights[name] = (base + expert.delta_rows(name, 0, info.rows, base)).view(info.shape)
        return weights
