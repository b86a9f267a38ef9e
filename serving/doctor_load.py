"""Checks that load what is served: attention, modules, routers, and what experiments name."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from ..adapters.bank import Bank
from ..adapters.errors import MergerouteError
from .experiments.checks import check_targets
from .findings import Finding
from .hosting import host_banks
from .settings import ServeSettings
from .targets import Targets


def check_load(
    banks: Sequence[Bank], settings: ServeSettings, said: str, *, starts: bool = True
) -> Iterator[Finding]:
    """Load banks, and let them go. said: of those that load. starts: see `host_banks`."""
    started = time.monotonic()
    try:
        hosted = host_banks(banks, settings.placement, starts=starts)
    except MergerouteError as error:
        yield Finding("error", "load", str(error))
        return
    for host in hosted:
        host.residency.stop()
    yield Finding("ok", "load", f"in {time.monotonic() - started:.1f} s: {said}")
    yield from _experiments(settings, Targets(hosted))


def _experiments(settings: ServeSettings, targets: Targets) -> Iterator[Finding]:
    """Of those that the settings declare; a module that comes at run time is not there yet."""
    for experiment in settings.experiments:
        try:
            check_targets(experiment, targets)
        except MergerouteError as error:
            yield Finding("warning", "experiments", f"{experiment.name}: {error}")
        else:
            yield Finding("ok", "experiments", f"{experiment.name}: all variants can answer")
