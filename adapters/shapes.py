"""Shapes: what of a model a module may change, by name and shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Shapes:
    """The matrices and vectors of a causal language model that a module may change.

    linear: inner linear layers by name, (out, in). embeddings: token embedding and learned
    positions by name, (rows, width). head: the output layer by name, (vocabulary, width), at most
    one. vectors: sizes of norm weights, norm biases and linear biases, by parameter name.
    tied: (embedding, head) when the two share one weight.
    """

    linear: Mapping[str, tuple[int, int]]
    embeddings: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    head: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    vectors: Mapping[str, int] = field(default_factory=dict)
    tied: tuple[str, str] | None = None

    @classmethod
    def of(cls, model: Any) -> Shapes:  # noqa: ANN401 - transformers is untyped
        """Read a plain model's shapes; parameters may lie on the meta device."""
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        names = {layer: name for name, layer in model.named_modules()}
        linear = {n: s for n, s in _matrices(model).items() if n != names.get(head)}
        tables = {n: la for n, la in model.named_modules() if isinstance(la, nn.Embedding)}
        has_head = isinstance(head, nn.Linear)
        return cls(
            linear=linear,
            embeddings={n: (t.num_embeddings, t.embedding_dim) for n, t in tables.items()},
            head={names[head]: (head.out_features, head.in_features)} if has_head else {},
            vectors={n: p.numel() for n, p in model.named_parameters() if _is_vector(n, p.ndim)},
            tied=(names[embedding], names[head])
            if has_head and _is_tied(head, embedding)
            else None,
        )

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Linear layers, embeddings and head together."""
        return {**self.linear, **self.embeddings, **self.head}


def _matrices(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Linear layers by name, (out, in) each.

    GPT-2's Conv1D counts: it stores its weight transposed, its deltas have the same shape as ever.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            shapes[name] = (layer.out_features, layer.in_features)
        elif isinstance(layer, Conv1D):
            shapes[name] = (layer.weight.shape[1], layer.weight.shape[0])
    return shapes


def _is_tied(head: nn.Linear, embedding: object) -> bool:
    return isinstance(embedding, nn.Embedding) and head.weight is embedding.weight


def _is_vector(name: str, dimensions: int) -> bool:
    return dimensions == 1 and name.rpartition(".")[2] in ("weight", "bias")
