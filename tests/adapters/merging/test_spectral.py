"""Spectral merges against their dense definitions, and what must leave each of them unchanged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergeroute.adapters.delta import LowRank, concat
from mergeroute.adapters.lego import lego
from mergeroute.adapters.merging.spectral import iso_c, summed, tsv, weighted, wudi
from mergeroute.adapters.merging.subspaces import knots, opcm

Merge = Callable[[Sequence[LowRank], Sequence[float]], LowRank]

METHODS: dict[str, Merge] = {
    "tsv": lambda deltas, weights: tsv(deltas, weights=weights),
    "tsv of rank 2": lambda deltas, weights: tsv(deltas, weights=weights, rank=2),
    "iso_c": lambda deltas, weights: iso_c(deltas, weights=weights),
    "wudi": lambda deltas, weights: wudi(deltas, weights=weights),
    "wudi, small ridge": lambda deltas, weights: wudi(deltas, weights=weights, ridge=1e-3),
    "wudi, no ridge": lambda deltas, weights: wudi(deltas, weights=weights, ridge=0),
    "knots": lambda deltas, weights: knots(deltas, weights=weights, density=0.5),
    "opcm": lambda deltas, weights: opcm(deltas, weights=weights),
    "lego": lambda deltas, weights: lego(
        [delta.scaled(weight) for delta, weight in zip(deltas, weights, strict=True)], rank=3
    ),
}
WITHOUT_ORDER = sorted(METHODS.keys() - {"opcm"})
ON_OUTPUTS = sorted(METHODS)
ON_INPUTS = sorted(METHODS.keys() - {"knots"})  # it compares entries along the inputs

seeds = st.integers(0, 2**16)


def make_deltas(
    seed: int, *, o: int = 13, i: int = 11, ranks: Sequence[int] = (3, 2, 4)
) -> list[LowRank]:
    generator = torch.Generator().manual_seed(seed)
    return [
        LowRank(torch.randn(o, r, generator=generator), torch.randn(r, i, generator=generator))
        for r in ranks
    ]


def rotation(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return q


def regauged(delta: LowRank, seed: int) -> LowRank:
    """The same change in other factors, (B G⁻¹, G A)."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(delta.rank, delta.rank, generator=generator, dtype=torch.float64)
    g = g + 3 * torch.eye(delta.rank, dtype=torch.float64)
    return LowRank(delta.left.double() @ torch.linalg.inv(g), g @ delta.right.double())


def dense(delta: LowRank) -> Tensor:
    return delta.left.double() @ delta.right.double()


def assert_same(one: Tensor, other: Tensor, *, tolerance: float = 2e-5) -> None:
    """Relative Frobenius distance; float32 factors of a few components."""
    scale = max(float(one.norm()), float(other.norm()), 1e-9)
    assert float((one.double() - other.double()).norm()) <= tolerance * scale


@pytest.mark.parametrize("name", METHODS)
@settings(deadline=None, max_examples=15)
@given(seed=seeds)
def test_the_result_does_not_depend_on_the_gauge(name: str, seed: int) -> None:
    deltas = make_deltas(seed)
    others = [regauged(delta, seed + k) for k, delta in enumerate(deltas)]
    weights = [1.0, 0.5, 2.0]
    merged = METHODS[name](deltas, weights)
    assert_same(dense(merged), dense(METHODS[name](others, weights)))


@pytest.mark.parametrize("name", ON_OUTPUTS)
@settings(deadline=None, max_examples=15)
@given(seed=seeds)
def test_rotating_the_outputs_rotates_the_result(name: str, seed: int) -> None:
    deltas, q = make_deltas(seed), rotation(13, seed)
    turned = [LowRank(q @ delta.left.double(), delta.right.double()) for delta in deltas]
    weights = [1.0, 0.5, 2.0]
    assert_same(q @ dense(METHODS[name](deltas, weights)), dense(METHODS[name](turned, weights)))


@pytest.mark.parametrize("name", ON_INPUTS)
@settings(deadline=None, max_examples=15)
@given(seed=seeds)
def test_rotating_the_inputs_rotates_the_result(name: str, seed: int) -> None:
    deltas, q = make_deltas(seed), rotation(11, seed)
    turned = [LowRank(delta.left.double(), delta.right.double() @ q) for delta in deltas]
    weights = [1.0, 0.5, 2.0]
    assert_same(dense(METHODS[name](deltas, weights)) @ q, dense(METHODS[name](turned, weights)))


