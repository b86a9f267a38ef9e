"""The recorder: records reach the database, and what happens while it does not answer."""

from __future__ import annotations

import asyncio
import os
import pwd
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from mergeroute.serving.errors import ApiError
from mergeroute.serving.experiments.database import Database, DatabaseDownError
from mergeroute.serving.experiments.journal import Journal, JournalFullError
from mergeroute.serving.experiments.migrations import VERSION_TABLE
from mergeroute.serving.experiments.recorder import Recorder
from mergeroute.serving.experiments.records import to_line
from mergeroute.serving.experiments.store import Store
from mergeroute.serving.experiments.sums import UnitCounts

from .postgres import Cluster
from .recorded import exposure, feedback, outcome, shadow_pair, stored_request
from .shapes import experiment

SLOWEST_S = 0.25
"""Most that recording may take while the database does not answer: it takes some 20 us where the
machine has nothing else to do, and the database would be waited for ten times as long.
"""


@contextmanager
def recording(folder: Path, store: Store, **given: Any) -> Iterator[Recorder]:
    """A recorder with a journal in a folder."""
    journal = Journal(folder, **given)
    recorder = Recorder(journal, store)
    try:
        yield recorder
    finally:
        recorder.close()
        journal.close()


@contextmanager
def sqlite_store(folder: Path) -> Iterator[Store]:
    """A store in a file, with the experiment that records are of."""
    with closing(Database(f"sqlite:///{folder}/experiments.sqlite")) as database:
        store = Store(database)
        with store.changing() as experiments:
            experiments.create(experiment(), who="ann")
        yield store


@pytest.fixture
def ties(store: Store) -> Store:
    """A store with the experiment that records are of."""
    with store.changing() as experiments:
        experiments.create(experiment(), who="ann")
    return store


