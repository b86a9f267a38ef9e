"""The database: its URL, its connections, its schema, and what it means when it does not answer."""

from __future__ import annotations

import importlib.util
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DataError,
    DBAPIError,
    IntegrityError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from ..errors import ApiError, SettingsError
from .migrations import upgrade

_DRIVERS = {
    "sqlite": "sqlite+pysqlite",
    "sqlite+pysqlite": "sqlite+pysqlite",
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
_SECRETS = ("password", "sslpassword")
_BUSY_S = 2.0
_PATIENCE: dict[str, Any] = {"connect_timeout": 3, "tcp_user_timeout": 10_000}
_POSTGRES_BEGIN = (
    "SELECT set_config('lock_timeout', '5s', true), set_config('statement_timeout', '300s', true)"
)
_Identity = tuple[int, int]


class DatabaseDownError(ApiError):
    """The database cannot be used now; trying again may help."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=503, code="database_unavailable")


class Database:
    """A SQLite file or a PostgreSQL database. Nothing is connected to before it is used.

    name: the URL without its secrets.

    Raises:
        SettingsError: the URL names no database that can be used.
    """

    def __init__(self, url: str) -> None:
        parsed = _parsed(url)
        self.name = parsed.difference_update_query(_SECRETS).render_as_string()
        self.engine = _engine(parsed)
        self._file = Path(parsed.database or "") if _is_sqlite(self.engine) else None
        self._identity: _Identity | None = None
        self._is_prepared = False
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Bring the schema up to date; done by the first use at the latest.

        Raises:
            DatabaseDownError: the database does not answer.
            SettingsError: its schema is newer than this program, or it is no database.
        """
        with self._lock, self._explained():
            self._find_file()
            if not self._is_prepared:
                if self._file:
                    _write_ahead(self.engine)
                with self.engine.connect() as connection:
                    upgrade(connection, self.name)
                self._identity = _identity(self._file)
                self._is_prepared = True

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that reads, all as of one moment.

        Raises:
            DatabaseDownError: the database does not answer.
        """
        with self._transaction(is_writing=False) as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes; committed at the end.

        Raises:
            DatabaseDownError: the database does not answer, or cannot be written.
        """
        with self._transaction(is_writing=True) as connection:
            yield connection

    def close(self) -> None:
        """Leave it."""
        self.engine.dispose()

    @contextmanager
    def _transaction(self, *, is_writing: bool) -> Iterator[Connection]:
        self.prepare()
        before = self._identity
        with self._explained():
            with self.engine.connect() as connection:
                _begin_as(connection, is_writing=is_writing)
                with connection.begin():
                    yield connection
            if _identity(self._file) != before:  # written into a file nobody has
                raise DatabaseDownError(f"{self.name} was taken away while it was written")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (DataError, IntegrityError):  # what was to be written is at fault
            raise
        except (DBAPIError, PoolTimeoutError) as error:
            self._is_prepared = False  # it may come back as another one
            self.engine.dispose()  # and what was opened read-only stays so
            text = _text(error)
            if isinstance(error, DatabaseError) and "file is not a database" in text:
                raise SettingsError(
                    f"{self.name} is no SQLite database: name another with --database"
                ) from error
            raise DatabaseDownError(f"the database does not answer: {text}") from error

    def _find_file(self) -> None:
        """SQLite goes on writing into a file that was removed; nothing of that would be found."""
        if self._file is None or self._identity is None:
            return
        found = _identity(self._file)
        if found != self._identity:
            self.engine.dispose()
            self._is_prepared = False
        if found is None:
            raise DatabaseDownError(
                f"the database file {self._file} is gone: put it back, or restart the server to "
                "begin with an empty one"
            )


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise SettingsError(
            "the database is no SQLAlchemy URL: write sqlite:////path/to/file.sqlite or "
            "postgresql://user:password@host/name"
        ) from error
    driver = _DRIVERS.get(parsed.drivername)
    if driver is None:
        raise SettingsError(
            f"the database is {parsed.drivername}, it must be sqlite or postgresql (psycopg)"
        )
    if driver.startswith("sqlite"):
        _check_file(parsed)
    elif importlib.util.find_spec("psycopg") is None:
        raise SettingsError("PostgreSQL needs psycopg: pip install 'mergeroute[postgres]'")
    return parsed.set(drivername=driver)


def _check_file(url: URL) -> None:
    name = url.database or ""
    if name in ("", ":memory:") or name.startswith("file:"):
        raise SettingsError(
            f"the database {url.render_as_string()} is no file, and would be lost at the end: "
            "write sqlite:////path/to/file.sqlite"
        )
    if not Path(name).parent.is_dir():
        raise SettingsError(f"the database's folder {Path(name).parent} is not there: make it")


def _engine(url: URL) -> Engine:
    if url.drivername.startswith("sqlite"):
        engine = create_engine(url, hide_parameters=True, connect_args={"timeout": _BUSY_S})
        event.listen(engine, "connect", _connect_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    patience = {key: value for key, value in _PATIENCE.items() if key not in url.query}
    engine = create_engine(
        url,
        hide_parameters=True,
        pool_pre_ping=True,
        pool_timeout=5,
        connect_args={**patience, "prepare_threshold": None},  # PgBouncer may be between
    )
    event.listen(engine, "begin", _begin_postgres)
    return engine


def _connect_sqlite(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # transactions begin where we say, not before a first write
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: Connection) -> None:
    if connection.get_execution_options().get("is_writing"):
        connection.exec_driver_sql("PRAGMA synchronous=FULL")  # journals go after a commit
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.exec_driver_sql("BEGIN")


def _begin_postgres(connection: Connection) -> None:
    connection.exec_driver_sql(_POSTGRES_BEGIN)


def _begin_as(connection: Connection, *, is_writing: bool) -> None:
    connection.execution_options(is_writing=is_writing)
    if connection.dialect.name == "postgresql" and not is_writing:
        connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def _write_ahead(engine: Engine) -> None:
    """Readers and the writer do not wait for each other. A file that cannot be changed stays as it
    is; one that cannot be used is told of by its next use.
    """
    with suppress(OSError):  # its folder may be anybody's to read
        Path(engine.url.database or "").touch(mode=0o600, exist_ok=False)
    with suppress(sqlite3.Error), closing(engine.raw_connection()) as connection:
        connection.cursor().execute("PRAGMA journal_mode=WAL")


def _is_sqlite(engine: Engine) -> bool:
    return engine.dialect.name == "sqlite"


def _identity(file: Path | None) -> _Identity | None:
    """Which file lies there."""
    try:
        found = file.stat() if file else None
    except OSError:
        found = None
    return (found.st_dev, found.st_ino) if found else None


def _text(error: SQLAlchemyError) -> str:
    """The driver's own words: SQLAlchemy's hold the statement."""
    told = str(getattr(error, "orig", None) or error).strip()
    return " ".join(told.split())
