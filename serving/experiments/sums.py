"""What the statistics read: sums over units of assignment, computed by the database."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    ColumnElement,
    Connection,
    Double,
    FromClause,
    case,
    cast,
    func,
    literal,
    select,
)

from .metric_values import values_of
from .statistics.units import Sums
from .tables import experiments, exposures, feedback, versions


@dataclass(frozen=True)
class Span:
    """Which exposures count. version_from: those given by this version of the experiment or a
    later one; None: all since its creation.
    """

    version_from: int | None = None


ALL = Span()


@dataclass(frozen=True)
class UnitCounts:
    """Units by variant. crossed: how many were seen in several variants; they count nowhere."""

    by_variant: dict[str, int]
    crossed: int


def sums(connection: Connection, experiment: str, metric: str, span: Span) -> dict[str, Sums]:
    """By variant, over the units that have a value; see `Store.sums`."""
    return _up_to(connection, experiment, metric, span, ())[0]


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
    connection: Connection, experiment: str, metrics: Sequence[str], *, points: int, span: Span
) -> list[tuple[float, dict[str, dict[str, Sums]]]]:
    """Sums up to each of so many moments, by metric and variant."""
    ends = (func.min(exposures.c.at), func.max(exposures.c.at))
    asked = select(*ends).where(*counted(connection, experiment, span))
    first, last = connection.execute(asked).one()
    if first is None:
        return []
    moments = [first + (last - first) * (point + 1) / points for point in range(points - 1)]
    told = {metric: _up_to(connection, experiment, metric, span, moments) for metric in metrics}
    return [
        (at, {metric: each[number] for metric, each in told.items()})
        for number, at in enumerate([*moments, last])
    ]


def counted(connection: Connection, experiment: str, span: Span) -> list[ColumnElement[bool]]:
    """Which exposures count: none that was forced, nor those of a deleted experiment that had the
    name before.
    """
    version = max(span.version_from or 0, _first_version(connection, experiment))
    return [
        exposures.c.experiment == experiment,
        ~exposures.c.is_forced,
        exposures.c.version >= version,
    ]


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


def _began(connection: Connection, experiment: str) -> tuple[int, float]:
    """Its first exposure: the place in the order of insertion, and when."""
    first = (func.min(exposures.c.sequence), func.min(exposures.c.at))
    asked = select(*first).where(*counted(connection, experiment, ALL))
    sequence, at = connection.execute(asked).one()
    return sequence or 0, at or 0.0


_VARIANTS = (
    func.min(exposures.c.variant).label("variant"),
    func.max(exposures.c.variant).label("last"),
)
"""The same for a unit that was seen in one variant only."""


def _up_to(
    connection: Connection, experiment: str, metric: str, span: Span, moments: Sequence[float]
) -> list[dict[str, Sums]]:
    """Sums over the exposures before each of the moments, which ascend; at last, over all."""
    counts = counted(connection, experiment, span)
    totals = _totals(counts, metric, _began(connection, experiment), moments)
    keys = (totals.c.variant, totals.c.slot, totals.c.until)
    y, x, z = totals.c.y, totals.c.x, totals.c.z
    is_known = case((z.is_not(None), 1.0), else_=0.0)
    known = (is_known, z, z * z, y * z, x * z, y * is_known, x * is_known)
    summed = [func.sum(each) for each in (y, x, y * y, x * x, x * y, *known)]
    found: dict[str, NDArray[np.float64]] = defaultdict(
        lambda: np.zeros((len(moments) + 1, 1 + len(summed)))
    )
    for variant, slot, until, *values in connection.execute(
        select(*keys, func.count(), *summed).group_by(*keys)
    ):
        found[variant][slot:until] += [value or 0.0 for value in values]
    return [
        _filled({variant: each[slot] for variant, each in found.items()})
        for slot in range(len(moments) + 1)
    ]


def _filled(rows: dict[str, NDArray[np.float64]]) -> dict[str, Sums]:
    """By variant, where there are units: those without a past have the mean past of the others.

    rows: units, and sums of y, x, yy, xx, xy over them; then, of those with a past, their number
    and sums of z, zz, yz, xz, y, x.
    """
    known = sum(row[6] for row in rows.values())
    fill = sum(row[7] for row in rows.values()) / known if known else 0.0
    told = {}
    for variant, (n, y, x, yy, xx, xy, k, z, zz, yz, xz, ky, kx) in rows.items():
        if n:
            past = (z + fill * (n - k), zz + fill * fill * (n - k))
            both = (yz + fill * (y - ky), xz + fill * (x - kx))
            told[variant] = Sums(int(n), *map(float, (y, x, yy, xx, xy, *past, *both)))
    return told


def _totals(
    counts: Sequence[ColumnElement[bool]],
    metric: str,
    began: tuple[int, float],
    moments: Sequence[float],
) -> FromClause:
    """What each unit adds up to: variant, y, x, z from its slot on until another one (NULL: until
    the end), while it was seen in one variant and has a value. z: NULL where there is no past.
    """
    own = _by_slot(counts, metric, moments)
    told = {
        "until": func.lead(own.c.slot),
        "variant": func.min(own.c.variant),
        "last": func.max(own.c.last),
        "y": func.sum(own.c.y),
        "x": func.sum(own.c.x),
    }
    columns = (
        each.over(partition_by=own.c.unit, order_by=own.c.slot).label(name)
        for name, each in told.items()
    )
    so_far = select(own.c.unit, own.c.slot, *columns).cte("so_far")
    before = _before(own, metric, began)
    kept = (so_far.c[name] for name in ("variant", "slot", "until", "y", "x"))
    return (
        select(*kept, before.c.mean.label("z"))
        .outerjoin(before, before.c.unit == so_far.c.unit)
        .where(so_far.c.variant == so_far.c.last, so_far.c.x > 0)
        .cte("totals")
    )


def _by_slot(
    counts: Sequence[ColumnElement[bool]], metric: str, moments: Sequence[float]
) -> FromClause:
    """Of every unit, its values between two moments: slot 0 is before the first of them."""
    values, value, belongs = values_of(metric)
    slots = [(exposures.c.at < moment, number) for number, moment in enumerate(moments)]
    slot = case(*slots, else_=len(moments)) if slots else literal(0)
    given = (
        select(exposures.c.unit, exposures.c.variant, value.label("value"), slot.label("slot"))
        .outerjoin_from(exposures, values, belongs)
        .where(*counts)
        .subquery("given")
    )
    return (
        select(
            given.c.unit,
            given.c.slot,
            func.min(given.c.variant).label("variant"),
            func.max(given.c.variant).label("last"),
            func.coalesce(func.sum(given.c.value), 0.0).label("y"),
            cast(func.count(given.c.value), Double).label("x"),
        )
        .group_by(given.c.unit, given.c.slot)
        .cte("own")
    )


def _before(own: FromClause, metric: str, began: tuple[int, float]) -> FromClause:
    """The mean of each unit's values before the experiment began, in the order of insertion: clocks
    of several servers need not agree. Feedback goes by the clock, too: what is said of an earlier
    request once the experiment runs may be what the variant made of the user.
    """
    sequence, at = began
    values, value, belongs = values_of(metric)
    is_past = [exposures.c.sequence < sequence, value.is_not(None)]
    if values is feedback:
        is_past.append(feedback.c.at < at)
    return (
        select(exposures.c.unit, func.avg(value).label("mean"))
        .join_from(exposures, values, belongs)
        .where(exposures.c.unit.in_(select(own.c.unit)), ~exposures.c.is_forced)
        .where(*is_past)
        .group_by(exposures.c.unit)
        .cte("before")
    )
