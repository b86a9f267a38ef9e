"""Merging modules into a model for good: the reference that the engine is measured against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.blend import Blend
from ..adapters.lora import Module
from ..adapters.shapes import Shapes


@torch.no_grad()
def merge_into(model: Any, modules: Mapping[str, Module], blend: Blend) -> None:  # noqa: ANN401
    """Add a blend's changes to the parameters for good: W += sum of w B A, v += sum of w δ.

    A tied head is untied first when a module changes it and the embedding unequally.

    modules: by the names that the blend uses. The model's layers must be plain.
    """
    shapes = Shapes.of(model)
    if shapes.tied and not all(_changes_as_one(modules[name], shapes) for name in blend):
        head = model.get_submodule(shapes.tied[1])
        head.weight = nn.Parameter(head.weight.detach().clone())
    is_tied = Shapes.of(model).tied is not None
    for name, weight in blend.items():
        deltas = modules[name].resolved(shapes)
        if is_tied and shapes.tied:
            deltas.pop(shapes.tied[1], None)
        for layer_name, delta in deltas.items():
            layer = model.get_submodule(layer_name)
            change = delta.dense().to(layer.weight)
            is_transposed = not isinstance(layer, nn.Linear | nn.Embedding)
            layer.weight.add_(change.T if is_transposed else change, alpha=weight)
        for parameter_name, vector in modules[name].vectors.items():
            parameter: Tensor = model.get_parameter(parameter_name)
            parameter.add_(vector.to(parameter), alpha=weight)


def _changes_as_one(module: Module, shapes: Shapes) -> bool:
    """Whether a module leaves embedding and tied head one matrix."""
    assert shapes.tied is not None
    deltas = module.resolved(shapes)
    embedding, head = (deltas.get(name) for name in shapes.tied)
    return embedding is head or (module.ties_head and embedding is not None)
