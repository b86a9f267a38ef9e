"""Experts: what a build merges. Each tells how it changes a parameter of the base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .backbone import (
    checkpoint_files,
    digest_of_files,
    digest_of_weights,
    file_digests,
    locate,
    stated_folder,
)
from .checkpoint import Checkpoint, all_finite
from .delta import LowRank
from .errors import BackboneError, CheckpointError, ModuleError
from .kinds import Kind, Parameter, classify, empty_model
from .lora import CONFIG_FILE, Module
from .merging.stack import rows_per_block
from .module_files import module_files
from .shapes import Shapes

_COMMON = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
    "head_dim",
)
"""What the configurations of base and experts agree in."""

_BEHAVIOUR = (
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "sliding_window",
    "rope_parameters",
    "rope_theta",
)
"""What they agree in, too: where these differ, the same weights are another model. An architecture
has some of them.
"""

_BUFFER = re.compile(r"\.(inv_freq|masked_bias|attn\.bias|attention\.bias)$")
"""What older versions of transformers stored beside the parameters."""


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
    """The common ancestor: its tensors, and what each of them is.

    parameters: a head that is tied to the embedding is none of its own, even where it is stored.
    config: what the configurations of the experts must state too.
    """

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
        path = locate(stated_folder(source))
        model = empty_model(path)
        if getattr(model.config, "quantization_config", None):
            raise BackboneError(f"{path} is quantised: merge the bfloat16 checkpoint it came from")
        checkpoint, shapes, known = Checkpoint.open(path), Shapes.of(model), classify(model)
        copy = _tied_copy(shapes)
        _check_tied("the base", checkpoint, shapes)
        if missing := known.keys() - checkpoint.tensors.keys() - {copy}:
            if any(".experts." in name for name in missing):
                raise BackboneError(
                    f"{path} is a sparse mixture of experts, stored one by one, which merges of "
                    "models do not read: merge its experts by a mapping experts: {method: ...}, "
                    "or serve modules on it by --backbone and --module"
                )
            raise CheckpointError(
                f"{path} lacks the tensor {min(missing)!r} ({len(missing)} in all): it is "
                "incomplete, or stores its tensors under other names; load it and save_pretrained()"
            )
        names = [name for name in checkpoint.tensors if name != copy]
        parameters = {name: known.get(name, Parameter(name, Kind.BUFFER)) for name in names}
        return cls(path, checkpoint, parameters, _common(model), shapes)

    @property
    def blocks(self) -> int:
        """How many blocks of layers there are."""
        return len({p.depth for p in self.parameters.values()} - {None})

    def is_tied_copy(self, parameter: str) -> bool:
        """Whether it is the head's weight, stored beside the embedding it is tied to."""
        return parameter == _tied_copy(self.shapes)

    @cached_property
    def files(self) -> Mapping[str, str]:
        """The digest of each of its files, by name; all are read, once."""
        return file_digests(checkpoint_files(self.path))

    @property
    def weights_digest(self) -> str:
        """Digest of its weights, by which modules know what they stand on."""
        return digest_of_weights(self.files)


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
        if not all_finite(rows):
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
        return parameter in self.module.vectors or self.factors(parameter) is not None

    def factors(self, parameter: str) -> LowRank | None:
        """The delta of a layer's weight in factors, (out, in) even where stored transposed."""
        known = self.parameters[parameter]
        return self.module.deltas.get(known.layer) if parameter.endswith(".weight") else None

    def delta_rows(self, parameter: str, start: int, stop: int, base: Tensor) -> Tensor:
        """The product's rows, without the rest of it."""
        if parameter in self.module.vectors:
            return self.module.vectors[parameter].to(base).view(1, -1)
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
        path = stated_folder(source)
        if (path / CONFIG_FILE).is_file():
            module = Module.load(path, name=name, layers=base.shapes)
            module.check_backbone(base)
            _check_ties(module, base.shapes)
            return LoraExpert(name, path, module, base.parameters)
        path = locate(path)
    except BackboneError as error:
        raise BackboneError(
            f"expert {name!r}: {error} (an expert is a checkpoint or a PEFT LoRA folder)"
        ) from error
    _check_config(name, path, base)
    checkpoint = Checkpoint.open(path)
    _check_tensors(name, checkpoint, base)
    _check_tied(f"expert {name!r}", checkpoint, base.shapes)
    return FullExpert(name, path, checkpoint)


