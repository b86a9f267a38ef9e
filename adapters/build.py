"""Build: a recipe into a bank. Nothing is seen at the bank's place before it is whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from .backbone import checkpoint_files, digest_of_files, digest_of_weights, file_digests
from .bank import Bank, BankModule, copy_files, new_bank, seal
from .checkpoint import MODEL_DTYPES, Checkpoint
from .delta import LowRank
from .errors import RecipeError
from .experts import Base, Expert, open_expert, source_digest
from .kinds import Kind
from .lora import Module
from .manifest import RESERVED_NAMES, BackboneEntry
from .merge import Merger, Statistics
from .merging.stack import rows_per_block
from .module_files import module_files
from .recipe import ExpertEntry, Recipe
from .truncation import distance
from .twin import Extracted, Source, extract, matrices, own_factors

MODULE_DTYPES = {**MODEL_DTYPES, "int8": torch.int8}

_NO_BACKBONE = {*RESERVED_NAMES} - {"backbone", "base"}
"""What a backbone cannot be called; two of the reserved names mean it in any case."""

Progress = Callable[[str, int], Callable[[], None]]
"""Told that a stage of so many steps begins; what it returns is called after each step."""


@dataclass(frozen=True)
class Calibrated:
    """What a build needs to run models for. statistics: for the merge, if it looks at data.

    moments: mean of x xᵀ by layer on an expert's prompts, for `modules: {fit: outputs}`.
    """

    statistics: Statistics | None = None
    moments: Callable[[Expert], Mapping[str, Tensor]] = lambda _: {}


Calibrate = Callable[[Base, Sequence[Expert]], Calibrated]
WriteRouter = Callable[[Path, Path], None]
"""The backbone's folder and the folder to write the router to."""


def silent(_stage: str, _total: int) -> Callable[[], None]:
    """Shows nothing."""
    return lambda: None


