"""Request bodies: what is accepted, and what is refused by name. Nothing is dropped silently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    model_validator,
)

from ..adapters.errors import RequestError, RouterError
from ..routers.token_routing import TokenRouting
from ..runtime.types import MAX_STOPS, MAX_TOP_LOGPROBS, SamplingParams
from .formats.response_format import StructuredFields
from .formats.tools import MAX_TOOLS, ToolCall, ToolFields

MAX_CHOICES = 128
MAX_CONVERSATION_ID = 512
MAX_SAMPLES = 1000
MAX_BLENDED = 1024
MAX_EMBEDDED = 2048
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions; chat may use the rest of the context."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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


class StreamOptions(_Body):
    """What a stream carries besides tokens."""

    include_usage: bool = Field(False, description="a last chunk with the usage")


class TextPart(_Body):
    """One part of a message; only text is supported."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One message of a conversation. name: a label of its author; changes nothing.

    tool_calls: what an assistant called. tool_call_id: what a tool answers to.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | tuple[TextPart, ...] | None = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = Field((), max_length=MAX_TOOLS)
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _calls_or_answers(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a message of role {self.role!r} has no tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id goes with a message of role 'tool', and only with one")
        return self

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role!r} needs content")
        return self

    @property
    def text(self) -> str:
        """The content as one text."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class Conversation(_Body):
    """A conversation as OpenAI's Responses write it."""

    id: str = Field(min_length=1, max_length=MAX_CONVERSATION_ID)


_ConversationId = Annotated[str, StringConstraints(min_length=1, max_length=MAX_CONVERSATION_ID)]
_LabelName = Annotated[
    str, StringConstraints(min_length=1, max_length=64), AfterValidator(_as_label_name)
]
_LabelValue = Annotated[str, StringConstraints(max_length=512)]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_AT_ONCE = Field(fail_fast=True)
_Ids = Annotated[list[int], _AT_ONCE]
_Prompts = str | _Ids | Annotated[list[str], _AT_ONCE] | Annotated[list[_Ids], _AT_ONCE]
"""A long list that is wrong is wrong at its first item: a million errors would take seconds."""


class _Templated(_Body):
    """How the chat template is applied."""

    add_generation_prompt: bool | None = Field(None, description="the template opens an answer")
    continue_final_message: bool = Field(False, description="go on where the last message ends")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, max_length=64, description="more that the chat template may look at"
    )

    @model_validator(mode="after")
    def _opens_or_continues(self) -> _Templated:
        if self.add_generation_prompt and self.continue_final_message:
            raise RequestError(
                "an answer is opened or the final message continued, not both: leave one out",
                parameter="continue_final_message",
            )
        return self

    @property
    def template_arguments(self) -> dict[str, Any]:
        """What the chat template is told beside the messages."""
        opens_answer = self.add_generation_prompt
        if opens_answer is None:
            opens_answer = not self.continue_final_message
        return {
            "add_generation_prompt": opens_answer,
            "continue_final_message": self.continue_final_message,
            **self.chat_template_kwargs,
        }


class MergedAdapters(_Body):
    """LoRAX's blend. weights: one per id; none: all 1. density and majority_sign_method belong to
    strategies that are refused, and a linear merge does not look at them.
    """

    ids: tuple[str, ...] = Field(min_length=1, max_length=MAX_BLENDED)
    weights: tuple[float, ...] = ()
    merge_strategy: Literal["linear", "ties", "dare_linear", "dare_ties"] = "linear"
    density: float | None = Field(None, ge=0, le=1)
    majority_sign_method: Literal["total", "frequency"] | None = None


class LoraScale(_Body):
    """One module of llama.cpp's blend. id: its number in GET /lora-adapters."""

    id: int = Field(ge=0)
    scale: float


