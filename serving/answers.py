"""What answers hold, as the OpenAPI document describes it. The answers themselves are written by
whoever gives them; the tests hold both against each other.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


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
