"""Pairs summed up by the database, against scipy on the pairs themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mergeroute.serving.experiments.paired import effective_pairs, paired, sections, wilson
from mergeroute.serving.experiments.records import Record
from mergeroute.serving.experiments.statistics.units import Sums
from mergeroute.serving.experiments.store import Store
from mergeroute.serving.experiments.sums import ALL

from .recorded import exposure, shadow_pair


def wilsons(hits: int, count: int, alpha: float = 0.05) -> tuple[float, float]:
    found = stats.binomtest(hits, count).proportion_ci(1 - alpha, method="wilson")
    return found.low, found.high


SEED = np.random.default_rng(7)


@given(st.integers(1, 500), st.data(), st.sampled_from([0.01, 0.05, 0.2]))
def test_wilsons_interval_is_that_of_scipy(count: int, data: st.DataObject, alpha: float) -> None:
    hits = data.draw(st.integers(0, count))
    found = wilson(hits / count, count, alpha)
    expected = wilsons(hits, count, alpha)
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-9)


def stored(store: Store, units: list[str], gains: list[float], agrees: list[bool]) -> None:
    store.database.prepare()
    records: list[Record] = []
    for number, (unit, gain, agree) in enumerate(zip(units, gains, agrees, strict=True)):
        name = f"r{number}"
        score = gain if number % 2 else None
        records += [
            exposure(name, unit=unit),
            shadow_pair(name, agrees=agree, score=score, error=None if number % 2 else "late"),
        ]
    records += [exposure("forced", is_forced=True), shadow_pair("forced", agrees=False)]
    store.insert(records)


def test_one_pair_a_unit_is_the_plain_paired_test(store: Store) -> None:
    gains = [float(each) for each in SEED.normal(0.3, 1, 40)]
    agrees = [bool(each) for each in SEED.random(40) < 0.6]
    stored(store, [f"u{number}" for number in range(40)], gains, agrees)
    [found] = sections(paired(store, "ties", ALL), 0.05)
    assert (found["variant"], found["compared_with"]) == ("routed", "control")
    assert (found["pairs"], found["units"], found["scorer_errors"]) == (40, 40, 20)
    scored = stats.ttest_1samp(gains[1::2], 0).confidence_interval(0.95)
    assert found["score"]["pairs"] == 20
    assert found["score"]["mean"] == pytest.approx(np.mean(gains[1::2]))
    told = found["score"]["confidence_interval"]
    assert (told["lower"], told["upper"]) == pytest.approx((scored.low, scored.high))
    told = found["agreement"]["confidence_interval"]
    assert (told["lower"], told["upper"]) == pytest.approx(wilsons(sum(agrees), 40))
    assert found["length_difference"]["mean"] == 0
    assert found["latency_ms_difference"]["mean"] == 1


def test_pairs_of_one_user_count_as_less(store: Store) -> None:
    """Ten users whose pairs all agree or all do not say what ten pairs would."""
    units = [f"u{number // 20}" for number in range(200)]
    agrees = [number // 20 % 2 == 0 for number in range(200)]
    stored(store, units, [0.0] * 200, agrees)
    [found] = paired(store, "ties", ALL)
    assert effective_pairs(found.sums["agrees"]) == pytest.approx(10)
    [told] = sections([found], 0.05)
    interval = told["agreement"]["confidence_interval"]
    assert (interval["lower"], interval["upper"]) == pytest.approx(wilsons(5, 10))


@pytest.mark.parametrize("y", [0.0, 3.0])
def test_three_alike_are_three(y: float) -> None:
    sums = Sums.of([y / 3] * 3)
    assert effective_pairs(sums) == 3


def test_without_pairs_there_is_nothing(store: Store) -> None:
    store.database.prepare()
    assert paired(store, "ties", ALL) == []