@pytest.mark.parametrize("name", WITHOUT_ORDER)
@settings(deadline=None, max_examples=15)
@given(seed=seeds, order=st.permutations(range(3)))
def test_the_order_of_experts_does_not_matter(name: str, seed: int, order: list[int]) -> None:
    deltas, weights = make_deltas(seed), [1.0, 0.5, 2.0]
    merged = METHODS[name](deltas, weights)
    other = METHODS[name]([deltas[k] for k in order], [weights[k] for k in order])
    assert_same(dense(merged), dense(other))


@pytest.mark.parametrize("name", METHODS)
def test_experts_that_change_nothing_do_not_count(name: str) -> None:
    deltas, weights = make_deltas(1), [1.0, 0.5, 2.0]
    zero = LowRank(torch.zeros(13, 2), torch.ones(2, 11))
    merged = METHODS[name](deltas, weights)
    others = METHODS[name]([deltas[0], zero, *deltas[1:]], [1.0, 3.0, 0.5, 2.0])
    assert_same(dense(merged), dense(others))
    silent = METHODS[name]([*deltas, deltas[0]], [*weights, 0.0])
    assert_same(dense(merged), dense(silent))
    nothing = METHODS[name]([zero, zero], [1.0, 1.0])
    assert torch.equal(nothing.dense(), torch.zeros(13, 11))
    assert nothing.rank >= 1


