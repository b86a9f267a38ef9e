"""Compressors of one delta, against their definitions entry by entry."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergeroute.adapters.compressors import (
    bitdelta,
    compeft,
    emr,
    magnitude,
    quantised,
    tall,
)

SIZES = st.tuples(st.integers(1, 7), st.integers(1, 9))
DENSITIES = st.floats(0.05, 1)


def delta_of(size: tuple[int, int], seed: int = 0) -> Tensor:
    """No two magnitudes are equal, none is zero."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(math.prod(size), generator=generator).view(size).float() + 1
    return order * torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0) / 8


@settings(max_examples=25, deadline=None)
@given(size=SIZES, density=DENSITIES)
def test_magnitude_keeps_the_largest_entries(size: tuple[int, int], density: float) -> None:
    delta = delta_of(size)
    found = magnitude(delta, density=density)
    count = max(1, round(density * delta.numel()))
    largest = sorted(delta.abs().flatten().tolist(), reverse=True)[:count]
    for kept, given_value in zip(found.dense.flatten(), delta.flatten(), strict=True):
        is_kept = abs(float(given_value)) in largest
        assert float(kept) == (float(given_value) if is_kept else 0.0)
    assert found.nbytes == 2 * count + math.ceil(delta.numel() / 8)


@settings(max_examples=25, deadline=None)
@given(size=SIZES, density=DENSITIES)
def test_compeft_keeps_signs_and_one_scale(size: tuple[int, int], density: float) -> None:
    delta = delta_of(size)
    found = compeft(delta, density=density, alpha=2.0)
    kept = magnitude(delta, density=density).dense != 0
    scale = 2.0 * float(delta.std(correction=0))
    torch.testing.assert_close(found.dense, torch.where(kept, delta.sign() * scale, 0.0))
    assert found.nbytes == 2 * math.ceil(delta.numel() / 8) + 4


@settings(max_examples=25, deadline=None)
@given(size=SIZES)
def test_bitdelta_has_the_scale_of_least_error(size: tuple[int, int]) -> None:
    delta = delta_of(size)
    found = bitdelta(delta)
    assert torch.equal(found.dense.sign(), delta.sign())
    scale = float(found.dense.abs().max())
    assert scale == pytest.approx(float(delta.abs().mean()))
    errors = [float((delta - delta.sign() * s * scale).norm()) for s in (0.9, 1.0, 1.1)]
    assert min(errors) == errors[1]
    assert found.nbytes == math.ceil(delta.numel() / 8) + 4


def test_a_sign_is_kept_of_zeros_too() -> None:
    assert bitdelta(torch.tensor([[0.0, -4.0]])).dense.tolist() == [[2.0, -2.0]]


@settings(max_examples=25, deadline=None)
@given(size=SIZES, seed=st.integers(1, 50), threshold=st.floats(0.1, 1))
def test_tall_keeps_where_the_sum_is_the_experts(
    size: tuple[int, int], seed: int, threshold: float
) -> None:
    delta = delta_of(size)
    merged = delta + delta_of(size, seed)
    found = tall(delta, merged, threshold=threshold)
    for kept, own, total in zip(
        found.dense.flatten().tolist(), delta.flatten(), merged.flatten(), strict=True
    ):
        expected = float(total) if abs(own) > threshold * abs(total - own) else 0.0
        assert kept == pytest.approx(expected)
    assert found.nbytes == math.ceil(delta.numel() / 8)


@settings(max_examples=25, deadline=None)
@given(size=SIZES, seed=st.integers(1, 50))
def test_emr_keeps_equal_signs_at_the_experts_size(size: tuple[int, int], seed: int) -> None:
    delta, unified = delta_of(size), delta_of(size, seed)
    found = emr(delta, unified).dense
    agree = delta.sign() == unified.sign()
    assert not found[~agree].any()
    if agree.any():
        assert float(found.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-4)
        ratio = found[agree] / unified[agree]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_emr_of_opposite_signs_is_nothing() -> None:
    delta = delta_of((3, 4))
    assert not emr(delta, -delta).dense.any()
    torch.testing.assert_close(emr(delta, delta).dense, delta)


@settings(max_examples=25, deadline=None)
@given(size=SIZES, bits=st.sampled_from([4, 8]))
def test_rounding_is_within_half_a_step_and_idempotent(size: tuple[int, int], bits: int) -> None:
    weight = delta_of(size)
    found = quantised(weight, bits=bits)
    step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert bool(((found.dense - weight).abs() <= step / 2 + 1e-6).all())
    torch.testing.assert_close(quantised(found.dense, bits=bits).dense, found.dense)
    assert found.nbytes == weight.numel() * bits // 8 + 4 * len(weight)
    assert not quantised(weight * 0, bits=bits).dense.any()
