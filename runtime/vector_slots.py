"""VectorSlots: where the vectors of resident modules lie, changes of norms and biases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .blended import BlendedVectors, gather
from .prepared import PreparedModule


class VectorSlots:
    """One slot for each resident module that changes vectors, in all layers of which any does.
    Not thread-safe.

    layers: by name. by_digest: the slots in use.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[str, BlendedVectors] = {}
        self.by_digest: dict[str, int] = {}
        self._model = model
        self._ranks = torch.zeros(0, dtype=torch.long)

    def gates(self, gates: Tensor) -> Tensor:
        """The gates of vectors: [rows, R] to [rows, slots]. What a free slot gets has no effect."""
        return gates[:, self._ranks]

    def add(self, module: PreparedModule, low: int) -> None:
        """Copy a module's vectors into a free slot. low: the first of its ranks."""
        slot = next(k for k in range(len(self.by_digest) + 1) if k not in self.by_digest.values())
        for name, vector in module.vectors.items():
            owner, _, leaf = name.rpartition(".")
            rows = self.layers[owner].weights if leaf == "weight" else self.layers[owner].biases
            rows[slot] = vector.to(rows)
        slots = max(slot + 1, len(self._ranks))
        ranks = torch.zeros(slots, dtype=torch.long, device=next(self._model.parameters()).device)
        ranks[: len(self._ranks)] = self._ranks
        ranks[slot] = low
        self._ranks = ranks
        self.by_digest[module.digest] = slot

    def remove(self, digest: str) -> None:
        """Give a module's slot back, if it has one."""
        if digest not in self.by_digest:
            return
        slot = self.by_digest.pop(digest)
        for layer in self.layers.values():
            layer.clear(slot, slot + 1)
        self._ranks[slot] = 0
        if not self.by_digest:
            self._ranks = self._ranks[:0]

    def are_compact(self, order: Iterable[str]) -> bool:
        """Whether modules in this order lie together from the first slot on."""
        slots = self._slots(order)
        return slots == list(range(len(slots)))

    def compact(self, lows: Mapping[str, int]) -> None:
        """Move modules together, in the order given, so that what is free lies behind them.

        lows: the first of each one's ranks, from now on.
        """
        slots = self._slots(lows)
        gather([tensor for layer in self.layers.values() for tensor in layer.tensors], slots)
        self.by_digest = {d: k for k, d in enumerate(d for d in lows if d in self.by_digest)}
        self._ranks = self._ranks.new_tensor([lows[d] for d in self.by_digest])
        for layer in self.layers.values():
            layer.clear(len(slots), layer.rows)

    def _slots(self, order: Iterable[str]) -> list[int]:
        return [self.by_digest[digest] for digest in order if digest in self.by_digest]