@pytest.mark.parametrize("name", METHODS)
def test_experts_that_cancel_give_finite_numbers(name: str) -> None:
    one = make_deltas(1, ranks=[3])[0]
    merged = METHODS[name]([one, one.scaled(-1)], [1.0, 1.0])
    assert bool(merged.dense().isfinite().all())
    assert float(merged.dense().norm()) <= one.norm() * (1 + 1e-5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_result_has_the_dtype_and_shape_of_the_deltas(name: str, dtype: torch.dtype) -> None:
    deltas = [LowRank(d.left.to(dtype), d.right.to(dtype)) for d in make_deltas(2)]
    merged = METHODS[name](deltas, [1.0, 1.0, 1.0])
    assert merged.left.dtype == merged.right.dtype == dtype
    assert merged.shape == (13, 11)
    assert merged.rank <= 9  # never more than all components together


@pytest.mark.parametrize("name", METHODS)
@settings(deadline=None, max_examples=15)
@given(seed=seeds)
def test_float32_deltas_lose_only_the_last_rounding(name: str, seed: int) -> None:
    deltas, weights = make_deltas(seed), [1.0, 0.5, 2.0]
    wide = [LowRank(delta.left.double(), delta.right.double()) for delta in deltas]
    merged = dense(METHODS[name](deltas, weights))
    assert_same(merged, dense(METHODS[name](wide, weights)), tolerance=5e-7)


@pytest.mark.parametrize("name", METHODS)
def test_a_dense_delta_of_low_rank_is_merged_like_its_factors(name: str) -> None:
    deltas, weights = make_deltas(3, o=64, i=48), [1.0, 0.5, 2.0]
    decomposed = [torch.linalg.svd(delta.dense(), full_matrices=False) for delta in deltas]
    full = [LowRank.from_svd(*parts) for parts in decomposed]  # 48 components, most of them noise
    assert all(delta.rank == 48 for delta in full)
    merged = dense(METHODS[name](deltas, weights))
    assert_same(merged, dense(METHODS[name](full, weights)), tolerance=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_deltas_of_full_rank_and_more_of_them_than_dimensions(name: str) -> None:
    deltas = make_deltas(3, o=4, i=3, ranks=[3, 3, 3, 3, 3])
    merged = METHODS[name](deltas, [1.0] * 5)
    assert bool(merged.dense().isfinite().all())
    again = METHODS[name]([regauged(delta, 1) for delta in deltas], [1.0] * 5)
    assert_same(dense(merged), dense(again))


@pytest.mark.parametrize("method", [tsv, iso_c, wudi, knots, opcm])
def test_scale_multiplies_the_result_and_errors_say_what_to_do(
    method: Callable[..., LowRank],
) -> None:
    deltas, weights = make_deltas(4), [1.0, 1.0, 1.0]
    merged = method(deltas, weights=weights)
    assert_same(-0.3 * merged.dense(), method(deltas, weights=weights, scale=-0.3).dense())
    with pytest.raises(ValueError, match="2 weights for 3 deltas: give one"):
        method(deltas, weights=[1.0, 1.0])
    with pytest.raises(ValueError, match="nothing"):
        method([], weights=[])
    with pytest.raises(ValueError, match="different shapes"):
        method([deltas[0], make_deltas(1, o=12)[0]], weights=[1.0, 1.0])


def polar(x: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    factor: Tensor = u @ vt
    return factor


def dense_tsv(deltas: Sequence[Tensor], rank: int) -> Tensor:
    """The method as published: dense singular value decompositions, one polar factor a side."""
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    u = torch.cat([u[:, :rank] for u, _, _ in parts], 1)
    v = torch.cat([vt[:rank].T for _, _, vt in parts], 1)
    singular = torch.cat([s[:rank] for _, s, _ in parts])
    return polar(u) @ torch.diag(singular) @ polar(v).T


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(4, 14), st.integers(4, 14), seeds)
def test_tsv_is_the_published_method_where_that_is_defined(
    experts: int, o: int, i: int, seed: int
) -> None:
    rank = min(o, i) // experts
    deltas = make_deltas(seed, o=o, i=i, ranks=[rank] * experts)
    weights = [1.0 + k for k in range(experts)]
    merged = tsv(deltas, weights=weights)
    matrices = [w * dense(delta) for w, delta in zip(weights, deltas, strict=True)]
    assert merged.rank == rank * experts
    assert_same(dense(merged), dense_tsv(matrices, rank), tolerance=1e-4)


def test_tsv_shares_the_dimensions_out_to_experts_of_full_rank() -> None:
    deltas = make_deltas(5, ranks=[11, 11, 11])
    expected = dense_tsv([dense(delta) for delta in deltas], 3)
    assert_same(dense(tsv(deltas, weights=[1.0] * 3)), expected)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_tsv_truncates_to_a_stated_rank(rank: int) -> None:
    deltas = make_deltas(5, ranks=[3, 4, 3])
    merged = tsv(deltas, weights=[1.0] * 3, rank=rank)
    assert_same(dense(merged), dense_tsv([dense(delta) for delta in deltas], rank))
    with pytest.raises(ValueError, match="rank 0 is out of range"):
        tsv(deltas, weights=[1.0] * 3, rank=0)


@settings(deadline=None, max_examples=15)
@given(seeds, st.integers(1, 4))
def test_tsv_gives_an_expert_and_its_copies_back(seed: int, copies: int) -> None:
    one = make_deltas(seed, ranks=[3])[0]
    merged = tsv([one] * copies, weights=[1.0] * copies, rank=3)
    assert_same(dense(merged), dense(one))


def test_tsv_of_orthogonal_experts_is_their_sum() -> None:
    u, v = rotation(13, 1), rotation(11, 2)
    s = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    deltas = [
        LowRank(u[:, part] * s, v[:, part].T) for part in (slice(0, 3), slice(3, 6), slice(6, 9))
    ]
    assert_same(dense(tsv(deltas, weights=[1.0] * 3)), dense(concat(deltas)), tolerance=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.integers(3, 10), st.integers(3, 10), seeds)
def test_iso_c_of_a_full_rank_sum_is_the_published_method(o: int, i: int, seed: int) -> None:
    deltas = make_deltas(seed, o=o, i=i, ranks=[min(o, i)] * 2)
    u, s, vt = torch.linalg.svd(dense(deltas[0]) + 2 * dense(deltas[1]), full_matrices=False)
    merged = iso_c(deltas, weights=[1.0, 2.0])
    assert_same(dense(merged), s.mean() * u @ vt)


def test_iso_c_keeps_the_rank_and_the_sum_of_singular_values() -> None:
    deltas = make_deltas(6)
    merged = iso_c(deltas, weights=[1.0] * 3)
    before = torch.linalg.svdvals(dense(concat(deltas)))
    after = torch.linalg.svdvals(dense(merged))
    torch.testing.assert_close(after[:9], before[:9].mean().expand(9), atol=1e-4, rtol=1e-5)
    assert float(after[9:].sum()) < 1e-4


def wudi_loss(merged: Tensor, deltas: Sequence[LowRank]) -> float:
    """The published objective, term by term."""
    return sum(
        float(((merged - dense(d)) @ dense(d).T).square().sum() / dense(d).square().sum())
        for d in deltas
    )


@settings(deadline=None, max_examples=25)
@given(seeds, st.sampled_from([1e-3, 0.1, 1.0, 10.0]), st.sampled_from([(3, 2), (4, 4), (9, 9)]))
def test_wudi_is_regmean_with_the_gram_of_the_deltas(
    seed: int, ridge: float, ranks: tuple[int, int]
) -> None:
    deltas = make_deltas(seed, o=10, i=9, ranks=ranks)
    matrices = [dense(delta) for delta in deltas]
    grams = [x.T @ x / x.square().sum() for x in matrices]
    gram = torch.stack(grams).sum(0)
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    right = torch.stack([x @ g for x, g in zip(matrices, grams, strict=True)]).sum(0)
    expected = torch.linalg.solve(gram, right.T).T
    bound = (matrices[0] + matrices[1]).norm()
    expected = expected * (bound / expected.norm()).clamp(max=1.0)
    assert_same(dense(wudi(deltas, weights=[1.0, 1.0], ridge=ridge)), expected)


@settings(deadline=None, max_examples=25)
@given(seeds, st.sampled_from([0.0, 1e-9]), st.sampled_from([13, 24, 200]))
def test_wudi_answers_as_each_expert_on_its_own_inputs(seed: int, ridge: float, i: int) -> None:
    deltas = make_deltas(seed, o=13, i=i, ranks=[3, 2, 4])
    merged, whole = wudi(deltas, weights=[1.0] * 3, ridge=ridge), concat(deltas)
    rows = torch.cat([torch.linalg.qr(delta.right.double().T).Q for delta in deltas], 1)
    answers = torch.cat(
        [dense(d) @ torch.linalg.qr(d.right.double().T).Q for d in deltas], 1
    )  # of each expert to its own inputs
    exact = answers @ torch.linalg.pinv(rows)
    capped = min(1.0, whole.norm() / float(exact.norm()))
    for delta in deltas:
        x = torch.randn(5, delta.rank, generator=torch.Generator().manual_seed(seed))
        x = x @ delta.right
        assert_same(merged.apply(x), capped * delta.apply(x), tolerance=1e-3)
    assert wudi_loss(dense(merged) / capped, deltas) <= 1e-6 * wudi_loss(dense(whole), deltas)


@settings(deadline=None, max_examples=25)
@given(seeds, st.sampled_from([0.0, 1e-6, 1e-2, 1.0]), st.floats(0.1, 2.0))
def test_wudi_of_a_shared_initialisation_stays_within_the_norm_of_the_sum(
    seed: int, ridge: float, noise: float
) -> None:
    start, *others = make_deltas(seed, ranks=[4, 4, 4, 4])
    deltas = [LowRank(d.left, start.right + noise * d.right) for d in others]
    merged = wudi(deltas, weights=[1.0] * 3, ridge=ridge)
    assert merged.norm() <= concat(deltas).norm() * (1 + 1e-5)


def test_wudi_minimises_what_it_states() -> None:
    deltas = make_deltas(7)
    ridge = 1.0
    merged = dense(wudi(deltas, weights=[1.0] * 3, ridge=ridge))
    assert float(merged.norm()) < concat(deltas).norm() * 0.999  # not capped

    def objective(x: Tensor) -> float:
        return wudi_loss(x, deltas) + ridge * len(deltas) / 11 * float(x.square().sum())

    best = objective(merged)
    for k in range(20):
        step = rotation(13, k)[:, :11]
        assert objective(merged + 1e-2 * step) > best
    assert best < objective(dense(concat(deltas)))
    with pytest.raises(ValueError, match="ridge -1"):
        wudi(deltas, weights=[1.0] * 3, ridge=-1)


def test_no_matrix_is_formed_when_ranks_are_small() -> None:
    o, i = 200_000, 150_000  # 120 GB in float32
    deltas = make_deltas(8, o=o, i=i, ranks=[2, 1])
    for merge in (tsv, iso_c, wudi, opcm, functools.partial(knots, density=0.5)):
        merged = merge(deltas, weights=[1.0, 1.0])
        assert merged.shape == (o, i)
        assert merged.rank <= 3
    assert lego(deltas, rank=2).shape == (o, i)


def test_summed_and_weighted() -> None:
    deltas = make_deltas(9, o=5, i=4, ranks=[3, 3])
    for o, i in ((5, 4), (4, 5), (9, 9)):
        deltas = make_deltas(9, o=o, i=i, ranks=[3, 3])
        assert_same(dense(summed(deltas)), dense(concat(deltas)))
        assert summed(deltas).rank <= min(o, i, 6)
    assert [d.norm() for d in weighted(deltas, [2.0, 0.0])] == [2 * deltas[0].norm()]
