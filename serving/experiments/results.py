"""The results of an experiment as a document: GET /v1/experiments/{name}/results."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from ...adapters.digest import short
from .definition import Experiment
from .judging import Judged, judged
from .paired import paired, sections
from .statistics.comparison import Interval
from .statistics.effect import Effect, effect
from .statistics.power import (
    Design,
    days_to_reach,
    deviation_of,
    minimum_detectable_effect,
    units_needed,
)
from .statistics.units import Sums
from .statistics.verdict import Arm, Verdict
from .store import Reading, Store

PLANNED_CHANGE = 0.05
"""Relative to the control's mean: how long it takes to find so much is told."""

_DAY_S = 86_400
_TOLD = 4
"""Of what a variant was answered from, at most."""


def results(
    store: Store, name: str, *, points: int = 0, version_from: int | None = None
) -> dict[str, Any]:
    """What is known so far. points: of the effects over time; 0: without. version_from: count what
    was given by this version and later ones; None: since the weights last changed.

    Raises:
        ApiError: there is no such experiment, or the database does not answer.
    """
    with store.reading() as reading:
        found = judged(reading, name, version_from=version_from)
        series = _series(reading, found, points) if points else None
    stored, document = found.stored, found.stored.document
    verdicts = [found.deciding, *([found.watching] if found.watching else [])]
    return {
        "object": "experiment.results",
        "experiment": name,
        "state": stored.state,
        "version": stored.version,
        "version_from": found.span.version_from,
        "at": time.time(),
        "alpha": document.alpha,
        "control": document.control.name,
        "verdict": {"winner": found.deciding.winner, "reason": found.deciding.reason},
        "sample_ratio": {
            "p_value": found.ratio.p_value,
            "is_mismatch": found.ratio.is_mismatch,
            "weights": document.weights,
            "units": {v: found.units.by_variant.get(v, 0) for v in document.weights},
            "units_in_several_variants": found.units.crossed,
        },
        "metrics": [
            _metric(found, verdict, metric) for verdict in verdicts for metric in verdict.arms
        ],
        "shadow": sections(paired(store, name, found.span), document.alpha),
        "warnings": list(_warnings(found)),
        **({} if series is None else {"series": series}),
    }


def _metric(found: Judged, verdict: Verdict, name: str) -> dict[str, Any]:
    """One metric in every variant."""
    document = found.stored.document
    settings, arms = document.measured[name], verdict.arms[name]
    control = document.control.name
    return {
        "name": name,
        "kind": settings.kind,
        "direction": settings.direction,
        "decides": verdict is found.deciding,
        "control_stats": _stats(control, arms[control]),
        "variant_results": [
            {**_stats(variant, arm), **_compared(document, arm)}
            | {"power": _power(found, name, variant)}
            for variant, arm in arms.items()
            if variant != control
        ],
    }


def _stats(variant: str, arm: Arm) -> dict[str, Any]:
    return {
        "variant_name": variant,
        "sample_size": arm.units,
        "effective_units": arm.effective_units,
        "observations": int(arm.observations),
        "mean": arm.mean,
        "standard_error": arm.standard_error,
        "probability_best": arm.probability_best,
        "expected_loss": arm.expected_loss,
    }


def _compared(document: Experiment, arm: Arm) -> dict[str, Any]:
    """A variant against the control."""
    found, adjusted = arm.effect, arm.adjusted_p_value
    assert found is not None
    always, guard = found.always_valid, arm.guardrail
    return {
        "absolute_change": found.difference,
        "percent_change": _percent(found.lift),
        "confidence_interval": _interval(found.interval),
        "percent_confidence_interval": _interval(found.lift_interval, scale=100),
        "p_value": found.p_value,
        "always_valid": {
            "confidence_interval": _interval(always.interval) if always else None,
            "percent_confidence_interval": _interval(always.lift_interval, scale=100)
            if always
            else None,
            "p_value": always.p_value if always else None,
            "adjusted_p_value": adjusted,
        },
        "is_significant": adjusted is not None and adjusted <= document.alpha,
        "variance_kept": found.variance_kept,
        "guardrail": {
            "is_breached": guard.breached,
            "worsening": guard.worsening,
            "at_least": guard.at_least,
            "p_value": guard.p_value,
        }
        if guard
        else None,
    }


