"""Experiments in the database: versions, compare-and-set, promotions."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from mergeroute.serving.errors import ApiError
from mergeroute.serving.experiments.allocation import allocate
from mergeroute.serving.experiments.database import Database
from mergeroute.serving.experiments.experiment_store import StaleError, StoredExperiment
from mergeroute.serving.experiments.store import Store

from .shapes import experiment


def created(store: Store, name: str = "ties") -> StoredExperiment:
    """A draft."""
    with store.changing() as experiments:
        return experiments.create(experiment(name=name), who="ann")


def started(store: Store, draft: StoredExperiment) -> StoredExperiment:
    """The draft, running."""
    allocation = allocate(draft.document.weights)
    after = replace(draft, state="running", allocation=allocation, ranges=((0, 10), (20, 30)))
    with store.changing() as experiments:
        return experiments.replace(draft.etag, after, who="bob", what="started")


def test_an_experiment_is_read_as_it_was_created(store: Store) -> None:
    before = time.time()
    made = created(store)
    assert store.get("ties") == made
    assert store.list() == [made]
    assert (made.state, made.version, made.etag, made.changed_by) == ("draft", 1, '"1"', "ann")
    assert (made.allocation, made.ranges, made.promoted) == (None, (), None)
    assert before <= made.created_at == made.changed_at <= time.time()


def test_a_change_makes_a_version(store: Store) -> None:
    draft = created(store)
    running = started(store, draft)
    assert store.get("ties") == running
    assert store.history("ties") == [draft, running]
    assert (running.version, running.changed_by, running.reason) == (2, "bob", "started")
    assert running.created_at == draft.created_at
    assert running.allocation == allocate(draft.document.weights)


def test_they_are_listed_by_name(store: Store) -> None:
    for name in ("b", "c", "a"):
        created(store, name)
    assert [each.name for each in store.list()] == ["a", "b", "c"]


def test_a_stale_change_is_refused(store: Store) -> None:
    draft = created(store)
    started(store, draft)
    with pytest.raises(StaleError, match='is at "2", the change is of "1"') as caught:
        started(store, draft)
    assert (caught.value.status, len(store.history("ties"))) == (412, 2)


def test_of_many_changes_at_once_one_is_made(store: Store) -> None:
    draft = created(store)

    def change(_: int) -> bool:
        try:
            started(store, draft)
        except StaleError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(change, range(8))) == 1
    assert len(store.history("ties")) == 2


def test_changes_wait_for_each_other(database_url: str) -> None:
    databases = [Database(database_url) for _ in range(2)]

    def count_up(database: Database) -> None:
        for _ in range(10):
            with Store(database).changing() as experiments:
                now = experiments.get("ties")
                experiments.replace(now.etag, now, who="ann", what="counted")

    created(Store(databases[0]))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(count_up, databases))
    assert Store(databases[0]).get("ties").version == 21
    for database in databases:
        database.close()


def test_what_fails_changes_nothing(store: Store) -> None:
    draft = created(store)

    def fail() -> None:
        with store.changing() as experiments:
            experiments.replace(draft.etag, draft, who="ann", what="nothing")
            experiments.set_default("zoo", experiment="ties", variant="routed", who="ann")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert store.get("ties") == draft
    assert store.default_target() is None


def test_a_name_is_taken_once(store: Store) -> None:
    created(store)
    with pytest.raises(ApiError, match="there is an experiment 'ties'") as caught:
        created(store)
    assert caught.value.status == 409


def test_unknown_experiments(store: Store) -> None:
    for ask in (store.get, store.history):
        with pytest.raises(ApiError, match="there is no experiment 'nobody'") as caught:
            ask("nobody")
        assert caught.value.status == 404


def test_versions_go_on_after_a_deletion(store: Store) -> None:
    draft = created(store)
    with store.changing() as experiments:
        experiments.delete("ties", draft.etag, who="ann")
    assert store.list() == []
    again = created(store)
    assert (again.version, again.first_version) == (3, 3)
    assert store.history("ties") == [again]
    with pytest.raises(StaleError), store.changing() as experiments:
        experiments.delete("ties", draft.etag, who="ann")


def test_promotions_are_a_stack(store: Store) -> None:
    with store.changing() as experiments:
        first = experiments.set_default("zoo", experiment="ties", variant="routed", who="ann")
        second = experiments.set_default("zoo-2", experiment="two", variant="b", who="bob")
        assert experiments.promotions() == [first, second]
    assert store.default_target() == second
    with store.changing() as experiments:
        assert experiments.rollback_default(who="cyd") == first
        third = experiments.set_default("zoo-3", experiment="ties", variant="c", who="ann")
        assert experiments.promotions() == [first, third]
        assert experiments.rollback_default(who="cyd") == first
        assert experiments.rollback_default(who="cyd") is None
    assert store.default_target() is None
    with (
        pytest.raises(ApiError, match="nothing was promoted") as caught,
        store.changing() as experiments,
    ):
        experiments.rollback_default(who="cyd")
    assert caught.value.status == 409
