"""ModuleStack: the modules that are resident in a model, and where in its layers they lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from itertools import accumulate
from typing import get_args

import torch
from torch import Tensor, nn

from ..adapters.blend import Blend
from ..adapters.delta import LowRank
from ..adapters.errors import UnknownModuleError
from ..adapters.lora import Module
from ..adapters.shapes import Shapes
from .blended import BlendedMatrix, BlendedVectors, gather
from .blending import Part
from .footprint import Demand, Footprint, Room
from .model_layers import ModelLayers
from .prepared import Preparation, PreparedModule
from .vector_slots import VectorSlots

WHOLE_STACK_SHARE = 2 / 3
"""Above this share of active ranks one pass over the whole stack beats a loop over slices."""

_GROWTH = 1.25
_BESIDE: dict[Part, str] = {
    "embedding": "embeddings",
    "head": "the head",
    "vectors": "norms or biases",
    "head_vectors": "the head's bias",
}


@dataclass(frozen=True)
class ResidentModule:
    """What of a resident module a gate asks for.

    deltas: copies of its changes of inner linear layers, as they are served, on the CPU.
    gates: its gate vectors by layer, float32. beside_inner: what else it changes, in words, or
    nothing. name: that it was first loaded by.
    """

    name: str
    digest: str
    deltas: Mapping[str, LowRank]
    gates: Mapping[str, Tensor]
    beside_inner: str = ""


@dataclass(frozen=True)
class _Told:
    """What the layers do not tell of a resident module. inner: the inner layers it changes."""

    name: str
    inner: tuple[str, ...]
    gates: Mapping[str, Tensor]


class ModuleStack:
    """The modules that are resident in a model, by digest. Not thread-safe: one thread changes it.

    Layers are replaced once the first module changes them.

    budget: most bytes of factors and vectors; it is taken as a whole with the first module, and
    shared out anew only when a module changes other layers. None: memory grows with the modules.
    layout: changes whenever modules move to other ranks.
    """

    def __init__(self, model: nn.Module, budget: int | None = None) -> None:
        self.shapes = Shapes.of(model)
        self.room = Room.of(model, self.shapes, budget)
        self.layout = 0
        self._model_layers = ModelLayers(model, self.shapes)
        self._preparation = Preparation(model, self.shapes, self._model_layers)
        self._model = model
        self._layers: dict[str, BlendedMatrix] = {}
        self._slots = VectorSlots(model)
        self._slices: dict[str, tuple[int, int]] = {}
        self._footprints: dict[str, Footprint] = {}
        self._told: dict[str, _Told] = {}
        self._spreads: dict[tuple[str, ...], Tensor] = {}
        self._changing: dict[Part, set[str]] = {part: set() for part in get_args(Part)}
        self._capacity = 0
        self._slot_capacity = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._slices

    def __len__(self) -> int:
        return len(self._slices)

    @property
    def ranks(self) -> int:
        """R: the ranks in use, holes left by removed modules included."""
        return max((high for _, high in self._slices.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes that all factors and vectors take, used or free."""
        layers: list[BlendedMatrix | BlendedVectors] = [*self._layers.values()]
        layers += self._slots.layers.values()
        return sum(tensor.nbytes for layer in layers for tensor in layer.tensors)

    @property
    def changes_beside_inner(self) -> bool:
        """Whether any resident module changes more than inner linear layers."""
        return any(digests for part, digests in self._changing.items() if part != "inner")

    def changing(self, part: Part) -> Set[str]:
        """The resident modules that change a part of the model."""
        return self._changing[part]

    def prepare(self, module: Module) -> PreparedModule:
        """Check a module and bring it into the model's dtype; changes nothing, in any thread.

        Raises:
            ModuleError: it does not fit the model's layers or its dtype.
            UnsupportedModelError: the model does not run a layer in a way that can be blended.
        """
        return self._preparation.prepare(module)

    def add(self, module: PreparedModule) -> None:
        """Copy a module's changes into free ranks and, of vectors, into a free slot.

        Raises:
            EngineError: the budget has no room beside the modules that are there.
        """
        self._make_room(module.footprint)
        low = self._free_slice(module.rank)
        for name, layer in self._layers.items():
            layer.a[low : low + module.rank] = 0
            layer.b[low : low + module.rank] = 0
            if name in module.factors:
                a, b = module.factors[name]
                layer.a[low : low + a.shape[0]] = a.to(layer.a)
                layer.b[low : low + b.shape[0]] = b.to(layer.b)
        if module.vectors:
            self._slots.add(module, low)
        self._slices[module.digest] = (low, low + module.rank)
        self._footprints[module.digest] = module.footprint
        inner = [layer for layer in module.factors if self._model_layers.part(layer) == "inner"]
        self._told[module.digest] = _Told(module.name, tuple(inner), module.gates)
        self._spreads.clear()
        for part in module.parts:
            self._changing[part].add(module.digest)

    def remove(self, digest: str) -> None:
        """Give a module's ranks back. Without a budget an empty stack gives its memory back too."""
        del self._slices[digest], self._footprints[digest], self._told[digest]
        self._spreads.clear()
        for digests in self._changing.values():
            digests.discard(digest)
        self._slots.remove(digest)
        if not self._slices and self.room.budget is None:
            self._allocate(Demand.of([]), 0, 0)

    def gates(self, blend: Blend) -> Tensor:
        """A blend over digests as gates, [R], in the model's dtype and on its device."""
        gates = next(self._model.parameters()).new_zeros(self.ranks)
        for digest, weight in blend.items():
            low, high = self._slices[digest]
            gates[low:high] = weight
        return gates

    def slot_gates(self, gates: Tensor) -> Tensor:
        """The gates of vectors: [rows, R] to [rows, slots]. What a free slot gets has no effect."""
        return self._slots.gates(gates)

    def rank_slices(self, digests: Iterable[str]) -> tuple[tuple[int, int], ...]:
        """The slices that rows with these modules need: neighbours joined, or the whole stack."""
        active = sorted(self._slices[digest] for digest in set(digests))
        joined: list[tuple[int, int]] = []
        for low, high in active:
            if joined and joined[-1][1] == low:
                joined[-1] = (joined[-1][0], high)
            else:
                joined.append((low, high))
        needed = sum(high - low for low, high in joined)
        if needed > WHOLE_STACK_SHARE * self.ranks:
            return ((0, self.ranks),)
        return tuple(joined)

    def spread(self, digests: tuple[str, ...]) -> Tensor:
        """Which ranks belong to which of the modules: [modules, R], ones and zeros."""
        if digests not in self._spreads:
            self._spreads[digests] = torch.stack([self.gates(Blend({d: 1.0})) for d in digests])
        return self._spreads[digests]

    def resident(self, digest: str) -> ResidentModule:
        """A resident module, read back from the layers.

        Raises:
            UnknownModuleError: it is not resident.
        """
        if digest not in self._slices:
            raise UnknownModuleError(f"module {digest} is not loaded: load it first")
        told = self._told[digest]
        beside = [words for part, words in _BESIDE.items() if digest in self._changing[part]]
        return ResidentModule(
            name=told.name,
            digest=digest,
            deltas={layer: self._delta(digest, layer) for layer in told.inner},
            gates=told.gates,
            beside_inner=" and ".join(beside),
        )

    def _delta(self, digest: str, layer: str) -> LowRank:
        (low, high), matrix = self._slices[digest], self._layers[layer]
        left, right = matrix.b[low:high].T, matrix.a[low:high]
        return LowRank(left.to("cpu", copy=True), right.to("cpu", copy=True))

    def _free_slice(self, rank: int) -> int:
        """Where `rank` free ranks begin: the first hole that fits, else the end."""
        low = 0
        for start, stop in sorted(self._slices.values()):
            if start - low >= rank:
                return low
            low = stop
        return low

    def _make_room(self, footprint: Footprint) -> None:
        """See that a module finds its layers, its ranks and its slot."""
        demand = Demand.of([*self._footprints.values(), footprint])
        ranks, slots = self._capacity, self._slot_capacity
        fits = demand.ranks <= ranks and demand.slots <= slots
        if not (fits and self._has_memory(footprint)):
            if self.room.budget is not None:
                ranks, slots = self.room.allot(demand)
            elif demand.ranks > ranks:
                ranks = max(demand.ranks, int(ranks * _GROWTH))
            self._compact()
            self._allocate(demand, ranks, max(slots, demand.slots))
        elif self._free_slice(footprint.rank) + footprint.rank > ranks:
            self._compact()

    def _has_memory(self, footprint: Footprint) -> bool:
        """Whether all layers that a module changes are as large as the stack."""
        matrices = [self._layers.get(name) for name in footprint.layers]
        vectors = [self._slots.layers.get(name) for name in footprint.owners]
        return all(layer and layer.rows == self._capacity for layer in matrices) and all(
            layer and layer.rows == self._slot_capacity for layer in vectors
        )

    def _compact(self) -> None:
        """Move all modules together, so that what is free lies behind them."""
        order = sorted(self._slices, key=self._slices.__getitem__)
        ranks = [rank for digest in order for rank in range(*self._slices[digest])]
        if ranks != list(range(len(ranks))) or not self._slots.are_compact(order):
            gather([t for layer in self._layers.values() for t in layer.tensors], ranks)
            stops = accumulate(self._footprints[digest].rank for digest in order)
            lows = {
                d: stop - self._footprints[d].rank for d, stop in zip(order, stops, strict=True)
            }
            self._slots.compact(lows)
            self._slices = {d: (low, low + self._footprints[d].rank) for d, low in lows.items()}
            self._spreads.clear()
            self.layout += 1

    def _allocate(self, demand: Demand, ranks: int, slots: int) -> None:
        """Give memory to the layers that are asked for, and take it from all others."""
        vectors = self._slots.layers
        for name in demand.layers - self._layers.keys():
            self._layers[name] = self._model_layers.replace_matrix(name)
        for owner in demand.owners - vectors.keys():
            vectors[owner] = self._model_layers.replace_vectors(owner)
        sizes: list[tuple[BlendedMatrix | BlendedVectors, int]] = [
            (layer, ranks * (name in demand.layers)) for name, layer in self._layers.items()
        ]
        sizes += [(layer, slots * (name in demand.owners)) for name, layer in vectors.items()]
        for layer, count in sorted(sizes, key=lambda one: one[1] - one[0].rows):  # freed first
            layer.resize(count)
        self._capacity, self._slot_capacity = ranks, slots
