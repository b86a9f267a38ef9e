"""What goes into an engine and what comes out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from ..adapters.blend import Blend
from ..adapters.errors import RequestError
from ..routers.token_routing import TokenRouting

MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"
    TIMEOUT = "timeout"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    max_tokens: at least 1, or 0 where only the prompt is scored; None allows the rest of the
        context.
    temperature: 0 is greedy; at most 2.
    top_p: in (0, 1]. top_k: 0 is off. min_p: share of the best token's probability, in [0, 1].
    seed: the same tokens again, whatever else is in the batch; None draws a fresh one.
    frequency_penalty, presence_penalty: in [-2, 2], over the tokens generated.
    repetition_penalty: above 0, 1 is off; over prompt and generated tokens.
    logit_bias: added to the logits, by token id; finite.
    stop: texts that end the generation and are not returned, up to 16.
    stop_token_ids: tokens that end it, besides the model's own end tokens.
    ignore_eos: go on past the model's own end tokens.
    min_tokens: end tokens are not chosen before so many tokens; stop texts end it all the same.
    top_logprobs: alternatives to report per token, at most 20; None reports no log-probabilities.
    prompt_logprobs: the same for the prompt's tokens, whose cached prefix is then not reused.

    Raises:
        RequestError: a value out of range; `parameter` names it.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        least = 1 if self.prompt_logprobs is None else 0
        _check(
            "max_tokens",
            self.max_tokens,
            f"at least {least}",
            self.max_tokens is None or self.max_tokens >= least,
        )
        _check("temperature", self.temperature, "between 0 and 2", 0 <= self.temperature <= 2)
        _check("top_p", self.top_p, "above 0, at most 1", 0 < self.top_p <= 1)
        _check("top_k", self.top_k, "0 (off) to 2,147,483,647", 0 <= self.top_k < 2**31)
        _check("min_p", self.min_p, "between 0 and 1", 0 <= self.min_p <= 1)
        _check(
            "frequency_penalty",
            self.frequency_penalty,
            "between -2 and 2",
            abs(self.frequency_penalty) <= 2,
        )
        _check(
            "presence_penalty",
            self.presence_penalty,
            "between -2 and 2",
            abs(self.presence_penalty) <= 2,
        )
        _check(
            "repetition_penalty",
            self.repetition_penalty,
            "above 0 and finite",
            0 < self.repetition_penalty < math.inf,
        )
        _check(
            "logit_bias",
            dict(self.logit_bias),
            "finite numbers",
            all(map(math.isfinite, self.logit_bias.values())),
        )
        _check(
            "stop",
            self.stop,
            f"up to {MAX_STOPS} non-empty texts",
            len(self.stop) <= MAX_STOPS and all(self.stop),
        )
        _check(
            "top_logprobs",
            self.top_logprobs,
            f"between 0 and {MAX_TOP_LOGPROBS}",
            self.top_logprobs is None or 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS,
        )
        _check(
            "prompt_logprobs",
            self.prompt_logprobs,
            f"between 0 and {MAX_TOP_LOGPROBS}",
            self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MAX_TOP_LOGPROBS,
        )
        most = math.inf if self.max_tokens is None else self.max_tokens
        rule = "at least 0, at most max_tokens"
        _check("min_tokens", self.min_tokens, rule, 0 <= self.min_tokens <= most)

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is always taken."""
        return self.temperature == 0

    @property
    def adjusts_logits(self) -> bool:
        """Whether a penalty or bias changes the logits."""
        return bool(
            self.logit_bias
            or self.frequency_penalty
            or self.presence_penalty
            or self.repetition_penalty != 1
            or self.min_tokens
        )


@dataclass(frozen=True)
class TokenGate:
    """Modules that every layer weighs anew for every token, and how.

    modules: digests, at least one, each once; kept sorted, so that equal gates are equal.

    Raises:
        RequestError: there are no modules, or one is named twice.
    """

    routing: TokenRouting
    modules: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", tuple(sorted(self.modules)))
        is_set = 0 < len(self.modules) == len(set(self.modules))
        if not is_set:
            raise RequestError(
                f"routing by token is over {len(self.modules)} modules, {len(set(self.modules))} "
                "of them different: name at least one, and each once",
                parameter="routing",
            )


@dataclass(frozen=True)
class Grammar:
    """A form that the answer must have.

    text: in Lark as llguidance reads it. parameter: what it is called in errors.
    """

    text: str
    parameter: str


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt, a blend and how to sample.

    prompt_ids: token ids, at least one.
    blend: weights by module *digest*, as `load_module` returned it: content, never a name.
    gate: modules that are weighed by token, on top of the blend; a module may be in both.
    grammar: the form of the answer, which ends when it is complete and nothing can follow.
    tenant: who asks; tenants that wait get slots in turn. None: nobody in particular.
    deadline: when it ends as TIMEOUT if it has not yet, in seconds of `time.monotonic`.
    """

    prompt_ids: tuple[int, ...]
    blend: Blend = field(default_factory=Blend)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    gate: TokenGate | None = None
    grammar: Grammar | None = None
    tenant: str | None = None
    deadline: float | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-probability of a token under the unmodified logits."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class ScoredToken:
    """A prompt's token under the logits that the tokens before it give.

    rank: among all tokens, the best is 1. top_logprobs: the best tokens, best first.
    """

    logprob: TokenLogprob
    rank: int
    top_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """One step of a generation.

    token_id: the token generated; None when the event only ends the generation.
    text: what may be shown now; lags behind the token while a character or a stop text is open.
    logprob, top_logprobs: when asked for. is_end: whether it is an end token, which has no text.
    finish_reason: set on the last event and only there.
    error: why, when finish_reason is ERROR.
    """

    token_id: int | None = None
    text: str = ""
    logprob: TokenLogprob | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    is_end: bool = False


def _check(name: str, value: object, rule: str, holds: bool) -> None:
    if not holds:
        raise RequestError(f"{name} is {value!r}, allowed is {rule}", parameter=name)
