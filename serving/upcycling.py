"""`mergeroute smoe upcycle`: dense experts of one base into a sparse mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from torch import Tensor

from ..adapters.build import BuildTools, Progress
from ..adapters.errors import RecipeError
from ..adapters.merge import Merger
from ..adapters.recipe import Recipe
from ..adapters.smoe.upcycling import upcycle
from ..runtime.gate_fitting import fitted_gates
from ..runtime.loading import choose_device
from .building import calibration_prompts, progress_bars


def upcycle_recipe(
    recipe: Recipe,
    out: Path,
    *,
    top_k: int,
    force: bool = False,
    device: str = "auto",
    console: Console,
) -> Path:
    """Write the mixture of a recipe's experts and show how far it is. Its gates are fitted on the
    recipe's calibration prompts; see `mergeroute.adapters.smoe.upcycling.upcycle`.

    Raises:
        MergerouteError: an input cannot be used; nothing is left behind.
    """
    place = choose_device(device)
    if recipe.calibration is None:
        raise RecipeError(
            "gates are fitted on prompts: give calibration, a JSON lines file of prompts with the "
            "name of their expert as task"
        )
    with progress_bars(console) as stage:
        tools = BuildTools(place, stage)

        def gates(merger: Merger) -> Mapping[int, Tensor]:
            return _fitted(merger, stage)

        return upcycle(recipe, out, gates=gates, top_k=top_k, force=force, tools=tools)


def _fitted(merger: Merger, stage: Progress) -> dict[int, Tensor]:
    assert merger.recipe.calibration is not None
    path = Path(merger.recipe.calibration)
    prompts = calibration_prompts(path, merger.base, merger.experts)
    step = stage("gates", sum(map(len, prompts.values())))
    return fitted_gates(merger, prompts, on_prompt=step)
