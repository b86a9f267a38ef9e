"""Spectra and cosines against dense linear algebra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mergeroute.adapters.delta import LowRank
from mergeroute.adapters.energy import Spectrum, cosines, curve_ranks, gram


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spectrum_of(change: Tensor | LowRank) -> Spectrum:
    found = Spectrum.of(change)
    assert found is not None
    return found


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32), (1, 7), (700, 300)])
def test_energies_are_those_of_svdvals(shape: tuple[int, int]) -> None:
    change = random(*shape) * 1e-3
    squares = torch.linalg.svdvals(change.double()).square()
    found = spectrum_of(change)
    assert_close(found.energy, squares.cumsum(0) / squares.sum(), rtol=1e-6, atol=1e-9)
    assert_close(found.values.double().square(), squares, rtol=1e-5, atol=1e-12)


def test_factors_have_the_spectrum_of_their_product() -> None:
    delta = LowRank(random(30, 5), random(5, 20, seed=1))
    expected = torch.linalg.svdvals(delta.dense().double())[:5]
    assert_close(spectrum_of(delta).values.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_dense_matrix_of_low_rank_needs_that_rank() -> None:
    change = random(60, 3) @ random(3, 50, seed=1)
    assert spectrum_of(change).rank_for(1 - 1e-9) == 3


def test_no_change_has_no_spectrum() -> None:
    assert Spectrum.of(torch.zeros(4, 3)) is None
    assert Spectrum.of(LowRank(torch.zeros(4, 2), torch.ones(2, 3))) is None
    assert Spectrum.of(LowRank(torch.zeros(4, 0), torch.zeros(0, 3))) is None


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9),
    st.floats(0.01, 1.0),
)
def test_the_effective_rank_is_the_smallest_that_keeps_the_share(
    values: list[float], share: float
) -> None:
    found = Spectrum(torch.tensor(sorted(values, reverse=True)))
    rank = found.rank_for(share)
    assert 1 <= rank <= len(values)
    assert found.kept(rank) >= share - 1e-9
    assert rank == 1 or found.kept(rank - 1) < share
    assert found.kept(100) == found.kept(len(values)) == 1.0
    assert list(found.curve().values()) == sorted(found.curve().values())


def test_curve_ranks_are_powers_of_two_the_halves_between_and_the_last() -> None:
    assert curve_ranks(40) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40]
    assert curve_ranks(8) == [1, 2, 3, 4, 6, 8]
    assert curve_ranks(1) == [1]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(0, 1000))
def test_the_gram_matrix_in_factor_space_is_the_dense_one(ranks: list[int], seed: int) -> None:
    deltas = [
        LowRank(random(9, r, seed=seed + k), random(r, 7, seed=seed - k - 1))
        for k, r in enumerate(ranks)
    ]
    dense = torch.stack([delta.dense().double().flatten() for delta in deltas])
    assert_close(gram(deltas), dense @ dense.T, rtol=1e-5, atol=1e-5)


def test_cosines_are_those_of_the_vectors_and_nan_beside_zero() -> None:
    vectors = random(4, 10).double()
    vectors[2] = 0
    found = cosines(vectors @ vectors.T)
    for i in range(4):
        for j in range(4):
            if 2 in (i, j):
                assert found[i, j].isnan()
            else:
                expected = torch.cosine_similarity(vectors[i], vectors[j], dim=0)
                assert_close(found[i, j], expected)
    assert found[0, 0] == 1
