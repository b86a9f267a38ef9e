"""Footprint and Room: what modules take of a stack's memory, reckoned without touching it.

A module has `rank` ranks, in every layer that any module of the stack changes, and where it changes
vectors one slot, in every layer whose vectors any of them changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..adapters.errors import EngineError
from ..adapters.shapes import Shapes


@dataclass(frozen=True)
class Footprint:
    """What a module asks of a stack.

    rank: at least 1. layers: whose matrices it changes. owners: layers whose vectors it changes.
    """

    rank: int
    layers: frozenset[str]
    owners: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Demand:
    """What modules ask for together: ranks in `layers`, slots in `owners`."""

    ranks: int
    slots: int
    layers: frozenset[str]
    owners: frozenset[str]

    @classmethod
    def of(cls, footprints: Iterable[Footprint]) -> Demand:
        """The sum of footprints."""
        asked = list(footprints)
        return cls(
            ranks=sum(one.rank for one in asked),
            slots=sum(bool(one.owners) for one in asked),
            layers=frozenset().union(*{one.layers for one in asked}),
            owners=frozenset().union(*{one.owners for one in asked}),
        )


@dataclass(frozen=True, eq=False)
class Room:
    """The memory that a stack may take.

    rank_bytes: of one rank in a layer, by layer. slot_bytes: of one slot, by owner.
    budget: most bytes of the whole stack; None: whatever is asked for. setting: that states it.
    """

    rank_bytes: Mapping[str, int]
    slot_bytes: Mapping[str, int]
    budget: int | None = None
    setting: str = "module_memory"

    @classmethod
    def of(cls, model: nn.Module, shapes: Shapes, budget: int | None) -> Room:
        """The room in a model, as it is before any layer is replaced."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        slots: dict[str, int] = {}
        for name, size in shapes.vectors.items():
            owner = name.rpartition(".")[0]
            slots[owner] = slots.get(owner, 0) + size * parameters[f"{owner}.weight"].itemsize
        ranks = {
            name: sum(shape) * parameters[f"{name}.weight"].itemsize
            for name, shape in shapes.matrices.items()
        }
        return cls(ranks, slots, budget)

    def needed(self, footprints: Iterable[Footprint]) -> int:
        """Bytes that modules take together."""
        return self._bytes(Demand.of(footprints))

    def fits(self, footprints: Iterable[Footprint]) -> bool:
        """Whether modules can be resident at the same time, wherever they lie."""
        return self.budget is None or self.needed(footprints) <= self.budget

    def allot(self, demand: Demand) -> tuple[int, int]:
        """Ranks and slots to make of the budget: at least what is asked for, and all there is.

        Raises:
            EngineError: it does not fit.
        """
        assert self.budget is not None
        spare = self.budget - self._bytes(demand)
        if spare < 0:
            raise EngineError(
                f"the modules in memory need {self._bytes(demand):,} bytes, the budget is "
                f"{self.budget:,} (module_memory): unload some, or raise it"
            )
        per_rank, per_slot = self._units(demand)
        slots = demand.slots
        if per_slot:  # so that the next modules with vectors find a slot
            slots += min(demand.slots, spare // 2 // per_slot)
        left = self.budget - slots * per_slot
        return (left // per_rank if per_rank else 2 * demand.ranks), slots

    def _bytes(self, demand: Demand) -> int:
        per_rank, per_slot = self._units(demand)
        return demand.ranks * per_rank + demand.slots * per_slot

    def _units(self, demand: Demand) -> tuple[int, int]:
        per_rank = sum(self.rank_bytes[layer] for layer in demand.layers)
        return per_rank, sum(self.slot_bytes[owner] for owner in demand.owners)
