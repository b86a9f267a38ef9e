"""Spending a module's bytes on ranks."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from torch import Tensor

from .errors import RecipeError

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_SCALE_BYTES = {"int8": 4}
"""Two bfloat16 scales for each component."""

Shape = tuple[int, int]


def component_bytes(shape: Shape, dtype: str) -> int:
    """Bytes of one component of a matrix (out, in): a column of left and a row of right."""
    return sum(shape) * ITEM_BYTES[dtype] + _SCALE_BYTES.get(dtype, 0)


def fixed_rank(shapes: Mapping[str, Shape], budget: int, *, dtype: str) -> dict[str, int]:
    """The largest rank, the same for all layers (a smaller layer stops at its full rank).

    budget: bytes of all factors together.

    Raises:
        RecipeError: not even rank 1 fits.
    """

    def nbytes(rank: int) -> int:
        return sum(component_bytes(s, dtype) * min(rank, *s) for s in shapes.values())

    if nbytes(1) > budget:
        raise RecipeError(
            f"modules: {{bytes: {budget:,}}} is too little: rank 1 takes {nbytes(1):,} bytes"
        )
    low, high = 1, max((min(shape) for shape in shapes.values()), default=1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if nbytes(middle) <= budget else (low, middle - 1)
    return {layer: min(low, *shape) for layer, shape in shapes.items()}


def spend(
    spectra: Mapping[str, Tensor], shapes: Mapping[str, Shape], budget: int, *, dtype: str
) -> dict[str, int]:
    """The ranks that keep most energy: the component with the largest squared singular value per
    byte comes next, whatever its layer. A layer may end with none.

    spectra: singular values of each layer, descending.

    Raises:
        RecipeError: not even one component fits.

    Source: greedy solution of the fractional knapsack; the values of a layer descend, so that a
    component never comes before a larger one of its layer.
    """
    ranks = dict.fromkeys(spectra, 0)
    heap = [(-_worth(spectra, shapes, layer, 0, dtype), layer) for layer in spectra]
    heapq.heapify(heap)
    left = budget
    while heap:
        worth, layer = heapq.heappop(heap)
        if worth == 0:
            break  # nothing that is left keeps anything
        cost = component_bytes(shapes[layer], dtype)
        if cost > left:
            continue
        left -= cost
        ranks[layer] += 1
        if ranks[layer] < len(spectra[layer]):
            heapq.heappush(heap, (-_worth(spectra, shapes, layer, ranks[layer], dtype), layer))
    if not any(ranks.values()):
        raise RecipeError(f"modules: {{bytes: {budget:,}}} is too little for one component")
    return ranks


def _worth(
    spectra: Mapping[str, Tensor], shapes: Mapping[str, Shape], layer: str, index: int, dtype: str
) -> float:
    return float(spectra[layer][index]) ** 2 / component_bytes(shapes[layer], dtype)
