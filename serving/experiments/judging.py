"""What the database holds of an experiment, put before the statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ApiError
from .definition import Experiment, Guardrail
from .experiment_store import StoredExperiment
from .metrics import BUILT_IN
from .statistics.srm import SampleRatio, sample_ratio
from .statistics.units import Sums
from .statistics.verdict import Metric, Verdict, judge
from .store import Store
from .sums import Span, UnitCounts


@dataclass(frozen=True)
class Judged:
    """An experiment and what its data say. span: the exposures that count. since: when it began to
    run as it does in them. units: in them. ratio: of those since the weights last changed, in
    version `ratio_since`. deciding: of the metrics that the verdict goes by; watching: of those
    that are recorded anyway.
    """

    stored: StoredExperiment
    span: Span
    since: float
    units: UnitCounts
    ratio: SampleRatio
    ratio_since: int
    sums: dict[str, dict[str, Sums]]
    deciding: Verdict
    watching: Verdict | None


def judged(store: Store, name: str, *, version_from: int | None = None) -> Judged:
    """Judge an experiment by the exposures of `span_of`, or by those of the version `version_from`
    and later ones.

    Raises:
        ApiError: there is no such experiment or version, or the database does not answer.
    """
    history = store.history(name)
    stored, settled = history[-1], Span(version_from=settled_at(history))
    document = stored.document
    if version_from is not None and version_from > stored.version:
        raise ApiError(
            f"version_from is {version_from}, the experiment {name!r} is at version "
            f"{stored.version}: give that or an earlier one",
            param="version_from",
        )
    span = Span(version_from=version_from) if version_from else span_of(history)
    measured = {metric: store.sums(name, metric, span) for metric in document.measured}
    settled_units = store.unit_counts(name, settled)
    ratio = sample_ratio(settled_units.by_variant, document.weights)
    deciding = _metrics(document, decides=True)
    watching = _metrics(document, decides=False)
    return Judged(
        stored,
        span,
        _running_since(history, span),
        settled_units if span == settled else store.unit_counts(name, span),
        ratio,
        settled_at(history),
        measured,
        _verdict(document, deciding or watching, measured, ratio),
        _verdict(document, watching, measured, ratio) if deciding and watching else None,
    )


def span_of(history: Sequence[StoredExperiment]) -> Span:
    """The exposures since the weights last changed: units that a ramp moved would be missing from
    where they went, the busiest first. A bandit's weights change all the time: there all count.
    """
    stored = history[-1]
    is_bandit = stored.document.bandit is not None
    return Span(version_from=stored.first_version if is_bandit else settled_at(history))


def _running_since(history: Sequence[StoredExperiment], span: Span) -> float:
    """When the first version that counts began to run; when it was made, where none did."""
    counted = [each for each in history if each.version >= (span.version_from or 0)]
    running = [each.changed_at for each in counted if each.state == "running"]
    return running[0] if running else history[-1].changed_at


def settled_at(history: Sequence[StoredExperiment]) -> int:
    """The version at which the weights became what they are. history: not empty."""
    weights = history[-1].document.weights
    version = history[-1].version
    for stored in reversed(history):
        if stored.document.weights != weights:
            break
        version = stored.version
    return version


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
