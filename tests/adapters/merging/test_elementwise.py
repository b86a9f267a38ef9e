"""Elementwise merges against slow obvious references, PEFT, and the laws they obey."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import Tensor

from mergeroute.adapters.errors import RecipeError
from mergeroute.adapters.merging import elementwise as methods
from mergeroute.adapters.merging.elect import tall_mask
from mergeroute.adapters.merging.masks import emr_mask_and_rescale
from mergeroute.adapters.merging.stack import Merged, Stack, as_rows, gathered

from .deltas import expert_deltas, gaussian, stack_of

Method = Callable[[Stack], Merged]

DETERMINISTIC: dict[str, Method] = {
    "linear": methods.linear,
    "task_arithmetic": functools.partial(methods.task_arithmetic, scale=0.5),
    "ties": functools.partial(methods.ties, density=0.4),
    "breadcrumbs": functools.partial(methods.breadcrumbs, density=0.5, gamma=0.2),
    "breadcrumbs_ties": functools.partial(methods.breadcrumbs_ties, density=0.5, gamma=0.2),
    "sce": functools.partial(methods.sce, select_topk=0.5),
    "pcb": functools.partial(methods.pcb, ratio=0.5),
    "consensus": methods.consensus,
    "emr": methods.emr,
    "widen": methods.widen,
}
RANDOM: dict[str, Method] = {
    "dare_linear": methods.dare_linear,
    "dare_ties": methods.dare_ties,
    "della": methods.della,
    "della_linear": methods.della_linear,
}
WHOLE: dict[str, Method] = {
    "linear": methods.linear,
    "task_arithmetic": methods.task_arithmetic,
    "ties": functools.partial(methods.ties, density=1.0),
    "dare_linear": functools.partial(methods.dare_linear, density=1.0),
    "dare_ties": functools.partial(methods.dare_ties, density=1.0),
    "della": functools.partial(methods.della, density=1.0),
    "della_linear": functools.partial(methods.della_linear, density=1.0),
    "breadcrumbs": functools.partial(methods.breadcrumbs, density=1.0),
    "breadcrumbs_ties": functools.partial(methods.breadcrumbs_ties, density=1.0),
    "sce": methods.sce,
    "consensus": methods.consensus,
    "emr": methods.emr,
    "widen": methods.widen,
}
"""Methods with parameters that keep every entry."""
MEANS = ("linear", "ties", "dare_ties", "della", "breadcrumbs_ties", "sce", "emr")


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, as_rows(expected), rtol=1e-5, atol=1e-6)


def kept_largest(delta: Tensor, kept: int) -> Tensor:
    smallest = delta.abs().flatten().sort(descending=True).values[kept - 1]
    return torch.where(delta.abs() >= smallest, delta, 0)


def slow_ties(deltas: list[Tensor], weights: list[float]) -> Tensor:
    out = torch.zeros_like(deltas[0])
    for place in range(out.numel()):
        entries = [float(delta.flatten()[place]) for delta in deltas]
        votes = sum(w * x for w, x in zip(weights, entries, strict=True))
        agreeing = [
            (w, x)
            for w, x in zip(weights, entries, strict=True)
            if (w * x > 0 if votes >= 0 else w * x < 0)
        ]
        if agreeing:
            total = sum(w * x for w, x in agreeing)
            out.view(-1)[place] = total / sum(w for w, _ in agreeing)
    return out


@given(expert_deltas(), st.sampled_from([0.05, 0.3, 0.7, 1.0]))
@settings(max_examples=25, deadline=None)
def test_ties_is_the_obvious_loop(deltas: list[Tensor], density: float) -> None:
    weights = [1.0, 2.0, -0.5, 4.0][: len(deltas)]
    kept = max(1, int(density * deltas[0].numel()))
    trimmed = [kept_largest(delta, kept) for delta in deltas]
    found = gathered(methods.ties(stack_of(deltas, weights=weights), density=density))
    close(found, slow_ties(trimmed, weights))


def test_ties_weighs_votes_and_divides_by_the_weights_that_survive() -> None:
    deltas = [torch.tensor([1.0, -2, 0]), torch.tensor([-3.0, -2, 8])]
    stack = stack_of(deltas, weights=[5.0, 1.0])
    close(gathered(methods.ties(stack, density=1.0)), torch.tensor([1.0, -2, 8]))
    close(gathered(methods.ties(stack, density=1.0, normalize=False)), torch.tensor([5.0, -12, 8]))


@pytest.mark.parametrize("density", [0.01, 0.2, 0.9])
@pytest.mark.parametrize("shape", [(400,), (20, 30)])
def test_ties_with_equal_weights_is_that_of_peft(density: float, shape: tuple[int, ...]) -> None:
    deltas = gaussian(4, *shape)
    expected = merge_utils.ties(deltas, torch.ones(4), density)
    close(gathered(methods.ties(stack_of(deltas), density=density)), expected)


@given(expert_deltas())
@settings(max_examples=25, deadline=None)
def test_average_and_task_arithmetic_are_sums(deltas: list[Tensor]) -> None:
    weights = [1.0, 2.0, 0.5, 4.0][: len(deltas)]
    total = sum(w * delta for w, delta in zip(weights, deltas, strict=True))
    assert isinstance(total, Tensor)
    stack = stack_of(deltas, weights=weights)
    close(gathered(methods.linear(stack)), total / sum(weights))
    close(gathered(methods.linear(stack, normalize=False)), total)
    close(gathered(methods.task_arithmetic(stack, scale=0.3)), 0.3 * total)


@pytest.mark.parametrize("shape", [(1,), (7,), (50,), (9, 11)])
@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.2), (0.9, 0.01), (0.3, 0.9), (0.01, 0.0)])
def test_breadcrumbs_keep_a_band_and_never_nothing(
    shape: tuple[int, ...], density: float, gamma: float
) -> None:
    (delta,) = gaussian(1, *shape)
    kept = max(1, int(density * delta.numel()))
    start = min(int(gamma * delta.numel()), delta.numel() - kept)
    order = delta.abs().flatten().argsort(descending=True)[start : start + kept]
    expected = torch.zeros(delta.numel()).index_copy(0, order, delta.flatten()[order])
    found = gathered(methods.breadcrumbs(stack_of([delta]), density=density, gamma=gamma))
    assert found.count_nonzero() == kept
    close(found, expected.view_as(delta))


@given(expert_deltas(), st.sampled_from([0.2, 0.6, 1.0]))
@settings(max_examples=25, deadline=None)
def test_sce_is_the_obvious_formula(deltas: list[Tensor], select_topk: float) -> None:
    x = torch.stack(deltas)
    spread = (x - x.mean(0)).square().mean(0)
    if select_topk < 1:
        kept = max(1, int(select_topk * int(spread.count_nonzero())))
        x = torch.where(spread >= spread.flatten().sort(descending=True).values[kept - 1], x, 0)
    energy = [float(delta.square().sum()) for delta in x]
    weights = [part / sum(energy) if sum(energy) else 1.0 for part in energy]
    elected = torch.where(x.sum(0) >= 0, 1.0, -1.0)
    x = torch.where(x.sign() == elected, x, 0)
    w = torch.tensor(weights).view(-1, *[1] * deltas[0].ndim)
    divisor = (w * (x != 0)).sum(0)
    expected = (w * x).sum(0) / torch.where(divisor == 0, 1, divisor)
    close(gathered(methods.sce(stack_of(deltas), select_topk=select_topk)), expected)


@given(expert_deltas(st.integers(2, 4)))
@settings(max_examples=25, deadline=None)
def test_consensus_keeps_what_two_experts_use(deltas: list[Tensor]) -> None:
    merged = torch.stack(deltas).sum(0)
    users = torch.stack([d.abs() > 0.4 * (merged - d).abs() for d in deltas]).sum(0)
    close(gathered(methods.consensus(stack_of(deltas))), merged * (users >= 2))
    third = stack_of(deltas, weights=[0.3] * len(deltas))
    close(gathered(methods.consensus(third)), 0.3 * merged * (users >= 2))
    assert torch.equal(
        tall_mask(deltas[0], merged, 0.4), deltas[0].abs() > 0.4 * (merged - deltas[0]).abs()
    )


@given(expert_deltas())
@settings(max_examples=25, deadline=None)
def test_emr_takes_the_largest_with_the_elected_sign(deltas: list[Tensor]) -> None:
    x = torch.stack(deltas)
    positive = x.sum(0) >= 0
    expected = torch.where(positive, x.clamp_min(0).amax(0), x.clamp_max(0).amin(0))
    unified = gathered(methods.emr(stack_of(deltas)))
    close(unified, expected)
    for delta in map(as_rows, deltas):
        mask, rescale = emr_mask_and_rescale(delta, unified)
        assert torch.equal(mask, delta.sign() * unified.sign() > 0)
        if mask.any():
            back = (rescale * mask * unified).abs().sum()
            torch.testing.assert_close(back, delta.abs().sum())


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("shape", [(6, 5), (9,), (4, 1), (1,)])
def test_random_merges_are_a_function_of_seed_and_names(name: str, shape: tuple[int, ...]) -> None:
    method, deltas = RANDOM[name], gaussian(3, *shape)
    weights = [1.0, 2.0, 4.0]
    first = gathered(method(stack_of(deltas, weights=weights)))
    assert torch.equal(first, gathered(method(stack_of(deltas, weights=weights))))
    turned = stack_of(deltas[::-1], weights=weights[::-1], names="cba")
    torch.testing.assert_close(first, gathered(method(turned)))
    assert first.isfinite().all()


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
@pytest.mark.parametrize("shape", [(3, 8), (8, 1), (5,)])
def test_random_drops_leave_the_mean(name: str, shape: tuple[int, ...]) -> None:
    deltas = [torch.arange(1, 1 + torch.Size(shape).numel()).view(shape) / 8] * 2
    drawn = [gathered(RANDOM[name](stack_of(deltas, seed=seed))) for seed in range(600)]
    drift = torch.stack(drawn).mean(0) - 2 * as_rows(deltas[0])
    deviation = torch.stack(drawn).std(0) / 600**0.5
    assert (drift.abs() < 5 * deviation).all()
    assert not torch.equal(drawn[0], drawn[1])


def test_della_keeps_small_entries_less_often() -> None:
    delta = torch.arange(1.0, 6.0).expand(4000, 5)
    found = gathered(methods.della_linear(stack_of([delta]), density=0.5, epsilon=0.4))
    shares = (found != 0).float().mean(0)
    expected = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.04)


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.15), (0.15, 0.15)])
def test_della_refuses_a_ramp_that_leaves_the_probabilities(density: float, epsilon: float) -> None:
    with pytest.raises(RecipeError, match="smaller epsilon"):
        methods.della(stack_of(gaussian(2, 4)), density=density, epsilon=epsilon)


@pytest.mark.parametrize("name", DETERMINISTIC)
@given(deltas=expert_deltas(), block_elements=st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_block_size_changes_nothing(name: str, deltas: list[Tensor], block_elements: int) -> None:
    base = gaussian(1, *deltas[0].shape)[0]
    small = Stack.of(deltas, base=base, block_elements=block_elements)
    whole = DETERMINISTIC[name](Stack.of(deltas, base=base))
    torch.testing.assert_close(gathered(DETERMINISTIC[name](small)), gathered(whole))


@pytest.mark.parametrize("name", DETERMINISTIC)
@given(deltas=expert_deltas())
@settings(max_examples=15, deadline=None)
def test_order_of_the_experts_changes_nothing(name: str, deltas: list[Tensor]) -> None:
    weights = [1.0, 2.0, 0.5, 4.0][: len(deltas)]
    one = DETERMINISTIC[name](stack_of(deltas, weights=weights))
    other = DETERMINISTIC[name](stack_of(deltas[::-1], weights=weights[::-1]))
    torch.testing.assert_close(gathered(one), gathered(other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", WHOLE)
@given(deltas=expert_deltas(st.just(1)))
@settings(max_examples=10, deadline=None)
def test_a_single_expert_is_itself(name: str, deltas: list[Tensor]) -> None:
    close(gathered(WHOLE[name](stack_of(deltas))), deltas[0])


@pytest.mark.parametrize("name", MEANS)
@given(deltas=expert_deltas(st.just(1)), experts=st.integers(2, 4))
@settings(max_examples=10, deadline=None)
def test_equal_experts_give_the_expert(name: str, deltas: list[Tensor], experts: int) -> None:
    close(gathered(WHOLE[name](stack_of(deltas * experts))), deltas[0])


@pytest.mark.parametrize("name", [*DETERMINISTIC, *RANDOM])
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 1), (3, 4)])
@pytest.mark.parametrize("experts", [1, 3])
def test_no_change_gives_no_change(name: str, shape: tuple[int, ...], experts: int) -> None:
    method = {**DETERMINISTIC, **RANDOM}[name]
    assert not gathered(method(stack_of([torch.zeros(shape)] * experts))).any()


@pytest.mark.parametrize("name", [*DETERMINISTIC, *RANDOM])
def test_the_deltas_stay_as_they_are(name: str) -> None:
    deltas = gaussian(3, 6, 5)
    stack = stack_of(deltas)
    gathered({**DETERMINISTIC, **RANDOM}[name](stack))
    assert torch.equal(next(stack.read()).x, torch.stack(deltas))
