"""Experiments among the models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...adapters.errors import MergerouteError
from ..access.callers import Caller
from ..access.permissions import may_name
from ..targets import Targets
from .enrolment import Running
from .snapshots import Snapshot


def experiment_entries(
    snapshot: Snapshot, targets: Targets, caller: Caller
) -> Iterator[dict[str, Any]]:
    """Every experiment that a key may ask for now, in the shape of /v1/models, without the fields
    all share. Its context is that of the variant with the shortest.
    """
    for running in snapshot.experiments:
        name = running.experiment.name
        if running.state != "draft" and may_name(caller, name):
            lengths = list(_lengths(running, targets))
            if lengths:
                yield {
                    "id": name,
                    "root": f"experiment at version {running.version}",
                    "parent": None,
                    "max_model_len": min(lengths),
                }


def _lengths(running: Running, targets: Targets) -> Iterator[int]:
    for variant in running.experiment.variants:
        try:
            yield targets.resolve(variant.target).hosted.engine.max_length
        except MergerouteError:  # it is gone, which the monitor sees to
            continue