def source_digest(source: Base | Expert) -> str:
    """Content digest of a base's or an expert's files, by which a bank knows what it was built
    from.
    """
    if isinstance(source, Base):
        return digest_of_files(source.files)
    is_folder = isinstance(source, LoraExpert)
    files = module_files(source.path) if is_folder else checkpoint_files(source.path)
    return digest_of_files(file_digests(files))


def _check_config(name: str, path: Path, base: Base) -> None:
    for key, theirs in _common(empty_model(path)).items():
        if theirs != (ours := base.config[key]):
            remedy = " (where it is harmless, state it alike in config.json)"
            raise BackboneError(
                f"expert {name!r} has {key} {theirs!r}, the base {base.path} has {ours!r}: only "
                f"models of one base can be merged{remedy if key in _BEHAVIOUR else ''}"
            )


def _common(model: Any) -> dict[str, object]:  # noqa: ANN401 - transformers is untyped
    config = model.config.get_text_config()
    found = {key: getattr(config, key, None) for key in (*_COMMON, *_BEHAVIOUR)}
    heads = found["num_attention_heads"]
    if found["head_dim"] is None and heads:
        found["head_dim"] = config.hidden_size // heads  # what an absent one means
    return found


def _tied_copy(shapes: Shapes) -> str | None:
    """The name under which some checkpoints store a tied head a second time."""
    return f"{shapes.tied[1]}.weight" if shapes.tied else None


def _check_tied(owner: str, checkpoint: Checkpoint, shapes: Shapes) -> None:
    """A head that is stored beside the embedding it is tied to equals it."""
    copy = _tied_copy(shapes)
    embedding = f"{shapes.tied[0]}.weight" if shapes.tied else None
    if copy not in checkpoint.tensors or embedding not in checkpoint.tensors:
        return
    assert copy is not None
    assert embedding is not None
    info = checkpoint.tensors[embedding]
    rows = rows_per_block(info.columns)
    for start in range(0, info.rows, rows):
        one, other = (checkpoint.read_rows(n, start, start + rows) for n in (embedding, copy))
        if not torch.equal(one, other):
            raise CheckpointError(
                f"{owner} stores {copy!r} with other values than {embedding!r}, though its "
                "config.json ties them: set tie_word_embeddings to false in all, or remove it"
            )


def _check_ties(module: Module, shapes: Shapes) -> None:
    """A LoRA changes a tied embedding and the head alike, or neither: a merge has one matrix."""
    if shapes.tied is None:
        return
    embedding, head = (module.resolved(shapes).get(layer) for layer in shapes.tied)
    if embedding is not head and not (embedding and head and embedding.equals(head)):
        raise ModuleError(
            f"expert {module.name!r} changes one of {shapes.tied[0]!r} and {shapes.tied[1]!r}, "
            "which share one weight: train with ensure_weight_tying, or on the inner layers"
        )


def _check_tensors(name: str, checkpoint: Checkpoint, base: Base) -> None:
    """The expert has the base's parameters in their shapes; buffers come and go with versions of
    transformers, and are the base's anyway.
    """
    theirs, ours = checkpoint.tensors, base.checkpoint.tensors
    parameters = [n for n, p in base.parameters.items() if p.kind is not Kind.BUFFER]
    for tensor in parameters:
        if tensor not in theirs:
            raise CheckpointError(
                f"expert {name!r} lacks the tensor {tensor!r} of the base: the checkpoint is "
                "incomplete or of another base"
            )
        if theirs[tensor].shape != ours[tensor].shape:
            raise CheckpointError(
                f"expert {name!r} has {tensor!r} of shape {list(theirs[tensor].shape)}, the base "
                f"has {list(ours[tensor].shape)}: resize it to the base's, or choose another base"
            )
    for extra in theirs.keys() - ours.keys():
        if not base.is_tied_copy(extra) and not _BUFFER.search(extra):
            raise CheckpointError(
                f"expert {name!r} holds the tensor {extra!r}, which the base lacks: it is of "
                "another base"
            )
