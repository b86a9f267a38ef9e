"""Everything the database is asked: experiments in transactions, records in batches, sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy import select, text

from . import record_store, sums, tables
from .database import Database
from .experiment_store import DefaultTarget, Experiments, StoredExperiment
from .record_store import AnsweredFrom
from .records import Exposure, Feedback, Record, StoredRequest
from .statistics.units import Sums
from .sums import ALL, Span, UnitCounts

_LOCK = 0x6D657868  # of PostgreSQL: one change of experiments at a time


class Reading(Experiments):
    """Experiments, and what is counted of them, all as of one moment."""

    def sums(self, experiment: str, metric: str, span: Span = ALL) -> dict[str, Sums]:
        """As `Store.sums`."""
        return sums.sums(self._connection, experiment, metric, span)

    def unit_counts(self, experiment: str, span: Span = ALL) -> UnitCounts:
        """As `Store.unit_counts`."""
        return sums.unit_counts(self._connection, experiment, span)

    def series(
        self, experiment: str, metrics: Sequence[str], *, points: int, span: Span = ALL
    ) -> Sequence[tuple[float, dict[str, dict[str, Sums]]]]:
        """Sums by metric and variant up to each of so many moments, evenly from the first exposure
        to the last.
        """
        return sums.series(self._connection, experiment, metrics, points=points, span=span)

    def answered_from(self, experiment: str, span: Span = ALL) -> Sequence[AnsweredFrom]:
        """What answered the variants of an experiment, each once."""
        return record_store.answered_from(self._connection, experiment, span)


class Store:
    """The database as experiments see it. Every method raises DatabaseDownError (503) where the
    database does not answer; all of them wait for it, so none is for the event loop.
    """

    def __init__(self, database: Database) -> None:
        self.database = database

    @contextmanager
    def changing(self) -> Iterator[Experiments]:
        """Experiments, to change: nobody else changes any until the end, when all is committed, or
        nothing where an exception leaves the block.
        """
        with self.database.writing() as connection:
            if connection.dialect.name == "postgresql":  # SQLite has one writer anyway
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
            yield Experiments(connection)

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """Experiments, to read."""
        with self.database.reading() as connection:
            yield Reading(connection)

    def secret(self) -> str:
        """What units are hashed with: drawn once per database, the same for all its servers."""
        with self.database.reading() as connection:
            asked = select(tables.secrets.c.value).where(tables.secrets.c.name == "units")
            return str(connection.execute(asked).scalar_one())

    def get(self, name: str) -> StoredExperiment:
        """As `Experiments.get`."""
        with self.reading() as experiments:
            return experiments.get(name)

    def list(self) -> Sequence[StoredExperiment]:
        """As `Experiments.list`."""
        with self.reading() as experiments:
            return experiments.list()

    def history(self, name: str) -> Sequence[StoredExperiment]:
        """As `Experiments.history`."""
        with self.reading() as experiments:
            return experiments.history(name)

    def settled(self, name: str) -> tuple[StoredExperiment, StoredExperiment]:
        """As `Experiments.settled`."""
        with self.reading() as experiments:
            return experiments.settled(name)

    def default_target(self) -> DefaultTarget | None:
        """As `Experiments.default_target`."""
        with self.reading() as experiments:
            return experiments.default_target()

    def insert(self, records: Sequence[Record]) -> int:
        """Keep records, all or none; those that are there already are left as they are. How many
        exposures were of other requests than those that have their ids.

        Raises:
            DataError, IntegrityError: of SQLAlchemy: a record is at fault, not the database.
        """
        with self.database.writing() as connection:
            return record_store.insert_records(connection, records)

    def find_exposure(self, request_id: str) -> Exposure | None:
        """Of a request."""
        with self.database.reading() as connection:
            return record_store.find(connection, Exposure, request_id)

    def find_request(self, request_id: str) -> StoredRequest | None:
        """What is needed to answer it again."""
        with self.database.reading() as connection:
            return record_store.find(connection, StoredRequest, request_id)

    def find_feedback(
        self, request_id: str, metric: str, *, caller: str, idempotency_key: str | None
    ) -> Feedback | None:
        """What a caller said under the key, else what was said of the request in this metric."""
        with self.database.reading() as connection:
            return record_store.find_feedback(
                connection, request_id, metric, caller, idempotency_key
            )

    def sums(self, experiment: str, metric: str, span: Span = ALL) -> dict[str, Sums]:
        """By variant, over units of assignment: of a built-in metric, else of feedback. Left out:
        forced exposures, and units that were seen in several variants. z is the mean of the unit's
        values before the experiment's first exposure, in whatever experiment it was then; of a unit
        without any, the mean of the others.
        """
        with self.reading() as reading:
            return reading.sums(experiment, metric, span)

    def unit_counts(self, experiment: str, span: Span = ALL) -> UnitCounts:
        """Units that were exposed; what a sample-ratio test reads."""
        with self.reading() as reading:
            return reading.unit_counts(experiment, span)
