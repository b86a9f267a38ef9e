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

MAX_CHOICES = 128
MAX_CONVERSATION_ID = 512
MAX_SAMPLES = 1000
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
    """One message of a conversation. name: a label of its author; changes nothing."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[TextPart, ...] | None = None
    name: str | None = None

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


class _Generation(_Body):
    """What chat and text completions share; ranges of sampling values are checked by the engine."""

    model: str = Field("auto", description="target", max_length=2048)
    blend: dict[str, float] | None = Field(None, description="weights by module, fixes the blend")
    routing: Annotated[TokenRouting | None, PlainValidator(_as_routing)] = Field(
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
    stop: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field((), max_length=MAX_STOPS)
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, _Bias] = Field(default_factory=dict, max_length=1024)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="a label of the caller; changes nothing")
    safety_identifier: str | None = Field(None, description="as user, its newer name")
    prompt_cache_key: str | None = Field(None, description="a hint; prefixes are reused anyway")

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
            top_logprobs=top_logprobs,
        )


class ChatRequest(_Generation):
    """`POST /v1/chat/completions`."""

    messages: tuple[Message, ...] = Field(min_length=1)
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

    def sampling(self, defaults: SamplingParams, choice: int) -> SamplingParams:
        """Parameters of one choice."""
        limit = self.max_tokens if self.max_tokens is not None else self.max_completion_tokens
        top = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling(defaults, choice=choice, max_tokens=limit, top_logprobs=top)


class CompletionRequest(_Generation):
    """`POST /v1/completions`. prompt: a text or its token ids, or a list of either."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = DEFAULT_COMPLETION_TOKENS
    logprobs: int | None = Field(None, ge=0, le=5)

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
        if isinstance(self.prompt, str):
            return [self.prompt]
        token_ids = [item for item in self.prompt if isinstance(item, int)]
        return [token_ids] if token_ids else [p for p in self.prompt if not isinstance(p, int)]

    def sampling(self, defaults: SamplingParams, choice: int) -> SamplingParams:
        """Parameters of one choice."""
        return self._sampling(
            defaults, choice=choice, max_tokens=self.max_tokens, top_logprobs=self.logprobs
        )


GenerationBody = ChatRequest | CompletionRequest

_Sample = Annotated[str, StringConstraints(min_length=1)]


class LoadModuleRequest(_Body):
    """`POST /v1/load_lora_adapter`. lora_name: a bare name goes to the first bank."""

    lora_name: str = Field("", description="name, or bank:name")
    lora_path: str = Field("", description="folder under one of the server's module roots")
    load_inplace: bool = Field(False, description="replace the module that has this name")
    description: str | None = Field(None, max_length=4096, description="what it is for")
    samples: tuple[_Sample, ...] = Field((), max_length=MAX_SAMPLES, description="its prompts")


class UnloadModuleRequest(_Body):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: str = Field("", description="name, or bank:name")


NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "parallel_tool_calls": (True, False),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "modalities": (["text"],),
    "functions": ([],),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "length_penalty": (1.0,),
    "priority": (0,),
    "chat_template_kwargs": ({},),
    "tool_calls": ([],),
    "annotations": ([],),
}
"""Parameters, of bodies and messages, that are not supported, with the values that ask for nothing
and so are accepted.
"""


_FREE = ("blend", "logit_bias", "metadata", "routing")
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
