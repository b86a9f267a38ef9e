"""What the statistics read: sums over units of assignment, computed by the database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sqlalchemy import (
    ColumnElement,
    Connection,
    Double,
    FromClause,
    Table,
    case,
    cast,
    func,
    select,
)

from .metrics import BUILT_IN
from .statistics.units import Sums
from .tables import experiments, exposures, feedback, outcomes, versions


@dataclass(frozen=True)
class Span:
    """Which exposures count. since, until: seconds since 1970, until not included. version_from:
    those given by this version of the experiment or a later one.
    """

    since: float | None = None
    until: float | None = None
    version_from: int | None = None


ALL = Span()


@dataclass(frozen=True)
class UnitCounts:
    """Units by variant. crossed: how many were seen in several variants; they count nowhere."""

    by_variant: dict[str, int]
    crossed: int


def sums(connection: Connection, experiment: str, metric: str, span: Span) -> dict[str, Sums]:
    """By variant, over the units that have a value; see `Store.sums`."""
    counts = counted(connection, experiment, span)
    totals = _totals(counts, metric, _began(connection, experiment))
    x, y, z = totals.c.x, totals.c.y, totals.c.z
    products = (y, x, y * y, x * x, x * y, z, z * z, y * z, x * z)
    asked = select(totals.c.variant, func.count(), *map(func.sum, products)).group_by(
        totals.c.variant
    )
    return {row[0]: Sums(row[1], *map(float, row[2:])) for row in connection.execute(asked)}


def unit_counts(connection: Connection, experiment: str, span: Span) -> UnitCounts:
    """Units that were exposed."""
    counts = counted(connection, experiment, span)
    units = select(*_VARIANTS).where(*counts).group_by(exposures.c.unit).cte("units")
    variant, last = units.c.variant, units.c.last
    asked = select(variant, last, func.count()).group_by(variant, last)
    rows = connection.execute(asked).all()
    crossed = sum(count for first, last, count in rows if first != last)
    return UnitCounts({first: n for first, last, n in rows if first == last}, crossed)


def series(
    connection: Connection, experiment: str, metric: str, *, points: int, span: Span
) -> list[tuple[float, dict[str, Sums]]]:
    """Sums up to each of so many moments."""
    ends = (func.min(exposures.c.at), func.max(exposures.c.at))
    asked = select(*ends).where(*counted(connection, experiment, span))
    first, last = connection.execute(asked).one()
    if first is None:
        return []
    moments = [first + (last - first) * (point + 1) / points for point in range(points - 1)]
    told = [(at, sums(connection, experiment, metric, replace(span, until=at))) for at in moments]
    return [*told, (last, sums(connection, experiment, metric, span))]


def counted(connection: Connection, experiment: str, span: Span) -> list[ColumnElement[bool]]:
    """Which exposures count: none that was forced, nor those of a deleted experiment that had the
    name before.
    """
    version = max(span.version_from or 0, _first_version(connection, experiment))
    found = [
        exposures.c.experiment == experiment,
        ~exposures.c.is_forced,
        exposures.c.version >= version,
    ]
    if span.since is not None:
        found.append(exposures.c.at >= span.since)
    if span.until is not None:
        found.append(exposures.c.at < span.until)
    return found


def _first_version(connection: Connection, experiment: str) -> int:
    asked = (
        select(versions.c.first_version)
        .join(
            experiments,
            (experiments.c.name == versions.c.name) & (experiments.c.version == versions.c.version),
        )
        .where(versions.c.name == experiment)
    )
    return connection.execute(asked).scalar() or 0


def _began(connection: Connection, experiment: str) -> int:
    """The place of its first exposure in the order of insertion."""
    first = counted(connection, experiment, ALL)
    asked = select(func.min(exposures.c.sequence)).where(*first)
    return connection.execute(asked).scalar() or 0


_VARIANTS = (
    func.min(exposures.c.variant).label("variant"),
    func.max(exposures.c.variant).label("last"),
)
"""The same for a unit that was seen in one variant only."""


def _totals(counts: Sequence[ColumnElement[bool]], metric: str, began: int) -> FromClause:
    """Of every unit that was seen in one variant and has a value: variant, y, x, z."""
    values, value, belongs = _values(metric)
    x = func.count(value)
    own = (
        select(exposures.c.unit, *_VARIANTS, func.sum(value).label("y"), cast(x, Double).label("x"))
        .outerjoin_from(exposures, values, belongs)
        .where(*counts)
        .group_by(exposures.c.unit)
        .having((func.min(exposures.c.variant) == func.max(exposures.c.variant)) & (x > 0))
        .cte("own")
    )
    before = _before(own, metric, began)
    known = func.avg(before.c.mean).over()  # of those that have one
    z = func.coalesce(before.c.mean, known, 0.0).label("z")
    return (
        select(own.c.variant, own.c.y, own.c.x, z)
        .outerjoin(before, before.c.unit == own.c.unit)
        .cte("totals")
    )


def _before(own: FromClause, metric: str, began: int) -> FromClause:
    """The mean of each unit's values before the experiment began, in the order of insertion: clocks
    of several servers need not agree.
    """
    values, value, belongs = _values(metric)
    return (
        select(exposures.c.unit, func.avg(value).label("mean"))
        .join_from(exposures, values, belongs)
        .where(exposures.c.unit.in_(select(own.c.unit)), ~exposures.c.is_forced)
        .where(exposures.c.sequence < began, value.is_not(None))
        .group_by(exposures.c.unit)
        .cte("before")
    )


def _values(metric: str) -> tuple[Table, ColumnElement[float], ColumnElement[bool]]:
    """Where a metric's values are, what they are, and which belong to an exposure. A value is NULL
    where a request has none: how long an answer took and was is told of those without an error.
    """
    belongs = outcomes.c.request_id == exposures.c.request_id
    if metric not in BUILT_IN:
        same = feedback.c.request_id == exposures.c.request_id
        return feedback, feedback.c.value, same & (feedback.c.metric == metric)
    if metric == "error":
        return outcomes, _one_if(outcomes.c.error.is_not(None)), belongs
    if metric == "truncated":
        return outcomes, _one_if(outcomes.c.finish_reason == "length"), belongs
    value = case((outcomes.c.error.is_(None), cast(outcomes.c[metric], Double)))
    return outcomes, value, belongs


def _one_if(condition: ColumnElement[bool]) -> ColumnElement[float]:
    """1 or 0; NULL where there is no outcome at all."""
    one, zero = cast(1.0, Double), cast(0.0, Double)
    return case((outcomes.c.request_id.is_(None), None), (condition, one), else_=zero)
