"""One experiment judged: every effect, whether the split is sound, and who wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .bayes import beliefs
from .effect import Effect, effect
from .guardrail import Guardrail, guardrail
from .means import mean_of
from .multiple import adjusted
from .sequential import MINIMUM_UNITS
from .srm import SampleRatio
from .units import Direction, Kind, Sums

Table = Mapping[str, Mapping[str, Sums]]


@dataclass(frozen=True)
class Metric:
    """max_increase: how much worse (absolute) a variant may make it; None: no guardrail."""

    name: str
    kind: Kind
    direction: Direction
    max_increase: float | None = None


@dataclass(frozen=True)
class Arm:
    """One metric in one variant. effect: against the control; None for the control itself.

    adjusted_p_value: always-valid, over all metrics and variants (Benjamini-Hochberg).
    """

    units: int
    effective_units: float
    observations: float
    mean: float | None
    standard_error: float | None
    probability_best: float | None
    expected_loss: float | None
    effect: Effect | None = None
    adjusted_p_value: float | None = None
    guardrail: Guardrail | None = None


@dataclass(frozen=True)
class Verdict:
    """winner: a variant, the control among them, or None. arms: metric -> variant -> arm."""

    winner: str | None
    reason: str
    sample_ratio: SampleRatio
    arms: dict[str, dict[str, Arm]]


def judge(
    metrics: Sequence[Metric],
    sums: Table,
    *,
    control: str,
    sample_ratio: SampleRatio,
    alpha: float = 0.05,
) -> Verdict:
    """Compare every variant with the control, metric by metric.

    metrics: the first decides; the others may only stand against a winner.
    sums: metric -> variant -> sums; a metric without data may be missing.
    sample_ratio: a mismatch blocks the verdict, the effects are still there to see.

    Raises:
        ValueError: no metrics.
    """
    if not metrics:
        raise ValueError("there is no metric to decide by: declare one")
    names = list(dict.fromkeys((control, *(name for each in sums.values() for name in each))))
    arms = {
        metric.name: _arms(metric, _complete(sums.get(metric.name, {}), names), control, alpha)
        for metric in metrics
    }
    arms = _with_adjusted(arms)
    winner, reason = _decide(metrics, arms, control=control, ratio=sample_ratio, alpha=alpha)
    return Verdict(winner, reason, sample_ratio, arms)


def _complete(sums: Mapping[str, Sums], names: Sequence[str]) -> dict[str, Sums]:
    return {name: sums.get(name, Sums()) for name in names}


def _arms(metric: Metric, sums: dict[str, Sums], control: str, alpha: float) -> dict[str, Arm]:
    believed = beliefs(sums, kind=metric.kind, direction=metric.direction)
    found = {}
    for name, each in sums.items():
        mean = mean_of(each, metric.kind)
        belief = believed[name]
        found[name] = Arm(
            units=each.n,
            effective_units=mean.effective_units if mean else 0.0,
            observations=each.x,
            mean=each.mean,
            standard_error=mean.variance**0.5 if mean else None,
            probability_best=belief.probability_best,
            expected_loss=belief.expected_loss,
        )
        if name != control:
            found[name] = replace(
                found[name],
                effect=effect(sums[control], each, kind=metric.kind, alpha=alpha),
                guardrail=_guard(metric, sums[control], each, alpha),
            )
    return found


def _guard(metric: Metric, control: Sums, variant: Sums, alpha: float) -> Guardrail | None:
    if metric.max_increase is None:
        return None
    return guardrail(
        control,
        variant,
        kind=metric.kind,
        direction=metric.direction,
        max_increase=metric.max_increase,
        alpha=alpha,
    )


def _with_adjusted(arms: dict[str, dict[str, Arm]]) -> dict[str, dict[str, Arm]]:
    found = adjusted(
        {
            (metric, name): arm.effect.always_valid.p_value
            for metric, each in arms.items()
            for name, arm in each.items()
            if arm.effect and arm.effect.always_valid
        }
    )
    return {
        metric: {
            name: replace(arm, adjusted_p_value=found.get((metric, name)))
            for name, arm in each.items()
        }
        for metric, each in arms.items()
    }


def _decide(
    metrics: Sequence[Metric],
    arms: dict[str, dict[str, Arm]],
    *,
    control: str,
    ratio: SampleRatio,
    alpha: float,
) -> tuple[str | None, str]:
    if ratio.is_mismatch:
        return None, f"no verdict: sample ratio mismatch (p = {ratio.p_value:.2g})"
    first = metrics[0]
    if all(arm.adjusted_p_value is None for name, arm in arms[first.name].items()):
        return None, (
            f"no verdict yet: {first.name} needs {MINIMUM_UNITS} effective units with some spread "
            "in the control and in a variant"
        )
    gains = {name: _gain(first, arm, alpha) for name, arm in arms[first.name].items()}
    better = sorted((n for n in gains if gains[n] > 0), key=lambda n: -gains[n])
    for name in better:
        if not _objections(metrics, arms, name, alpha):
            return name, _story(first, arms[first.name][name], name, control, alpha)
    if better:
        name = better[0]
        worse = ", ".join(_objections(metrics, arms, name, alpha))
        return None, f"no winner: {name} is better on {first.name} but worse on {worse}"
    others = [name for name in gains if name != control]
    if others and all(gains[name] < 0 for name in others):
        return control, f"{control} wins: every other variant is worse on {first.name}"
    return None, f"no winner yet: no difference on {first.name} is certain"


def _gain(metric: Metric, arm: Arm, alpha: float) -> float:
    """How much better than the control, for certain; 0 where that is not."""
    if arm.effect is None or arm.adjusted_p_value is None or arm.adjusted_p_value > alpha:
        return 0.0
    return (arm.effect.difference or 0.0) * (1 if metric.direction == "up" else -1)


def _objections(
    metrics: Sequence[Metric], arms: dict[str, dict[str, Arm]], name: str, alpha: float
) -> list[str]:
    """Metrics on which a variant is worse for certain, or beyond its guardrail."""
    found = []
    for metric in metrics:
        arm = arms[metric.name][name]
        if (arm.guardrail and arm.guardrail.breached) or (
            metric.max_increase is None and _gain(metric, arm, alpha) < 0
        ):
            found.append(metric.name)
    return found


def _story(metric: Metric, arm: Arm, name: str, control: str, alpha: float) -> str:
    assert arm.effect is not None
    assert arm.effect.always_valid is not None
    interval = arm.effect.always_valid.interval
    assert interval is not None
    return (
        f"{name} beats {control} on {metric.name} by {arm.effect.difference:+.4g} "
        f"({100 * (1 - alpha):g} % always-valid interval "
        f"{interval.low:+.4g} to {interval.high:+.4g})"
    )
