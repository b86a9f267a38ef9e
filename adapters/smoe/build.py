"""Build: a recipe for a sparse model's experts into a bank whose backbone has fewer of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..backbone import checkpoint_files, digest_of_files, file_digests
from ..bank import Bank, new_bank, seal
from ..build import Progress, silent
from ..errors import RecipeError
from ..kinds import empty_model
from ..manifest import BackboneEntry
from .layers import LayerMerger, planned_counts
from .layout import MoeCheckpoint
from .recipe import MoeRecipe
from .stored import read_report
from .usage import Usage
from .writing import write_backbone

CollectUsage = Callable[[MoeCheckpoint], Usage]
"""Runs the model on the recipe's calibration prompts."""


@dataclass(frozen=True)
class MoeTools:
    """What a build uses of its surroundings. collect: runs the model; without it recipes that look
    at prompts are refused.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = silent
    collect: CollectUsage | None = None


def build_moe(
    recipe: MoeRecipe, out: str | Path, *, force: bool = False, tools: MoeTools = MoeTools()
) -> Bank:
    """Merge a sparse model's experts, or leave some out, and write the result as a bank.

    One layer is in memory at a time, in float32, and the residuals of all as they are stored;
    attention, shared experts and everything else are copied as they are.

    recipe: with absolute paths, as `read_recipe` gives it. force: replace the bank at `out`.

    Raises:
        RecipeError, BackboneError, BankError: an input cannot be used, or `out` is taken; nothing
            is left behind.
    """
    with new_bank(out, force=force) as folder:
        moe = MoeCheckpoint.open(recipe.base)
        check_recipe(recipe, moe)
        usage = _usage(recipe, moe, tools)
        counts = planned_counts(recipe.experts, moe, usage)
        write_backbone(
            folder / "backbone",
            LayerMerger(recipe, min(counts), moe, tools.device),
            counts,
            usage,
            progress=tools.progress,
        )
        digest = digest_of_files(file_digests(checkpoint_files(folder / "backbone")))
        seal(
            folder,
            name=recipe.name,
            backbone=BackboneEntry(
                name=f"{recipe.name[:55]}-backbone", folder="backbone", digest=digest
            ),
            modules=[],
            recipe=recipe.model_dump(mode="json", exclude_none=True),
            sources={"base": digest_of_files(file_digests(checkpoint_files(moe.path)))},
        )
    return Bank.open(out, verify=False)


def check_recipe(recipe: MoeRecipe, moe: MoeCheckpoint) -> None:
    """Refuse a recipe that its base does not fit.

    Raises:
        BackboneError: the base is no causal language model, as a bank's backbone is.
        RecipeError: it has too few experts or sparse layers, or merged ones; it says which.
    """
    empty_model(moe.path)
    settings = recipe.experts
    report = read_report(moe.path)
    if report is not None and report.router != "compact":
        raise RecipeError(
            f"{moe.path} has merged experts and the router of the experts they were merged of: "
            "merge the model that it came from"
        )
    if moe.experts == 1:
        raise RecipeError(
            f"the layers of {moe.path} have one expert each: there is nothing to merge"
        )
    if settings.count >= moe.experts:
        raise RecipeError(
            f"experts.keep is {settings.count}, the layers of {moe.path} have {moe.experts} "
            f"experts: keep 1 to {moe.experts - 1}"
        )
    if beyond := [layer for layer in settings.skip_layers if not 0 <= layer < len(moe.layers)]:
        raise RecipeError(
            f"experts.skip_layers names {beyond[0]}, the model has the sparse layers 0 to "
            f"{len(moe.layers) - 1}"
        )
    if len(set(settings.skip_layers)) == len(moe.layers):
        raise RecipeError("experts.skip_layers names every sparse layer: nothing would be merged")


def _usage(recipe: MoeRecipe, moe: MoeCheckpoint, tools: MoeTools) -> Usage:
    """How the model routes the calibration prompts; empty without any.

    Raises:
        RecipeError: there is nothing here that could run it.
    """
    if recipe.calibration is None:
        return {}
    if tools.collect is None:
        raise RecipeError("this recipe looks at calibration prompts: build it by mergeroute build")
    return tools.collect(moe)
