"""What answers hold, as the OpenAPI document describes it. The answers themselves are written by
whoever gives them; the tests hold both against each other.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from .experiments.definition import Experiment as Definition


class ErrorDetail(BaseModel):
    """What went wrong. type and code are fixed words; param: the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Every error's body."""

    error: ErrorDetail


class Usage(BaseModel):
    """Tokens; of details, those that do not occur here are 0."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens_details: dict[str, int]


class TopLogprob(BaseModel):
    """A token that could have come. bytes: None where it has none of its own."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token that came, and the best ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of the answer's tokens."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(BaseModel):
    """arguments: JSON."""

    name: str
    arguments: str


class CalledTool(BaseModel):
    """A call that the caller is to carry out."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[CalledTool] = []


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class _Completed(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class ChatCompletion(_Completed):
    """The answer to a chat."""

    object: Literal["chat.completion"]
    service_tier: str
    choices: list[ChatChoice]


class TextLogprobs(BaseModel):
    """One entry per token; None before the first."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(_Completed):
    """The answer to a completion."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class Route(BaseModel):
    """What would answer a request, and why."""

    object: Literal["route"]
    target: str
    bank: str
    bank_digest: str
    blend: dict[str, float]
    abstained: float
    confidence: float
    scores: dict[str, float]
    distance: float | None
    typicality: float | None
    threshold: float | None
    runner_up: str | None
    router: str
    reason: str
    basis: dict[str, Any]
    routing: dict[str, Any] | None
    milliseconds: float
    experiment: str | None
    variant: str | None


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


class Model(BaseModel):
    """A target. parent: the backbone of a module. root: what it is made of."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(BaseModel):
    """Every target that the caller may name."""

    object: Literal["list"]
    data: list[Model]


class Module(BaseModel):
    """A module and where it is. hits: requests that ran on it."""

    id: str
    object: Literal["module"]
    name: str
    bank: str
    state: str
    resident: bool
    pinned: bool
    rank: int | None
    bytes: int | None
    digest: str | None
    generation: int
    hits: int
    cold_loads: int
    last_used: float | None
    description: str
    samples: int
    path: str
    error: str | None


class ModuleList(BaseModel):
    """Every module."""

    object: Literal["list"]
    data: list[Module]


class Uploaded(BaseModel):
    """lora_path: what to load it by."""

    object: Literal["module.upload"]
    lora_path: str


class Embedding(BaseModel):
    """Of one input; base64: float32, little-endian."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """One per input, in order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokens(BaseModel):
    """A text's tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(BaseModel):
    """Tokens' text."""

    prompt: str


class Status(BaseModel):
    """All is well, or well enough to answer: warnings says what is not."""

    status: Literal["ok"]
    warnings: list[str] = []


class Version(BaseModel):
    """Of this package."""

    version: str


class LoraAdapter(BaseModel):
    """A module by its number, as llama.cpp lists them."""

    id: int
    path: str
    scale: float
