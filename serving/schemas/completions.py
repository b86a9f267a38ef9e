"""The two bodies that ask for an answer: a chat's completion, and a text's."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from ...adapters.errors import RequestError
from ...runtime.types import MAX_TOP_LOGPROBS, SamplingParams
from ..formats.tools import ToolFields
from .body import Prompts, one_by_one
from .generation import MAX_CHOICES, GenerationFields
from .messages import Message, TemplateFields

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions; chat may use the rest of the context."""


class ChatRequest(GenerationFields, TemplateFields, ToolFields):
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


class CompletionRequest(GenerationFields):
    """`POST /v1/completions`. prompt: a text or its token ids, or a list of either."""

    prompt: Prompts
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
        return one_by_one(self.prompt)

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


GenerationBody = ChatRequest | CompletionRequest
