"""Weights per expert, per column and per entry against the published formulas written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergeroute.adapters.build import open_sources
from mergeroute.adapters.errors import RecipeError
from mergeroute.adapters.merge import Merger
from mergeroute.adapters.merging.elementwise import mwa, pcb, widen
from mergeroute.adapters.merging.stack import Context, Stack, as_rows, gathered

from ...experts import make_zoo
from ...tiny import make_model
from .deltas import gaussian, stack_of


def slow_pcb(deltas: list[Tensor], ratio: float, unit: float) -> Tensor:
    x = torch.stack(deltas).double().flatten(1)
    experts, n = x.shape
    magnitude = torch.empty_like(x)
    for row, source in zip(magnitude, x.abs(), strict=True):
        ordered = source.sort().values
        row[:] = source.clamp(ordered[int(n * 1e-4)], ordered[int(n * (1 - 1e-4) - 1)])
    low, high = magnitude.amin(1, keepdim=True), magnitude.amax(1, keepdim=True)
    inner = torch.exp(experts * ((magnitude - low) / (high - low)) ** 2)
    score = inner * torch.tanh(x * x.sum(0) / unit)
    cut = score.sort(1).values[:, int(n * (1 - ratio)), None]
    c = (score - cut).clamp_min(0) / (score.amax(1, keepdim=True) - cut)
    return ((c * x.sign() * magnitude).sum(0) / c.sum(0).clamp_min(1e-12)).view_as(deltas[0])


@pytest.mark.parametrize("shape", [(60,), (12, 9), (150, 150)])
@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_pcb_is_the_published_formula(shape: tuple[int, ...], ratio: float) -> None:
    deltas = [delta * 50 for delta in gaussian(3, *shape)]
    found = gathered(pcb(stack_of(deltas), ratio=ratio, unit_rms=False))
    expected = as_rows(slow_pcb(deltas, ratio, 1.0).float())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    unit = float(torch.stack(deltas).square().mean())
    found = gathered(pcb(stack_of(deltas), ratio=ratio))
    expected = as_rows(slow_pcb(deltas, ratio, unit).float())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_pcb_does_not_depend_on_the_scale_of_the_deltas() -> None:
    deltas = gaussian(4, 20, 20)
    small = gathered(pcb(stack_of([delta / 1024 for delta in deltas])))
    torch.testing.assert_close(1024 * small, gathered(pcb(stack_of(deltas))))


@pytest.mark.parametrize("unit_rms", [True, False])
def test_equal_weights_leave_the_competition_of_pcb_as_it_is(unit_rms: bool) -> None:
    deltas = [delta * 50 for delta in gaussian(4, 20, 20)]
    third = gathered(pcb(stack_of(deltas, weights=[0.3] * 4), unit_rms=unit_rms))
    torch.testing.assert_close(third, gathered(pcb(stack_of(deltas), unit_rms=unit_rms)))


def slow_scores(change: Tensor) -> Tensor:
    """change: [T, i]."""
    ranks = change.argsort(1).argsort(1) / change.shape[1]
    scores = ranks.softmax(0)
    scores[ranks > ranks.mean(1, keepdim=True)] = 1
    return scores


def slow_widen(deltas: list[Tensor], base: Tensor) -> Tensor:
    """deltas, base: [out, in]."""
    experts = torch.stack(deltas).double() + base
    magnitude = (experts.norm(dim=1) - base.double().norm(dim=0)).abs()
    direction = 1 - torch.cosine_similarity(experts, base.double()[None], dim=1)
    weight = (slow_scores(magnitude) + slow_scores(direction)) / 2
    return (weight[:, None] * torch.stack(deltas)).sum(0).float()


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (2, 5)])
def test_widen_is_the_published_formula(is_transposed: bool, shape: tuple[int, int]) -> None:
    base = gaussian(1, *shape, seed=1)[0] * 100
    deltas = gaussian(3, *shape)
    expected = slow_widen(deltas, base)
    if is_transposed:
        base, deltas = base.T.contiguous(), [delta.T.contiguous() for delta in deltas]
        expected = expected.T
    context = Context(is_transposed=is_transposed)
    found = gathered(widen(Stack.of(deltas, base=base, context=context, block_elements=100)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("architecture", "parameter", "is_transposed"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn.weight", True),
        ("gpt2", "transformer.wte.weight", True),
        ("llama", "model.embed_tokens.weight", True),
        ("llama", "model.layers.0.self_attn.q_proj.weight", False),
    ],
)
def test_widen_scores_tokens_and_input_units(
    architecture: str, parameter: str, is_transposed: bool, tmp_path: Path
) -> None:
    zoo = make_zoo(tmp_path, make_model(architecture))
    recipe = zoo.recipe("ab", backbone={"method": "widen"})
    base, experts = open_sources(recipe)
    change = Merger(base, experts, recipe).change(parameter)
    assert change is not None
    before = zoo.base[parameter]
    deltas = [zoo.experts[name][parameter] - before for name in "ab"]
    if is_transposed:
        before, deltas = before.T, [delta.T for delta in deltas]
    expected = slow_widen(deltas, before)
    found = gathered(change)
    torch.testing.assert_close(found, expected.T if is_transposed else expected)


def test_widen_ranks_the_entries_of_a_vector() -> None:
    deltas = gaussian(3, 30)
    expected = (slow_scores(torch.stack(deltas).abs()) * torch.stack(deltas)).sum(0)
    found = gathered(widen(Stack.of(deltas, base=torch.ones(30))))
    torch.testing.assert_close(found, as_rows(expected))


def test_mwa_prefers_small_losses() -> None:
    deltas = [torch.ones(4), torch.zeros(4)]
    found = gathered(mwa(stack_of(deltas, weights=[7.0, 9.0]), losses=(1.0, 2.0), power=2.0))
    torch.testing.assert_close(found, torch.full((1, 4), 0.8))
    with pytest.raises(RecipeError, match="1 losses for 2 experts"):
        mwa(stack_of(deltas), losses=(1.0,))
