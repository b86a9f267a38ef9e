"""The results of an experiment in words and figures, for tables of any form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from .experiments.answers import (
    Bounds,
    ExperimentResults,
    MetricResults,
    SampleRatioStats,
    ShadowMean,
    ShadowResults,
    VariantResult,
)

NONE = "-"


@dataclass(frozen=True)
class Row:
    """A metric in a variant, as text. change, interval, lift and p_value: against the control, the
    interval and the p-value safe to look at any time; NONE in the control's own row.
    """

    metric: str
    variant: str
    units: str
    mean: str
    change: str = NONE
    interval: str = NONE
    lift: str = NONE
    p_value: str = NONE
    best: str = NONE
    notes: str = ""


@dataclass(frozen=True)
class ShadowRow:
    """Shadows of a variant, as text; intervals are for one look."""

    variant: str
    compared_with: str
    pairs: str
    agreement: str
    length: str
    latency: str
    score: str


def metric_rows(results: ExperimentResults, *, decides: bool) -> Iterator[Row]:
    """Rows of the metrics that decide, or of the others; the control comes first."""
    for metric in results.metrics:
        if metric.decides is decides:
            yield from _rows(metric)


def shadow_rows(results: ExperimentResults) -> Iterator[ShadowRow]:
    """Rows of shadows, none where there are none."""
    for found in results.shadow:
        yield _shadow_row(found)


def ratio_line(ratio: SampleRatioStats) -> str:
    """How units are split, and whether that is as it should be."""
    total = sum(ratio.units.values())
    meant = {variant: 100 * weight for variant, weight in ratio.weights.items()}
    parts = ", ".join(
        f"{variant} {count:,} ({100 * count / max(1, total):.1f} % of {meant.get(variant, 0):g} %)"
        for variant, count in ratio.units.items()
    )
    if ratio.p_value is None:
        return f"{parts}: too few to tell"
    judged = "a mismatch: no verdict" if ratio.is_mismatch else "as the weights say"
    return f"{parts}: {judged} (p {p_value(ratio.p_value)})"


def when(at: float) -> str:
    """A moment, to the second, in UTC."""
    try:
        return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError, OSError):
        return NONE


def p_value(value: float | None) -> str:
    """With as many digits as matter."""
    if value is None:
        return NONE
    return "< 0.0001" if value < 0.0001 else f"{value:.2g}"


def percent(value: float | None) -> str:
    """What is in percent already, with its sign."""
    return NONE if value is None else f"{value:+.1f} %"


def share(value: float | None) -> str:
    """A share of 1."""
    return NONE if value is None else f"{100 * value:.1f} %"


def _rows(metric: MetricResults) -> Iterator[Row]:
    is_rate = metric.kind == "binary"
    name = f"{metric.name} ({'up' if metric.direction == 'up' else 'down'} is better)"
    for number, stats in enumerate((metric.control_stats, *metric.variant_results)):
        row = Row(
            metric="" if number else name,
            variant=stats.variant_name,
            units=f"{stats.sample_size:,}",
            mean=share(stats.mean) if is_rate else _plain(stats.mean),
            best=share(stats.probability_best),
        )
        yield _compared(row, stats, is_rate) if isinstance(stats, VariantResult) else row


def _compared(row: Row, found: VariantResult, is_rate: bool) -> Row:
    return Row(
        metric=row.metric,
        variant=row.variant,
        units=row.units,
        mean=row.mean,
        change=_change(found.absolute_change, is_rate),
        interval=_interval(found.always_valid.confidence_interval, is_rate),
        lift=percent(found.percent_change),
        p_value=p_value(found.always_valid.adjusted_p_value),
        best=row.best,
        notes="; ".join(_notes(found, is_rate)),
    )


def _notes(found: VariantResult, is_rate: bool) -> Iterator[str]:
    if found.is_significant:
        yield "significant"
    if found.guardrail and found.guardrail.is_breached:
        yield "guardrail broken"
    elif found.guardrail:
        yield "guardrail holds"
    power = found.power
    if power and power.minimum_detectable_effect:
        yield f"finds {_size(power.minimum_detectable_effect, is_rate)}"
    if power and power.units_needed and power.days_to_reach:
        planned, days = f"{power.planned_percent_change:g} %", f"{power.days_to_reach:,.1f} days"
        yield f"to find {planned} takes {power.units_needed:,} units, {days} more"


def _plain(value: float | None) -> str:
    return NONE if value is None else f"{value:,.4g}"


def _change(value: float | None, is_rate: bool) -> str:
    """Of rates in points of a percent."""
    if value is None:
        return NONE
    return f"{100 * value:+.1f}" if is_rate else f"{value:+,.4g}"


def _size(value: float, is_rate: bool) -> str:
    return f"{100 * value:.1f} points" if is_rate else f"{value:,.4g}"


def _interval(found: Bounds | None, is_rate: bool) -> str:
    if found is None:
        return NONE
    return f"{_change(found.lower, is_rate)} to {_change(found.upper, is_rate)}"


def _shadow_row(found: ShadowResults) -> ShadowRow:
    told = found.agreement.confidence_interval
    errors = f" ({found.scorer_errors:,} without)" if found.scorer_errors else ""
    return ShadowRow(
        variant=found.variant,
        compared_with=found.compared_with,
        pairs=f"{found.pairs:,} of {found.units:,} units",
        agreement=f"{share(found.agreement.share)} ({share(told.lower)} to {share(told.upper)})",
        length=_mean(found.length_difference),
        latency=_mean(found.latency_ms_difference),
        score=_mean(found.score) + errors,
    )


def _mean(found: ShadowMean | None) -> str:
    if found is None:
        return NONE
    told = found.confidence_interval
    around = f" ({told.lower:+,.4g} to {told.upper:+,.4g})" if told else ""
    return f"{found.mean:+,.4g}{around}"
