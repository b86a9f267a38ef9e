"""Chances of being best against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate, stats

from mergeroute.serving.experiments.statistics.bayes import beliefs
from mergeroute.serving.experiments.statistics.means import mean_of
from mergeroute.serving.experiments.statistics.units import Sums

from .samples import sums


def ones(successes: int, count: int) -> Sums:
    """One observation a unit."""
    return Sums.of(np.r_[np.ones(successes), np.zeros(count - successes)])


def test_rates_of_single_observations_are_beta() -> None:
    found = beliefs({"a": ones(20, 200), "b": ones(30, 210)}, kind="binary", direction="up")
    first, second = stats.beta(21, 181), stats.beta(31, 181)
    want = integrate.quad(lambda rate: first.cdf(rate) * second.pdf(rate), 0, 1)[0]
    assert found["b"].probability_best == pytest.approx(want, abs=0.012)
    assert found["a"].probability_best == pytest.approx(1 - want, abs=0.012)
    gap = (found["a"].expected_loss or 0) - (found["b"].expected_loss or 0)
    assert gap == pytest.approx(second.mean() - first.mean(), abs=0.001)


def test_clustered_means_are_normal() -> None:
    sides = {"a": sums(300, seed=1), "b": sums(300, seed=2, mean=1.1)}
    first, second = (mean_of(each, "continuous") for each in sides.values())
    assert first is not None
    assert second is not None
    z = (second.value - first.value) / (first.variance + second.variance) ** 0.5
    up = beliefs(sides, kind="continuous", direction="up")
    down = beliefs(sides, kind="continuous", direction="down")
    assert up["b"].probability_best == pytest.approx(stats.norm.cdf(z), abs=0.012)
    assert down["a"].probability_best == pytest.approx(stats.norm.cdf(z), abs=0.012)


def test_correlated_successes_are_not_beta() -> None:
    """Ten requests of each of 40 users, all alike, say no more than 40 single ones."""
    users = {name: np.r_[np.ones(k), np.zeros(40 - k)] for name, k in (("a", 16), ("b", 22))}
    once = {name: Sums.of(each) for name, each in users.items()}
    tenfold = {name: Sums.of(10 * each, np.full(40, 10.0)) for name, each in users.items()}
    few = beliefs(once, kind="binary", direction="up")["b"].probability_best
    many = beliefs(tenfold, kind="binary", direction="up")["b"].probability_best
    assert many == pytest.approx(few, abs=0.02)
    assert many is not None
    assert many < 0.95


def test_the_same_seed_gives_the_same_numbers() -> None:
    sides = {"a": sums(seed=1), "b": sums(seed=2)}
    first = beliefs(sides, kind="continuous", direction="up", seed=1)
    assert first == beliefs(sides, kind="continuous", direction="up", seed=1)
    assert first != beliefs(sides, kind="continuous", direction="up", seed=2)


def test_equals_share_and_the_unknown_are_not_guessed() -> None:
    flat = Sums.of(np.full(10, 3.0))
    found = beliefs({"a": flat, "b": flat, "c": Sums()}, kind="count", direction="down")
    assert (found["a"].probability_best, found["a"].expected_loss) == (0.5, 0)
    assert (found["c"].probability_best, found["c"].expected_loss) == (None, None)
    nothing = beliefs({"a": Sums()}, kind="binary", direction="up")
    assert nothing["a"].probability_best is None
