"""What `mergeroute inspect` tells of sparse models: their experts, and how these were merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters.backbone import Backbone
from ..adapters.smoe.accounting import plain_cost
from ..adapters.smoe.layout import FAMILIES, MoeCheckpoint, model_type
from ..adapters.smoe.recipe import MoeRecipe
from ..adapters.smoe.stored import ExpertsReport, read_report
from .inspect_entries import backbone_entry


def is_sparse(path: Path) -> bool:
    """Whether a checkpoint folder holds a sparse mixture of experts of a family that is known."""
    return model_type(path) in FAMILIES


def checkpoint_document(path: Path) -> dict[str, Any]:
    """A sparse checkpoint, merged or not."""
    report = read_report(path)
    return {
        "kind": "checkpoint",
        **backbone_entry(Backbone.open(path)),
        **_sizes(MoeCheckpoint.open(path)),
        **({} if report is None else merged_entry(report)),
    }


def recipe_document(path: Path, recipe: MoeRecipe) -> dict[str, Any]:
    """A recipe that merges a sparse model's experts, and the model."""
    moe = MoeCheckpoint.open(recipe.base)
    return {
        "kind": "recipe",
        "name": recipe.name,
        "path": str(path),
        "merge": recipe.experts.model_dump(mode="json", exclude_none=True, exclude_defaults=True),
        "base": recipe.base,
        "calibration": recipe.calibration,
        **_sizes(moe),
    }


def merged_entry(report: ExpertsReport) -> dict[str, Any]:
    """How experts were merged, all in all and layer by layer."""
    document = report.model_dump(mode="json", exclude={"format", "version", "layers"})
    layers = [
        {**layer.model_dump(mode="json"), "unused": list(layer.unused)} for layer in report.layers
    ]
    return {"merged_experts": document, "sparse_layers": layers}


def _sizes(moe: MoeCheckpoint) -> dict[str, Any]:
    cost = plain_cost(moe)
    return {
        "model_type": moe.config["model_type"],
        "experts_of_a_layer": moe.experts,
        "experts_of_a_token": moe.top_k,
        "layers_with_experts": len(moe.layers),
        "neurons_of_an_expert": moe.layers[0].width,
        "expert_bytes": cost.bytes,
        "tensor_bytes": moe.checkpoint.nbytes,
        "expert_flops_of_a_token": cost.flops,
    }
