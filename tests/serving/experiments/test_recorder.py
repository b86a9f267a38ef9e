"""The recorder: records reach the database, and what happens while it does not answer."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mergeroute.serving.errors import ApiError
from mergeroute.serving.experiments.database import DatabaseDownError
from mergeroute.serving.experiments.journal import JournalFullError
from mergeroute.serving.experiments.recorder import Recorder
from mergeroute.serving.experiments.records import to_line
from mergeroute.serving.experiments.store import Store

from .recorded import exposure, feedback, outcome
from .recording import all_stored, drained, record_all, recording, sqlite_store


def test_records_reach_the_database(ties: Store, tmp_path: Path) -> None:
    with recording(tmp_path / "journal", ties) as recorder:
        record_all(recorder, "a")
        drained(recorder)
        all_stored(ties, "a")
        assert recorder.status() == {
            "database": "up",
            "backlog": 0,
            "backlog_bytes": 0,
            "dropped": 0,
            "refused": 0,
            "repeated": 0,
            "last_error": None,
        }


def test_closing_drains(ties: Store, tmp_path: Path) -> None:
    with recording(tmp_path / "journal", ties) as recorder:
        record_all(recorder, "a")
    all_stored(ties, "a")
    assert list((tmp_path / "journal").glob("0*")) == []


def test_what_comes_after_the_end_is_refused(ties: Store, tmp_path: Path) -> None:
    with recording(tmp_path / "journal", ties) as recorder:
        pass
    recorder.expose(exposure("a"))
    assert recorder.status()["dropped"] == 1
    with pytest.raises(JournalFullError, match="the server stops"):
        asyncio.run(recorder.feedback(feedback("a")))
    with pytest.raises(DatabaseDownError):
        asyncio.run(recorder.find("a"))


def test_thousands_at_once(ties: Store, tmp_path: Path) -> None:
    with recording(tmp_path / "journal", ties) as recorder:
        for number in range(3000):
            recorder.expose(exposure(f"r{number}"))
    assert ties.unit_counts("ties").by_variant == {"control": 3000}


def test_a_record_at_fault_holds_nothing_up(ties: Store, tmp_path: Path) -> None:
    bad = outcome("bad", status=2**70)
    with recording(tmp_path / "journal", ties) as recorder:
        recorder.finish(bad)
        record_all(recorder, "a")
        drained(recorder)
        assert recorder.status()["refused"] == 1
    all_stored(ties, "a")
    assert (tmp_path / "journal/refused.jsonl").read_bytes() == to_line(bad)


def test_a_request_id_that_comes_again_is_counted(ties: Store, tmp_path: Path) -> None:
    with recording(tmp_path / "journal", ties) as recorder:
        record_all(recorder, "a")
        recorder.expose(exposure("a", at=2000.0, unit="somebody else"))
        drained(recorder)
        assert recorder.status()["repeated"] == 1
    all_stored(ties, "a")


def test_unknown_requests_are_refused_after_a_while(tmp_path: Path) -> None:
    with sqlite_store(tmp_path) as store, recording(tmp_path / "journal", store) as recorder:
        began = time.perf_counter()
        with pytest.raises(ApiError, match="no answer with the request id 'nobody'") as caught:
            asyncio.run(recorder.find("nobody"))
        assert 1.9 < time.perf_counter() - began < 4
        assert (caught.value.status, caught.value.param) == (404, "request_id")


def test_an_exposure_of_another_replica_is_waited_for(ties: Store, tmp_path: Path) -> None:
    with recording(tmp_path / "journal", ties) as recorder:
        threading.Timer(0.4, ties.insert, [[exposure("a")]]).start()
        assert asyncio.run(recorder.find("a")) == exposure("a")


@pytest.mark.parametrize("is_stored", [False, True])
def test_feedback_counts_once(ties: Store, tmp_path: Path, is_stored: bool) -> None:
    if is_stored:
        ties.insert([feedback("a"), feedback("b", idempotency_key="k")])
    with recording(tmp_path / "journal", ties) as recorder:

        def give(*given: Any, **named: Any) -> bool:
            return asyncio.run(recorder.feedback(feedback(*given, **named)))

        assert give("a") is not is_stored
        assert give("b", idempotency_key="k") is not is_stored
        assert not give("a", at=5.0)
        assert not give("b", idempotency_key="k")
        assert not give("b", idempotency_key="k2")
        for value, key, told in (
            (2.0, None, "score of this request is 1 already"),
            (2.0, "k3", "score of this request is 1 already"),
            (1.0, "k", "was used for other feedback"),
        ):
            with pytest.raises(ApiError, match=told) as caught:
                give("a", value, idempotency_key=key)
            assert caught.value.status == 409
        assert give("a", 2.0, metric="other")
        assert give("a", 2.0, metric="third", idempotency_key="k", caller="somebody else")
    assert ties.find_feedback("a", "score", caller="app", idempotency_key=None) == feedback("a")


def test_of_feedback_at_once_one_is_new(ties: Store, tmp_path: Path) -> None:
    async def give(recorder: Recorder) -> list[bool]:
        return await asyncio.gather(*(recorder.feedback(feedback("a")) for _ in range(20)))

    with recording(tmp_path / "journal", ties) as recorder:
        assert sum(asyncio.run(give(recorder))) == 1


def test_feedback_that_is_not_kept_is_not_acknowledged(tmp_path: Path) -> None:
    with sqlite_store(tmp_path) as store, recording(tmp_path / "j", store, limit_bytes=9) as full:
        full.expose(exposure("a"))
        with pytest.raises(JournalFullError):
            asyncio.run(full.feedback(feedback("a")))
        assert full.status()["dropped"] == 2
