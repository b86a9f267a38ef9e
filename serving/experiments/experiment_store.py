"""Experiments and the default target, as a transaction sees them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile
from typing import Any, Literal

from pydantic import ValidationError
from sqlalchemy import Connection, Row, Select, func, insert, select, update

from ..errors import ApiError
from .allocation import Allocation
from .definition import Experiment
from .layers import Ranges
from .tables import experiments, promotions, versions

State = Literal["draft", "running", "paused", "concluded"]
_DELETED = "deleted"
_AT_ONCE = 10
"""Versions that are fetched together."""
_TOLD, _SHOWN = 20, 80
"""Of an error: names at most, and letters of one."""


class StaleError(ApiError):
    """Somebody else changed it in the meantime."""

    def __init__(self, name: str, *, given: str, etag: str) -> None:
        super().__init__(
            f"the experiment {name!r} is at {etag}, the change is of {given}: read it again",
            status=412,
            param="If-Match",
            code="stale",
        )


@dataclass(frozen=True)
class StoredExperiment:
    """An experiment at one version. version: grows with every change of the name, also over
    deletions. first_version: of its creation; records of earlier ones are another experiment's.
    allocation, ranges: None and empty until it is started. promoted: a variant.
    created_at, changed_at: seconds since 1970. reason: what the last change was.
    """

    name: str
    state: State
    version: int
    first_version: int
    document: Experiment
    allocation: Allocation | None
    ranges: Ranges
    promoted: str | None
    created_at: float
    changed_at: float
    changed_by: str
    reason: str

    @property
    def etag(self) -> str:
        """Of this version, with the quotes of the header."""
        return f'"{self.version}"'


@dataclass(frozen=True)
class DefaultTarget:
    """What `auto` answers from. experiment, variant: whose promotion made it so."""

    target: str
    experiment: str
    variant: str
    who: str
    at: float


class Experiments:
    """Experiments within one transaction: what is done here happens together, or not at all."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, document: Experiment, *, who: str) -> StoredExperiment:
        """A draft.

        Raises:
            ApiError: the name is taken (409).
        """
        name, now = document.name, time.time()
        if self._find(name):
            raise ApiError(
                f"there is an experiment {name!r}: delete it, or choose another name",
                status=409,
                param="name",
                code="experiment_exists",
            )
        version = self._last_version(name) + 1
        made = StoredExperiment(
            name, "draft", version, version, document, None, (), None, now, now, who, "created"
        )
        self._write(made)
        self._connection.execute(insert(experiments).values(name=name, version=version))
        return made

    def get(self, name: str) -> StoredExperiment:
        """As it is now.

        Raises:
            ApiError: there is none of this name (404).
        """
        if found := self._find(name):
            return found
        known = ", ".join(stored.name for stored in self.list()[:_TOLD]) or "none"
        raise ApiError(
            f"there is no experiment {name[:_SHOWN]!r}; there are: {known}",
            status=404,
            code="experiment_not_found",
        )

    def list(self) -> Sequence[StoredExperiment]:
        """All, by name."""
        return [_stored(row) for row in self._connection.execute(_CURRENT)]

    def replace(
        self, etag: str, changed: StoredExperiment, *, who: str, what: str
    ) -> StoredExperiment:
        """Put `changed` (made with `dataclasses.replace` from what was read) in the place of the
        version that the ETag names; version, times and author are set here.

        Raises:
            StaleError: it is not at that version any more.
            ApiError: there is none of this name (404).
        """
        now = self.get(changed.name)
        if now.etag != etag:
            raise StaleError(now.name, given=etag, etag=now.etag)
        after = replace(
            changed,
            version=now.version + 1,
            first_version=now.first_version,
            created_at=now.created_at,
            changed_at=time.time(),
            changed_by=who,
            reason=what,
        )
        self._write(after)
        self._connection.execute(
            update(experiments)
            .where(experiments.c.name == after.name)
            .values(version=after.version)
        )
        return after

    def history(self, name: str) -> Sequence[StoredExperiment]:
        """All versions since its creation, the first one first.

        Raises:
            ApiError: there is none of this name (404).
        """
        asked = _versions(self.get(name)).order_by(versions.c.version)
        return [_stored(row) for row in self._connection.execute(asked)]

    def settled(self, name: str) -> tuple[StoredExperiment, StoredExperiment]:
        """As it is now, and at the version at which its weights became what they are. Those before
        are not read: a bandit makes thousands.

        Raises:
            ApiError: there is none of this name (404).
        """
        now = self.get(name)
        asked = (
            _versions(now)
            .where(versions.c.version < now.version)
            .order_by(versions.c.version.desc())
            .execution_options(yield_per=_AT_ONCE)
        )
        with self._connection.execute(asked) as rows:
            weights = now.document.weights
            same = takewhile(lambda each: each.document.weights == weights, map(_stored, rows))
            return now, [now, *same][-1]

    def running_since(self, now: StoredExperiment, version: int) -> float:
        """When it first ran from a version on; when it became as it is now, where it never did."""
        asked = (
            _versions(now)
            .where(versions.c.version >= version, versions.c.state == "running")
            .order_by(versions.c.version)
            .with_only_columns(versions.c.changed_at)
        )
        found = self._connection.execute(asked.limit(1)).scalar()
        return now.changed_at if found is None else found

    def delete(self, name: str, etag: str, *, who: str) -> None:
        """Take it away; its versions and records stay for audits, out of the way of a new one of
        the same name.

        Raises:
            StaleError, ApiError: as `replace`.
        """
        gone = self.replace(etag, self.get(name), who=who, what="deleted")
        self._connection.execute(experiments.delete().where(experiments.c.name == name))
        self._connection.execute(
            update(versions)
            .where(versions.c.name == name, versions.c.version == gone.version)
            .values(state=_DELETED)
        )

    def default_target(self) -> DefaultTarget | None:
        """The last promotion that was not rolled back; None: there is none."""
        stack = self.promotions()
        return stack[-1] if stack else None

    def set_default(self, target: str, *, experiment: str, variant: str, who: str) -> DefaultTarget:
        """Promote a target."""
        made = DefaultTarget(target, experiment, variant, who, time.time())
        self._connection.execute(insert(promotions).values(**vars(made)))
        return made

    def rollback_default(self, *, who: str) -> DefaultTarget | None:
        """Take back the last promotion: what is the default after it; None: none is promoted.

        Raises:
            ApiError: nothing was promoted (409).
        """
        if self.default_target() is None:
            raise ApiError(
                "nothing was promoted, so there is nothing to roll back",
                status=409,
                code="nothing_promoted",
            )
        in_force = select(func.max(promotions.c.sequence)).where(_IN_FORCE).scalar_subquery()
        self._connection.execute(
            update(promotions)
            .where(promotions.c.sequence == in_force)
            .values(taken_back_by=who, taken_back_at=time.time())
        )
        return self.default_target()

    def promotions(self) -> Sequence[DefaultTarget]:
        """Those in force, the first one first: each is what a rollback of the next restores."""
        columns = [promotions.c[name] for name in DefaultTarget.__dataclass_fields__]
        asked = select(*columns).where(_IN_FORCE).order_by(promotions.c.sequence)
        return [DefaultTarget(*row) for row in self._connection.execute(asked)]

    def _find(self, name: str) -> StoredExperiment | None:
        row = self._connection.execute(_CURRENT.where(versions.c.name == name)).one_or_none()
        return None if row is None else _stored(row)

    def _last_version(self, name: str) -> int:
        asked = select(func.max(versions.c.version)).where(versions.c.name == name)
        return self._connection.execute(asked).scalar() or 0

    def _write(self, stored: StoredExperiment) -> None:
        self._connection.execute(insert(versions).values(**_row(stored)))


