"""`mergeroute build`: a build with models, progress bars and a router."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import progress as bars
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..adapters.backbone import locate
from ..adapters.bank import Bank
from ..adapters.blend import Blend
from ..adapters.build import BuildTools, Calibrate, Calibrated, Progress, build
from ..adapters.digest import short
from ..adapters.errors import BlendError, RecipeError, RouterError
from ..adapters.experts import Base, Expert
from ..adapters.kinds import empty_model
from ..adapters.merging.methods import find_method
from ..adapters.recipe import Recipe, RouterSection
from ..routers.base import Query
from ..routers.data import Example, read_examples
from ..routers.policies import Policy
from ..routers.store import (
    PrototypeSettings,
    SignalSettings,
    load_router,
    save_fixed,
    save_prototype,
)
from ..routers.training import Labelled, evaluate, fit_prototype
from ..runtime.expert_statistics import ExpertStatistics, SequentialStatistics
from ..runtime.loading import choose_device, load_tokenizer
from ..runtime.rendering import Rendered, render
from ..runtime.torch_engine import TorchEngine

_COLUMNS = (bars.TextColumn("{task.description:32}"), bars.BarColumn(), bars.MofNCompleteColumn())


def build_bank(
    recipe: Recipe, out: Path, *, force: bool = False, device: str = "auto", console: Console
) -> Bank:
    """Build a bank and show how far it is; see `mergeroute.adapters.build.build`.

    Raises:
        MergerouteError: an input cannot be used; nothing is left behind.
    """
    place = choose_device(device)
    check_router(recipe)
    with progress_bars(console) as stage:
        router = _RouterWriter(recipe, place, stage, console)
        tools = BuildTools(place, stage, calibrator(recipe, place, stage), router.write)
        return build(recipe, out, force=force, tools=tools)


def summary(bank: Bank) -> Table | str:
    """What came out: a row per module."""
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
        RecipeError: there are no modules to choose from, or a setting or task fits none of them.
        DataError: a data file is missing or damaged.
        UnsupportedModelError: the base has no usable tokenizer.
    """
    router = recipe.router
    if router is None:
        return
    if recipe.modules.method == "none":
        raise RecipeError("router chooses among modules, and modules: {method: none} has none")
    try:
        Policy.parse(router.policy)
    except RouterError as error:
        raise RecipeError(f"router.policy: {error}") from error
    if router.scorer == "fixed":
        names = {expert.name for expert in recipe.experts}
        if unknown := set(_blend(router)) - names:
            raise RecipeError(f"router.blend names {min(unknown)!r}, which is no expert")
        return
    _check_prototype(recipe, router)


def _check_prototype(recipe: Recipe, router: RouterSection) -> None:
    _check_tasks(read_examples(Path(router.data or ""), needs=("task",)), recipe)
    if router.none is not None:
        read_examples(Path(router.none))
    path = locate(recipe.base)
    load_tokenizer(path)
    layers = empty_model(path).config.get_text_config().num_hidden_layers
    if router.signal.layer > layers:
        raise RecipeError(
            f"router.signal.layer is {router.signal.layer}, the base has {layers} layers"
        )


def _blend(router: RouterSection) -> Blend:
    try:
        return Blend.parse(router.blend or "")
    except BlendError as error:
        raise RecipeError(f"router.blend: {error}") from error


def _check_tasks(examples: Sequence[Example], recipe: Recipe) -> None:
    """Every module has examples, and every example a module."""
    tasks, names = {example.task for example in examples}, {e.name for e in recipe.experts}
    if missing := names - tasks:
        raise RecipeError(
            f"router.data holds no prompt of {min(missing)!r}: add some with its task"
        )
    for example in examples:
        if example.task not in names:
            raise RecipeError(
                f"{example.where}: task {example.task!r} is no expert; prompts that no module "
                "serves go to router.none"
            )


def _calibrated(
    recipe: Recipe, base: Base, experts: Sequence[Expert], device: torch.device, stage: Progress
) -> Calibrated:
    """Statistics on the recipe's calibration prompts."""
    assert recipe.calibration is not None
    prompts = _calibration_prompts(Path(recipe.calibration), base, experts)
    needs = find_method(recipe.backbone.method).needs
    kind = SequentialStatistics if needs == "sequential" else ExpertStatistics
    runs = {"sequential": 2 * base.blocks, None: 0}.get(needs, 1)
    runs += recipe.modules.fit == "outputs"
    step = stage("calibration", runs * sum(map(len, prompts.values())))
    statistics = kind(base, experts, prompts, device=device, on_prompt=step)
    return Calibrated(statistics if needs else None, statistics.moments_of)


def _calibration_prompts(
    path: Path, base: Base, experts: Sequence[Expert]
) -> dict[str, list[Rendered]]:
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
            save_fixed(folder, _blend(router))
            return
        with TorchEngine.load(backbone, device=str(self.device), dtype="float32") as engine:
            self._fit(router, engine, folder)
            if router.none is not None:
                self._report(Path(router.none), engine, folder)

    def _fit(self, router: RouterSection, engine: TorchEngine, folder: Path) -> None:
        """Fit prototypes on the recipe's prompts."""
        signal = SignalSettings(layer=router.signal.layer, pooling=router.signal.pooling)
        names = tuple(expert.name for expert in self.recipe.experts)
        settings = PrototypeSettings(modules=names, signal=signal, policy=router.policy)
        examples = read_examples(Path(router.data or ""), needs=("task",))
        labelled = [Labelled(_query(engine, example), example.task) for example in examples]
        step = self.stage("router", len(labelled))

        def counted(items: Iterable[Labelled]) -> Iterator[Labelled]:
            for item in items:
                yield item
                step()

        scorer = fit_prototype(labelled, settings, encode=engine.encode, progress=counted)
        save_prototype(folder, scorer, settings)

    def _report(self, path: Path, engine: TorchEngine, folder: Path) -> None:
        """Say how many of the prompts that no module serves the router leaves alone."""
        fitted = load_router(folder, encode=engine.encode)
        generic = [Labelled(_query(engine, e), None) for e in read_examples(path)]
        report = evaluate(fitted, generic)
        self.console.print(f"the router leaves {report.kept:.1%} of {path} to the backbone")


def _query(engine: TorchEngine, example: Example) -> Query:
    prompt = render(engine.tokenizer, example.model_copy(update={"answer": None}))
    return Query(prompt.token_ids, example.prompt)
