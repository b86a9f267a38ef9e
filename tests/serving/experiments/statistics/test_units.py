"""Sums of units."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeroute.serving.experiments.statistics.units import LARGEST, Sums

from .samples import users


@given(st.integers(0, 50), st.integers(0, 50))
def test_sums_of_disjoint_units_add_up(first: int, second: int) -> None:
    y, x, z = users(first + second, seed=3)
    both = Sums.of(y[:first], x[:first], z[:first]) + Sums.of(y[first:], x[first:], z[first:])
    assert astuple(both) == pytest.approx(astuple(Sums.of(y, x, z)))
    assert both + Sums() == both


def test_each_sum_is_what_its_name_says() -> None:
    y, x, z = users(30, seed=1)
    want = {"n": 30, "y": y.sum(), "x": x.sum(), "z": z.sum()}
    want |= {"yy": (y * y).sum(), "xx": (x * x).sum(), "zz": (z * z).sum()}
    want |= {"xy": (x * y).sum(), "yz": (y * z).sum(), "xz": (x * z).sum()}
    found = Sums.of(y, x, z)
    assert {name: getattr(found, name) for name in want} == pytest.approx(want)
    assert found.mean == pytest.approx(y.sum() / x.sum())


def test_units_without_an_observation_are_left_out() -> None:
    assert Sums.of([5.0, 0.0], [2.0, 0.0], [1.0, 9.0]) == Sums.of([5.0], [2.0], [1.0])
    assert Sums.of([], []) == Sums()
    assert Sums().mean is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 10 * LARGEST])
def test_what_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="y holds a number that is not finite or above 1e"):
        Sums.of([1.0, bad])
    with pytest.raises(ValueError, match="the sum y is"):
        Sums(n=1, x=1, y=bad * 1e10)


def test_shapes_and_counts_are_checked() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(1,\): give one number for every unit"):
        Sums.of([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="neither 0 nor 1 and more"):
        Sums.of([1.0], [0.5])
    with pytest.raises(ValueError, match=r"3 units have 2 observations: .* must be left out"):
        Sums(n=3, x=2)
