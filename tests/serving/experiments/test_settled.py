"""Since when an experiment's weights are what they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import update

from mergeroute.serving.errors import ApiError
from mergeroute.serving.experiments.definition import Experiment
from mergeroute.serving.experiments.experiment_store import StoredExperiment
from mergeroute.serving.experiments.results import results
from mergeroute.serving.experiments.store import Store
from mergeroute.serving.experiments.tables import versions

from .shapes import experiment


def changed(store: Store, **given: Any) -> StoredExperiment:
    """The next version."""
    with store.changing() as experiments:
        now = experiments.get("ties")
        return experiments.replace(now.etag, replace(now, **given), who="ann", what="changed")


def weighted(share: float) -> Experiment:
    """With so much for the second variant."""
    return experiment().with_weights({"control": 1 - share, "routed": share})


@pytest.fixture
def ramped(store: Store) -> Store:
    """Versions 1 to 6: a draft, running, at 10 % three times, at 50 % again."""
    with store.changing() as experiments:
        experiments.create(experiment(), who="ann")
    changed(store, state="running")
    changed(store, document=weighted(0.1))
    changed(store, state="paused")
    changed(store, state="running")
    changed(store, document=weighted(0.5))
    return store


def test_the_last_change_of_weights_counts(ramped: Store) -> None:
    now, settled = ramped.settled("ties")
    assert (now, settled) == (ramped.get("ties"), now)
    changed(ramped, state="paused")
    last = changed(ramped, state="running")
    assert ramped.settled("ties") == (last, now)


def test_weights_that_never_changed_are_the_first(store: Store) -> None:
    with store.changing() as experiments:
        first = experiments.create(experiment(), who="ann")
    assert store.settled("ties") == (first, first)
    last = first
    for number in range(25):
        last = changed(store, state="paused" if number % 2 else "running")
    assert store.settled("ties") == (last, first)
    with pytest.raises(ApiError, match="there is no experiment 'other'"):
        store.settled("other")


def test_what_is_older_is_not_read(ramped: Store) -> None:
    """Not even where it is damaged."""
    with ramped.database.writing() as connection:
        damaged = update(versions).where(versions.c.version < 5).values(document="{")
        connection.execute(damaged)
    now, settled = ramped.settled("ties")
    assert now == settled
    assert results(ramped, "ties")["version_from"] == now.version


def test_since_when_it_runs(ramped: Store) -> None:
    history = ramped.history("ties")
    with ramped.reading() as reading:
        since = [reading.running_since(history[-1], number) for number in range(1, 7)]
        draft = reading.running_since(history[0], 7)
    times = [stored.changed_at for stored in history]
    assert since == [times[1], times[1], times[2], times[4], times[4], times[5]]
    assert draft == times[0]


def test_versions_of_another_one_of_the_name_are_not_its_own(ramped: Store) -> None:
    with ramped.changing() as experiments:
        experiments.delete("ties", experiments.get("ties").etag, who="ann")
        again = experiments.create(experiment(), who="ann")
    assert ramped.settled("ties") == (again, again)
    with ramped.reading() as reading:
        assert reading.running_since(again, 1) == again.changed_at
