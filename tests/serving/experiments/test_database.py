"""Database URLs, the schema, and what is said of a database that cannot be used."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from mergeroute.serving.errors import SettingsError
from mergeroute.serving.experiments.database import Database, DatabaseDownError
from mergeroute.serving.experiments.migrations import VERSION_TABLE
from mergeroute.serving.experiments.tables import metadata


def sqlite_database(tmp_path: Path) -> Database:
    """In a file of its own."""
    return Database(f"sqlite:///{tmp_path}/experiments.sqlite")


def test_the_migrations_make_the_tables(database: Database) -> None:
    with database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        ours = [
            change
            for change in compare_metadata(context, metadata)
            if VERSION_TABLE not in str(change)
        ]
    assert ours == []


def test_preparing_again_changes_nothing(database: Database, database_url: str) -> None:
    database.prepare()
    again = Database(database_url)
    again.prepare()
    again.close()
    with database.reading() as connection:
        assert connection.execute(text(f"SELECT count(*) FROM {VERSION_TABLE}")).scalar() == 1


def test_replicas_prepare_at_once(database_url: str) -> None:
    databases = [Database(database_url) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(Database.prepare, databases))
    for database in databases:
        database.close()


def test_a_newer_schema_is_refused_by_name(database: Database, database_url: str) -> None:
    with database.writing() as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    other = Database(database_url)
    with pytest.raises(SettingsError, match=r"has schema 9999, .* up to 0001"):
        other.prepare()
    other.close()


def test_what_fails_is_not_committed(database: Database) -> None:
    def fail() -> None:
        with database.writing() as connection:
            connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with database.reading() as connection:
        found = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
    assert found == "0001"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nothing", "no SQLAlchemy URL"),
        ("mysql://root:hunter2@host/name", "is mysql, it must be sqlite or postgresql"),
        ("postgresql+psycopg2://root:hunter2@host/name", "must be sqlite or postgresql"),
        ("sqlite://", "is no file"),
        ("sqlite:///:memory:", "is no file"),
        ("sqlite:////nowhere/at/all/a.sqlite", "folder /nowhere/at/all is not there"),
    ],
)
def test_urls_that_cannot_be_used(url: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told) as caught:
        Database(url)
    assert "hunter2" not in str(caught.value)


def test_secrets_are_not_told() -> None:
    url = "postgresql://me:hunter2@127.0.0.1:1/name?sslpassword=hunter3&password=hunter4"
    database = Database(url)
    with pytest.raises(DatabaseDownError) as caught:
        database.prepare()
    database.close()
    for secret in ("hunter2", "hunter3", "hunter4"):
        assert secret not in database.name + str(caught.value)
    assert database.name == "postgresql+psycopg://me:***@127.0.0.1:1/name"


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "experiments.sqlite").write_text("dear diary, " * 100)
    database = sqlite_database(tmp_path)
    with pytest.raises(SettingsError, match="is no SQLite database"):
        database.prepare()
    database.close()


def test_sqlite_writes_ahead_and_readers_do_not_wait(tmp_path: Path) -> None:
    database = sqlite_database(tmp_path)
    database.prepare()
    other = sqlite3.connect(tmp_path / "experiments.sqlite", isolation_level=None)
    try:
        other.execute("BEGIN EXCLUSIVE")
        with database.reading() as connection:
            assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        with (
            pytest.raises(DatabaseDownError, match="database is locked"),
            database.writing(),
        ):
            pass
    finally:
        other.close()
        database.close()


def test_a_sqlite_file_is_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "experiments.sqlite"
    database = Database(f"sqlite:///{file}")
    database.prepare()
    with database.writing():
        modes = {each.name: each.stat().st_mode & 0o777 for each in tmp_path.iterdir()}
    assert set(modes.values()) == {0o600}, modes
    database.close()


def test_a_file_that_was_taken_away_is_missed(tmp_path: Path) -> None:
    database = sqlite_database(tmp_path)
    database.prepare()
    (tmp_path / "experiments.sqlite").rename(tmp_path / "elsewhere")
    with pytest.raises(DatabaseDownError, match="is gone"), database.reading():
        pass
    (tmp_path / "elsewhere").rename(tmp_path / "experiments.sqlite")
    with database.reading() as connection:
        assert connection.execute(text(f"SELECT count(*) FROM {VERSION_TABLE}")).scalar() == 1
    database.close()


def test_a_file_that_is_taken_away_meanwhile_was_not_written(tmp_path: Path) -> None:
    database = sqlite_database(tmp_path)
    database.prepare()

    def lose() -> None:
        with database.writing() as connection:
            connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
            (tmp_path / "experiments.sqlite").unlink()

    with pytest.raises(DatabaseDownError, match="taken away"):
        lose()
    database.close()