def wait_for(condition: Callable[[], bool]) -> None:
    """Half a minute at most."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.02)


def drained(recorder: Recorder) -> None:
    """Wait until the database has all."""
    wait_for(lambda: recorder.status()["backlog"] == 0)


def down(recorder: Recorder, told: str) -> None:
    """Wait until the status tells why nothing is stored."""
    wait_for(lambda: told in str(recorder.status()["last_error"]))
    assert recorder.status()["database"] == "down"


def record_all(recorder: Recorder, request_id: str) -> None:
    """One record of each kind, none of which takes long."""
    began = time.perf_counter()
    recorder.expose(exposure(request_id))
    recorder.finish(outcome(request_id))
    assert asyncio.run(recorder.find(request_id)) == exposure(request_id)
    assert asyncio.run(recorder.feedback(feedback(request_id)))
    recorder.shadow(shadow_pair(request_id))
    recorder.keep(stored_request(request_id))
    assert time.perf_counter() - began < 6 * SLOWEST_S


def all_stored(store: Store, *names: str) -> None:
    """Everything that `record_all` recorded, once."""
    assert store.unit_counts("ties") == UnitCounts({"control": len(names)}, 0)
    for metric in ("latency_ms", "score"):
        assert store.sums("ties", metric)["control"].n == len(names)
    for name in names:
        assert store.find_exposure(name) == exposure(name)
        assert store.find_request(name) == stored_request(name)
    assert len(store.shadow_pairs("ties")) == len(names)


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


def test_a_locked_database(tmp_path: Path) -> None:
    with sqlite_store(tmp_path) as store, recording(tmp_path / "journal", store) as recorder:
        with closing(_other(tmp_path)) as other:
            other.execute("BEGIN EXCLUSIVE")
            record_all(recorder, "a")
            down(recorder, "database is locked")
            record_all(recorder, "b")
        drained(recorder)
        all_stored(store, "a", "b")
        assert recorder.status()["database"] == "up"


def test_a_full_database(tmp_path: Path) -> None:
    with sqlite_store(tmp_path) as store:
        with store.database.reading() as connection:
            pages = connection.execute(text("PRAGMA page_count")).scalar_one()
            connection.execute(text(f"PRAGMA max_page_count = {pages}"))
        with recording(tmp_path / "journal", store) as recorder:
            for number in range(200):
                recorder.expose(exposure(f"r{number}"))
            down(recorder, "database or disk is full")
            record_all(recorder, "a")
            with store.database.reading() as connection:
                connection.execute(text("PRAGMA max_page_count = 100000"))
            drained(recorder)
        assert store.unit_counts("ties").by_variant == {"control": 201}


def test_a_file_that_may_not_be_written() -> None:
    with (
        tempfile.TemporaryDirectory() as name,
        unprivileged(Path(name)) as folder,
        sqlite_store(folder) as store,
    ):
        store.database.close()
        (folder / "experiments.sqlite").chmod(0o400)
        with recording(folder / "journal", store) as recorder:
            record_all(recorder, "a")
            down(recorder, "attempt to write a readonly database")
            for file in folder.glob("experiments.sqlite*"):  # SQLite gave its own files that mode
                file.chmod(0o600)
            drained(recorder)
        all_stored(store, "a")


@contextmanager
def unprivileged(folder: Path) -> Iterator[Path]:
    """As somebody who owns the folder, and who is not root: root may write everything."""
    if os.geteuid() != 0:
        yield folder
        return
    nobody = pwd.getpwnam("nobody")
    os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    os.seteuid(nobody.pw_uid)
    try:
        yield folder
    finally:
        os.seteuid(0)


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "database"
    folder.mkdir()
    with sqlite_store(folder) as store, recording(tmp_path / "journal", store) as recorder:
        record_all(recorder, "a")
        drained(recorder)
        folder.rename(tmp_path / "elsewhere")
        record_all(recorder, "b")
        down(recorder, "is gone: put it back")
        (tmp_path / "elsewhere").rename(folder)
        drained(recorder)
        all_stored(store, "a", "b")


def test_a_newer_schema(ties: Store, tmp_path: Path) -> None:
    _set_schema(ties, "9999")
    ties.database.close()
    with (
        closing(Database(_url(ties))) as database,
        recording(tmp_path / "journal", Store(database)) as recorder,
    ):
        record_all(recorder, "a")
        down(recorder, "has schema 9999")
        _set_schema(ties, "0001")
        drained(recorder)
    all_stored(ties, "a")


def test_postgres_stops_and_starts(cluster: Cluster, tmp_path: Path) -> None:
    with closing(Database(cluster.url())) as database:
        store = Store(database)
        with store.changing() as experiments:
            experiments.create(experiment(), who="ann")
        with recording(tmp_path / "journal", store) as recorder:
            record_all(recorder, "a")
            drained(recorder)
            cluster.stop()
            try:
                record_all(recorder, "b")
                down(recorder, "the database does not answer")
                record_all(recorder, "c")
                with pytest.raises(DatabaseDownError) as caught:
                    asyncio.run(recorder.find("nobody"))
                assert caught.value.status == 503
            finally:
                cluster.start()
            drained(recorder)
            all_stored(store, "a", "b", "c")


def test_what_was_not_drained_is_known_after_a_restart(tmp_path: Path) -> None:
    with sqlite_store(tmp_path) as store, closing(_other(tmp_path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with recording(tmp_path / "journal", store) as recorder:
            record_all(recorder, "a")
        with recording(tmp_path / "journal", store) as recorder:
            assert asyncio.run(recorder.find("a")) == exposure("a")
            assert not asyncio.run(recorder.feedback(feedback("a")))
            other.rollback()
            drained(recorder)
        all_stored(store, "a")


def test_a_process_that_is_killed_loses_nothing(ties: Store, tmp_path: Path) -> None:
    """Again and again, while it drains; what was stored and is found in the journal counts once."""
    told = 0
    for run in range(2):
        program = [sys.executable, "-c", _KILLED, _url(ties), str(tmp_path / "journal"), str(run)]
        process = subprocess.Popen(program, stdout=subprocess.PIPE)
        assert process.stdout is not None
        acknowledged = [process.stdout.readline() for _ in range(600)]
        os.kill(process.pid, signal.SIGKILL)
        acknowledged += process.stdout.read().splitlines(keepends=True)
        process.wait(30)
        process.stdout.close()
        told += sum(line.endswith(b"\n") for line in acknowledged)
    with recording(tmp_path / "journal", ties) as recorder:
        drained(recorder)
    stored = ties.unit_counts("ties").by_variant["control"]
    assert told <= stored <= told + 2
    assert told <= ties.sums("ties", "score")["control"].n <= told + 2


_KILLED = """
import itertools, sys, time
from pathlib import Path
from mergeroute.serving.experiments.database import Database
from mergeroute.serving.experiments.journal import Journal
from mergeroute.serving.experiments.recorder import Recorder
from mergeroute.serving.experiments.store import Store
from tests.serving.experiments.recorded import exposure, feedback
journal = Journal(Path(sys.argv[2]))
recorder = Recorder(journal, Store(Database(sys.argv[1])))
for number in itertools.count():
    name = f"{sys.argv[3]}-{number}"
    recorder.expose(exposure(name))
    journal.append(feedback(name))
    print(name, flush=True)
    time.sleep(0.0005)
"""


def _other(folder: Path) -> sqlite3.Connection:
    """Another program that has the database open."""
    return sqlite3.connect(folder / "experiments.sqlite", isolation_level=None)


def _url(store: Store) -> str:
    return store.database.engine.url.render_as_string(hide_password=False)


def _set_schema(store: Store, revision: str) -> None:
    with store.database.engine.begin() as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '{revision}'"))
