"""The algebra in factors against the same algebra on dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeroute.adapters.delta import LowRank, concat

sizes = st.integers(1, 12)
seeds = st.integers(0, 2**16)


def make_delta(o: int, i: int, r: int, *, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(o, r, generator=generator), torch.randn(r, i, generator=generator))


def spectrum(matrix: torch.Tensor) -> torch.Tensor:
    singular: torch.Tensor = torch.linalg.svdvals(matrix.double())
    return singular


@settings(deadline=None, max_examples=50)
@given(sizes, sizes, sizes, st.lists(st.integers(0, 3), max_size=3), seeds)
def test_apply_is_the_product_with_the_dense_matrix(
    o: int, i: int, r: int, batch: list[int], seed: int
) -> None:
    delta = make_delta(o, i, r, seed=seed)
    x = torch.randn(*batch, i, generator=torch.Generator().manual_seed(seed + 1))
    dense = torch.einsum("or,ri->oi", delta.left, delta.right)
    torch.testing.assert_close(delta.dense(), dense)
    torch.testing.assert_close(delta.apply(x), x @ dense.T, atol=1e-4, rtol=1e-4)
    assert delta.shape == (o, i) == tuple(dense.shape)
    assert delta.rank == r
    assert delta.nbytes == 4 * r * (o + i)


@settings(deadline=None, max_examples=50)
@given(sizes, sizes, sizes, st.floats(-4, 4), seeds)
def test_scaled_scales_the_product(o: int, i: int, r: int, factor: float, seed: int) -> None:
    delta = make_delta(o, i, r, seed=seed)
    torch.testing.assert_close(delta.scaled(factor).dense(), delta.dense() * factor)


@settings(deadline=None, max_examples=50)
@given(sizes, sizes, st.lists(sizes, min_size=1, max_size=4), seeds)
def test_concat_is_the_sum(o: int, i: int, ranks: list[int], seed: int) -> None:
    deltas = [make_delta(o, i, r, seed=seed + k) for k, r in enumerate(ranks)]
    whole = concat(deltas)
    assert whole.rank == sum(ranks)
    expected = torch.stack([delta.dense() for delta in deltas]).sum(0)
    torch.testing.assert_close(whole.dense(), expected, atol=1e-4, rtol=1e-4)


def test_concat_keeps_every_factor_bit_for_bit() -> None:
    one, other = make_delta(5, 3, 2, seed=1), make_delta(5, 3, 4, seed=2)
    whole = concat([one, other])
    assert torch.equal(whole.left, torch.cat([one.left, other.left], 1))
    assert torch.equal(whole.right, torch.cat([one.right, other.right], 0))
    assert torch.equal(concat([one]).dense(), one.dense())


@settings(deadline=None, max_examples=50)
@given(sizes, sizes, sizes, seeds)
def test_norm_is_the_frobenius_norm(o: int, i: int, r: int, seed: int) -> None:
    delta = make_delta(o, i, r, seed=seed)
    expected = float(torch.linalg.matrix_norm(delta.left.double() @ delta.right.double()))
    assert delta.norm() == pytest.approx(expected, rel=1e-6)


def test_norm_of_nan_is_nan() -> None:
    assert math.isnan(LowRank(torch.full((3, 1), math.nan), torch.ones(1, 2)).norm())


@settings(deadline=None, max_examples=25)
@given(sizes, sizes, sizes, sizes, seeds)
def test_inner_is_the_sum_of_products_of_entries(
    o: int, i: int, r: int, other_rank: int, seed: int
) -> None:
    one, other = make_delta(o, i, r, seed=seed), make_delta(o, i, other_rank, seed=seed + 1)
    expected = float((one.dense().double() * other.dense().double()).sum())
    assert one.inner(other) == pytest.approx(expected, abs=1e-4, rel=1e-5)
    assert one.inner(other) == pytest.approx(other.inner(one))


@settings(deadline=None, max_examples=25)
@given(sizes, sizes, sizes, seeds)
def test_svd_is_that_of_the_dense_matrix(o: int, i: int, r: int, seed: int) -> None:
    delta = make_delta(o, i, r, seed=seed)
    u, singular, vt = delta.svd()
    k = singular.numel()
    dense = delta.left.double() @ delta.right.double()
    assert u.dtype == singular.dtype == vt.dtype == torch.float64
    assert k <= min(o, i, r)
    torch.testing.assert_close(singular, spectrum(dense)[:k], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(u * singular @ vt, dense, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(u.T @ u, torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(vt @ vt.T, torch.eye(k, dtype=torch.float64))
    balanced = LowRank.from_svd(u, singular, vt)
    torch.testing.assert_close(balanced.dense(), dense, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(balanced.left.T @ balanced.left, torch.diag(singular))


def test_svd_drops_what_is_no_direction() -> None:
    one, other = make_delta(8, 6, 2), make_delta(8, 6, 1, seed=1)
    assert concat([one, one, other.scaled(1e-8)]).svd(rtol=1e-6)[1].numel() == 2
    assert concat([one, one, other.scaled(1e-3)]).svd(rtol=1e-6)[1].numel() == 3
    zero = LowRank(torch.zeros(4, 3), torch.ones(3, 5))
    assert [part.shape for part in zero.svd()] == [(4, 0), (0,), (0, 5)]


def test_norm_neither_overflows_nor_vanishes() -> None:
    one = LowRank(torch.full((3, 1), 1e30), torch.full((1, 2), 1e30))
    assert one.norm() == pytest.approx(1e60 * 6**0.5, rel=1e-6)
    assert LowRank(torch.full((3, 1), 1e-30), torch.full((1, 2), 1e-30)).norm() > 0
    assert LowRank(torch.zeros(3, 2), torch.ones(2, 4)).norm() == 0


@settings(deadline=None, max_examples=50)
@given(sizes, sizes, sizes, st.integers(1, 14), seeds)
def test_compact_by_rank_is_the_best_approximation(
    o: int, i: int, r: int, rank: int, seed: int
) -> None:
    delta = make_delta(o, i, r, seed=seed)
    compact = delta.compact(rank=rank)
    assert compact.shape == delta.shape
    assert compact.rank <= min(rank, o, i, r)
    singular = spectrum(delta.dense())
    lost = float(singular[rank:].square().sum().sqrt())  # Eckart, Young 1936
    error = float(torch.linalg.matrix_norm((compact.dense() - delta.dense()).double()))
    assert error == pytest.approx(lost, abs=1e-4 * float(singular[0]) + 1e-6)


@settings(deadline=None, max_examples=50)
@given(sizes, sizes, sizes, st.floats(0.05, 1), seeds)
def test_compact_by_energy_keeps_the_fewest_components_that_suffice(
    o: int, i: int, r: int, energy: float, seed: int
) -> None:
    delta = make_delta(o, i, r, seed=seed)
    kept = delta.compact(energy=energy).rank
    shares = spectrum(delta.dense()).square().cumsum(0)
    shares = shares / shares[-1]
    assert shares[kept - 1] >= energy - 1e-5
    assert kept == 1 or shares[kept - 2] < energy + 1e-5


def test_compact_balances_its_factors() -> None:
    delta = make_delta(9, 7, 4)
    compact = LowRank(delta.left * 1000, delta.right / 1000).compact(rank=3)
    singular = spectrum(delta.dense())[:3].float()
    gram = torch.diag(singular)
    torch.testing.assert_close(compact.left.T @ compact.left, gram, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(compact.right @ compact.right.T, gram, atol=1e-4, rtol=1e-4)


def test_compact_of_known_spectra() -> None:
    left, _ = torch.linalg.qr(torch.randn(8, 4, generator=torch.Generator().manual_seed(1)))
    right, _ = torch.linalg.qr(torch.randn(6, 4, generator=torch.Generator().manual_seed(2)))
    delta = LowRank(left * torch.tensor([4.0, 2.0, 2.0, 1.0]), right.T)  # squares 16, 4, 4, 1
    ranks = {0.5: 1, 16 / 25: 1, 0.65: 2, 20 / 25: 2, 0.81: 3, 24 / 25: 3, 0.97: 4, 1.0: 4}
    for energy, rank in ranks.items():
        assert delta.compact(energy=energy - 1e-6 if energy < 1 else 1.0).rank == rank, energy
    assert delta.compact(rank=1).norm() == pytest.approx(4)


def test_compact_of_rank_deficient_factors_drops_the_noise() -> None:
    one = make_delta(8, 6, 2)
    twice = concat([one, one, one.scaled(-0.5)])
    compact = twice.compact(energy=1.0)
    assert compact.rank == 2
    torch.testing.assert_close(compact.dense(), one.dense() * 1.5, atol=1e-4, rtol=1e-4)


def test_compact_of_more_rank_than_the_matrix_has() -> None:
    delta = make_delta(3, 5, 12)
    for compact in (delta.compact(rank=100), delta.compact(energy=1.0)):
        assert compact.rank == 3
        torch.testing.assert_close(compact.dense(), delta.dense(), atol=1e-4, rtol=1e-4)


def test_compact_of_zero_is_zero() -> None:
    zero = LowRank(torch.zeros(4, 3), torch.zeros(3, 5))
    for compact in (zero.compact(rank=2), zero.compact(energy=0.5), zero.compact(energy=1.0)):
        assert compact.rank >= 1
        assert torch.equal(compact.dense(), torch.zeros(4, 5))


def test_compact_keeps_the_dtype() -> None:
    delta = make_delta(4, 5, 3)
    half = LowRank(delta.left.bfloat16(), delta.right.bfloat16()).compact(rank=3)
    assert half.left.dtype == half.right.dtype == torch.bfloat16
    torch.testing.assert_close(half.dense().float(), delta.dense(), atol=0.2, rtol=0.05)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(2, 5\)"):
        LowRank(torch.zeros(4, 3), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="do not multiply"):
        LowRank(torch.zeros(4, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="nothing"):
        concat([])
    with pytest.raises(ValueError, match="different shapes"):
        concat([make_delta(2, 3, 1), make_delta(3, 2, 1)])
    delta = make_delta(4, 5, 2)
    with pytest.raises(ValueError, match="either rank or energy"):
        delta.compact()
    with pytest.raises(ValueError, match="either rank or energy"):
        delta.compact(rank=1, energy=0.5)
    for rank in (0, -1):
        with pytest.raises(ValueError, match=f"rank {rank} "):
            delta.compact(rank=rank)
    for energy in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="energy"):
            delta.compact(energy=energy)
