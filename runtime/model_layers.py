"""ModelLayers: the layers of a model that modules may change, and what takes their place."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapters.shapes import Shapes
from .blended import BlendedEmbedding, BlendedLinear, BlendedMatrix, BlendedVectors
from .blending import Part
from .probing import Probe


class ModelLayers:
    """The layers of one model, by name: to which part each belongs, and the one that blends in its
    place.

    model: no layer is replaced yet. probe: tells how the model calls its layers.
    """

    def __init__(self, model: Any, shapes: Shapes) -> None:  # noqa: ANN401 - transformers is untyped
        self.probe = Probe(model, shapes)
        self._model = model
        self._shapes = shapes

    def part(self, layer: str) -> Part:
        """The part that a layer's matrix belongs to."""
        if layer in self._shapes.head:
            return "head"
        return "embedding" if layer in self._shapes.embeddings else "inner"

    def vector_part(self, name: str) -> Part:
        """The part that a parameter belongs to, a norm's weight or a bias."""
        return "head_vectors" if name.rpartition(".")[0] in self._shapes.head else "vectors"

    def replace_matrix(self, name: str) -> BlendedMatrix:
        """Put a layer in its place that blends factors into its matrix."""
        base = self._model.get_submodule(name)
        layer: BlendedMatrix
        if name in self._shapes.embeddings:
            rows, width = self._shapes.embeddings[name]
            scale = self.probe.embedding_scale(name)
            layer = BlendedEmbedding(base, rows=rows, width=width, scale=scale)
        else:
            out, into = self._shapes.matrices[name]
            part = self.part(name)
            layer = BlendedLinear(base, name=name, in_features=into, out_features=out, part=part)
        self._replace(name, layer)
        return layer

    def replace_vectors(self, owner: str) -> BlendedVectors:
        """Put a layer in its place that blends changes of its weight vector and its bias."""
        layer = BlendedVectors(
            self._model.get_submodule(owner),
            unit=self.probe.unit(owner),
            row_dim=self.probe.row_dim(owner),
            part=self.vector_part(f"{owner}."),
        )
        self._replace(owner, layer)
        return layer

    def _replace(self, name: str, layer: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self._model.get_submodule(parent), leaf, layer)
