"""Where the database has the values of a metric."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Double, Table, case, cast

from .metrics import BUILT_IN
from .tables import exposures, feedback, outcomes


def values_of(metric: str) -> tuple[Table, ColumnElement[float], ColumnElement[bool]]:
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
