"""Prompts: conversations and texts to the token ids that the backbone, and the router, see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jinja2 import TemplateError

from .errors import ApiError
from .schemas import Message


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the engine.

    token_ids: all of it. routed_ids (when called), routed_text: what the router looks at: of a
    conversation the last user message alone, rendered as a conversation of its own; of a text all.
    """

    token_ids: tuple[int, ...]
    routed_ids: Callable[[], tuple[int, ...]]
    routed_text: str


def chat_prompt(tokenizer: Any, messages: Sequence[Message]) -> Prompt:  # noqa: ANN401
    """Render a conversation with the backbone's chat template.

    Raises:
        ApiError: the backbone has no chat template, or it refuses these messages.
    """
    if not tokenizer.chat_template:
        raise ApiError(
            "this backbone has no chat template: use /v1/completions, or add a chat_template to "
            "its tokenizer",
            param="messages",
        )
    last_user = next((m for m in reversed(messages) if m.role == "user"), None)
    routed = [last_user] if last_user else messages
    return Prompt(
        token_ids=_render(tokenizer, messages),
        routed_ids=partial(_render, tokenizer, routed),
        routed_text=last_user.text if last_user else "",
    )


def text_prompt(tokenizer: Any, prompt: str | list[int]) -> Prompt:  # noqa: ANN401
    """A prompt of /v1/completions: tokenized as it stands, or token ids already."""
    if isinstance(prompt, str):
        ids = tuple(tokenizer(prompt)["input_ids"])
        return Prompt(ids, lambda: ids, prompt)
    return Prompt(tuple(prompt), lambda: tuple(prompt), "")


def _render(tokenizer: Any, messages: Sequence[Message]) -> tuple[int, ...]:  # noqa: ANN401
    conversation = [
        {"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in messages
    ]
    try:
        ids = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise ApiError(
            f"the backbone's chat template refuses these messages: {error}", param="messages"
        ) from error
    return tuple(ids)
