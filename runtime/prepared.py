"""PreparedModule: a module checked against a model, in its dtype, ready to be copied in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..adapters.delta import LowRank
from ..adapters.errors import ModuleError
from ..adapters.lora import Module
from ..adapters.shapes import Shapes
from .blending import Part
from .footprint import Footprint
from .model_layers import ModelLayers


@dataclass(frozen=True)
class PreparedModule:
    """A module ready to be copied in.

    factors: A [r, i] and B [r, o] by layer, in the model's dtype. vectors: changes by parameter.
    parts: the parts of the model that it changes. gates: its gate vectors, float32.
    """

    name: str
    digest: str
    footprint: Footprint
    factors: Mapping[str, tuple[Tensor, Tensor]]
    vectors: Mapping[str, Tensor]
    parts: frozenset[Part]
    gates: Mapping[str, Tensor]

    @property
    def rank(self) -> int:
        """How many ranks it takes, at least 1."""
        return self.footprint.rank

    def to(self, device: torch.device) -> PreparedModule:
        """The same with what is copied in on a device."""
        factors = {n: (a.to(device), b.to(device)) for n, (a, b) in self.factors.items()}
        vectors = {n: vector.to(device) for n, vector in self.vectors.items()}
        return replace(self, factors=factors, vectors=vectors)


class Preparation:
    """Prepares modules for one model. It changes nothing, and may be asked in any thread."""

    def __init__(self, model: nn.Module, shapes: Shapes, layers: ModelLayers) -> None:
        self._model = model
        self._shapes = shapes
        self._layers = layers
        self._names: dict[frozenset[str], frozenset[str]] = {}

    def prepare(self, module: Module) -> PreparedModule:
        """Check a module and bring it into the model's dtype; changes nothing, in any thread.

        Raises:
            ModuleError: it does not fit the model's layers or its dtype.
            UnsupportedModelError: the model does not run a layer in a way that can be blended.
        """
        module.check(self._shapes)
        dtype = next(self._model.parameters()).dtype
        deltas = module.resolved(self._shapes)
        for name in deltas:
            self._check(name)
        for name in module.vectors:
            owner, _, _ = name.rpartition(".")
            self._layers.probe.row_dim(owner)
            self._layers.probe.unit(owner)
        return PreparedModule(
            name=module.name,
            digest=module.digest,
            footprint=Footprint(
                max(1, module.rank),
                self._interned(deltas),
                self._interned(name.rpartition(".")[0] for name in module.vectors),
            ),
            factors={n: self._prepared(n, delta, dtype) for n, delta in deltas.items()},
            vectors={n: _finite(n, v.to(dtype)) for n, v in module.vectors.items()},
            parts=frozenset(map(self._layers.part, deltas))
            | frozenset(map(self._layers.vector_part, module.vectors)),
            gates=module.gates,
        )

    def _interned(self, names: Iterable[str]) -> frozenset[str]:
        """Equal sets are one: those of thousands of modules are compared at once."""
        found = frozenset(names)
        return self._names.setdefault(found, found)

    def _check(self, layer: str) -> None:
        if layer in self._shapes.embeddings:
            self._layers.probe.embedding_scale(layer)
        elif layer in self._shapes.head:
            self._layers.probe.row_dim(layer)

    def _prepared(self, layer: str, delta: LowRank, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B of a layer; an embedding's are those of its transpose: A [r, V], B [r, d]."""
        if layer in self._shapes.embeddings:
            delta = LowRank(delta.right.T, delta.left.T)
        return _factors(delta, dtype, where=layer)


def _factors(delta: LowRank, dtype: torch.dtype, *, where: str) -> tuple[Tensor, Tensor]:
    """A [r, i] and B [r, o] of a delta in the model's dtype, with no entry of A above 1.

    A row of the batch is multiplied by all the ranks that its neighbours need, then by gates of
    zero: what overflows there would be NaN in the neighbour. The power of two that goes from A
    to B keeps every bit.
    """
    peak = float(delta.right.abs().max()) if delta.rank else 0.0
    exponent = max(0, math.frexp(peak)[1])
    a = (delta.right.double() * 2.0**-exponent).to(dtype)
    b = (delta.left.T.double() * 2.0**exponent).to(dtype)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ModuleError(
            f"the change of {where!r} is too large for {dtype}: its training diverged"
        )
    return a, b


def _finite(name: str, vector: Tensor) -> Tensor:
    if not vector.isfinite().all():
        raise ModuleError(f"the change of {name!r} is too large for {vector.dtype}")
    return vector
