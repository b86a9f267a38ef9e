"""What the answers of experiments' routes hold, as the OpenAPI document describes them and clients
read them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from .definition import Experiment as Definition


class Feedback(BaseModel):
    """What was kept, and what the answer was a part of."""

    object: Literal["feedback"]
    request_id: str
    metric: str
    value: float
    experiment: str
    variant: str


class Experiment(Definition):
    """An experiment at one version. buckets: whose each of the 10,000 is, as runs of a variant, the
    first and the one after the last; layer_buckets: those of the layer that take part.
    """

    object: Literal["experiment"]
    state: Literal["draft", "running", "paused", "concluded"]
    version: int
    promoted: str | None
    buckets: list[tuple[str, int, int]] | None
    layer_buckets: list[tuple[int, int]]
    created_at: float
    changed_at: float
    changed_by: str
    reason: str


class ExperimentList(BaseModel):
    """Experiments, or versions of one."""

    object: Literal["list"]
    data: list[Experiment]


class Bounds(BaseModel):
    """An interval."""

    lower: float
    upper: float


class VariantStats(BaseModel):
    """A metric in one variant. sample_size: units of assignment; effective_units: how many of equal
    weight would say as much, of which a verdict needs 100; observations: values of theirs.
    """

    variant_name: str
    sample_size: int
    effective_units: float
    observations: int
    mean: float | None
    standard_error: float | None
    probability_best: float | None
    expected_loss: float | None


class AlwaysValidStats(BaseModel):
    """What holds however often one looks. adjusted_p_value: for all metrics and variants."""

    confidence_interval: Bounds | None
    percent_confidence_interval: Bounds | None
    p_value: float | None
    adjusted_p_value: float | None


class GuardrailStats(BaseModel):
    """at_least: how much worse it is for certain."""

    is_breached: bool
    worsening: float | None
    at_least: float | None
    p_value: float | None


class PowerStats(BaseModel):
    """What can be found by now, and how long it takes to find a change that was planned for."""

    minimum_detectable_effect: float | None
    planned_percent_change: float
    units_needed: int | None
    days_to_reach: float | None


class VariantResult(VariantStats):
    """A variant against the control. confidence_interval, p_value: for a single look.
    is_significant: by the adjusted, always-valid p-value.
    """

    absolute_change: float | None
    percent_change: float | None
    confidence_interval: Bounds | None
    percent_confidence_interval: Bounds | None
    p_value: float | None
    always_valid: AlwaysValidStats
    is_significant: bool
    variance_kept: float
    guardrail: GuardrailStats | None
    power: PowerStats | None


class MetricResults(BaseModel):
    """A metric. decides: whether the verdict goes by it."""

    name: str
    kind: Literal["binary", "continuous", "count"]
    direction: Literal["up", "down"]
    decides: bool
    control_stats: VariantStats
    variant_results: list[VariantResult]


class SampleRatioStats(BaseModel):
    """Whether the units are split as the weights say."""

    p_value: float | None
    is_mismatch: bool
    weights: dict[str, float]
    units: dict[str, int]
    units_in_several_variants: int


class ExperimentVerdict(BaseModel):
    """winner: a variant, the control among them, or None."""

    winner: str | None
    reason: str


class ShadowMean(BaseModel):
    """A mean over pairs; pairs: those that have a value."""

    pairs: int
    mean: float
    confidence_interval: Bounds | None


class ShadowAgreement(BaseModel):
    """Pairs whose two answers are the same text."""

    share: float
    confidence_interval: Bounds


class ShadowResults(BaseModel):
    """A variant's shadows of the requests that another one answered; differences are the shadow's
    less the other's. scorer_errors: pairs without a score though there is a scorer.
    """

    variant: str
    compared_with: str
    pairs: int
    units: int
    agreement: ShadowAgreement
    length_difference: ShadowMean | None
    latency_ms_difference: ShadowMean | None
    score: ShadowMean | None
    scorer_errors: int


class ExperimentResults(BaseModel):
    """What is known so far. version_from: what was given by this version and later ones counts.
    series: of effects over time, where points are asked for.
    """

    object: Literal["experiment.results"]
    experiment: str
    state: str
    version: int
    version_from: int | None
    at: float
    alpha: float
    control: str
    verdict: ExperimentVerdict
    sample_ratio: SampleRatioStats
    metrics: list[MetricResults]
    shadow: list[ShadowResults]
    warnings: list[str]
    series: list[dict[str, Any]] | None = None


class ReplayGone(BaseModel):
    """What an equal answer needs and is not as it was. now: null: there is none."""

    what: str
    name: str
    was: str
    now: str | None


class ReplayChange(BaseModel):
    """What may have changed without being needed."""

    was: str
    now: str | None


class ReplayChoice(BaseModel):
    """One choice of an answer."""

    text: str
    token_ids: list[int]
    finish_reason: str | None


class ReplayDifference(BaseModel):
    """The first choice that differs, and from which of its tokens on."""

    choice: int
    token: int


class Replay(BaseModel):
    """A request that was answered again. is_equal: null: it could not be, for what is gone.
    blends: what was decided, by prompt. seed: the one that was drawn; null: the body states it.
    """

    object: Literal["replay"]
    request_id: str
    experiment: str
    variant: str
    target: str
    answered_at: float
    is_equal: bool | None
    first_difference: ReplayDifference | None
    gone: list[ReplayGone]
    bank: ReplayChange
    engine: ReplayChange
    blends: list[dict[str, Any]]
    seed: int | None
    stored: list[ReplayChoice]
    replayed: list[ReplayChoice] | None
