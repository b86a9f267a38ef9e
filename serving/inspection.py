"""What `mergeroute inspect` tells of a recipe, a bank, a checkpoint or a LoRA folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.backbone import Backbone
from ..adapters.bank import Bank, BankModule
from ..adapters.build import Progress, open_sources
from ..adapters.errors import MergerouteError
from ..adapters.experts import Base
from ..adapters.lora import CONFIG_FILE, Module
from ..adapters.manifest import MANIFEST
from ..adapters.module_check import check_layer, check_vector
from ..adapters.module_files import module_files
from ..adapters.recipe import ModuleSettings, Recipe
from ..adapters.recipe_file import read_any_recipe
from ..adapters.shapes import Shapes
from ..adapters.smoe.recipe import MoeRecipe
from ..adapters.smoe.stored import read_report
from ..adapters.survey import Survey, Surveyed, survey_experts, survey_modules, surveyed_names
from .inspect_entries import (
    backbone_entry,
    block_of,
    comparison,
    coverage_entry,
    disk_bytes,
    expert_entry,
    parameter_entry,
    sizes,
    spread,
)
from .inspection_moe import (
    checkpoint_document,
    is_sparse,
    merged_entry,
    recipe_document,
    recipe_entry,
)
from .variants import recorded_moe

_RECIPE_SUFFIXES = (".yaml", ".yml")


class InspectError(MergerouteError):
    """The path is nothing that can be told about."""


@dataclass(frozen=True)
class Inspection:
    """What was found. document: JSON. survey: of what has deltas."""

    document: dict[str, Any]
    survey: Survey | None = None


def inspect_path(
    path: Path, *, progress: Progress = lambda _stage, _total: lambda: None
) -> Inspection:
    """Read a recipe's sources, a bank, a checkpoint or a LoRA folder. Nothing is built or run.

    Raises:
        MergerouteError: the path is none of them, or something there is missing or damaged.
    """
    if path.is_file() and path.suffix.lower() in _RECIPE_SUFFIXES:
        return _inspect_recipe(path, progress)
    if not path.is_dir():
        raise InspectError(
            f"{path} is neither a folder nor a recipe (*.yaml)"
            if path.exists()
            else f"there is no {path}"
        )
    if (path / MANIFEST).is_file():
        return _inspect_bank(path, progress)
    if (path / CONFIG_FILE).is_file():
        return _inspect_module(path)
    if (path / "config.json").is_file():
        return _inspect_checkpoint(path, progress)
    raise InspectError(
        f"{path} holds none of {MANIFEST} (bank), {CONFIG_FILE} (LoRA) and config.json (checkpoint)"
    )


def _inspect_recipe(path: Path, progress: Progress) -> Inspection:
    recipe = read_any_recipe(path)
    if isinstance(recipe, MoeRecipe):
        return Inspection(recipe_document(path, recipe))
    base, experts = open_sources(recipe, progress=progress)
    step = progress("comparing", len(surveyed_names(base)))
    survey = survey_experts(base, experts, on_parameter=step)
    rank = None if recipe.modules.method in ("lora", "none") else recipe.modules.fixed_rank
    document = {
        "kind": "recipe",
        "name": recipe.name,
        "path": str(path),
        "merge": _merge(recipe),
        "modules_settings": _settings(recipe.modules.model_dump(mode="json", exclude_none=True)),
        "rank": rank,
        "base": recipe.base,
        **sizes(base),
        "experts": [expert_entry(expert, survey, rank) for expert in experts],
        "parameters": [parameter_entry(survey, parameter) for parameter in survey.parameters],
        **comparison(survey, rank),
    }
    return Inspection(document, survey)


def _inspect_bank(path: Path, progress: Progress) -> Inspection:
    step = progress("verifying", 1)
    bank = Bank.open(path)
    step()
    step = progress("modules", len(bank.modules))
    loaded, rows = [], []
    weights = disk_bytes(bank.backbone.path.glob("*.safetensors"))
    for entry in bank.modules:
        loaded.append(bank.load(entry))
        rows.append(_bank_module(bank, entry, loaded[-1], weights))
        step()
    survey = survey_modules(loaded, bank.backbone.layers)
    shared, recipe, moe = bank.shared, bank.recipe or {}, recorded_moe(bank)
    report = read_report(bank.backbone.path)
    document = {
        "kind": "bank",
        "name": bank.name,
        "digest": bank.digest,
        "router": bank.router_path is not None,
        **{f"backbone_{key}": value for key, value in backbone_entry(bank.backbone).items()},
        **({"merge": recipe.get("backbone")} if moe is None else recipe_entry(moe)),
        "modules_settings": _settings(recipe.get("modules", {})),
        "shared": shared and _bank_module(bank, shared, bank.load(shared), weights),
        "modules": rows,
        **comparison(survey, None),
        **({} if report is None else merged_entry(report)),
    }
    return Inspection(document, survey)


def _inspect_checkpoint(path: Path, progress: Progress) -> Inspection:
    step = progress("reading", 1)
    if is_sparse(path):
        document = checkpoint_document(path)
        step()
        return Inspection(document)
    base = Base.open(path)
    backbone = backbone_entry(Backbone.open(path))
    step()
    return Inspection({"kind": "checkpoint", **backbone, **sizes(base)})


def _inspect_module(path: Path) -> Inspection:
    """A LoRA folder without its backbone: its own shapes are all there is to check against."""
    module = Module.read(path, name=path.resolve().name)
    shapes = Shapes(
        linear={layer: delta.shape for layer, delta in module.deltas.items()},
        vectors={name: vector.numel() for name, vector in module.vectors.items()},
    )
    for layer, delta in module.deltas.items():
        check_layer(module.name, layer, delta, shapes)
    for name, vector in module.vectors.items():
        check_vector(module.name, name, vector, shapes)
    survey = survey_modules([module], module.deltas)
    energy = sum(float(layer.inner) for layer in survey.parameters)
    document = {
        "kind": "LoRA",
        "name": module.name,
        **coverage_entry(module.coverage(shapes)),
        "bytes": disk_bytes(module_files(path)[1:]),
        "digest": module.digest,
        "layers": [_lora_layer(module, layer, energy) for layer in survey.parameters],
    }
    return Inspection(document, survey)


def _lora_layer(module: Module, layer: Surveyed, total: float) -> dict[str, Any]:
    """total: the module's energy over all its layers, of which the layer has a share."""
    return {
        "layer": layer.name,
        "block": block_of(layer.name),
        "shape": list(layer.shape),
        "rank": module.deltas[layer.name].rank,
        "effect": module.deltas[layer.name].norm(),
        "share": float(layer.inner) / total if total else 0.0,
        **spread(layer.spectra.get(module.name), None),
    }


def _merge(recipe: Recipe) -> dict[str, Any]:
    """The method with all its parameters."""
    stated = recipe.backbone.model_dump(mode="json", exclude_none=True)
    return {**stated, **recipe.backbone.parameters}


def _settings(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Method and dtype of the modules, and whatever is not as usual."""
    usual = {key: field.default for key, field in ModuleSettings.model_fields.items()}
    always = ("method", "dtype")
    return {k: value for k, value in stated.items() if k in always or value != usual.get(k)}


def _bank_module(
    bank: Bank, entry: BankModule, module: Module, backbone_bytes: int
) -> dict[str, Any]:
    size = disk_bytes(module_files(entry.path)[1:])
    error = entry.provenance.get("error")
    return {
        "name": entry.name,
        "description": entry.description,
        **coverage_entry(module.coverage(bank.backbone.shapes)),
        "bytes": size,
        "percent_of_backbone": 100 * size / backbone_bytes,
        "energy_kept": None if error is None else max(0.0, 1 - error**2),
        "provenance": entry.provenance,
        "digest": module.digest,
    }
