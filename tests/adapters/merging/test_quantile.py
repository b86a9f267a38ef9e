"""Order statistics of a stream equal those of a sort."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergeroute.adapters.merging.quantile import kth_largest, kth_largest_magnitudes, share
from mergeroute.adapters.merging.stack import Stack

from .deltas import expert_deltas, gaussian


@given(expert_deltas(), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_ranks_of_signed_values_are_those_of_a_sort(deltas: list[Tensor], block: int) -> None:
    flat = torch.stack(deltas).flatten(1)

    def read() -> Iterator[Tensor]:
        return (flat[:, start : start + block] for start in range(0, flat.shape[1], block))

    found = kth_largest(read, lambda n: range(1, n + 1))
    assert torch.equal(found, flat.sort(1, descending=True).values)


def test_every_float_is_ordered() -> None:
    values = torch.tensor([[float("inf"), 3e38, 1.5, 1.0, 1e-45, 0.0, -1e-45, -1.0, -float("inf")]])
    shuffled = values[:, torch.randperm(9, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(kth_largest(lambda: [shuffled], lambda n: range(1, n + 1)), values)


def test_magnitudes_of_many_blocks() -> None:
    deltas = gaussian(3, 300, 300)
    stack = Stack.of(deltas, block_elements=900)
    found = kth_largest_magnitudes(stack, lambda n: [1, n // 5, n])
    ordered = torch.stack(deltas).abs().flatten(1).sort(1, descending=True).values
    assert torch.equal(found, ordered[:, [0, 17_999, 89_999]])


def test_a_share_is_rounded_down_and_never_nothing() -> None:
    assert [share(0.2, 9), share(0.2, 10), share(0.01, 50), share(1.0, 7)] == [1, 2, 1, 7]