_CURRENT = (
    select(versions)
    .join(
        experiments,
        (experiments.c.name == versions.c.name) & (experiments.c.version == versions.c.version),
    )
    .order_by(versions.c.name)
)
_IN_FORCE = promotions.c.taken_back_at.is_(None)


def _versions(now: StoredExperiment) -> Select[Any]:
    """Since its creation: not those of one that had the name before."""
    return select(versions).where(
        versions.c.name == now.name, versions.c.version >= now.first_version
    )


def _row(stored: StoredExperiment) -> dict[str, Any]:
    allocation = stored.allocation
    return {
        **vars(stored),
        "document": stored.document.model_dump_json(),
        "allocation": None if allocation is None else json.dumps(allocation.as_lists()),
        "ranges": json.dumps(stored.ranges),
    }


def _stored(row: Row[Any]) -> StoredExperiment:
    values = dict(row._mapping)
    allocation = values["allocation"]
    return StoredExperiment(
        **{
            **values,
            "document": _document(values["document"], values["name"]),
            "allocation": allocation and Allocation.parse(json.loads(allocation)),
            "ranges": tuple((start, end) for start, end in json.loads(values["ranges"])),
        }
    )


@lru_cache(maxsize=256)  # every server reads all of them every second
def _document(text: str, name: str) -> Experiment:
    try:
        return Experiment.model_validate_json(text)
    except ValidationError as error:
        raise ApiError(
            f"the stored experiment {name!r} cannot be read: it was written by another version of "
            f"this program, or is damaged ({error.errors()[0]['msg']})",
            status=500,
            code="experiment_damaged",
        ) from error
