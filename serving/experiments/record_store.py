"""Records in the database: each is written once, whoever writes it again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from typing import TypeVar

from sqlalchemy import ColumnElement, Connection, Table, or_, select
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from .records import Exposure, Feedback, Record, ShadowPair, StoredRequest, values_of
from .sums import Span, counted
from .tables import TABLES, exposures, feedback, shadow_pairs

_Kind = TypeVar("_Kind", Exposure, Feedback, ShadowPair, StoredRequest)


def insert_records(connection: Connection, records: Sequence[Record]) -> None:
    """Keep records; those that are there already are left as they are."""
    by_kind = defaultdict(list)
    for record in records:
        by_kind[type(record)].append(values_of(record))
    is_sqlite = connection.dialect.name == "sqlite"
    for kind, rows in by_kind.items():
        insert = sqlite_insert(TABLES[kind]) if is_sqlite else postgresql_insert(TABLES[kind])
        connection.execute(insert.on_conflict_do_nothing(), rows)


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


def read_shadow_pairs(connection: Connection, experiment: str, span: Span) -> list[ShadowPair]:
    """Of an experiment, in the order of their insertion."""
    given = select(exposures.c.request_id).where(*counted(connection, experiment, span))
    asked = [shadow_pairs.c.experiment == experiment, shadow_pairs.c.request_id.in_(given)]
    return _read(connection, ShadowPair, asked, order=shadow_pairs.c.sequence)


def _read(
    connection: Connection,
    kind: type[_Kind],
    where: Sequence[ColumnElement[bool]],
    order: ColumnElement[int] | None = None,
) -> list[_Kind]:
    table: Table = TABLES[kind]
    asked = select(*(table.c[each.name] for each in fields(kind))).where(*where).order_by(order)
    return [kind(*row) for row in connection.execute(asked)]