def _power(found: Judged, metric: str, variant: str) -> dict[str, Any] | None:
    """What can be found by now, and how long a change of PLANNED_CHANGE takes to be found."""
    document = found.stored.document
    kind, measured = document.measured[metric].kind, found.sums[metric]
    control, other = measured.get(document.control.name, Sums()), measured.get(variant, Sums())
    deviation, so_far = deviation_of(control, kind), control.n + other.n
    mine, its = document.weights[variant], document.weights[document.control.name]
    if deviation is None or not (mine and its):
        return None
    per_unit = max(1.0, control.x / control.n)
    design = Design(deviation, per_unit, share=mine / (mine + its), alpha=document.alpha)
    needed = units_needed(design, PLANNED_CHANGE * abs(control.mean or 0.0))
    days = max((time.time() - found.since) / _DAY_S, 1e-6)
    pace = so_far / days
    return {
        "minimum_detectable_effect": minimum_detectable_effect(design, so_far),
        "planned_percent_change": 100 * PLANNED_CHANGE,
        "units_needed": needed,
        "days_to_reach": None
        if needed is None
        else days_to_reach(needed, units_so_far=so_far, units_per_day=pace),
    }


def _series(reading: Reading, found: Judged, points: int) -> list[dict[str, Any]]:
    """The effects on the metrics that decide, up to each of so many moments."""
    document = found.stored.document
    metrics = list(found.deciding.arms)
    told = reading.series(found.stored.name, metrics, points=points, span=found.span)
    return [
        {"at": at, "metrics": {name: _effects(document, name, sums[name]) for name in metrics}}
        for at, sums in dict(told).items()
    ]


def _effects(
    document: Experiment, metric: str, sums: Mapping[str, Sums]
) -> dict[str, dict[str, Any]]:
    control, kind = sums.get(document.control.name, Sums()), document.measured[metric].kind
    return {
        variant: _effect(
            effect(control, sums.get(variant, Sums()), kind=kind, alpha=document.alpha)
        )
        for variant in document.weights
        if variant != document.control.name
    }


def _effect(found: Effect) -> dict[str, Any]:
    always = found.always_valid
    return {
        "absolute_change": found.difference,
        "confidence_interval": _interval(found.interval),
        "always_valid_interval": _interval(always.interval) if always else None,
    }


def _warnings(found: Judged) -> Iterator[str]:
    stored = found.stored
    if found.ratio.is_mismatch:
        yield "the units are not split as the weights say: no verdict until it is known why"
    if found.units.crossed:
        yield (
            f"{found.units.crossed:,} units were seen in several variants, and count in none: the "
            "weights changed meanwhile, or a unit is not the same in all its requests"
        )
    yield from _changed_answerers(found)
    if stored.document.bandit:
        yield "a bandit moves the weights: intervals are for the winner's choice, not for reports"
    elif found.span.version_from not in (None, stored.first_version):
        yield (
            f"counted since version {found.span.version_from}: "
            "GET .../results?version_from=VERSION counts from another"
        )
    if (found.span.version_from or 0) < found.ratio_since:
        yield (
            f"the split of units is checked since version {found.ratio_since} only, when the "
            "weights last changed: nothing says that it was right before"
        )


def _changed_answerers(found: Judged) -> Iterator[str]:
    """Variants that were not the same thing all the time."""
    by_variant: dict[str, list[str]] = {}
    for each in found.answered_from:
        by_variant.setdefault(each.variant, []).append(f"{each.target} ({short(each.bank)})")
    for variant, told in by_variant.items():
        if len(told) > 1:
            yield (
                f"{variant} was answered from {len(told)} things, which its numbers mix: "
                f"{', '.join(told[:_TOLD])}{', ...' if len(told) > _TOLD else ''}; a promotion or "
                "rollback changed `auto`, or its bank's modules changed, or servers differ"
            )


def _interval(found: Interval | None, *, scale: float = 1) -> dict[str, float] | None:
    return {"lower": scale * found.low, "upper": scale * found.high} if found else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