class _Generation(StructuredFields):
    """What chat and text completions share; ranges of sampling values are checked by the engine."""

    model: str = Field("auto", description="target", max_length=2048)
    blend: dict[str, float] | None = Field(None, description="weights by module, fixes the blend")
    routing: Annotated[
        TokenRouting | None,
        PlainValidator(_as_routing, json_schema_input_type=str | dict[str, Any]),
    ] = Field(
        None, description="layers weigh the bank's modules for every token, by this method"
    )
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
    def _whole_answers_tell_of_prompts(self) -> _Generation:
        for name in ("prompt_logprobs", "return_token_ids"):
            if self.stream and getattr(self, name) not in (None, False):
                raise RequestError(
                    f"{name} is not available when stream is true: leave one of them out",
                    parameter=name,
                )
        return self

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> _Generation:
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


class ChatRequest(_Generation, _Templated, ToolFields):
    """`POST /v1/chat/completions`."""

    messages: tuple[Message, ...] = Field(min_length=1, fail_fast=True)
    max_tokens: int | None = Field(None, description="older name of max_completion_tokens")
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise RequestError(
                "top_logprobs is only allowed when logprobs is true", parameter="top_logprobs"
            )
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise RequestError(
                "give max_tokens or max_completion_tokens, not both", parameter="max_tokens"
            )
        return self

    @model_validator(mode="after")
    def _tools_answer_calls(self) -> ChatRequest:
        called: set[str] = set()
        for index, message in enumerate(self.messages):
            called |= {call.id for call in message.tool_calls}
            if message.tool_call_id is not None and message.tool_call_id not in called:
                raise RequestError(
                    f"tool_call_id {message.tool_call_id!r} is of no tool call before it",
                    parameter=f"messages.{index}.tool_call_id",
                )
        return self

    @property
    def template_arguments(self) -> dict[str, Any]:
        """What the chat template is told beside the messages."""
        offered = [tool.for_template for tool in self.offered]
        return super().template_arguments | ({"tools": offered} if offered else {})

    def sampling(self, defaults: SamplingParams, choice: int) -> SamplingParams:
        """Parameters of one choice."""
        limit = self.max_tokens if self.max_tokens is not None else self.max_completion_tokens
        if limit == 0:
            raise RequestError("max_tokens is 0, allowed is at least 1", parameter="max_tokens")
        top = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling(
            defaults,
            choice=choice,
            max_tokens=limit,
            top_logprobs=top,
            prompt_logprobs=self.prompt_logprobs,
        )


class CompletionRequest(_Generation):
    """`POST /v1/completions`. prompt: a text or its token ids, or a list of either."""

    prompt: _Prompts
    max_tokens: int | None = DEFAULT_COMPLETION_TOKENS
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = Field(False, description="the prompt first, with its logprobs where asked for")

    @model_validator(mode="after")
    def _has_prompts(self) -> CompletionRequest:
        count = len(self.prompts)
        if not 1 <= count * self.n <= MAX_CHOICES:
            raise RequestError(
                f"{count} prompts with n={self.n} make {count * self.n} choices, 1 to "
                f"{MAX_CHOICES} are allowed",
                parameter="prompt",
            )
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        return _one_by_one(self.prompt)

    def sampling(self, defaults: SamplingParams, choice: int) -> SamplingParams:
        """Parameters of one choice; an echo with logprobs scores the prompt, and so does one that
        generates nothing.
        """
        if self.max_tokens == 0 and not (self.echo or self.prompt_logprobs is not None):
            raise RequestError(
                "max_tokens is 0, allowed is at least 1, or 0 with echo or prompt_logprobs",
                parameter="max_tokens",
            )
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        scored = max((count for count in asked if count is not None), default=None)
        return self._sampling(
            defaults,
            choice=choice,
            max_tokens=self.max_tokens,
            top_logprobs=self.logprobs,
            prompt_logprobs=0 if scored is None and self.max_tokens == 0 else scored,
        )


