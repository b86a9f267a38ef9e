"""Fisher and RegMean against least squares, whole weights and slow loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.errors import RecipeError
from mergeroute.adapters.merging.calibrated import (
    fisher,
    fisher_norm,
    regmean,
    regmean_dense,
)

seeds = st.integers(0, 2**16)
counts = st.integers(1, 4)
sizes = st.integers(1, 9)
EXACT = {"reduction": 1.0, "ridge": 1e-12}


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gram(x: Tensor) -> Tensor:
    return x.T @ x


@settings(deadline=None, max_examples=25)
@given(counts, sizes, sizes, seeds)
def test_fisher_is_the_weighted_mean_of_every_entry(t: int, b: int, i: int, seed: int) -> None:
    x, f = draw(t, b, i, seed=seed), draw(t, b, i, seed=seed + 1).square()
    weights = draw(t, seed=seed + 2).abs() + 0.1
    merged = fisher(x, f, weights=weights, floor=1e-3)
    for row in range(b):
        for column in range(i):
            above = sum(
                weights[k] * (f[k, row, column] + 1e-3) * x[k, row, column] for k in range(t)
            )
            below = sum(weights[k] * (f[k, row, column] + 1e-3) for k in range(t))
            assert float(merged[row, column]) == pytest.approx(float(above / below))
    torch.testing.assert_close(
        fisher(x, f, weights=weights.view(-1, 1, 1), floor=1e-3), merged, rtol=0, atol=0
    )


@settings(deadline=None, max_examples=25)
@given(counts, sizes, sizes, seeds)
def test_fisher_of_deltas_is_fisher_of_whole_weights(t: int, b: int, i: int, seed: int) -> None:
    base, x = draw(b, i, seed=seed), draw(t, b, i, seed=seed + 1)
    f, weights = draw(t, b, i, seed=seed + 2).square(), torch.ones(t)
    whole = fisher(base + x, f, weights=weights)
    torch.testing.assert_close(base + fisher(x, f, weights=weights), whole)


def test_fisher_of_equal_diagonals_is_the_average() -> None:
    x = draw(3, 4, 5, seed=1)
    same = draw(4, 5, seed=2).square().expand(3, -1, -1)
    torch.testing.assert_close(fisher(x, same, weights=torch.ones(3)), x.mean(0))
    weights = torch.tensor([1.0, 2.0, 5.0]).double()
    expected = torch.einsum("t,tbi->bi", weights / 8, x)
    torch.testing.assert_close(fisher(x, same, weights=weights), expected)


def test_fisher_goes_by_rows() -> None:
    x, f = draw(3, 6, 4, seed=1), draw(3, 6, 4, seed=2).square()
    weights = torch.tensor([1.0, 0.5, 0.0])
    blocks = [fisher(x[:, r : r + 2], f[:, r : r + 2], weights=weights) for r in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(blocks), fisher(x, f, weights=weights), rtol=0, atol=0)


def test_fisher_follows_the_expert_that_cares() -> None:
    x = torch.tensor([[[1.0, 1.0, 1.0]], [[-1.0, -1.0, -1.0]]])
    f = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]])
    merged = fisher(x, f, weights=torch.ones(2))
    torch.testing.assert_close(merged, torch.tensor([[1.0, -1.0, 0.0]]), atol=1e-5, rtol=0)


def test_norms_bring_experts_to_a_common_size() -> None:
    x, f = draw(2, 3, 4, seed=1), draw(2, 3, 4, seed=2).square()
    norms = torch.tensor([fisher_norm([f[k]]) for k in range(2)])
    assert float(norms[0]) == pytest.approx(float(f[0].flatten().norm()))
    assert fisher_norm([f[0], f[1]]) == pytest.approx(float(f.flatten().norm()))
    merged = fisher(x, f, weights=torch.ones(2), norms=norms)
    divided = torch.stack([f[k] / norms[k] for k in range(2)])
    torch.testing.assert_close(merged, fisher(x, divided, weights=torch.ones(2)))
    loud = torch.stack([f[0], f[1] * 1000])
    louder = torch.tensor([norms[0], norms[1] * 1000])
    again = fisher(x, loud, weights=torch.ones(2), norms=louder)
    torch.testing.assert_close(again, merged)


def test_an_expert_without_information_gets_the_floor_alone() -> None:
    x, f = draw(2, 3, 4, seed=1), draw(2, 3, 4, seed=2).square() + 0.1
    f[1] = 0
    norms = torch.tensor([fisher_norm([f[k]]) for k in range(2)])
    merged = fisher(x, f, weights=torch.ones(2), norms=norms, floor=1e-9)
    torch.testing.assert_close(merged, x[0], atol=1e-6, rtol=1e-6)
    silent = fisher(x, f * 0, weights=torch.ones(2), norms=norms * 0)
    torch.testing.assert_close(silent, x.mean(0))


def test_fisher_refuses_what_makes_no_mean() -> None:
    x = draw(2, 3, 4, seed=1)
    with pytest.raises(ValueError, match="differ"):
        fisher(x, x[:, :2], weights=torch.ones(2))
    for weights in (torch.zeros(2), torch.tensor([1.0, -1.0]), torch.tensor([float("nan"), 1])):
        with pytest.raises(ValueError, match="negative or all zero"):
            fisher(x, x.abs(), weights=weights)


@settings(deadline=None, max_examples=25)
@given(counts, sizes, sizes, seeds)
def test_regmean_solves_the_regression_on_all_inputs(t: int, o: int, i: int, seed: int) -> None:
    inputs = [draw(i + 5, i, seed=seed + k) for k in range(t)]
    deltas = [draw(o, i, seed=seed + 50 + k) for k in range(t)]
    weights = [1.0 + k for k in range(t)]
    roots = [w**0.5 for w in weights]
    stacked = torch.cat([r * x for r, x in zip(roots, inputs, strict=True)])
    outputs = torch.cat([r * x @ d.T for r, x, d in zip(roots, inputs, deltas, strict=True)])
    expected = torch.linalg.lstsq(stacked, outputs).solution.T
    merged = regmean_dense(deltas, [gram(x) for x in inputs], weights=weights, **EXACT)
    torch.testing.assert_close(merged, expected, atol=1e-6, rtol=1e-6)


@settings(deadline=None, max_examples=25)
@given(counts, sizes, sizes, st.floats(0, 1), seeds)
def test_regmean_in_factors_is_regmean_of_dense_matrices(
    t: int, o: int, i: int, reduction: float, seed: int
) -> None:
    deltas = [
        LowRank(draw(o, 1 + k, seed=seed + k), draw(1 + k, i, seed=seed + 9 + k)) for k in range(t)
    ]
    grams = [gram(draw(4, i, seed=seed + 20 + k)) for k in range(t)]
    merged = regmean(deltas, grams, reduction=reduction)
    expected = regmean_dense([d.dense() for d in deltas], grams, reduction=reduction)
    assert merged.rank == sum(d.rank for d in deltas)
    torch.testing.assert_close(merged.dense(), expected, atol=1e-6, rtol=1e-6)


@settings(deadline=None, max_examples=25)
@given(counts, sizes, sizes, st.floats(0, 1), st.sampled_from([1e-6, 1e-2, 10.0]), seeds)
def test_regmean_of_deltas_is_regmean_of_whole_weights(
    t: int, o: int, i: int, reduction: float, ridge: float, seed: int
) -> None:
    base = draw(o, i, seed=seed)
    deltas = [draw(o, i, seed=seed + 1 + k) for k in range(t)]
    grams = [gram(draw(2 * i, i, seed=seed + 20 + k)) for k in range(t)]
    whole = regmean_dense([base + d for d in deltas], grams, reduction=reduction, ridge=ridge)
    merged = base + regmean_dense(deltas, grams, reduction=reduction, ridge=ridge)
    torch.testing.assert_close(merged, whole, atol=1e-7, rtol=1e-7)


def test_a_single_expert_comes_back() -> None:
    delta, few = draw(5, 8, seed=1), draw(3, 8, seed=2)  # fewer tokens than inputs
    torch.testing.assert_close(regmean_dense([delta], [gram(few)]), delta)
    torch.testing.assert_close(regmean_dense([delta], [gram(few)], ridge=1.0), delta)


def test_equal_moments_give_the_weighted_average() -> None:
    deltas = [draw(5, 8, seed=k) for k in range(3)]
    same = [gram(draw(20, 8, seed=9))] * 3
    torch.testing.assert_close(regmean_dense(deltas, same), torch.stack(deltas).mean(0))
    merged = regmean_dense(deltas, same, weights=[1, 2, 5])
    torch.testing.assert_close(merged, (deltas[0] + 2 * deltas[1] + 5 * deltas[2]) / 8)


def test_moments_of_no_input_give_the_average() -> None:
    deltas = [draw(5, 8, seed=k) for k in range(2)]
    merged = regmean_dense(deltas, [torch.zeros(8, 8)] * 2)
    torch.testing.assert_close(merged, (deltas[0] + deltas[1]) / 2)


def test_experts_with_inputs_of_their_own_are_both_kept() -> None:
    basis, _ = torch.linalg.qr(draw(8, 8, seed=1))
    inputs = [draw(20, 4, seed=2) @ basis[:, :4].T, draw(20, 4, seed=3) @ basis[:, 4:].T]
    deltas = [draw(5, 8, seed=4), draw(5, 8, seed=5)]
    merged = regmean_dense(deltas, [gram(x) for x in inputs], reduction=1.0, ridge=1e-9)
    for x, delta in zip(inputs, deltas, strict=True):
        torch.testing.assert_close(x @ merged.T, x @ delta.T, atol=1e-6, rtol=1e-6)


def test_reduction_scales_what_is_off_the_diagonal() -> None:
    deltas = [draw(5, 4, seed=k) for k in range(2)]
    grams = [gram(draw(9, 4, seed=8 + k)) for k in range(2)]
    kept = torch.full((4, 4), 0.3).double().fill_diagonal_(1.0)
    reduced = [g * kept for g in grams]
    expected = torch.linalg.solve(
        sum(reduced, torch.zeros(4, 4)), sum(g @ d.T for g, d in zip(reduced, deltas, strict=True))
    ).T
    merged = regmean_dense(deltas, grams, reduction=0.3, ridge=1e-12)
    torch.testing.assert_close(merged, expected, atol=1e-8, rtol=1e-8)
    diagonal = regmean_dense(deltas, grams, reduction=0.0, ridge=1e-12)
    shares = torch.stack([g.diagonal() for g in grams])
    columns = (shares[:, None] * torch.stack(deltas)).sum(0) / shares.sum(0)
    torch.testing.assert_close(diagonal, columns, atol=1e-8, rtol=1e-8)


def test_the_result_has_the_dtype_of_the_deltas() -> None:
    delta = LowRank(draw(5, 2, seed=1).bfloat16(), draw(2, 4, seed=2).bfloat16())
    moments = [torch.eye(4)] * 2
    assert regmean([delta, delta], moments).left.dtype == torch.bfloat16
    assert regmean_dense([delta.dense()] * 2, moments).dtype == torch.bfloat16


def test_regmean_refuses_what_does_not_belong_together() -> None:
    delta, moment = draw(5, 4, seed=1), torch.eye(4)
    with pytest.raises(ValueError, match="2 deltas, 1 moments"):
        regmean_dense([delta, delta], [moment])
    with pytest.raises(ValueError, match="0 deltas"):
        regmean_dense([], [])
    with pytest.raises(ValueError, match="do not belong together"):
        regmean_dense([delta, delta], [moment, torch.eye(5)])
    with pytest.raises(ValueError, match="do not belong together"):
        regmean_dense([delta, delta[:4]], [moment, moment])
    with pytest.raises(ValueError, match="negative or all zero"):
        regmean_dense([delta, delta], [moment, moment], weights=[1, -1])
    with pytest.raises(RecipeError, match="NaN"):
        regmean_dense([delta], [moment * float("nan")])
    with pytest.raises(RecipeError, match="not positive definite"):
        regmean_dense([delta], [moment - 2 * torch.ones(4, 4)], reduction=1.0)
