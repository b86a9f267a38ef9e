"""What `mergeroute inspect` tells of sparse models: their experts, and how these were merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters.backbone import Backbone
from ..adapters.checkpoint import Checkpoint
from ..adapters.smoe.accounting import plain_cost
from ..adapters.smoe.build import check_recipe
from ..adapters.smoe.layout import FAMILIES, MoeCheckpoint, model_type
from ..adapters.smoe.recipe import MoeRecipe
from ..adapters.smoe.stored import TENSORS, ExpertsReport, read_report
from ..routers.data import read_examples
from .inspect_entries import backbone_entry


def is_sparse(path: Path) -> bool:
    """Whether a checkpoint folder holds a sparse mixture of experts of a family that is known."""
    return model_type(path) in FAMILIES


def checkpoint_document(path: Path) -> dict[str, Any]:
    """A sparse checkpoint, merged or not."""
    moe, report = MoeCheckpoint.open(path), read_report(path)
    return {
        "kind": "checkpoint",
        **backbone_entry(Backbone.open(path), is_causal=moe.family.is_causal),
        **_sizes(moe),
        **({} if report is None else {**_served(moe, report), **merged_entry(report)}),
    }


def recipe_document(path: Path, recipe: MoeRecipe) -> dict[str, Any]:
    """A recipe that merges a sparse model's experts, and the model.

    Raises:
        RecipeError: the model has not what the recipe asks for.
        DataError: the calibration prompts cannot be read.
    """
    moe = MoeCheckpoint.open(recipe.base)
    check_recipe(recipe, moe)
    if recipe.calibration is not None:
        read_examples(Path(recipe.calibration))
    return {
        "kind": "recipe",
        "name": recipe.name,
        "path": str(path),
        **recipe_entry(recipe),
        "base": recipe.base,
        "calibration": recipe.calibration,
        **_sizes(moe),
    }


def recipe_entry(recipe: MoeRecipe) -> dict[str, Any]:
    """How a recipe merges experts; what it does not state is as it is by default."""
    settings = recipe.experts
    merge = settings.model_dump(mode="json", exclude_none=True)
    merge |= {"keep": settings.count, "router": settings.form}
    if settings.method != "reap":
        merge["align"] = "dominant" if settings.is_aligned else "none"
    if not settings.weighs_by_usage:
        del merge["floor"]
    return {"merge": merge, "dtype": recipe.dtype}


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


def _served(moe: MoeCheckpoint, report: ExpertsReport) -> dict[str, Any]:
    """Sizes that are other than those of the plain checkpoint, where more lies beside it."""
    if report.router == "compact":
        return {}
    return {
        "experts_of_a_layer": report.experts,
        "experts_of_a_token": report.top_k,
        "expert_bytes": report.merged.bytes,
        "tensor_bytes": moe.checkpoint.nbytes + Checkpoint.of_file(moe.path / TENSORS).nbytes,
        "expert_flops_of_a_token": report.merged.flops,
    }