@dataclass(frozen=True)
class BuildTools:
    """What a build uses of its surroundings.

    calibrate, write_router: run models; without them recipes that need them are refused.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = silent
    calibrate: Calibrate | None = None
    write_router: WriteRouter | None = None


def build(
    recipe: Recipe, out: str | Path, *, force: bool = False, tools: BuildTools = BuildTools()
) -> Bank:
    """Merge a recipe's experts into a backbone, compress what is exclusive to each, and write all
    as a bank. Checkpoints are read a few rows at a time.

    recipe: with absolute paths, as `read_recipe` gives it. force: replace the bank at `out`.

    Raises:
        RecipeError, BackboneError, ModuleError, BankError: an input cannot be used, or `out` is
            taken; nothing is left behind.
    """
    with new_bank(out, force=force) as folder:
        base, experts = open_sources(recipe, progress=tools.progress)
        source_digests = _beside(partial(_source_digests, base, experts))
        calibrated = _calibrated(recipe, base, experts, tools)
        merger = Merger(base, experts, recipe, calibrated.statistics, tools.device)
        check_shared(recipe, merger)
        backbone, weights_digest = _write_backbone(folder / "backbone", merger, tools.progress)
        shared = merger.shared_deltas() if merger.is_factored else None
        if recipe.shared == "module":
            _save_shared(folder, shared or {})
        opened = Checkpoint.open(folder / "backbone")
        source = Source(base, opened, _changed(merger), shared, tools.device)
        backbones = (weights_digest, *_kept_base(base, recipe))
        modules = []
        if recipe.modules.method != "none":
            for entry, expert in zip(recipe.experts, experts, strict=True):
                found = _extracted(expert, source, recipe, calibrated, tools.progress)
                found = replace(found, module=replace(found.module, backbones=backbones))
                modules.append(_save_module(folder, entry, expert, found, recipe))
        if recipe.router is not None:
            _write_router(folder, tools)
        seal(
            folder,
            name=recipe.name,
            backbone=backbone,
            modules=modules,
            recipe=recipe.model_dump(mode="json", exclude_none=True),
            sources=source_digests(),
        )
    return Bank.open(out, verify=False)


def open_sources(recipe: Recipe, *, progress: Progress = silent) -> tuple[Base, list[Expert]]:
    """The base and the experts of a recipe, checked against each other.

    Raises:
        BackboneError, CheckpointError, ModuleError: one is missing, damaged or of another base.
        RecipeError: an expert equals the base, or differs only in what the recipe leaves out.
    """
    base = Base.open(recipe.base)
    step = progress("experts", len(recipe.experts))
    experts = []
    for entry in recipe.experts:
        expert = open_expert(entry.name, entry.path, base)
        _check_differs(expert, base, recipe)
        experts.append(expert)
        step()
    return base, experts


def check_shared(recipe: Recipe, merger: Merger) -> None:
    """Refuse a shared module that would be no module.

    Raises:
        RecipeError: the merged change has full rank, or lies outside the linear layers.
    """
    if recipe.shared != "module":
        return
    method = recipe.backbone.method
    if merger.method.space == "none":
        raise RecipeError("shared: module needs a merge: backbone.method is none")
    if not merger.is_factored:
        raise RecipeError(
            f"shared: module needs a merged change of low rank, {method} over these experts makes "
            "a dense one: use shared: folded, or merge LoRA experts by linear, task_arithmetic or "
            "a spectral method"
        )
    outside = [
        name
        for name, parameter in merger.base.parameters.items()
        if parameter.kind is not Kind.LINEAR and merger.change(name) is not None
    ]
    if outside:
        raise RecipeError(
            f"shared: module keeps linear layers alone, the experts change {outside[0]!r} too: "
            f"use shared: folded, or kinds: {{{merger.base.parameters[outside[0]].kind}: drop}}"
        )


def _check_differs(expert: Expert, base: Base, recipe: Recipe) -> None:
    """Refuse an expert that neither backbone nor module would learn of."""
    used = {name: _is_used(p.kind, recipe) for name, p in base.parameters.items()}
    if any(is_used and _differs(expert, base, name) for name, is_used in used.items()):
        return
    left_out = (name for name, is_used in used.items() if not is_used)
    if (name := next((n for n in left_out if _differs(expert, base, n)), None)) is None:
        raise RecipeError(
            f"expert {expert.name!r} equals the base: every delta is zero. Is {expert.path} the "
            "right folder?"
        )
    raise RecipeError(
        f"expert {expert.name!r} differs from the base only in what this recipe leaves out, as "
        f"{name!r} of kind {base.parameters[name].kind}: keep that kind under kinds, or by a "
        "merge, or leave the expert out"
    )


def _is_used(kind: Kind, recipe: Recipe) -> bool:
    """Whether the merge takes a kind, or modules keep it."""
    if kind in (Kind.LINEAR, Kind.BUFFER):
        return kind is Kind.LINEAR
    setting = recipe.kinds.model_dump().get(kind, "shared")
    return bool(setting != "drop" and (setting != "shared" or recipe.backbone.method != "none"))


def _differs(expert: Expert, base: Base, name: str) -> bool:
    """Whether a parameter differs; stops at the first block of rows that does."""
    info = base.checkpoint.tensors[name]
    if not expert.changes(name) or not info.dtype.is_floating_point:
        return False
    rows = rows_per_block(info.columns)
    for start in range(0, info.rows, rows):
        stop = min(start + rows, info.rows)
        ours = base.checkpoint.read_rows(name, start, stop).float()
        if expert.delta_rows(name, start, stop, ours).any():
            return True
    return False


def _changed(merger: Merger) -> frozenset[str]:
    """The parameters that the merge may have changed."""
    if merger.method.space == "none":
        return frozenset()
    return frozenset(n for n in merger.names if any(e.changes(n) for e in merger.experts))


def _calibrated(
    recipe: Recipe, base: Base, experts: Sequence[Expert], tools: BuildTools
) -> Calibrated:
    if recipe.calibration is None:
        return Calibrated()
    if tools.calibrate is None:
        raise RecipeError("this recipe looks at calibration prompts: build it by mergeroute build")
    return tools.calibrate(base, experts)


def _write_backbone(folder: Path, merger: Merger, progress: Progress) -> tuple[BackboneEntry, str]:
    """Write the backbone and the base's other files; its entry in the manifest, and the digest of
    its weights.
    """
    others = [f for f in checkpoint_files(merger.base.path) if not is_weights(f)]
    copy_files(others, folder)
    step = progress(f"backbone by {merger.recipe.backbone.method}", len(merger.names))
    merger.write_backbone(folder, on_parameter=step)
    if merger.recipe.dtype is not None:
        _state_dtype(folder / "config.json", merger.recipe.dtype)
    files = file_digests(checkpoint_files(folder))
    name, digest = _backbone_name(merger.recipe), digest_of_files(files)
    return BackboneEntry(name=name, folder="backbone", digest=digest), digest_of_weights(files)


def _kept_base(base: Base, recipe: Recipe) -> tuple[str, ...]:
    """The digest of the base's weights where the backbone is the base, written anew: modules stand
    on either.
    """
    is_kept = recipe.backbone.method == "none" or recipe.shared == "module"
    return (base.weights_digest,) if is_kept else ()


def _state_dtype(config: Path, dtype: str) -> None:
    """Say in a configuration what the weights are stored in: transformers loads them so."""
    document = json.loads(config.read_text("utf-8"))
    document.pop("torch_dtype", None)
    config.write_text(json.dumps({**document, "dtype": dtype}, indent=2) + "\n", "utf-8")


def _backbone_name(recipe: Recipe) -> str:
    """The base's name when it is kept, else the bank's with `-backbone`.

    Requests know bank, backbone and modules by name. The user has no say in this one, so that a
    reserved name gets `-backbone` too, a taken one a number, and characters that names may not hold
    become `-`.
    """
    taken = {recipe.name}
    if recipe.modules.method != "none":
        taken |= {expert.name for expert in recipe.experts}
    name = f"{recipe.name}-backbone"
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(recipe.base).name).strip("._-")
    if recipe.backbone.method == "none" and base:
        name = f"{base}-backbone" if base in _NO_BACKBONE else base
    suffixes = ("", *(f"-{k}" for k in range(2, len(taken) + 3)))
    return next(n for suffix in suffixes if (n := name[: 64 - len(suffix)] + suffix) not in taken)


def is_weights(file: Path) -> bool:
    """Whether a file of a checkpoint holds its tensors, or says which of them does."""
    return file.suffix == ".safetensors" or file.name.endswith(".safetensors.index.json")


def _extracted(
    expert: Expert, source: Source, recipe: Recipe, calibrated: Calibrated, progress: Progress
) -> Extracted:
    if recipe.modules.method == "lora":
        return own_factors(expert, recipe.kinds)
    moments = calibrated.moments(expert) if recipe.modules.fit == "outputs" else None
    total = len(matrices(expert, source, recipe.kinds))
    step = progress(f"module {expert.name}", total)
    return extract(expert, source, recipe, moments=moments, on_layer=step)


def _save_module(
    folder: Path, entry: ExpertEntry, expert: Expert, found: Extracted, recipe: Recipe
) -> BankModule:
    """Write a module and what was lost on the way to it."""
    path = folder / "modules" / entry.name
    found.module.save(path, base=recipe.base, dtype=MODULE_DTYPES[recipe.modules.dtype])
    return BankModule(
        name=entry.name,
        path=path,
        description=entry.description,
        samples=entry.samples,
        provenance=_provenance(path, expert, found, recipe),
    )


def _provenance(path: Path, expert: Expert, found: Extracted, recipe: Recipe) -> dict[str, Any]:
    written = Module.read(path, name=expert.name)
    rounding = sum(
        distance(delta, written.deltas[layer]) ** 2 for layer, delta in found.module.deltas.items()
    )
    norm = sum(delta.norm() ** 2 for delta in found.module.deltas.values())
    ranks = [delta.rank for delta in found.module.deltas.values()]
    report = {
        "method": recipe.modules.method,
        "dtype": recipe.modules.dtype,
        "expert": str(expert.path),
        "ranks": [min(ranks, default=0), max(ranks, default=0)],
        "bytes": sum(file.stat().st_size for file in module_files(path)[1:]),
        "error": found.error,
        "rounding_error": (rounding / norm) ** 0.5 if norm else 0.0,
    }
    if found.compressor_error is not None:
        report["compressor_error"] = found.compressor_error
    return report


def _write_router(folder: Path, tools: BuildTools) -> None:
    if tools.write_router is None:
        raise RecipeError("this recipe fits a router: build it by mergeroute build")
    (folder / "router").mkdir()
    tools.write_router(folder / "backbone", folder / "router")


def _save_shared(folder: Path, deltas: Mapping[str, LowRank]) -> None:
    kept = {layer: delta for layer, delta in deltas.items() if delta.norm() > 0}
    if not kept:
        raise RecipeError("shared: module would change nothing: the merged change is zero")
    Module("shared", kept).save(folder / "shared", dtype=torch.float32)


def _beside(work: Callable[[], dict[str, str]]) -> Callable[[], dict[str, str]]:
    """Begin some work that leaves the interpreter to others, as hashing does; what is returned
    waits for its result. It ends with the process, should nobody wait.
    """
    future: Future[dict[str, str]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # whatever it is, who waits must hear of it
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future.result


def _source_digests(base: Base, experts: Sequence[Expert]) -> dict[str, str]:
    return {"base": source_digest(base)} | {e.name: source_digest(e) for e in experts}
