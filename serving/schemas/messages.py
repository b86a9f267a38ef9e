"""Messages of a conversation, and how the chat template is applied to them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ...adapters.errors import RequestError
from ..formats.tools import MAX_TOOLS, ToolCall
from .body import Body

_OURS = {"add_generation_prompt", "continue_final_message", "messages", "self", "tools"}


class TextPart(Body):
    """One part of a message; only text is supported."""

    type: Literal["text"]
    text: str


class Message(Body):
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


class TemplateFields(Body):
    """How the chat template is applied."""

    add_generation_prompt: bool | None = Field(None, description="the template opens an answer")
    continue_final_message: bool = Field(False, description="go on where the last message ends")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, max_length=64, description="more that the chat template may look at"
    )

    @model_validator(mode="after")
    def _opens_or_continues(self) -> TemplateFields:
        if self.add_generation_prompt and self.continue_final_message:
            raise RequestError(
                "an answer is opened or the final message continued, not both: leave one out",
                parameter="continue_final_message",
            )
        return self

    @model_validator(mode="after")
    def _leaves_ours_alone(self) -> TemplateFields:
        if taken := sorted(_OURS & self.chat_template_kwargs.keys()):
            raise RequestError(
                f"chat_template_kwargs may not hold {taken[0]!r}, which the server fills in: "
                "leave it out, or use the field of that name",
                parameter="chat_template_kwargs",
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
