"""Budgets of bytes spent on ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergeroute.adapters.errors import RecipeError
from mergeroute.adapters.ranks import ITEM_BYTES, component_bytes, fixed_rank, spend

SHAPES = st.dictionaries(
    st.sampled_from("abcd"), st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1
)
DTYPES = st.sampled_from(sorted(ITEM_BYTES))


def taken(ranks: dict[str, int], shapes: dict[str, tuple[int, int]], dtype: str) -> int:
    """Bytes of all factors, counted tensor by tensor."""
    total = 0
    for layer, rank in ranks.items():
        o, i = shapes[layer]
        total += (o * rank + rank * i) * ITEM_BYTES[dtype]
        total += 2 * 2 * rank if dtype == "int8" else 0
    return total


def spectra_of(shapes: dict[str, tuple[int, int]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: torch.rand(min(shape), generator=generator).sort(descending=True).values + 0.01
        for layer, shape in shapes.items()
    }


@settings(max_examples=25, deadline=None)
@given(shapes=SHAPES, dtype=DTYPES, budget=st.integers(1, 6000))
def test_a_fixed_rank_is_the_largest_that_fits(
    shapes: dict[str, tuple[int, int]], dtype: str, budget: int
) -> None:
    def ranks_of(rank: int) -> dict[str, int]:
        return {layer: min(rank, *shape) for layer, shape in shapes.items()}

    if taken(ranks_of(1), shapes, dtype) > budget:
        with pytest.raises(RecipeError, match=r"is too little: rank 1 takes"):
            fixed_rank(shapes, budget, dtype=dtype)
        return
    best = max(r for r in range(1, 13) if taken(ranks_of(r), shapes, dtype) <= budget)
    assert fixed_rank(shapes, budget, dtype=dtype) == ranks_of(best)


@settings(max_examples=25, deadline=None)
@given(shapes=SHAPES, dtype=DTYPES, budget=st.integers(1, 4000), seed=st.integers(0, 99))
def test_spending_never_exceeds_the_budget_and_leaves_too_little_for_any_more(
    shapes: dict[str, tuple[int, int]], dtype: str, budget: int, seed: int
) -> None:
    spectra = spectra_of(shapes, seed)
    if min(component_bytes(shape, dtype) for shape in shapes.values()) > budget:
        with pytest.raises(RecipeError, match="too little for one component"):
            spend(spectra, shapes, budget, dtype=dtype)
        return
    ranks = spend(spectra, shapes, budget, dtype=dtype)
    left = budget - taken(ranks, shapes, dtype)
    assert left >= 0
    for layer, rank in ranks.items():
        assert rank == min(shapes[layer]) or component_bytes(shapes[layer], dtype) > left


def test_spending_keeps_the_most_energy_of_all_ways_to_spend() -> None:
    shapes = {"a": (4, 4), "b": (4, 4), "c": (4, 4)}
    spectra = spectra_of(shapes, 7)
    budget = 5 * component_bytes((4, 4), "float32")
    ranks = spend(spectra, shapes, budget, dtype="float32")

    def energy(chosen: tuple[int, ...]) -> float:
        return sum(float(spectra[n][:r].square().sum()) for n, r in zip("abc", chosen, strict=True))

    ways = [way for way in itertools.product(range(5), repeat=3) if sum(way) <= 5]
    assert energy(tuple(ranks.values())) == pytest.approx(max(map(energy, ways)))


def test_components_that_keep_nothing_are_not_paid_for() -> None:
    spectra = {"a": torch.tensor([2.0, 0.0, 0.0]), "b": torch.tensor([1.0, 0.5, 0.0])}
    shapes = {"a": (3, 3), "b": (3, 3)}
    assert spend(spectra, shapes, 10**6, dtype="int8") == {"a": 1, "b": 2}


def test_a_dear_layer_is_passed_over_for_a_cheap_one() -> None:
    spectra = {"dear": torch.tensor([10.0]), "cheap": torch.tensor([1.0])}
    shapes = {"dear": (100, 100), "cheap": (5, 5)}
    assert spend(spectra, shapes, 50, dtype="float32") == {"dear": 0, "cheap": 1}
