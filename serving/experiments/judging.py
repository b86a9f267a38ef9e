"""What the database holds of an experiment, put before the statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ApiError
from .definition import Experiment, Guardrail
from .experiment_store import StoredExperiment
from .metrics import BUILT_IN
from .record_store import AnsweredFrom
from .statistics.srm import SampleRatio, sample_ratio
from .statistics.units import Sums
from .statistics.verdict import Metric, Verdict, judge
from .store import Reading
from .sums import Span, UnitCounts


@dataclass(frozen=True)
class Judged:
    """An experiment and what its data say, all as of one moment.

    span: the exposures that count. since: when it began to run as it does in them. units: in them.
    ratio: of those since the weights last changed, in version `ratio_since`. answered_from: what
    answered them. deciding: of the metrics that the verdict goes by; watching: of those that are
    recorded anyway.
    """

    stored: StoredExperiment
    span: Span
    since: float
    units: UnitCounts
    ratio: SampleRatio
    ratio_since: int
    sums: dict[str, dict[str, Sums]]
    answered_from: Sequence[AnsweredFrom]
    deciding: Verdict
    watching: Verdict | None


def judged(reading: Reading, name: str, *, version_from: int | None = None) -> Judged:
    """Judge an experiment by the exposures of `span_of`, or by those of the version `version_from`
    and later ones.

    Raises:
        ApiError: there is no such experiment or version, or the database does not answer.
    """
    stored, settled = reading.settled(name)
    document, since_settled = stored.document, Span(version_from=settled.version)
    if version_from is not None and version_from > stored.version:
        raise ApiError(
            f"version_from is {version_from}, the experiment {name!r} is at version "
            f"{stored.version}: give that or an earlier one",
            param="version_from",
        )
    span = Span(version_from=version_from) if version_from else span_of(stored, settled)
    measured = {metric: reading.sums(name, metric, span) for metric in document.measured}
    settled_units = reading.unit_counts(name, since_settled)
    ratio = sample_ratio(settled_units.by_variant, document.weights)
    deciding = _metrics(document, decides=True)
    watching = _metrics(document, decides=False)
    return Judged(
        stored,
        span,
        reading.running_since(stored, span.version_from or 0),
        settled_units if span == since_settled else reading.unit_counts(name, span),
        ratio,
        settled.version,
        measured,
        reading.answered_from(name, span),
        _verdict(document, deciding or watching, measured, ratio),
        _verdict(document, watching, measured, ratio) if deciding and watching else None,
    )


def span_of(stored: StoredExperiment, settled: StoredExperiment) -> Span:
    """The exposures since the weights last changed: units that a ramp moved would be missing from
    where they went, the busiest first. A bandit's weights change all the time: there all count.

    settled: the version at which the weights became what they are.
    """
    is_bandit = stored.document.bandit is not None
    return Span(version_from=stored.first_version if is_bandit else settled.version)


def guard_of(document: Experiment, metric: str) -> Guardrail | None:
    """The guardrail on a metric, if any."""
    return next((guard for guard in document.guardrails if guard.metric == metric), None)


def _metrics(document: Experiment, *, decides: bool) -> list[Metric]:
    """Those that are declared or guarded decide, the first of them first; the others are looked at.
    Where nothing decides, errors do, before what is recorded else.
    """
    guarded = [guard.metric for guard in document.guardrails]
    declared = [metric.name for metric in document.metrics]
    deciding = list(dict.fromkeys((*declared, *guarded)))
    rest = [name for name in dict.fromkeys(("error", *BUILT_IN)) if name not in deciding]
    return [_metric(document, name) for name in (deciding if decides else rest)]


def _metric(document: Experiment, name: str) -> Metric:
    settings = document.measured[name]
    guard = guard_of(document, name)
    limit = None
    if guard is not None:  # the other way is the better one, which the monitor alone looks at
        limit = guard.max_increase if settings.direction == "down" else guard.max_decrease
    return Metric(name, settings.kind, settings.direction, limit)


def _verdict(
    document: Experiment,
    metrics: Sequence[Metric],
    measured: dict[str, dict[str, Sums]],
    ratio: SampleRatio,
) -> Verdict:
    """Variants without any data are there too."""
    empty = dict.fromkeys(document.weights, Sums())
    return judge(
        metrics,
        {metric.name: {**empty, **measured[metric.name]} for metric in metrics},
        control=document.control.name,
        sample_ratio=ratio,
        alpha=document.alpha,
    )
