"""Experts: what a build merges. Each tells how it changes a parameter of the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .backbone import local_folder, locate
from .checkpoint import Checkpoint
from .delta import LowRank
from .errors import BackboneError, CheckpointError
from .kinds import Kind, Parameter, classify, empty_model
from .lora import CONFIG_FILE, Module
from .shapes import Shapes

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")


class Expert(Protocol):
    """A model of the base's shape, seen as its differences from the base."""

    @property
    def name(self) -> str:
        """What the recipe calls it."""

    @property
    def path(self) -> Path:
        """Where it is."""

    def changes(self, parameter: str) -> bool:
        """Whether it may differ from the base there; False: the delta is zero."""

    def delta_rows(self, parameter: str, start: int, stop: int, base: Tensor) -> Tensor:
        """Rows of its delta in the stored orientation, [b, i], float32. base: the same rows."""


@dataclass(frozen=True)
class Base:
    """The common ancestor: its tensors, and what each of them is."""

    path: Path
    checkpoint: Checkpoint
    parameters: Mapping[str, Parameter]
    config: Mapping[str, object]
    shapes: Shapes

    @classmethod
    def open(cls, source: str | Path) -> Base:
        """Open a checkpoint folder or hub id.

        Raises:
            BackboneError: it is no causal language model, quantised, or its files are damaged.
        """
        path = locate(source)
        model = empty_model(path)
        config = model.config.to_dict()
        if config.get("quantization_config"):
            raise BackboneError(f"{path} is quantised: merge the bfloat16 checkpoint it came from")
        checkpoint, known = Checkpoint.open(path), classify(model)
        parameters = {n: known.get(n, Parameter(n, Kind.OTHER)) for n in checkpoint.tensors}
        return cls(path, checkpoint, parameters, config, Shapes.of(model))

    @property
    def blocks(self) -> int:
        """How many blocks of layers there are."""
        return len({p.depth for p in self.parameters.values()} - {None})

    def is_tied_copy(self, parameter: str) -> bool:
        """Whether it is the head's weight, stored beside the embedding it is tied to."""
        return self.shapes.tied is not None and parameter == f"{self.shapes.tied[1]}.weight"


@dataclass(frozen=True)
class FullExpert:
    """A full checkpoint."""

    name: str
    path: Path
    checkpoint: Checkpoint

    def changes(self, parameter: str) -> bool:
        """Every parameter may differ."""
        return parameter in self.checkpoint.tensors

    def delta_rows(self, parameter: str, start: int, stop: int, base: Tensor) -> Tensor:
        """The expert's rows minus the base's."""
        rows = self.checkpoint.read_rows(parameter, start, stop).to(base.device, torch.float32)
        if not rows.isfinite().all():
            raise CheckpointError(
                f"expert {self.name!r} holds NaN or inf in {parameter!r}: its training diverged"
            )
        return rows.sub_(base)


@dataclass(frozen=True)
class LoraExpert:
    """A PEFT LoRA of the base; its scales are folded in."""

    name: str
    path: Path
    module: Module
    parameters: Mapping[str, Parameter]

    def changes(self, parameter: str) -> bool:
        """Only what the LoRA targets differs."""
        return self.factors(parameter) is not None

    def factors(self, parameter: str) -> LowRank | None:
        """The delta of a layer's weight in factors, (out, in) also where it is stored transposed."""
        known = self.parameters[parameter]
        return self.module.deltas.get(known.layer) if parameter.endswith(".weight") else None

    def delta_rows(self, parameter: str, start: int, stop: int, base: Tensor) -> Tensor:
        """The product's rows, without the rest of it."""
        delta = self.factors(parameter)
        if delta is None:
            return torch.zeros_like(base)
        if self.parameters[parameter].is_transposed:
            delta = LowRank(delta.right.T, delta.left.T)
        return delta.left[start:stop].to(base) @ delta.right.to(base)


def open_expert(name: str, source: str | Path, base: Base) -> Expert:
    """Open a full checkpoint or a PEFT LoRA folder and check that it belongs to the base.

    Raises:
        BackboneError, CheckpointError, ModuleError: it is missing, damaged or of another base.
    """
    try:
        path = local_folder(source)
        if (path / CONFIG_FILE).is_file():
            module = Module.load(path, name=name, layers=base.shapes)
            return LoraExpert(name, path, module, base.parameters)
        path = locate(path)
    except BackboneError as error:
        raise BackboneError(
            f"expert {name!r}: {error} (an expert is a checkpoint or a PEFT LoRA folder)"
        ) from error
    _check_config(name, path, base)
    checkpoint = Checkpoint.open(path)
    _check_tensors(name, checkpoint, base)
    return FullExpert(name, path, checkpoint)


def _check_config(name: str, path: Path, base: Base) -> None:
    config = empty_model(path).config.to_dict()
    for key in ("model_type", *_SIZES, "tie_word_embeddings"):
        theirs, ours = config.get(key), base.config.get(key)
        if theirs != ours:
            raise BackboneError(
                f"expert {name!r} has {key} {theirs!r}, the base {base.path} has {ours!r}: only "
                "models of one base can be merged"
            )


def _check_tensors(name: str, checkpoint: Checkpoint, base: Base) -> None:
    theirs, ours = checkpoint.tensors, base.checkpoint.tensors
    for missing in ours.keys() - theirs.keys():
        if not base.is_tied_copy(missing):
            raise CheckpointError(
                f"expert {name!r} lacks the tensor {missing!r} of the base: the checkpoint is "
                "incomplete or of another base"
            )
    for extra in theirs.keys() - ours.keys():
        if not base.is_tied_copy(extra):
            raise CheckpointError(
                f"expert {name!r} holds the tensor {extra!r}, which the base lacks: it is of "
                "another base"
            )
    for tensor, info in ours.items():
        if tensor in theirs and theirs[tensor].shape != info.shape:
            raise CheckpointError(
                f"expert {name!r} has {tensor!r} of shape {list(theirs[tensor].shape)}, the base "
                f"has {list(info.shape)}: resize it to the base's, or choose another base"
            )
