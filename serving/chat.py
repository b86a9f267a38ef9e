"""Prompts: conversations and texts to the token ids that the backbone, and the router, see."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from inspect import signature
from typing import Any

from jinja2 import Environment, TemplateError
from jinja2.meta import find_undeclared_variables

from ..routers.base import Turn
from .errors import ApiError
from .schemas.messages import Message

_PLAIN: Mapping[str, Any] = {"add_generation_prompt": True, "continue_final_message": False}
_GIVEN = {"messages", "raise_exception", "strftime_now"}
_GENERATION_TAG = re.compile(r"{%-?\s*(end)?generation\s*-?%}")  # known to transformers alone


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


def chat_prompt(
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped
    messages: Sequence[Message],
    arguments: Mapping[str, Any] = _PLAIN,
) -> Prompt:
    """Render a conversation with the backbone's chat template.

    arguments: what the template is told beside the messages; the router's turns go without.

    Raises:
        ApiError: the backbone has no chat template, or it refuses these messages or arguments.
    """
    if not tokenizer.chat_template:
        raise ApiError(
            "this backbone has no chat template: use /v1/completions, or add a chat_template to "
            "its tokenizer",
            param="messages",
        )
    _check_arguments(tokenizer, arguments)
    ids = _render(tokenizer, messages, arguments)
    _check_tools(tokenizer, messages, arguments, ids)
    return Prompt(ids, lambda: _turns(tokenizer, messages))


def text_prompt(tokenizer: Any, prompt: str | list[int]) -> Prompt:  # noqa: ANN401
    """A prompt of /v1/completions: tokenized as it stands, or token ids already."""
    if isinstance(prompt, str):
        ids = tuple(tokenizer(prompt, verbose=False)["input_ids"])  # the engine checks the length
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


def _check_arguments(tokenizer: Any, arguments: Mapping[str, Any]) -> None:  # noqa: ANN401
    """The caller's own arguments reach the template, which looks at them, and nothing else."""
    own = {name: value for name, value in arguments.items() if name not in {*_PLAIN, "tools"}}
    if own.get("enable_thinking") is False:
        del own["enable_thinking"]  # where a template does not think, this asks for nothing
    if not own:
        return
    ours = signature(tokenizer.apply_chat_template).parameters.keys()
    try:
        allowed = _names_in(tokenizer.get_chat_template(tools=arguments.get("tools"))) - ours
    except (TemplateError, ValueError):
        allowed = frozenset()
    if unknown := sorted(own.keys() - allowed):
        names = f"allowed are {', '.join(sorted(allowed))}" if allowed else "it looks at none"
        raise ApiError(
            f"chat_template_kwargs may not hold {unknown[0]!r}, which is not the template's "
            f"({names}): leave it out",
            param="chat_template_kwargs",
        )


@lru_cache(maxsize=64)
def _names_in(template: str) -> frozenset[str]:
    """What a chat template looks at, beside what it is always given."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])  # parses alone
    parsed = environment.parse(_GENERATION_TAG.sub("", template))
    return frozenset(find_undeclared_variables(parsed) - _GIVEN)


def _check_tools(
    tokenizer: Any,  # noqa: ANN401
    messages: Sequence[Message],
    arguments: Mapping[str, Any],
    rendered: tuple[int, ...],
) -> None:
    """A template that leaves out tools, or calls of them, would answer as if there were none."""
    remedy = "use a chat template with tools, or leave them out"
    if arguments.get("tools"):
        without = {name: value for name, value in arguments.items() if name != "tools"}
        if _render(tokenizer, messages, without) == rendered:
            raise ApiError(f"the backbone's chat template has no tools: {remedy}", param="tools")
    if any(message.tool_calls for message in messages):
        silent = [message.model_copy(update={"tool_calls": ()}) for message in messages]
        if _render(tokenizer, silent, arguments) == rendered:
            raise ApiError(
                f"the backbone's chat template has no tool_calls: {remedy}", param="messages"
            )


def _as_template_reads(message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    calls = [call.for_template for call in message.tool_calls]
    return {
        "role": role,
        "content": message.text,
        **({"tool_calls": calls} if calls else {}),
        **({"tool_call_id": message.tool_call_id} if message.tool_call_id else {}),
    }


def _render(
    tokenizer: Any,  # noqa: ANN401
    messages: Sequence[Message],
    arguments: Mapping[str, Any] = _PLAIN,
) -> tuple[int, ...]:
    conversation = [_as_template_reads(message) for message in messages]
    try:
        ids = tokenizer.apply_chat_template(
            conversation,
            tokenize=True,
            return_dict=False,
            tokenizer_kwargs={"verbose": False},  # the engine checks the length
            **arguments,
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise ApiError(
            f"the backbone's chat template refuses these messages: {error}", param="messages"
        ) from error
    return tuple(ids)
