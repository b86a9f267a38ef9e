"""Our merges beside mergekit's, where both mean the same, and where mergekit's differ."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.merging.elementwise import (
    breadcrumbs,
    breadcrumbs_ties,
    linear,
    sce,
    task_arithmetic,
    ties,
)
from mergeroute.adapters.merging.sparsify import band, drop, rank_drop, top
from mergeroute.adapters.merging.stack import Context, Stack, gathered

from .oracles import assert_same, dense_deltas, mergekit_delta

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the oracles' own imports
]

SHAPES = ((24, 16), (1, 40), (64, 64))
WEIGHTS = ([1.0, 1.0, 1.0], [5.0, 1.0, 0.5], [1.0, -0.5, 2.0])


@pytest.fixture
def methods() -> Any:
    """Every method of mergekit by its name, on tensors in memory."""
    return import_module("mergekit.merge_methods.api")


@pytest.fixture
def sparsify() -> Any:
    """mergekit's ways of setting entries to zero."""
    return import_module("mergekit.sparsify")


def kept(stack: Stack) -> Tensor:
    """The deltas of a stack, [T, o, i]."""
    return torch.cat([block.x for block in stack.read()], 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.99, 1.0])
def test_trimming(sparsify: Any, shape: tuple[int, int], density: float) -> None:
    deltas = dense_deltas(*shape)
    theirs = [sparsify.magnitude(delta, density) for delta in deltas]
    assert torch.equal(kept(top(Stack.of(deltas), density)), torch.stack(theirs))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear(
    methods: Any, shape: tuple[int, int], weights: list[float], normalize: bool
) -> None:
    deltas = dense_deltas(*shape)
    ours = gathered(linear(Stack.of(deltas, weights=weights), normalize=normalize))
    parameters = {"weight": weights, "normalize": normalize}
    theirs = methods.merge_tensors(deltas, "linear", parameters=parameters)
    assert_same(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_task_arithmetic(methods: Any, shape: tuple[int, int], weights: list[float]) -> None:
    deltas = dense_deltas(*shape)
    ours = gathered(task_arithmetic(Stack.of(deltas, weights=weights), scale=0.3))
    parameters = {"weight": weights, "lambda": 0.3}
    theirs = mergekit_delta(methods, "task_arithmetic", deltas, parameters=parameters)
    assert_same(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties(
    methods: Any,
    shape: tuple[int, int],
    weights: list[float],
    density: float,
    normalize: bool,
) -> None:
    deltas = dense_deltas(*shape)
    stack = Stack.of(deltas, weights=weights)
    ours = gathered(ties(stack, density=density, normalize=normalize))
    parameters = {"weight": weights, "density": density, "normalize": normalize}
    theirs = mergekit_delta(methods, "ties", deltas, parameters=parameters)
    assert_same(ours, theirs)


def test_mergekit_trims_equal_entries_by_their_order_ours_keeps_them_all(sparsify: Any) -> None:
    delta = torch.tensor([[3.0, -1.0, 1.0, 1.0]])
    assert sparsify.magnitude(delta, 0.5).count_nonzero() == 2
    assert torch.equal(kept(top(Stack.of([delta]), 0.5))[0], delta)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.1, 0.9, 0.995])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.1])
def test_the_band_of_breadcrumbs(
    sparsify: Any, shape: tuple[int, int], density: float, gamma: float
) -> None:
    deltas = dense_deltas(*shape)
    theirs = [sparsify.magnitude_outliers(delta, density, gamma=gamma) for delta in deltas]
    assert torch.equal(kept(band(Stack.of(deltas), density, gamma)), torch.stack(theirs))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", [breadcrumbs, breadcrumbs_ties])
def test_breadcrumbs(methods: Any, method: Any, weights: list[float], normalize: bool) -> None:
    deltas = dense_deltas(24, 16)
    options = {"density": 0.6, "gamma": 0.05, "normalize": normalize}
    ours = gathered(method(Stack.of(deltas, weights=weights), **options))
    parameters = {**options, "weight": weights}
    theirs = mergekit_delta(methods, method.__name__, deltas, parameters=parameters)
    assert_same(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("select_topk", [0.1, 0.5, 1.0])
def test_sce(methods: Any, shape: tuple[int, int], select_topk: float) -> None:
    deltas = [delta * size for delta, size in zip(dense_deltas(*shape), (1, 2, 3), strict=True)]
    ours = gathered(sce(Stack.of(deltas), select_topk=select_topk))
    theirs = mergekit_delta(methods, "sce", deltas, parameters={"select_topk": select_topk})
    assert_same(ours, theirs)


def test_mergekit_rescales_what_dare_keeps_to_the_norm_ours_by_the_probability(
    sparsify: Any,
) -> None:
    delta, density = dense_deltas(20, 20)[0] ** 5, 0.3  # heavy tails
    norm = sparsify.RescaleNorm.l1
    torch.manual_seed(0)
    theirs = sparsify.bernoulli(delta, density, rescale_norm=norm)
    assert_same(theirs.abs().sum(), delta.abs().sum())
    ours = kept(drop(Stack.of([delta]), density))[0]
    assert_same(ours[ours != 0], (delta / density)[ours != 0])
    factor = float((theirs / delta)[theirs != 0].mean())
    assert abs(factor * density - 1) > 0.05
    for draw in (ours, theirs):
        assert draw.count_nonzero() / delta.numel() == pytest.approx(density, abs=0.08)


def test_mergekit_drops_by_rank_with_the_same_probabilities(
    sparsify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta, density, epsilon, draws = dense_deltas(4, 12)[0], 0.6, 0.3, 1000
    asked: list[Tensor] = []

    def keep_all(probability: Tensor) -> Tensor:
        asked.append(probability)
        return torch.ones_like(probability)

    monkeypatch.setattr(torch, "bernoulli", keep_all)
    sparsify.della_magprune(delta, density, epsilon)
    stacks = [Stack.of([delta], context=Context(seed=seed)) for seed in range(draws)]
    ours = torch.stack([kept(rank_drop(stack, density, epsilon))[0] for stack in stacks])
    often = (ours != 0).float().mean(0)
    assert (often - asked[0]).abs().max() < 4 * (0.25 / draws) ** 0.5  # four standard deviations
    expected = (delta / asked[0]).expand_as(ours)  # theirs: to the norm, as in DARE
    assert_same(ours[ours != 0], expected[ours != 0])


def test_mergekit_cannot_drop_by_rank_in_rows_of_one_entry(sparsify: Any) -> None:
    delta = dense_deltas(400, 1)[0]
    with pytest.raises(RuntimeError, match="p_in"):
        sparsify.della_magprune(delta, 0.6, 0.3)
    ours = kept(rank_drop(Stack.of([delta]), 0.6, 0.3))[0]
    assert ours.count_nonzero() / 400 == pytest.approx(0.6, abs=0.1)


@pytest.mark.parametrize("rank", [4, 12])
def test_extracting_a_lora(rank: int) -> None:
    extract = import_module("mergekit.scripts.extract_lora")
    delta = dense_deltas(24, 16)[0]
    task = extract.TaskVectorDecompositionTask.model_construct(
        input_task=None, max_rank=rank, distribute_scale=True, transpose=False, sv_epsilon=0
    )
    right, left = task.execute(delta)
    ours = LowRank(delta, torch.eye(16)).compact(rank=rank)
    assert_same(ours.dense(), left @ right, rtol=1e-4, atol=1e-5)
