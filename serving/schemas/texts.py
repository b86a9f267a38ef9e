"""Bodies about text alone: nothing is generated."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ...adapters.errors import RequestError
from .body import Body, Prompts, one_by_one
from .messages import Message, TemplateFields

MAX_EMBEDDED = 2048


class EmbeddingRequest(Body):
    """`POST /v1/embeddings`. input: a text or its token ids, or a list of either."""

    input: Prompts
    model: str = Field("auto", description="the backbone, a bank or auto", max_length=2048)
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="keep so many, of length 1 again")
    user: str | None = Field(None, description="a label of the caller; changes nothing")

    @property
    def inputs(self) -> list[str | list[int]]:
        """The inputs one by one."""
        return one_by_one(self.input)

    @model_validator(mode="after")
    def _has_inputs(self) -> EmbeddingRequest:
        if not 1 <= len(self.inputs) <= MAX_EMBEDDED:
            raise RequestError(
                f"input holds {len(self.inputs):,} inputs, 1 to {MAX_EMBEDDED:,} are allowed",
                parameter="input",
            )
        return self


class TokenizeRequest(TemplateFields):
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


class DetokenizeRequest(Body):
    """`POST /detokenize`, in vLLM's shape."""

    model: str = Field("auto", max_length=2048)
    tokens: tuple[int, ...] = Field(fail_fast=True)
