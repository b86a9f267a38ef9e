"""The parameters that chat and text completions share, other servers' among them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    StringConstraints,
    model_validator,
)

from ...adapters.errors import RequestError, RouterError
from ...routers.token_routing import TokenRouting
from ...runtime.types import MAX_STOPS, SamplingParams
from ..formats.response_format import StructuredFields
from .body import Body

MAX_CHOICES = 128
MAX_CONVERSATION_ID = 512
MAX_BLENDED = 1024


def _as_tuple(value: Any) -> Any:  # noqa: ANN401 - before validation
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _as_routing(value: Any) -> TokenRouting:  # noqa: ANN401 - before validation
    try:
        return TokenRouting.parse(value)
    except RouterError as error:
        raise RequestError(str(error), parameter="routing") from error


def _as_label_name(name: str) -> str:
    if name.startswith("header:"):
        raise RequestError(
            f"the metadata key {name!r} is not allowed: what begins with 'header:' stands for the "
            "request's headers",
            parameter="metadata",
        )
    return name


class StreamOptions(Body):
    """What a stream carries besides tokens."""

    include_usage: bool = Field(False, description="a last chunk with the usage")


class Conversation(Body):
    """A conversation as OpenAI's Responses write it."""

    id: str = Field(min_length=1, max_length=MAX_CONVERSATION_ID)


class MergedAdapters(Body):
    """LoRAX's blend. weights: one per id; none: all 1. density and majority_sign_method belong to
    strategies that are refused, and a linear merge does not look at them.
    """

    ids: tuple[str, ...] = Field(min_length=1, max_length=MAX_BLENDED)
    weights: tuple[float, ...] = ()
    merge_strategy: Literal["linear", "ties", "dare_linear", "dare_ties"] = "linear"
    density: float | None = Field(None, ge=0, le=1)
    majority_sign_method: Literal["total", "frequency"] | None = None


class LoraScale(Body):
    """One module of llama.cpp's blend. id: its number in GET /lora-adapters."""

    id: int = Field(ge=0)
    scale: float


_ConversationId = Annotated[str, StringConstraints(min_length=1, max_length=MAX_CONVERSATION_ID)]
_LabelName = Annotated[
    str, StringConstraints(min_length=1, max_length=64), AfterValidator(_as_label_name)
]

_LabelValue = Annotated[str, StringConstraints(max_length=512)]
_Bias = Annotated[float, Field(ge=-100, le=100)]


class GenerationFields(StructuredFields):
    """What chat and text completions share; ranges of sampling values are checked by the engine."""

    model: str = Field("auto", description="target", max_length=2048)
    blend: dict[str, float] | None = Field(None, description="weights by module, fixes the blend")
    routing: Annotated[
        TokenRouting | None,
        PlainValidator(_as_routing, json_schema_input_type=str | dict[str, Any]),
    ] = Field(None, description="layers weigh the bank's modules for every token, by this method")
    conversation: _ConversationId | Conversation | None = Field(
        None, description="id of the conversation, which keeps its blend"
    )
    reroute: bool = Field(False, description="the last turn alone decides, this time")
    metadata: dict[_LabelName, _LabelValue] = Field(
        default_factory=dict, max_length=16, description="labels that rules may look at"
    )
    temperature: float | None = Field(None, description="0 is greedy; default 1")
    top_p: float | None = None
    top_k: int | None = Field(None, description="0 or -1 is off")
    min_p: float | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="choices per prompt")
    seed: int | None = None
    stop: Annotated[
        tuple[str, ...], BeforeValidator(_as_tuple, json_schema_input_type=str | tuple[str, ...])
    ] = Field((), max_length=MAX_STOPS)
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, description="no end token before so many tokens")
    prompt_logprobs: int | None = Field(None, description="log-probabilities of the prompt, 0-20")
    return_token_ids: bool = Field(False, description="token_ids and prompt_token_ids beside text")
    return_tokens_as_token_ids: bool = Field(False, description="tokens as token_id:ID in logprobs")
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, _Bias] = Field(default_factory=dict, max_length=1024)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="a label of the caller; changes nothing")
    safety_identifier: str | None = Field(None, description="as user, its newer name")
    prompt_cache_key: str | None = Field(None, description="a hint; prefixes are reused anyway")

    adapter_id: str | None = Field(None, description="LoRAX, TGI: a module")
    adapter_source: Literal["local"] | None = Field(None, description="LoRAX: loaded modules only")
    merged_adapters: MergedAdapters | None = Field(None, description="LoRAX: a blend")
    adapter: str | None = Field(None, description="mistral.rs: a module")
    lora: tuple[LoraScale, ...] | None = Field(None, description="llama.cpp: a blend by numbers")

    @model_validator(mode="after")
    def _whole_answers_tell_of_prompts(self) -> GenerationFields:
        for name in ("prompt_logprobs", "return_token_ids"):
            if self.stream and getattr(self, name) not in (None, False):
                raise RequestError(
                    f"{name} is not available when stream is true: leave one of them out",
                    parameter=name,
                )
        return self

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> GenerationFields:
        if self.stream_options and not self.stream:
            raise RequestError(
                "stream_options is only allowed when stream is true", parameter="stream_options"
            )
        return self

    @property
    def conversation_id(self) -> str | None:
        """The conversation's id, however it was written."""
        given = self.conversation
        return given.id if isinstance(given, Conversation) else given

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(
        self,
        defaults: SamplingParams,
        *,
        choice: int,
        max_tokens: int | None,
        top_logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> SamplingParams:
        """Parameters of one choice; what the body leaves open comes from the defaults."""

        def given(name: str) -> Any:  # noqa: ANN401 - a number
            value = getattr(self, name)
            return getattr(defaults, name) if value is None else value

        return SamplingParams(
            max_tokens=max_tokens,
            temperature=given("temperature"),
            top_p=given("top_p"),
            top_k=0 if self.top_k == -1 else given("top_k"),
            min_p=given("min_p"),
            seed=None if self.seed is None else self.seed + choice,
            frequency_penalty=given("frequency_penalty"),
            presence_penalty=given("presence_penalty"),
            repetition_penalty=given("repetition_penalty"),
            logit_bias=self.logit_bias,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            top_logprobs=top_logprobs,
            prompt_logprobs=prompt_logprobs,
        )
