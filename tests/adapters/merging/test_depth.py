"""LiNeS and layer swapping."""

from __future__ import annotations

import pytest
import torch

from mergeroute.adapters.errors import RecipeError
from mergeroute.adapters.merging.depth import l1_of_sum, lines_alpha, lines_factor, middle_share
from mergeroute.adapters.merging.elementwise import layer_swap
from mergeroute.adapters.merging.stack import Stack, gathered

from .deltas import gaussian, stack_of


def test_lines_grows_with_depth() -> None:
    assert lines_factor(None, alpha=0.25, beta=0.5) == 0.25
    factors = [lines_factor(depth, alpha=0.25, beta=0.5) for depth in (0.0, 0.5, 1.0)]
    assert factors == [0.25, 0.5, 0.75]


def test_alpha_of_lines_undoes_the_shrinking_of_a_mean() -> None:
    deltas = gaussian(4, 10, 10)
    total = l1_of_sum(Stack.of(deltas, block_elements=30))
    assert total == pytest.approx(float(torch.stack(deltas).sum(0).abs().sum()))
    merged = float(torch.stack(deltas).mean(0).abs().sum())
    assert lines_alpha(total, merged, 4) == pytest.approx(1.0)
    assert lines_alpha(0.0, 0.0, 4) == 0.25


@pytest.mark.parametrize(
    ("depth", "share"),
    [(None, 0), (0.0, 0), (0.19, 0), (0.21, 0.5), (0.5, 1), (0.65, 0.5), (0.71, 0), (1.0, 0)],
)
def test_the_middle_comes_from_inner(depth: float | None, share: float) -> None:
    assert middle_share(depth, bottom=0.2, top=0.3, transition=0.1) == share
    a, b = gaussian(2, 3, 4)
    swapped = layer_swap(
        stack_of([a, b], weights=[3.0, 5.0], depth=depth),
        outer="b",
        inner="a",
        bottom=0.2,
        top=0.3,
        transition=0.1,
    )
    torch.testing.assert_close(gathered(swapped), share * a + (1 - share) * b)


def test_swapping_all_layers_is_one_expert() -> None:
    deltas = gaussian(2, 5)
    stack = stack_of(deltas, depth=0.0)
    same = layer_swap(stack, outer="a", inner="a")
    assert torch.equal(gathered(same)[0], deltas[0])
    inner = layer_swap(stack, outer="a", inner="b", bottom=0.0, top=0.0, transition=0.0)
    assert torch.equal(gathered(inner)[0], deltas[1])


def test_an_unknown_expert_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"'z' is no expert; there are a, b"):
        layer_swap(stack_of(gaussian(2, 5)), outer="a", inner="z")
