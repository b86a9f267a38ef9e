"""Records in the database, and their sums over units."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from mergeroute.serving.experiments.database import Database
from mergeroute.serving.experiments.paired import paired
from mergeroute.serving.experiments.record_store import AnsweredFrom
from mergeroute.serving.experiments.records import Exposure, Outcome, Record
from mergeroute.serving.experiments.results import results
from mergeroute.serving.experiments.statistics.units import Sums
from mergeroute.serving.experiments.store import Store
from mergeroute.serving.experiments.sums import ALL, Span, UnitCounts

from .recorded import (
    exposure,
    feedback,
    one_of_each,
    outcome,
    shadow_pair,
    shadow_pairs_of,
    stored_request,
)
from .shapes import experiment


def test_records_are_found_as_they_were_inserted(ties: Store) -> None:
    ties.insert([*one_of_each("a"), *one_of_each("b")])
    assert ties.find_exposure("a") == exposure("a")
    assert ties.find_request("b") == stored_request("b")
    assert shadow_pairs_of(ties, "ties") == [shadow_pair("a"), shadow_pair("b")]
    told = ties.find_feedback("a", "score", caller="app", idempotency_key=None)
    assert told == feedback("a")
    assert ties.find_exposure("c") is None
    assert ties.find_request("c") is None
    assert ties.find_feedback("a", "other", caller="app", idempotency_key="k") is None


def test_the_first_one_stays(ties: Store) -> None:
    for _ in range(2):
        ties.insert(one_of_each("a"))
    ties.insert([feedback("a", 7), exposure("a", variant="routed"), outcome("a", latency_ms=1)])
    ties.insert([exposure("b"), exposure("b", variant="routed"), outcome("b")])
    told = ties.find_feedback("a", "score", caller="app", idempotency_key=None)
    assert told == feedback("a")
    assert ties.unit_counts("ties") == UnitCounts({"control": 2}, 0)
    assert ties.sums("ties", "latency_ms")["control"].y == 25


def test_feedback_is_found_by_its_key_first(ties: Store) -> None:
    ties.insert([feedback("a", idempotency_key="k"), feedback("b")])
    ties.insert(
        [feedback("c", idempotency_key="k"), feedback("d", idempotency_key="k", caller="x")]
    )
    find = ties.find_feedback
    assert find("b", "score", caller="app", idempotency_key="k") == feedback(
        "a", idempotency_key="k"
    )
    assert find("b", "score", caller="other", idempotency_key="k") == feedback("b")
    assert find("c", "score", caller="other", idempotency_key=None) is None
    assert find("d", "score", caller="app", idempotency_key=None) is not None


@pytest.mark.parametrize("bad", [exposure("\0"), exposure("\ud800"), outcome("b", status=2**70)])
def test_a_record_at_fault_is_told_apart(ties: Store, bad: Record) -> None:
    if isinstance(bad, Exposure) and bad.request_id == "\0" and "sqlite" in ties.database.name:
        ties.insert([bad])  # which has no objection
        return
    with pytest.raises((SQLAlchemyError, UnicodeError, OverflowError)):
        ties.insert([exposure("a"), bad])
    assert ties.find_exposure("a") is None


def test_there_is_one_secret(database_url: str) -> None:
    databases = [Database(database_url) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda database: Store(database).secret(), databases))
    assert [len(secret) for secret in found] == [32]
    assert Store(databases[0]).secret() in found
    for database in databases:
        database.close()


def many(generator: np.random.Generator) -> list[Record]:
    """Requests of 60 users in two variants, some of them in both, some forced, some with errors,
    and what was said of them; after requests of the same users in an earlier experiment.
    """
    made: list[Record] = []
    for number in range(600):
        user = int(generator.integers(60))
        earlier = number < 200
        variant = "routed" if user % 3 == 0 else "control"
        if user < 4 and number % 2:
            variant = "control"
        made += _request(
            f"r{number}",
            generator,
            experiment="aa" if earlier else "ties",
            variant=variant,
            unit=f"user-{user}",
            at=1000.0 + number,
            version=1 + number // 300,
            is_forced=bool(generator.random() < 0.05),
        )
    return made


def _request(name: str, generator: np.random.Generator, **given: object) -> Iterable[Record]:
    yield exposure(name, **given)
    failed = generator.random() < 0.1
    yield outcome(
        name,
        latency_ms=float(generator.exponential(100)),
        first_token_ms=None if failed else float(generator.exponential(10)),
        completion_tokens=int(generator.integers(100)),
        finish_reason="length" if generator.random() < 0.2 else "stop",
        error="engine_failed" if failed else None,
    )
    if generator.random() < 0.4:
        yield feedback(name, float(generator.normal(3)))
    if generator.random() < 0.2:
        yield feedback(name, 1.0, metric="thumbs")


def expected(
    records: Sequence[Record], metric: str, span: Span, until: float = math.inf
) -> dict[str, Sums]:
    """The slow obvious way."""
    exposures = {each.request_id: each for each in records if isinstance(each, Exposure)}
    values = dict(_values(records, metric))
    counted = {name: each for name, each in exposures.items() if _counts(each, span, until)}
    variants, before = defaultdict(set), defaultdict(list)
    totals: dict[str, list[float]] = defaultdict(list)
    for each in counted.values():
        variants[each.unit].add(each.variant)
    for name, each in exposures.items():
        if each.experiment == "aa" and not each.is_forced and name in values:
            before[each.unit].append(values[name])
        if name in counted and name in values:
            totals[each.unit].append(values[name])
    kept = [unit for unit in totals if len(variants[unit]) == 1]
    means = {unit: float(np.mean(before[unit])) for unit in kept if before[unit]}
    known = float(np.mean(list(means.values()))) if means else 0.0
    found = {}
    for variant in {min(variants[unit]) for unit in kept}:
        units = [unit for unit in kept if variant in variants[unit]]
        y, x = ([f(totals[unit]) for unit in units] for f in (sum, len))
        found[variant] = Sums.of(y, x, [means.get(unit, known) for unit in units])
    return found


def _counts(each: Exposure, span: Span, until: float = math.inf) -> bool:
    return (
        each.experiment == "ties"
        and not each.is_forced
        and each.at < until
        and each.version >= (span.version_from or 0)
    )


def _values(records: Sequence[Record], metric: str) -> Iterable[tuple[str, float]]:
    for each in records:
        if isinstance(each, Outcome):
            if metric == "error":
                yield each.request_id, float(each.error is not None)
            elif metric == "truncated":
                yield each.request_id, float(each.finish_reason == "length")
            elif each.error is None and hasattr(each, metric):
                yield each.request_id, getattr(each, metric)
        elif getattr(each, "metric", None) == metric:
            yield each.request_id, each.value  # type: ignore[union-attr]


SPANS = [Span(), Span(version_from=2)]


def test_sums_are_those_of_the_units(ties: Store) -> None:
    records = many(np.random.default_rng(0))
    ties.insert(records)
    metrics = ("latency_ms", "first_token_ms", "completion_tokens", "error", "truncated")
    for metric in (*metrics, "abstained", "score", "thumbs"):
        for span in SPANS:
            found, told = ties.sums("ties", metric, span), expected(records, metric, span)
            assert found.keys() == told.keys() == {"control", "routed"}
            for variant, sums in told.items():
                assert astuple(found[variant]) == pytest.approx(astuple(sums), rel=1e-9)


def test_units_are_counted_once(ties: Store) -> None:
    records = many(np.random.default_rng(0))
    ties.insert(records)
    for span in SPANS:
        variants = defaultdict(set)
        for each in records:
            if isinstance(each, Exposure) and _counts(each, span):
                variants[each.unit].add(each.variant)
        kept = [min(seen) for seen in variants.values() if len(seen) == 1]
        counts = {name: kept.count(name) for name in set(kept)}
        assert ties.unit_counts("ties", span) == UnitCounts(counts, len(variants) - len(kept))


def test_a_series_ends_with_all(ties: Store) -> None:
    records = many(np.random.default_rng(0))
    ties.insert(records)
    for metrics, points in ((["latency_ms"], 30), (["score", "latency_ms"], 5), (["thumbs"], 1)):
        told = series(ties, "ties", metrics, points=points, span=Span(version_from=2))
        moments = [at for at, _ in told]
        assert (len(moments), moments) == (points, sorted(moments))
        for at, by_metric in told:
            assert list(by_metric) == metrics
            until = at if at < moments[-1] else math.inf
            for metric, found in by_metric.items():
                want = expected(records, metric, Span(version_from=2), until)
                assert found.keys() == want.keys()
                for variant, sums in want.items():
                    assert astuple(found[variant]) == pytest.approx(astuple(sums), rel=1e-9)
    assert series(ties, "nothing", ["score"], points=5) == []


def series(
    store: Store, experiment: str, metrics: Sequence[str], **given: Any
) -> Sequence[tuple[float, dict[str, dict[str, Sums]]]]:
    with store.reading() as reading:
        return reading.series(experiment, metrics, **given)


def test_results_are_of_one_moment(ties: Store) -> None:
    """Although exposures come whenever a transaction of the reader ends."""
    for at, name in enumerate("abc"):
        ties.insert([exposure(name, at=at), outcome(name)])
    writer = Store(Database(ties.database.engine.url.render_as_string(hide_password=False)))
    names = (f"later-{number}" for number in range(1000))

    def write(_: object) -> None:
        name = next(names)
        writer.insert([exposure(name, at=time.time()), outcome(name)])

    event.listen(ties.database.engine, "commit", write)
    found = results(ties, "ties", points=3)
    writer.database.close()
    told = [each["metrics"].keys() for each in found["series"]]
    assert len(told) == 3
    assert told[0] == told[1] == told[2] == {each["name"] for each in found["metrics"]}
    control = found["metrics"][0]["control_stats"]
    assert control["sample_size"] == found["sample_ratio"]["units"]["control"] == 3


def test_what_answered_a_variant_is_told_once(ties: Store) -> None:
    routed = exposure("d", variant="routed", target="zoo")
    failed = exposure("e", bank="", target="auto")
    ties.insert([exposure("a"), exposure("b"), exposure("c", bank="sha256:1"), routed, failed])
    with ties.reading() as reading:
        assert reading.answered_from("ties") == [
            AnsweredFrom("control", "zoo-ties", "sha256:0"),
            AnsweredFrom("control", "zoo-ties", "sha256:1"),
            AnsweredFrom("routed", "zoo", "sha256:0"),
        ]


def test_another_request_under_the_same_id_is_told_of(ties: Store) -> None:
    assert ties.insert(one_of_each("a")) == 0
    assert ties.insert([*one_of_each("a"), *one_of_each("b")]) == 0  # a journal's, drained again
    assert ties.insert([exposure("a", at=1000.5), exposure("c"), exposure("c", unit="u")]) == 2
    assert ties.insert([exposure("b", caller="somebody else")]) == 1


def test_nothing_sums_to_nothing(ties: Store) -> None:
    ties.insert([exposure("a"), exposure("b", is_forced=True), feedback("b")])
    assert ties.sums("ties", "score") == {}
    assert ties.sums("nothing", "score") == {}
    assert ties.unit_counts("nothing") == UnitCounts({}, 0)


def test_another_experiment_that_had_the_name_is_not_counted(ties: Store) -> None:
    ties.insert([exposure("a", unit="u"), outcome("a", latency_ms=5), shadow_pair("a")])
    with ties.changing() as experiments:
        experiments.delete("ties", experiments.get("ties").etag, who="ann")
        again = experiments.create(experiment(), who="ann")
    assert ties.unit_counts("ties") == UnitCounts({}, 0)
    ties.insert([exposure("b", unit="u", version=again.version), outcome("b", latency_ms=7)])
    assert ties.sums("ties", "latency_ms") == {"control": Sums.of([7], [1], [5])}
    assert paired(ties, "ties", ALL) == []


def test_clocks_that_go_backwards_lose_nothing(ties: Store) -> None:
    """What came before is told by the order of insertion."""
    ties.insert([exposure("old", experiment="aa", unit="u", at=9000.0), outcome("old")])
    ties.insert([exposure("a", unit="u", at=50.0), outcome("a", at=10.0, latency_ms=2)])
    ties.insert([exposure("b", unit="u", at=40.0), outcome("b", at=5.0, latency_ms=3)])
    assert ties.sums("ties", "latency_ms") == {"control": Sums.of([5], [2], [12.5])}
    assert [at for at, _ in series(ties, "ties", ["latency_ms"], points=2)] == [45.0, 50.0]
