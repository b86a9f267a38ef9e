"""Stored requests are kept for as long as their experiment says, and then no longer."""

from __future__ import annotations

import time
from collections.abc import Collection

from sqlalchemy import ColumnElement, and_, delete, not_, or_, select

from .definition import DEFAULT_STORE_DAYS
from .enrolment import Running
from .store import Store
from .tables import exposures, requests

_AT_ONCE = 500
"""Deleted in one transaction, which holds up the records that come meanwhile."""

_DAY_S = 86_400


def prune(store: Store, experiments: Collection[Running]) -> int:
    """Delete the stored requests that are too old; how many. Those of experiments that are gone
    are kept for as long as one is that says nothing.

    Raises:
        DatabaseDownError: it does not answer.
    """
    pruned = 0
    while True:
        with store.database.writing() as connection:
            old = select(requests.c.request_id).where(_is_old(experiments)).limit(_AT_ONCE)
            count = connection.execute(delete(requests).where(requests.c.request_id.in_(old)))
        pruned += count.rowcount
        if count.rowcount < _AT_ONCE:
            return pruned


def _is_old(experiments: Collection[Running]) -> ColumnElement[bool]:
    days = {each.experiment.name: each.experiment.store_days for each in experiments}
    own = [and_(_is_older(kept), _is_of([name])) for name, kept in days.items()]
    left = and_(_is_older(DEFAULT_STORE_DAYS), not_(_is_of(days)))
    least = min((*days.values(), DEFAULT_STORE_DAYS))  # of which there is an index
    return and_(_is_older(least), or_(*own, left))


def _is_older(days: float) -> ColumnElement[bool]:
    return requests.c.at < time.time() - days * _DAY_S


def _is_of(experiments: Collection[str]) -> ColumnElement[bool]:
    """Whether a request took part in one of these."""
    taken = select(exposures.c.request_id).where(
        exposures.c.request_id == requests.c.request_id,
        exposures.c.experiment.in_(list(experiments)),
    )
    return taken.exists()
