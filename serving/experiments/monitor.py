"""What happens to experiments by itself: they are paused where they do harm or cannot answer, and
bandits move their weights.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from ...adapters.errors import MergerouteError
from ..targets import Targets
from . import lifecycle
from .definition import Guardrail
from .enrolment import Running
from .judging import span_of
from .lifecycle import Author
from .live import LiveExperiments, missing
from .pruning import prune
from .statistics.bandit import thompson_weights
from .statistics.guardrail import guardrail
from .statistics.units import Sums

logger = logging.getLogger(__name__)

EVERY_S = 60.0
PATIENCE_S = 60.0
MONITOR, BANDIT = "monitor", "bandit"
"""Who made a change."""
LEAST_CHANGE = 0.02
"""Of a weight, by a bandit: a smaller one gains little, and units that move count nowhere."""


class Monitor:
    """Looks after experiments. Several servers on one database may do so at once: what one has done
    the others find done.

    targets: what can be asked for now. every_s: between two looks at guardrails and bandits.
    patience_s: how long an experiment goes on although a target of it is not on this server, and
    never was: another one may have it. For one that was here and went, it is paused at once.
    """

    def __init__(
        self,
        live: LiveExperiments,
        targets: Callable[[], Targets],
        *,
        every_s: float = EVERY_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._live = live
        self._targets = targets
        self._every_s = every_s
        self._patience_s = patience_s
        self._due: dict[str, dict[str, float]] = {}  # by experiment and target: when it may go
        self._looked = time.monotonic()
        self._told: list[str] = []

    def look(self) -> None:
        """Once a second."""
        self._tell()
        running = [each for each in self._live.snapshot.experiments if each.state == "running"]
        names = [each.experiment.name for each in running]
        self._due = {name: self._due.get(name, {}) for name in names}
        for each in running:
            self._careful(each, self._pause_broken)
        if time.monotonic() - self._looked >= self._every_s:
            self._looked = time.monotonic()
            prune(self._live.store, self._live.snapshot.experiments)
            for each in running:
                self._careful(each, self._guard)
                self._careful(each, self._move_weights)

    def _careful(self, running: Running, look: Callable[[Running], None]) -> None:
        """One that cannot be looked after is no reason to leave the others."""
        try:
            look(running)
        except (MergerouteError, ValueError) as error:
            logger.info("experiment %s: %s", running.experiment.name, error)

    def _tell(self) -> None:
        """Log what is not as it should be, once."""
        found = self._live.warnings(self._targets())
        for text in found:
            if text not in self._told:
                logger.warning("%s", text)
        self._told = found

    def _pause_broken(self, running: Running) -> None:
        now, gone = time.monotonic(), missing(running, self._targets())
        due = self._due[running.experiment.name]
        for variant in running.experiment.variants:
            if variant not in gone:
                due[variant.target] = now
            elif now >= due.setdefault(variant.target, now + self._patience_s):
                self._pause(
                    running, f"{variant.target!r}, which {variant.name} answers from, is gone"
                )
                return

    def _guard(self, running: Running) -> None:
        experiment = running.experiment
        if not experiment.guardrails:
            return
        span = span_of(*self._live.store.settled(experiment.name))
        for guard in experiment.guardrails:
            sums = self._live.store.sums(experiment.name, guard.metric, span)
            if reason := _breach(running, guard, sums):
                self._pause(running, reason)
                self._live.pauses[experiment.name] += 1
                return

    def _pause(self, running: Running, reason: str) -> None:
        name = running.experiment.name
        with self._live.changing() as experiments:
            lifecycle.pause(experiments, name, Author(MONITOR, reason))
        logger.warning("experiment %s is paused: %s", name, reason)

    def _move_weights(self, running: Running) -> None:
        experiment = running.experiment
        if experiment.bandit is None:
            return
        bandit, metric = experiment.bandit, experiment.measured[experiment.bandit.metric]
        stored, settled = self._live.store.settled(experiment.name)
        if time.time() - settled.changed_at < 60 * bandit.every_minutes:
            return
        found = self._live.store.sums(experiment.name, metric.name, span_of(stored, settled))
        sums = {name: found.get(name, Sums()) for name in experiment.weights}
        weights = thompson_weights(
            sums, kind=metric.kind, direction=metric.direction, floor=bandit.floor
        )
        now = stored.document.weights
        if weights is None or max(abs(weights[v] - now[v]) for v in now) < LEAST_CHANGE:
            return
        with self._live.changing() as experiments:
            author = Author(BANDIT, etag=stored.etag)
            lifecycle.ramp(experiments, experiment.name, author, weights=weights)


def _breach(running: Running, guard: Guardrail, sums: dict[str, Sums]) -> str | None:
    """What a guardrail objects to; None: nothing, as far as can be told."""
    experiment = running.experiment
    control = sums.get(experiment.control.name, Sums())
    limit = guard.max_increase if guard.max_increase is not None else guard.max_decrease
    assert limit is not None
    for variant in experiment.weights:
        if variant == experiment.control.name:
            continue
        found = guardrail(
            control,
            sums.get(variant, Sums()),
            kind=experiment.measured[guard.metric].kind,
            direction="down" if guard.max_increase is not None else "up",
            max_increase=limit,
            alpha=experiment.alpha,
        )
        if found.breached:
            way = "above" if guard.max_increase is not None else "below"
            return (
                f"guardrail: {guard.metric} of {variant} is at least {found.at_least:.4g} {way} "
                f"the control's, {limit:g} is allowed"
            )
    return None