def _one_by_one(given: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    token_ids = [item for item in given if isinstance(item, int)]
    return [token_ids] if token_ids else [item for item in given if not isinstance(item, int)]


GenerationBody = ChatRequest | CompletionRequest


_Sample = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


class LoadModuleRequest(_Body):
    """`POST /v1/load_lora_adapter`. lora_name: a bare name goes to the first bank."""

    lora_name: str = Field("", description="name, or bank:name")
    lora_path: str = Field("", description="folder under one of the server's module roots")
    load_inplace: bool = Field(False, description="replace the module that has this name")
    expected_generation: int | None = Field(
        None, ge=0, description="of what has the name now, 0: nothing; else 409"
    )
    base_model_name: str | None = Field(None, description="the backbone it must be loaded onto")
    pinned: bool = Field(False, description="it stays in memory")
    description: str | None = Field(None, max_length=4096, description="what it is for")
    samples: tuple[_Sample, ...] = Field((), max_length=MAX_SAMPLES, description="its prompts")


class EmbeddingRequest(_Body):
    """`POST /v1/embeddings`. input: a text or its token ids, or a list of either."""

    input: _Prompts
    model: str = Field("auto", description="the backbone, a bank or auto", max_length=2048)
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="keep so many, of length 1 again")
    user: str | None = Field(None, description="a label of the caller; changes nothing")

    @property
    def inputs(self) -> list[str | list[int]]:
        """The inputs one by one."""
        return _one_by_one(self.input)

    @model_validator(mode="after")
    def _has_inputs(self) -> EmbeddingRequest:
        if not 1 <= len(self.inputs) <= MAX_EMBEDDED:
            raise RequestError(
                f"input holds {len(self.inputs):,} inputs, 1 to {MAX_EMBEDDED:,} are allowed",
                parameter="input",
            )
        return self


class TokenizeRequest(_Templated):
    """`POST /tokenize`, in vLLM's shape: a prompt, or messages with the chat template around them.

    add_special_tokens: default true for a prompt, and false for messages, whose template adds them.
    """

    model: str = Field("auto", max_length=2048)
    prompt: str | None = None
    messages: tuple[Message, ...] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _is_one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give prompt or messages, one of them", parameter="prompt")
        if self.messages and self.add_special_tokens:
            raise RequestError(
                "the chat template adds the special tokens of messages: leave it out",
                parameter="add_special_tokens",
            )
        return self


class DetokenizeRequest(_Body):
    """`POST /detokenize`, in vLLM's shape."""

    model: str = Field("auto", max_length=2048)
    tokens: tuple[int, ...] = Field(fail_fast=True)


class UnloadModuleRequest(_Body):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: str = Field("", description="name, or bank:name")
    lora_int_id: int | None = Field(None, description="vLLM's number of it; the name alone counts")
    expected_generation: int | None = Field(None, ge=0, description="else 409")


NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "best_of": (1,),
    "suffix": ("",),
    "modalities": (["text"],),
    "functions": ([],),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "reasoning_effort": ("none",),
    "length_penalty": (1.0,),
    "priority": (0,),
    "is_3d_lora_weight": (False,),
    "annotations": ([],),
}
"""Parameters, of bodies and messages, that are not supported, with the values that ask for nothing
and so are accepted.
"""


_FREE = (
    "blend",
    "chat_template_kwargs",
    "guided_json",
    "logit_bias",
    "metadata",
    "response_format",
    "routing",
    "structured_outputs",
    "tools",
)
"""Objects whose keys are the caller's, and no parameters."""


def without_no_effect(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body without nulls and without values that ask for nothing, at every depth."""
    return {
        key: value if key in _FREE else _cleaned(value)
        for key, value in body.items()
        if value is not None and not _asks_for_nothing(key, value)
    }


def _asks_for_nothing(key: str, value: Any) -> bool:  # noqa: ANN401 - any JSON value
    return any(value == no and type(value) is type(no) for no in NO_EFFECT.get(key, ()))


def _cleaned(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, dict):
        return without_no_effect(value)
    return [_cleaned(item) for item in value] if isinstance(value, list) else value
