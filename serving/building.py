"""`mergeroute build`: a build with models, progress bars and a router."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from rich import progress as bars
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..adapters.backbone import Backbone, locate
from ..adapters.bank import Bank
from ..adapters.blend import Blend
from ..adapters.build import BuildTools, Calibrate, Calibrated, Progress, build
from ..adapters.digest import short
from ..adapters.errors import BlendError, RecipeError, RouterError
from ..adapters.experts import Base, Expert
from ..adapters.kinds import empty_model
from ..adapters.merging.methods import find_method
from ..adapters.recipe import Recipe, RouterSection
from ..adapters.smoe.recipe import MoeRecipe
from ..adapters.smoe.stored import read_report
from ..routers.data import Example, read_examples
from ..routers.policies import Policy
from ..routers.settings import FixedSettings, SignalSettings, TokenSettings
from ..routers.store import save_router
from ..routers.token_routing import TokenRouting
from ..runtime.expert_statistics import ExpertStatistics, SequentialStatistics
from ..runtime.loading import choose_device, load_tokenizer
from ..runtime.rendering import Rendered, render
from ..runtime.torch_engine import TorchEngine
from .building_moe import build_moe_bank, experts_table
from .fitting import FittedRouter, fit_router, labelled, read_prompts
from .router_options import FitOptions, ScorerName
from .router_report import fit_lines

_COLUMNS = (bars.TextColumn("{task.description:32}"), bars.BarColumn(), bars.MofNCompleteColumn())


def build_bank(
    recipe: Recipe | MoeRecipe,
    out: Path,
    *,
    force: bool = False,
    device: str = "auto",
    console: Console,
) -> Bank:
    """Build a bank and show how far it is; see `mergeroute.adapters.build.build`, and
    `mergeroute.adapters.smoe.build.build_moe` for a sparse model's experts.

    Raises:
        MergerouteError: an input cannot be used; nothing is left behind.
    """
    place = choose_device(device)
    if isinstance(recipe, MoeRecipe):
        with progress_bars(console) as stage:
            return build_moe_bank(recipe, out, force=force, device=place, stage=stage)
    check_router(recipe)
    with progress_bars(console) as stage:
        router = _RouterWriter(recipe, place, stage, console)
        tools = BuildTools(place, stage, calibrator(recipe, place, stage), router.write)
        return build(recipe, out, force=force, tools=tools)


def summary(bank: Bank) -> Table | str:
    """What came out: a row per module, or per layer of merged experts."""
    if merged := read_report(bank.backbone.path):
        return experts_table(bank, merged)
    weights = sum(file.stat().st_size for file in bank.backbone.path.glob("*.safetensors"))
    title = f"bank {escape(bank.name)} {short(bank.digest)}, backbone {weights / 1e6:,.1f} MB"
    if not bank.modules:
        return f"{title}, no modules"
    table = Table(title=title)
    for column in ("module", "ranks", "MB", "% of backbone", "error", "rounding error"):
        table.add_column(column, justify="left" if column == "module" else "right")
    for module in bank.modules:
        report = module.provenance
        low, high = report["ranks"]
        table.add_row(
            escape(module.name),
            str(high) if low == high else f"{low} to {high}",
            f"{report['bytes'] / 1e6:,.2f}",
            f"{100 * report['bytes'] / weights:.1f}",
            f"{report['error']:.3f}",
            f"{report['rounding_error']:.3f}",
        )
    if bank.shared is not None:
        size = sum(file.stat().st_size for file in bank.shared.path.glob("*.safetensors"))
        share = f"{100 * size / weights:.1f}"
        table.add_row("shared, always on", "", f"{size / 1e6:,.2f}", share, "", "")
    return table


def calibrator(recipe: Recipe, device: torch.device, stage: Progress) -> Calibrate:
    """What runs the experts on a recipe's calibration prompts when a build needs it."""
    return lambda base, experts: _calibrated(recipe, base, experts, device, stage)


@contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    """A bar per stage, on a terminal."""
    columns = (*_COLUMNS, bars.TimeElapsedColumn())
    is_hidden = not console.is_terminal
    with bars.Progress(*columns, console=console, disable=is_hidden) as progress:

        def stage(name: str, total: int) -> Callable[[], None]:
            bar = progress.add_task(name, total=total)
            return lambda: progress.advance(bar)

        yield stage


