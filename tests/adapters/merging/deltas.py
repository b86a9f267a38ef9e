"""Deltas for the tests of elementwise merges: small multiples of 1/8, whose sums are exact."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from mergeroute.adapters.merging.stack import Context, Stack

SHAPES = st.one_of(st.tuples(st.integers(1, 12)), st.tuples(st.integers(1, 5), st.integers(1, 6)))


@st.composite
def expert_deltas(draw: st.DrawFn, experts: st.SearchStrategy[int] | None = None) -> list[Tensor]:
    """One, two or four deltas of one shape, vectors or matrices; many entries equal or zero."""
    count = draw(experts if experts is not None else st.sampled_from([1, 2, 4]))
    shape = draw(SHAPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    whole = torch.randint(-6, 7, (count, *shape), generator=generator)
    return list((whole / 8).float())


def gaussian(experts: int, *shape: int, seed: int = 0) -> list[Tensor]:
    """Deltas without two equal magnitudes, in practice."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(experts, *shape, generator=generator) * 1e-2)


def stack_of(
    deltas: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    names: str = "abcdefgh",
    seed: int = 0,
    depth: float | None = None,
) -> Stack:
    """A stack of experts that are named by letters."""
    context = Context(experts=tuple(names[: len(deltas)]), seed=seed, depth=depth)
    return Stack.of(deltas, weights=weights, context=context)
