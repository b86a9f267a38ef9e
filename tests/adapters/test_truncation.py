"""Truncation against the singular value decomposition of the dense matrix."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergeroute.adapters import truncation
from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.truncation import distance, spectrum, truncated

SIZES = st.integers(1, 9)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(size: int, *, seed: int = 0) -> Tensor:
    """The second moment of inputs with very different directions."""
    x = gaussian(4 * size, size, seed=seed) * torch.logspace(0, -2, size)
    return x.T @ x / len(x)


def best(dense: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(dense.double(), full_matrices=False)
    nearest: Tensor = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return nearest.float()


def in_factors(dense: Tensor) -> LowRank:
    """The same matrix in factors of some other gauge."""
    mix = gaussian(dense.shape[1], dense.shape[1], seed=5) + 4 * torch.eye(dense.shape[1])
    return LowRank(dense @ mix, torch.linalg.inv(mix))


@settings(max_examples=25, deadline=None)
@given(o=SIZES, i=SIZES, rank=st.integers(0, 10), is_dense=st.booleans())
def test_the_nearest_of_a_rank(o: int, i: int, rank: int, is_dense: bool) -> None:
    dense = gaussian(o, i, seed=o * 31 + i)
    found = truncated(dense if is_dense else in_factors(dense), rank=rank)
    assert found.rank == min(rank, o, i)
    assert found.left.dtype == found.right.dtype == torch.float32
    torch.testing.assert_close(found.dense(), best(dense, rank), atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(
        found.left.norm(dim=0), found.right.norm(dim=1), atol=1e-3, rtol=1e-3
    )


@settings(max_examples=25, deadline=None)
@given(o=SIZES, i=SIZES, energy=st.floats(0.05, 1), is_dense=st.booleans())
def test_the_smallest_rank_that_keeps_the_energy(
    o: int, i: int, energy: float, is_dense: bool
) -> None:
    dense = gaussian(o, i, seed=o * 31 + i)
    found = truncated(dense if is_dense else in_factors(dense), energy=energy)
    s = torch.linalg.svdvals(dense.double()).square()
    shares = s.cumsum(0) / s.sum()
    assert shares[found.rank - 1] >= energy - 1e-5
    assert found.rank == 1 or shares[found.rank - 2] < energy + 1e-5


@settings(max_examples=25, deadline=None)
@given(o=SIZES, i=SIZES, rank=st.integers(1, 10))
def test_compressing_again_changes_nothing_and_errors_fall_with_the_rank(
    o: int, i: int, rank: int
) -> None:
    dense = gaussian(o, i, seed=o * 31 + i)
    once = truncated(dense, rank=rank)
    again = truncated(once, rank=rank)
    torch.testing.assert_close(again.dense(), once.dense(), atol=1e-5, rtol=1e-4)
    errors = [distance(dense, truncated(dense, rank=r)) for r in range(min(o, i) + 1)]
    assert all(after <= before + 1e-4 for before, after in pairwise(errors))
    assert errors[-1] < 1e-4


@pytest.mark.parametrize("is_dense", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_outputs_are_kept_closer_than_by_any_other_delta_of_the_rank(
    rank: int, is_dense: bool
) -> None:
    dense, second = gaussian(8, 12, seed=3), moment(12)
    root = torch.linalg.cholesky(second.double() + 1e-9 * torch.eye(12))

    def output_error(delta: Tensor) -> float:
        return float(((dense - delta).double() @ root).norm())

    change = dense if is_dense else in_factors(dense)
    found = truncated(change, rank=rank, moment=second)
    assert found.rank == rank
    optimum = torch.linalg.svdvals(dense.double() @ root)[rank:].norm()
    error = output_error(found.dense())
    assert error < 1.1 * optimum + 1e-6
    assert error < 0.9 * output_error(truncated(dense, rank=rank).dense())


def test_full_rank_gives_the_change_back_whatever_the_inputs() -> None:
    dense = gaussian(6, 9, seed=1)
    for change in (dense, in_factors(dense)):
        found = truncated(change, rank=9, moment=moment(9))
        torch.testing.assert_close(found.dense(), dense, atol=1e-4, rtol=1e-3)
    blind = torch.zeros(9, 9)
    found = truncated(dense, rank=6, moment=blind)
    torch.testing.assert_close(found.dense(), dense, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("with_moment", [True, False])
def test_the_spectrum_is_that_of_the_dense_matrix(with_moment: bool) -> None:
    dense = gaussian(7, 5, seed=2)
    second = torch.eye(5) * 4 if with_moment else None
    wanted = torch.linalg.svdvals(dense) * (2 if with_moment else 1)
    for change in (dense, in_factors(dense)):
        found = spectrum(change, moment=second).float()
        torch.testing.assert_close(found, wanted, rtol=2e-2 if with_moment else 1e-4, atol=1e-4)


def test_distances_agree_dense_and_in_factors() -> None:
    one, other = gaussian(5, 7, seed=1), gaussian(5, 7, seed=2)
    wanted = float((one - other).norm())
    for a in (one, in_factors(one)):
        assert distance(a) == pytest.approx(float(one.norm()), rel=1e-4)
        for b in (other, in_factors(other)):
            assert distance(a, b) == pytest.approx(wanted, rel=1e-4)


def test_zero_stays_zero() -> None:
    zero = torch.zeros(4, 6)
    for change in (zero, LowRank(torch.zeros(4, 2), torch.zeros(2, 6))):
        assert truncated(change, rank=2).norm() == 0
        assert truncated(change, energy=0.9).norm() == 0
        assert truncated(change, rank=2, moment=moment(6)).norm() == 0


def test_large_matrices_are_nearly_as_well_approximated_by_projections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(truncation, "EXACT_SIZE", 100)
    u, v = torch.linalg.qr(gaussian(300, 200))[0], torch.linalg.qr(gaussian(260, 200, seed=1))[0]
    dense = (u * torch.arange(1, 201).float().pow(-0.5)) @ v.T
    for rank in (1, 8, 16):
        found = truncated(dense, rank=rank)
        assert found.rank == rank
        optimum = float((dense - best(dense, rank)).norm())
        assert distance(dense, found) < 1.001 * optimum
        assert torch.equal(found.left, truncated(dense, rank=rank).left)
