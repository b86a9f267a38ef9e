"""Kinds of parameters: what a tensor of a checkpoint is, and what may be done with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import BackboneError

UNUSABLE = (
    ValueError,
    LookupError,
    OSError,
    AttributeError,
    TypeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,  # RecursionError among it
    StrictDataclassError,
)
"""What transformers and torch raise of configurations that make no model."""


class Kind(StrEnum):
    """What a parameter is."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    BIAS = "bias"
    OTHER = "other"
    BUFFER = "buffer"  # stored beside the parameters: kept as the base has it


@dataclass(frozen=True)
class Parameter:
    """A parameter of a causal language model.

    layer: the layer it belongs to; the name without its last part.
    depth: the index of its block over that of the last block, in [0, 1]; None outside the blocks.
    is_transposed: stored [in, out], as GPT-2's Conv1D does.
    """

    name: str
    kind: Kind
    depth: float | None = None
    is_transposed: bool = False

    @property
    def layer(self) -> str:
        """The layer's name, by which LoRA knows it."""
        return self.name.rpartition(".")[0]


def empty_model(path: Path) -> Any:  # noqa: ANN401 - transformers is untyped
    """The model of a checkpoint folder without its weights.

    Raises:
        BackboneError: transformers cannot make a causal language model of the configuration.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except UNUSABLE as error:
        raise BackboneError(f"{path} is no causal language model: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What an error says in one line: transformers goes on with every class that it knows."""
    first, *others = str(error).splitlines() or [type(error).__name__]
    return " ".join([first, *(line.strip() for line in others[:1] if first.endswith(":"))])


def classify(model: Any) -> dict[str, Parameter]:  # noqa: ANN401
    """The kind of every parameter of a causal language model, by name.

    A head that is tied to the embedding is the embedding.
    """
    depths = _depths(model)
    found = {}
    for layer_name, layer in model.named_modules():
        for leaf, _ in layer.named_parameters(recurse=False):
            name = f"{layer_name}.{leaf}" if layer_name else leaf
            found[name] = Parameter(
                name=name,
                kind=_kind(model, layer, leaf),
                depth=next((d for block, d in depths.items() if name.startswith(block)), None),
                is_transposed=isinstance(layer, Conv1D) and leaf == "weight",
            )
    return found


def is_tied(model: Any) -> bool:  # noqa: ANN401
    """Whether the head shares the embedding's weight."""
    return bool(model.config.get_text_config().tie_word_embeddings)


def _kind(model: Any, layer: nn.Module, leaf: str) -> Kind:  # noqa: ANN401
    if layer is model.get_output_embeddings() and leaf == "weight":
        return Kind.EMBEDDING if is_tied(model) else Kind.HEAD
    if isinstance(layer, nn.Embedding):
        return Kind.EMBEDDING
    if "Norm" in type(layer).__name__:
        return Kind.NORM
    if leaf == "bias":
        return Kind.BIAS
    if isinstance(layer, nn.Linear | Conv1D) and leaf == "weight":
        return Kind.LINEAR
    return Kind.OTHER


def _depths(model: Any) -> Mapping[str, float]:  # noqa: ANN401
    """The prefix of every block's parameters, and the block's depth."""
    return dict(_blocks(model, model.config.get_text_config().num_hidden_layers))


def _blocks(model: nn.Module, count: int) -> Iterator[tuple[str, float]]:
    for name, child in model.named_modules():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            for index in range(count):
                yield f"{name}.{index}.", index / max(1, count - 1)
            return
