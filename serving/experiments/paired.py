"""What shadows say: two answers to the same prompt, compared pair by pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Double, FromClause, case, cast, func, select

from .statistics.comparison import Interval
from .statistics.means import Mean, mean_of
from .statistics.tails import normal_critical, student_critical
from .statistics.units import Sums
from .store import Store
from .sums import Span, counted
from .tables import exposures
from .tables import shadow_pairs as pairs


@dataclass(frozen=True)
class Paired:
    """A variant's shadows of the requests that another one answered. sums: by measure, over units:
    agrees, of 0 and 1; length, latency_ms: the shadow's less the other's; score.
    scorer_errors: pairs that could not be scored.
    """

    variant: str
    compared_with: str
    scorer_errors: int
    sums: dict[str, Sums]


MEASURES: dict[str, ColumnElement[float]] = {
    "agrees": case((pairs.c.agrees, cast(1.0, Double)), else_=cast(0.0, Double)),
    "length": cast(pairs.c.other_length - pairs.c.length, Double),
    "latency_ms": pairs.c.other_latency_ms - pairs.c.latency_ms,
    "score": pairs.c.score,
}

_GROUPS = (pairs.c.variant.label("variant"), exposures.c.variant.label("other"))
_SAME = exposures.c.request_id == pairs.c.request_id
_Where = Sequence[ColumnElement[bool]]


def paired(store: Store, experiment: str, span: Span) -> list[Paired]:
    """All pairs of an experiment, summed up by the database.

    Raises:
        DatabaseDownError: it does not answer.
    """
    with store.database.reading() as connection:
        where = [pairs.c.experiment == experiment, *counted(connection, experiment, span)]
        found = {name: _sums(connection, name, where) for name in MEASURES}
        errors = _errors(connection, where)

    def of(key: tuple[str, str]) -> Paired:
        sums = {name: each.get(key, Sums()) for name, each in found.items()}
        return Paired(*key, errors.get(key, 0), sums)

    return list(map(of, found["agrees"]))


def sections(found: list[Paired], alpha: float) -> list[dict[str, Any]]:
    """As the results tell of them."""
    return [_section(each, alpha) for each in found]


def wilson(share: float, count: float, alpha: float) -> Interval:
    """The interval of a share of so many independent observations.

    Source: Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference,
    JASA 22(158).
    """
    z = normal_critical(alpha / 2)
    weight = 1 + z * z / count
    middle = (share + z * z / (2 * count)) / weight
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / weight
    return Interval(max(0.0, middle - reach), min(1.0, middle + reach))


def _section(found: Paired, alpha: float) -> dict[str, Any]:
    agrees = found.sums["agrees"]
    share = agrees.y / agrees.x
    told = wilson(share, effective_pairs(agrees), alpha)
    return {
        "variant": found.variant,
        "compared_with": found.compared_with,
        "pairs": int(agrees.x),
        "units": agrees.n,
        "agreement": {"share": share, "confidence_interval": _interval(told)},
        "length_difference": _mean(found.sums["length"], alpha),
        "latency_ms_difference": _mean(found.sums["latency_ms"], alpha),
        "score": _mean(found.sums["score"], alpha),
        "scorer_errors": found.scorer_errors,
    }


def effective_pairs(agrees: Sums) -> float:
    """How many independent pairs would say as much of the share that agrees: pairs of one unit are
    alike. At least 1.

    Source: Kish 1965, Survey Sampling (design effect).
    """
    share, units = agrees.y / agrees.x, agrees.x * agrees.x / agrees.xx
    mean = mean_of(agrees, "continuous")
    if mean is None or mean.variance == 0:  # all alike: as many as there are units
        return max(1.0, units)
    bessel = units / (units - 1)
    return min(agrees.x, max(1.0, share * (1 - share) / mean.variance * bessel))


def _mean(sums: Sums, alpha: float) -> dict[str, Any] | None:
    """A mean over pairs, clustered by unit; None without any."""
    if sums.n == 0:
        return None
    found = mean_of(sums, "continuous")
    interval = _interval(_student(found, alpha)) if found else None
    return {"pairs": int(sums.x), "mean": sums.mean, "confidence_interval": interval}


def _student(mean: Mean, alpha: float) -> Interval:
    reach = student_critical(alpha / 2, mean.effective_units - 1) * math.sqrt(mean.variance)
    return Interval(mean.value - reach, mean.value + reach)


def _interval(found: Interval) -> dict[str, float]:
    return {"lower": found.low, "upper": found.high}


def _sums(connection: Connection, measure: str, where: _Where) -> dict[tuple[str, str], Sums]:
    """By the shadow's variant and the one that it is compared with."""
    units = _units(measure, where)
    y, x = units.c.y, units.c.x
    summed = [func.count(), *map(func.sum, (y, x, y * y, x * x, x * y))]
    asked = select(units.c.variant, units.c.other, *summed).group_by(units.c.variant, units.c.other)
    return {
        (row[0], row[1]): Sums(row[2], *map(float, row[3:])) for row in connection.execute(asked)
    }


def _units(measure: str, where: _Where) -> FromClause:
    """Of every unit: how many of its pairs have a value, and their sum."""
    value = MEASURES[measure]
    count = cast(func.count(), Double)
    return (
        select(*_GROUPS, exposures.c.unit, func.sum(value).label("y"), count.label("x"))
        .join_from(pairs, exposures, _SAME)
        .where(*where, value.is_not(None))
        .group_by(pairs.c.variant, exposures.c.variant, exposures.c.unit)
        .cte("units")
    )


def _errors(connection: Connection, where: _Where) -> dict[tuple[str, str], int]:
    asked = (
        select(*_GROUPS, func.count())
        .join_from(pairs, exposures, _SAME)
        .where(*where, pairs.c.error.is_not(None))
        .group_by(pairs.c.variant, exposures.c.variant)
    )
    return {(row[0], row[1]): row[2] for row in connection.execute(asked)}
