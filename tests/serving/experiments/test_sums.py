"""What counts as known of a unit before an experiment began."""

from __future__ import annotations

import pytest

from mergeroute.serving.experiments.statistics.units import Sums
from mergeroute.serving.experiments.store import Store

from .recorded import exposure, feedback, outcome
from .shapes import experiment


@pytest.fixture
def ties(store: Store) -> Store:
    """A store with the experiment that the records are of."""
    with store.changing() as experiments:
        experiments.create(experiment(), who="ann")
    return store


def test_what_is_said_of_the_past_once_it_runs_is_not_of_the_past(ties: Store) -> None:
    """Two earlier requests; the second is told of after the unit met its variant at 2000."""
    earlier = {"experiment": "aa", "unit": "u", "at": 1000.0}
    ties.insert([exposure("early", **earlier), exposure("late", **earlier)])
    ties.insert([exposure("a", unit="u", at=2000.0)])
    ties.insert([feedback("early", 2.0, at=1999.0), feedback("late", 9.0, at=2000.0)])
    ties.insert([feedback("a", 3.0, at=2001.0)])
    assert ties.sums("ties", "score") == {"control": Sums.of([3], [1], [2])}


def test_an_answer_that_ends_late_is_of_the_past(ties: Store) -> None:
    ties.insert([exposure("early", experiment="aa", unit="u"), exposure("a", unit="u", at=2000.0)])
    ties.insert([outcome("early", at=2001.0, latency_ms=5), outcome("a", latency_ms=7)])
    assert ties.sums("ties", "latency_ms") == {"control": Sums.of([7], [1], [5])}
