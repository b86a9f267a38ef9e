"""Prompts: conversations and texts to the token ids that the backbone, and the router, see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from ..routers.base import Turn
from .errors import ApiError
from .schemas import Message


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the engine.

    token_ids: all of it. read_turns: makes `turns`, which a prompt that is not routed never needs.
    """

    token_ids: tuple[int, ...]
    read_turns: Callable[[], tuple[Turn, ...]]

    @cached_property
    def turns(self) -> tuple[Turn, ...]:
        """What the router looks at: each user message, rendered as a conversation of its own; of
        what has no user message all, as one turn.
        """
        return self.read_turns()


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
    return Prompt(_render(tokenizer, messages), lambda: _turns(tokenizer, messages))


def text_prompt(tokenizer: Any, prompt: str | list[int]) -> Prompt:  # noqa: ANN401
    """A prompt of /v1/completions: tokenized as it stands, or token ids already."""
    if isinstance(prompt, str):
        ids = tuple(tokenizer(prompt)["input_ids"])
        return Prompt(ids, lambda: (Turn(ids, prompt),))
    return Prompt(tuple(prompt), lambda: (Turn(tuple(prompt), tokenizer.decode(prompt)),))


def user_prompt(tokenizer: Any, text: str) -> Prompt:  # noqa: ANN401
    """What a user would write, as the server sees it: a message where there is a chat template."""
    if tokenizer.chat_template:
        return chat_prompt(tokenizer, [Message(role="user", content=text)])
    return text_prompt(tokenizer, text)


def _turns(tokenizer: Any, messages: Sequence[Message]) -> tuple[Turn, ...]:  # noqa: ANN401
    said = [message for message in messages if message.role == "user"]
    if not said:
        text = "\n".join(message.text for message in messages)
        return (Turn(_render(tokenizer, messages), text),)
    return tuple(Turn(_render(tokenizer, [message]), message.text) for message in said)


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
