"""All experiments as of one moment, which requests read; and its copy on disk, for the time when
the database is down.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..targets import AUTO
from .allocation import Allocation, allocate
from .definition import Experiment
from .enrolment import Running
from .experiment_store import DefaultTarget, StoredExperiment


@dataclass(frozen=True)
class Snapshot:
    """experiments: in every state. default: what `auto` answers from; None: the server's own.
    secret: what units are hashed with.
    """

    experiments: tuple[Running, ...] = ()
    default: DefaultTarget | None = None
    secret: str = ""

    @cached_property
    def by_name(self) -> dict[str, Running]:
        """The experiments."""
        return {running.experiment.name: running for running in self.experiments}

    def target_of(self, target: str) -> str:
        """What a variant's target is now: `auto` is what was promoted, where something was."""
        return self.default.target if target == AUTO and self.default else target

    @property
    def mark(self) -> tuple[object, ...]:
        """Two snapshots with one mark are the same."""
        versions = tuple((each.experiment.name, each.version) for each in self.experiments)
        return versions, self.default, self.secret


NO_EXPERIMENTS = Snapshot()


def snapshot_of(
    stored: Sequence[StoredExperiment], default: DefaultTarget | None, secret: str
) -> Snapshot:
    """What the database holds."""
    return Snapshot(tuple(map(running_of, stored)), default, secret)


def running_of(stored: StoredExperiment) -> Running:
    """As requests meet it."""
    allocation = stored.allocation or allocate(stored.document.weights)
    return Running(
        stored.document,
        stored.version,
        allocation,
        stored.ranges,
        stored.state,
        stored.promoted,
        stored.first_version,
    )


def write_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Put it in the place of the one before; only the owner may read it, for its secret."""
    document = {
        "experiments": [_as_json(running) for running in snapshot.experiments],
        "default": asdict(snapshot.default) if snapshot.default else None,
        "secret": snapshot.secret,
    }
    new = path.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_text(json.dumps(document), encoding="utf-8")
    os.replace(new, path)


def read_snapshot(path: Path) -> Snapshot:
    """What was written last; nothing where nothing was.

    Raises:
        OSError, ValueError, KeyError, TypeError: it cannot be read, or is damaged.
    """
    if not path.exists():
        return Snapshot()
    document = json.loads(path.read_text(encoding="utf-8"))
    default = document["default"]
    return Snapshot(
        tuple(map(_from_json, document["experiments"])),
        DefaultTarget(**default) if default else None,
        document["secret"],
    )


def _as_json(running: Running) -> dict[str, Any]:
    return {
        "document": running.experiment.model_dump(mode="json"),
        "version": running.version,
        "allocation": running.allocation.as_lists(),
        "ranges": [list(one) for one in running.ranges],
        "state": running.state,
        "promoted": running.promoted,
        "first_version": running.first_version,
    }


def _from_json(document: dict[str, Any]) -> Running:
    return Running(
        Experiment.model_validate(document["document"]),
        document["version"],
        Allocation.parse(document["allocation"]),
        tuple((start, end) for start, end in document["ranges"]),
        document["state"],
        document["promoted"],
        document["first_version"],
    )
