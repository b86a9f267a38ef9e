"""The recorder while the database does not answer, or the process is killed."""

from __future__ import annotations

import asyncio
import os
import pwd
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text

from mergeroute.serving.experiments.database import Database, DatabaseDownError
from mergeroute.serving.experiments.journal import Batch, Journal
from mergeroute.serving.experiments.migrations import VERSION_TABLE
from mergeroute.serving.experiments.recorder import Recorder
from mergeroute.serving.experiments.store import Store
from mergeroute.serving.experiments.undrained import Undrained

from .postgres import Cluster
from .recorded import exposure, feedback
from .recording import all_stored, down, drained, record_all, recording, sqlite_store, wait_for
from .shapes import experiment


class _Clumsy(Journal):
    """It fails once, after what was drained is forgotten."""

    is_sound = False

    def drained(self, batch: Batch) -> None:
        super().drained(batch)
        if not self.is_sound:
            self.is_sound = True
            raise OSError(13, "may not be deleted")


def test_a_failure_after_a_batch_was_stored_is_got_over(tmp_path: Path) -> None:
    with sqlite_store(tmp_path) as store, closing(_Clumsy(tmp_path / "journal")) as journal:
        known = Undrained([], kept_s=0.0)
        with closing(Recorder(journal, store, known=known)) as recorder:
            recorder.expose(exposure("a"))
            wait_for(lambda: journal.is_sound and recorder.status()["database"] == "up")
            assert known.exposure("a") is None
            assert recorder.status()["last_error"] is None
        assert store.unit_counts("ties").by_variant == {"control": 1}


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
