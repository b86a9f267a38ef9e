"""Records in the database: each is written once, whoever writes it again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, Table, or_, select
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from .records import Exposure, Feedback, Record, StoredRequest, values_of
from .sums import Span, counted
from .tables import TABLES, exposures, feedback

_Kind = TypeVar("_Kind", Exposure, Feedback, StoredRequest)


@dataclass(frozen=True)
class AnsweredFrom:
    """What answered a variant's requests. bank: its digest."""

    variant: str
    target: str
    bank: str


def insert_records(connection: Connection, records: Sequence[Record]) -> int:
    """Keep records; those that are there already are left as they are. How many exposures were of
    other requests than those that have their ids.
    """
    by_kind, repeated = defaultdict(list), 0
    for record in records:
        by_kind[type(record)].append(values_of(record))
    is_sqlite = connection.dialect.name == "sqlite"
    for kind, rows in by_kind.items():
        insert = sqlite_insert(TABLES[kind]) if is_sqlite else postgresql_insert(TABLES[kind])
        done = connection.execute(
            insert.on_conflict_do_nothing(), rows, execution_options={"preserve_rowcount": True}
        )
        if kind is Exposure and done.rowcount != len(rows):
            repeated = _repeated(connection, rows)
    return repeated


def _repeated(connection: Connection, rows: Sequence[dict[str, Any]]) -> int:
    """How many exposures differ from what is stored of their requests; a journal that was drained
    before holds the same again.
    """
    columns = [exposures.c[name] for name in ("request_id", "unit", "caller", "at")]
    ids = {row["request_id"] for row in rows}
    asked = select(*columns).where(exposures.c.request_id.in_(ids))
    stored = {tuple(found) for found in connection.execute(asked)}
    return sum(tuple(row[column.name] for column in columns) not in stored for row in rows)


def find(connection: Connection, kind: type[_Kind], request_id: str) -> _Kind | None:
    """The one record of a kind that a request has."""
    table = TABLES[kind]
    found = _read(connection, kind, [table.c.request_id == request_id])
    return found[0] if found else None


def find_feedback(
    connection: Connection, request_id: str, metric: str, caller: str, key: str | None
) -> Feedback | None:
    """What a caller said under the key, else what was said of the request in this metric."""
    same = (feedback.c.request_id == request_id) & (feedback.c.metric == metric)
    keyed = (feedback.c.caller == caller) & (feedback.c.idempotency_key == key)
    found = _read(connection, Feedback, [or_(same, keyed) if key is not None else same])
    by_key = [each for each in found if key is not None and each.idempotency_key == key]
    return next(iter([*by_key, *found]), None)


def answered_from(connection: Connection, experiment: str, span: Span) -> list[AnsweredFrom]:
    """All that there is, each once; nothing of requests that failed before they had a bank."""
    columns = [exposures.c[each.name] for each in fields(AnsweredFrom)]
    counts = [*counted(connection, experiment, span), exposures.c.bank != ""]
    asked = select(*columns).where(*counts).distinct().order_by(*columns)
    return [AnsweredFrom(*row) for row in connection.execute(asked)]


def _read(
    connection: Connection, kind: type[_Kind], where: Sequence[ColumnElement[bool]]
) -> list[_Kind]:
    table: Table = TABLES[kind]
    asked = select(*(table.c[each.name] for each in fields(kind))).where(*where)
    return [kind(*row) for row in connection.execute(asked)]
