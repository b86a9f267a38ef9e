"""A tiny base with experts of it on disk, full ones and LoRAs, and the weights each stands for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergeroute.adapters.bank import Bank
from mergeroute.adapters.blend import Blend
from mergeroute.adapters.lora import Module
from mergeroute.adapters.recipe import Recipe
from mergeroute.runtime.loading import load_model
from mergeroute.runtime.merging import merge_into

from .tiny import make_model, make_module, make_tokenizer

Weights = Mapping[str, Tensor]
"""Parameters by name; a tied head is the embedding."""


@dataclass(frozen=True)
class Zoo:
    """A base and its experts: a and b are full checkpoints, c and d LoRAs of some layers each."""

    folder: Path
    base: Weights
    experts: Mapping[str, Weights]

    def recipe(self, names: str = "ab", **keys: Any) -> Recipe:
        """A recipe over experts named by letters; weights 1 unless `weights` is given."""
        weights = keys.pop("weights", [1.0] * len(names))
        experts = [
            {"name": name, "path": str(self.folder / name), "weight": weight}
            for name, weight in zip(names, weights, strict=True)
        ]
        document = {"name": "zoo", "base": str(self.folder / "base"), "experts": experts}
        return Recipe.model_validate({**document, **keys})


def make_zoo(folder: Path, model: Any) -> Zoo:
    """Write a base and four experts of it. The first layer belongs to no LoRA, some to one."""
    write_model(folder / "base", model)
    experts = {}
    for seed, name in enumerate("ab"):
        expert = changed(model, seed=seed)
        write_model(folder / name, expert)
        experts[name] = weights_of(expert)
    for seed, name in enumerate("cd"):
        module = make_module(model, name, rank=3, seed=seed, scale=0.2)
        layers = [layer for k, layer in enumerate(module.deltas) if (k + seed) % 3]
        module = Module(name, {layer: module.deltas[layer] for layer in layers})
        module.save(folder / name)
        expert = copy.deepcopy(model)
        merge_into(expert, {name: module}, Blend({name: 1.0}))
        experts[name] = weights_of(expert)
    return Zoo(folder, weights_of(model), experts)


def changed(model: Any, *, seed: int, scale: float = 0.2) -> Any:
    """A copy of a model with every parameter changed at random."""
    generator = torch.Generator().manual_seed(seed * 613 + 11)
    expert = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in expert.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * scale * parameter.std(correction=0).clamp_min(0.1))
    return expert


def write_model(folder: Path, model: Any) -> None:
    """A checkpoint with a byte tokenizer."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def weights_of(model: Any) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def wide_model(name: str) -> Any:
    """A model with matrices of more than one block of rows, whatever their orientation."""
    sizes: dict[str, dict[str, Any]] = {"gpt2": {"n_inner": 4200, "vocab_size": 4500, "n_layer": 2}}
    other: dict[str, Any] = {"intermediate_size": 4200, "vocab_size": 4500, "num_hidden_layers": 2}
    return make_model(name, **sizes.get(name, other))


EVERYTHING: dict[str, dict[str, Any]] = {
    "modules": {"rank": 4096, "dtype": "float32"},
    "kinds": {"embedding": "svd", "head": "svd", "norm": "exact", "bias": "exact"},
}
"""Keys of a recipe that keeps all that is exclusive to an expert."""


def blended(bank: Bank, blend: Blend) -> dict[str, Tensor]:
    """The weights that a bank stands for at a blend, its shared module among it."""
    model = load_model(bank.backbone.path, device=torch.device("cpu"), dtype=torch.float32)
    modules = {entry.name: bank.load(entry) for entry in bank.modules}
    if bank.shared is not None:
        modules["shared"] = bank.load(bank.shared)
        blend = Blend({**blend, "shared": 1.0})
    merge_into(model, modules, blend)
    return weights_of(model)