def check_router(recipe: Recipe) -> None:
    """Refuse what the router would stumble over once everything else is built.

    Raises:
        RecipeError: there are no modules to choose from, or a setting fits none of them.
        DataError: a data file is missing or damaged, or its tasks are not the experts.
        UnsupportedModelError: the base has no usable tokenizer.
    """
    router = recipe.router
    if router is None:
        return
    if recipe.modules.method == "none":
        raise RecipeError("router chooses among modules, and modules: {method: none} has none")
    if router.is_fitted:
        _check_fitted(recipe, router)
    elif router.scorer == "fixed":
        names = {expert.name for expert in recipe.experts}
        if unknown := set(_blend(router)) - names:
            raise RecipeError(f"router.blend names {min(unknown)!r}, which is no expert")
    else:
        _check_token_routing(router)


def _check_fitted(recipe: Recipe, router: RouterSection) -> None:
    try:
        Policy.parse(router.policy)
    except RouterError as error:
        raise RecipeError(f"router.policy: {error}") from error
    _prompts(recipe)
    path = locate(recipe.base)
    load_tokenizer(path)
    layers = empty_model(path).config.get_text_config().num_hidden_layers
    if (highest := max(router.signal.layers, default=0)) > layers:
        raise RecipeError(f"router.signal.layer is {highest}, the base has {layers} layers")


def _check_token_routing(router: RouterSection) -> None:
    try:
        TokenRouting.parse({**(router.settings or {}), "method": router.scorer})
    except RouterError as error:
        raise RecipeError(f"router.settings: {error}") from error


def _prompts(recipe: Recipe) -> list[tuple[Example, str | None]]:
    """What the router is fitted on."""
    assert recipe.router is not None
    names = [expert.name for expert in recipe.experts]
    none = recipe.router.none
    return read_prompts(
        Path(recipe.router.data or ""),
        None if none is None else Path(none),
        {name: name for name in names}.get,
        modules=names,
    )


def _blend(router: RouterSection) -> Blend:
    try:
        return Blend.parse(router.blend or "")
    except BlendError as error:
        raise RecipeError(f"router.blend: {error}") from error


def _calibrated(
    recipe: Recipe, base: Base, experts: Sequence[Expert], device: torch.device, stage: Progress
) -> Calibrated:
    """Statistics on the recipe's calibration prompts."""
    assert recipe.calibration is not None
    prompts = calibration_prompts(Path(recipe.calibration), base, experts)
    needs = find_method(recipe.backbone.method).needs
    kind = SequentialStatistics if needs == "sequential" else ExpertStatistics
    runs = {"sequential": 2 * base.blocks, None: 0}.get(needs, 1)
    runs += recipe.modules.fit == "outputs"
    step = stage("calibration", runs * sum(map(len, prompts.values())))
    statistics = kind(base, experts, prompts, device=device, on_prompt=step)
    return Calibrated(statistics if needs else None, statistics.moments_of)


def calibration_prompts(
    path: Path, base: Base, experts: Sequence[Expert]
) -> dict[str, list[Rendered]]:
    """The prompts of every expert, by its name, with their answers.

    Raises:
        DataError, RecipeError: they cannot be read, or an expert has none.
    """
    tokenizer = load_tokenizer(base.path)
    prompts: dict[str, list[Rendered]] = {expert.name: [] for expert in experts}
    for example in read_examples(path, needs=("task",)):
        if example.task in prompts:
            prompts[example.task].append(render(tokenizer, example))
    for name, own in prompts.items():
        if not own:
            raise RecipeError(f"{path} holds no prompt of expert {name!r}: add some with its task")
    return prompts


@dataclass(frozen=True)
class _RouterWriter:
    """Fits a recipe's router once the backbone is there."""

    recipe: Recipe
    device: torch.device
    stage: Progress
    console: Console

    def write(self, backbone: Path, folder: Path) -> None:
        """Write the router of a finished backbone to a folder."""
        router = self.recipe.router
        assert router is not None
        if router.scorer == "fixed":
            save_router(folder, FixedSettings(blend=_blend(router).weights_text))
        elif router.is_fitted:
            self._fit(router, backbone).write(folder)
        else:
            settings = router.settings or {}
            save_router(folder, TokenSettings(scorer=router.scorer, settings=settings))

    def _fit(self, router: RouterSection, backbone: Path) -> FittedRouter:
        """Fit it on the recipe's prompts, and say what a fifth of them told."""
        signal = SignalSettings.model_validate(router.signal.model_dump())
        options = FitOptions(cast(ScorerName, router.scorer), policy=router.policy)
        with TorchEngine.load(backbone, device=str(self.device), dtype="float32") as engine:
            fitted = fit_router(
                options.with_signal(signal, layers=engine.layers),
                labelled(engine.tokenizer, _prompts(self.recipe)),
                modules={expert.name: expert.description for expert in self.recipe.experts},
                encode=engine.encode,
                backbone=Backbone.open(backbone).digest,
                progress=self.stage,
            )
        for line in fit_lines(fitted):
            self.console.print(escape(line), soft_wrap=True)
        return fitted
